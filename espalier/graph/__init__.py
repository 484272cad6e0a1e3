"""Reads a network: capture, the algebra of dimensions, operator rules, topology."""
