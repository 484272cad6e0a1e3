"""Recipes of layers that can be inserted into a network, or put in place of others: see `Structure.insert_layer`."""

from espalier.edit.recipes.base import Recipe as Recipe
from espalier.edit.recipes.base import recipe as recipe
from espalier.edit.recipes.defaults import default_layer as default_layer
from espalier.edit.recipes.kinds import CopyOf as CopyOf
from espalier.edit.recipes.kinds import Factorised as Factorised
from espalier.edit.recipes.kinds import Folded as Folded
from espalier.edit.recipes.kinds import Identity as Identity
from espalier.edit.recipes.kinds import Redrawn as Redrawn
from espalier.edit.recipes.kinds import ResidualLayer as ResidualLayer
from espalier.edit.recipes.kinds import Skip as Skip
