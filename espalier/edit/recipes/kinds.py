"""All kinds of recipes that come with the package, registered by being imported here."""

from espalier.edit.recipes.copies import CopyOf

__all__ = ["CopyOf"]
