"""What a network costs: parameters, floating-point operations, latency; per axis and whole."""

from espalier.measure.cost import Cost, axis_cost, cost_of
from espalier.measure.latency import latency

__all__ = ["Cost", "axis_cost", "cost_of", "latency"]
