"""Single weights: scores, densities, which ones are live."""
