"""Units that there are not: asked without changing anything."""
