"""Stochastic gates: numbers that multiply units, weights or layers, and are trained with them."""
