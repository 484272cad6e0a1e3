"""What new layers are built from: every kind of recipe is one file, named in `espalier.edit.recipes.kinds`."""

from espalier.edit.recipes import kinds

__all__ = ["kinds"]
