"""All kinds of recipes that come with the package, registered by being imported here."""

from espalier.edit.recipes.copies import CopyOf
from espalier.edit.recipes.factorised import Factorised
from espalier.edit.recipes.folded import Folded
from espalier.edit.recipes.identity import Identity
from espalier.edit.recipes.linear import LinearMap
from espalier.edit.recipes.redrawn import Redrawn
from espalier.edit.recipes.residual import ResidualLayer
from espalier.edit.recipes.skip import Skip

__all__ = ["CopyOf", "Factorised", "Folded", "Identity", "LinearMap", "Redrawn", "ResidualLayer", "Skip"]
