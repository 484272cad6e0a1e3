"""Penalties on gates of single weights, and of layers and cells: what is live, or stays, in expectation.

With independent gates the expected number of live weights is the sum of their probabilities, and the expected cost of
layers is that of each times the probability of its gate.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.dims import size_of
from espalier.graph.topology import Topology
from espalier.parts.gates.expected import Counted, Priced
from espalier.parts.units.penalty import check_strength


@dataclass(frozen=True)
class ExpectedWeights:
    """strength * the expected number of live weights, as a part of all parameters that there were at first."""

    strength: float

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def reference(self, topology: Topology) -> float:
        return float(sum(math.prod(topology.shape(name)) for name in topology.parameters))

    def priced(self, topology: Topology, keys: Collection[str], reference: float) -> Priced:
        unknown = next((key for key in keys if key not in topology.tensors), None)
        if unknown is not None:
            raise MethodError(f"ExpectedWeights is for gates on single weights; {unknown} are none.")

        def price(probabilities: Mapping[str, Tensor]) -> Tensor:
            return self.strength / reference * torch.stack([one.sum() for one in probabilities.values()]).sum()

        return price


@dataclass(frozen=True)
class ExpectedLayers:
    """strength * the expected cost of the layers and cells with gates, as a part of the whole network's at first."""

    strength: float
    of: Counted = "parameters"

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.of not in get_args(Counted):
            raise MethodError(f"of: expected 'parameters' or 'flops', found {self.of!r}.")

    def reference(self, topology: Topology) -> float:
        return float(self._cost(topology, ""))

    def priced(self, topology: Topology, keys: Collection[str], reference: float) -> Priced:
        costs = {key: self._cost(topology, f"{key}.") for key in keys}

        def price(probabilities: Mapping[str, Tensor]) -> Tensor:
            parts = [costs[key] * one.sum() for key, one in probabilities.items()]
            return self.strength / reference * torch.stack(parts).sum()

        return price

    def _cost(self, topology: Topology, inside: str) -> int:
        """What everything within a module costs, given the beginning of the names in it."""
        if self.of == "parameters":
            return sum(math.prod(topology.shape(name)) for name in topology.parameters if name.startswith(inside))
        prediction = topology.predictions[0]
        return sum(
            factor * math.prod(size_of(dim, topology.sizes) for dim in dims)
            for call, factor, dims in prediction.costs
            if any(f"{path}.".startswith(inside) for path in prediction.calls[call].modules) or not inside
        )


__all__ = ["ExpectedLayers", "ExpectedWeights"]
