"""What a network costs: parameters, floating-point operations, latency, memory; per axis and whole."""

from espalier.measure.cost import Cost, axis_cost, cost_of
from espalier.measure.memory import peak_memory
from espalier.measure.runtimes import Compiled, Eager, OnnxRuntime, Runtime
from espalier.measure.sparse import SparseCopy, SparseWeight, sparse_copy
from espalier.measure.timing import latency

__all__ = [
    "Compiled", "Cost", "Eager", "OnnxRuntime", "Runtime", "SparseCopy", "SparseWeight", "axis_cost", "cost_of",
    "latency", "peak_memory", "sparse_copy",
]  # fmt: skip
