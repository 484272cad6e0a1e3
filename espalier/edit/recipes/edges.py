"""The value between two layers, where a new one is to come."""

from __future__ import annotations

from dataclasses import dataclass

from espalier.errors import PlanError
from espalier.graph.dims import size_of
from espalier.graph.regions import Boundaries, Refusal
from espalier.graph.silence import settled
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.visits import Visit


@dataclass(frozen=True)
class Edge:
    """The tensor that a module takes, or gives, in the first pass that runs it."""

    at: str
    before: bool
    prediction: TracePrediction
    visit: Visit
    value: int
    shape: tuple[int, ...]
    settled: tuple[str, ...]
    """Activations of which it is a fixed point in every pass, by name."""

    @property
    def call(self) -> int:
        """Number of the first call after it."""
        return self.visit.first if self.before else self.visit.last

    def __str__(self) -> str:
        return f"{'before' if self.before else 'after'} {self.at}"


def edge(topology: Topology, at: str, *, before: bool) -> Edge:
    """The edge before or after a module. Raises PlanError if it has none where a layer could come."""
    boundaries = Boundaries(topology)
    region = boundaries.region(at)
    if isinstance(region, Refusal):
        raise PlanError(f"no layer can come beside {at or 'the model itself'}: it {region.reason}.")
    refused = region.no_layer_before if before else region.no_layer_after
    if refused:
        raise PlanError(f"no layer can come {'before' if before else 'after'} {at}: it {refused}.")
    names = settled(boundaries, at, "entry" if before else "exit")
    place = region.takes[0] if before else region.exit
    for prediction in topology.predictions:
        for visit in prediction.visits:
            if visit.module == at:
                value = next(leaf.value for leaf in (visit.entries if before else visit.exits) if leaf.place == place)
                dims = prediction.dims[value]
                shape = tuple(size_of(dim, topology.sizes) for dim in dims)
                return Edge(at, before, prediction, visit, value, shape, names)
    raise PlanError(f"{at} is never run by itself.")


def check_features(found: Edge, features: int, kernel: tuple[int, ...] | None) -> None:
    """Raises PlanError unless a layer of so many features fits there: last for linear layers, else dimension 1."""
    shape = found.shape
    dtype = found.prediction.dtypes[found.value]
    if not (dtype.is_floating_point or dtype.is_complex):
        raise PlanError(f"{found}: the layer takes floating-point numbers, found {dtype}.")
    fits = (
        len(shape) == len(kernel) + 2 and shape[1] == features if kernel else len(shape) > 1 and shape[-1] == features
    )
    if not fits:
        wanted = f"[N, {features}{', L' * len(kernel)}]" if kernel else f"[..., {features}]"
        raise PlanError(f"{found}: the layer takes values of shape {wanted}, found {list(shape)}.")


__all__ = ["Edge", "check_features", "edge"]
