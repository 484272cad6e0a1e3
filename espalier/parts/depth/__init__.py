"""Layers and cells: which may go or come, what they are worth, which do."""
