"""What new layers are made by: every kind of recipe is one file, registered by being imported here."""

from espalier.edit.recipes import copies

__all__ = ["copies"]
