"""The value between two layers, where a new one is to come."""

from __future__ import annotations

from dataclasses import dataclass

from espalier.errors import PlanError
from espalier.graph.dims import axes_of, size_of
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.visits import Visit


@dataclass(frozen=True)
class Edge:
    """The first tensor among the arguments or the results of a module, in the first pass that runs it."""

    at: str
    before: bool
    prediction: TracePrediction
    visit: Visit
    value: int
    shape: tuple[int, ...]
    varying: tuple[int, ...]
    """The dimensions that have axes: where features are."""

    @property
    def call(self) -> int:
        """Number of the first call after it."""
        return self.visit.first if self.before else self.visit.last

    def __str__(self) -> str:
        return f"{'before' if self.before else 'after'} {self.at}"


def edge(topology: Topology, at: str, *, before: bool) -> Edge:
    """The edge before or after a module. Raises PlanError if it does not run, or on no tensor."""
    for prediction in topology.predictions:
        for visit in prediction.visits:
            if visit.module != at:
                continue
            leaves = visit.entries if before else visit.exits
            known = [leaf.value for leaf in leaves if leaf.value in prediction.dims]
            if not known:
                what = "gets" if before else "gives"
                raise PlanError(f"{at} {what} no tensor that an operator reads or makes, so no layer fits there.")
            dims = prediction.dims[known[0]]
            shape = tuple(size_of(dim, topology.sizes) for dim in dims)
            varying = tuple(
                position for position, dim in enumerate(dims) if any(axis in topology.axes for axis in axes_of(dim))
            )
            return Edge(at, before, prediction, visit, known[0], shape, varying)
    raise PlanError(f"{at} does not run in the forward pass, so nothing can come beside it.")


def check_features(found: Edge, features: int, kernel: tuple[int, ...] | None) -> None:
    """Raises PlanError unless a layer of so many features fits there: last for linear layers, else dimension 1."""
    shape = found.shape
    fits = (
        len(shape) == len(kernel) + 2 and shape[1] == features if kernel else len(shape) > 1 and shape[-1] == features
    )
    if not fits:
        wanted = f"[N, {features}{', L' * len(kernel)}]" if kernel else f"[..., {features}]"
        raise PlanError(f"{found}: the layer takes values of shape {wanted}, found {list(shape)}.")


__all__ = ["Edge", "check_features", "edge"]
