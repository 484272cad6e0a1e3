"""The methods that prune a network, as ``esp.prune.Name(...)``."""

from espalier.methods.magnitude import magnitude as Magnitude
from espalier.methods.random import random_pruning as Random

__all__ = ["Magnitude", "Random"]
