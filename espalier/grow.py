"""The methods that grow a network, as ``esp.grow.Name(...)``."""

from espalier.methods.random import random_growing as Random

__all__ = ["Random"]
