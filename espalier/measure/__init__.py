"""What a network costs: parameters, floating-point operations, latency; per axis and whole."""

from espalier.measure.cost import Cost, axis_cost, cost_of
from espalier.measure.latency import latency
from espalier.measure.sparse import SparseCopy, SparseWeight, sparse_copy

__all__ = ["Cost", "SparseCopy", "SparseWeight", "axis_cost", "cost_of", "latency", "sparse_copy"]
