"""Growing and pruning while a network trains."""
