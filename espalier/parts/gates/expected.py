"""What a network with independent gates costs in expectation, in closed form.

Costs are polynomials in axis sizes (`espalier.parts.budget`). With independent gates of probabilities p_j the size n of
an axis is a sum of Bernoulli variables, and those of different axes are independent, so that the expectation of a
product is that of its factors:

    E[n]   = sum of p_j
    E[n^r] = sum over m of S(r, m) m! e_m(p)      S: Stirling numbers of the second kind, e_m: elementary symmetric
                                                  polynomials, by Newton's identities from power sums of p

This is exact for every polynomial. For products of distinct axes it is the polynomial at the expected sizes; a layer
whose inputs and outputs are one axis (a residual stream) needs E[n^2], which is larger by the sum of p_j (1 - p_j).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.topology import Topology
from espalier.parts.budget import FLOPs, Parameters, Polynomial
from espalier.parts.units.penalty import check_strength

Counted = Literal["parameters", "flops"]
FloatArray = npt.NDArray[np.float64]


def moment(probabilities: Tensor, power: int) -> Tensor:
    """E[n^power] for n the number of gates that are open; differentiable, once."""
    value, slope = _moment(probabilities.detach().double().numpy(), power)
    return _with_slope(value, probabilities, slope + np.zeros(probabilities.shape))


def _moment(p: FloatArray, power: int) -> tuple[float, FloatArray]:
    """E[n^power], and its gradient by the probabilities, which may be one number for all.

    The derivative of e_m by p_j is e_(m-1) of the others: the sum over i of (-p_j)^i e_(m-1-i).
    """
    if power == 0:
        return 1.0, np.zeros(1)
    if power == 1:
        return float(p.sum()), np.ones(1)
    sums = [float((p**i).sum()) for i in range(1, power + 1)]
    symmetric, others = [1.0], np.ones_like(p)
    value, slope = 0.0, np.zeros_like(p)
    for m in range(1, power + 1):
        symmetric.append(sum((-1) ** (i - 1) * symmetric[m - i] * sums[i - 1] for i in range(1, m + 1)) / m)
        ways = _stirling(power, m) * math.factorial(m)
        value += ways * symmetric[m]
        slope += ways * others  # e_(m-1) without p_j
        others = symmetric[m] - p * others
    return value, slope


def _with_slope(value: float, by: Tensor, slope: FloatArray) -> Tensor:
    """A number whose gradient by a vector is known."""
    row = torch.from_numpy(slope).to(by)
    return value + (by - by.detach()) @ row


def _stirling(n: int, m: int) -> int:
    """In how many ways n things fall into m groups, none of them empty."""
    if n == m:
        return 1
    return 0 if m in (0, n + 1) or m > n else m * _stirling(n - 1, m) + _stirling(n - 1, m - 1)


class Expected:
    """The expectation of a cost in the sizes of axes that all have gates.

    In closed form, with its gradient: autograd would go through a hundred tiny operations at every step.
    """

    def __init__(self, cost: Polynomial) -> None:
        self._terms = tuple((tuple(Counter(axes).items()), float(factor)) for axes, factor in cost.terms.items())
        self._powers = tuple(dict.fromkeys(one for powers, _ in self._terms for one in powers))

    def __call__(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """By the probabilities of the gates of every axis: a scalar, differentiable, once."""
        flat = torch.cat([one.flatten() for one in probabilities.values()])
        numbers, places, start = flat.detach().double().numpy(), {}, 0
        for axis, row in probabilities.items():
            places[axis] = slice(start, start := start + row.numel())
        moments = {(axis, power): _moment(numbers[places[axis]], power) for axis, power in self._powers}
        total, rates = 0.0, dict.fromkeys(self._powers, 0.0)
        for powers, factor in self._terms:
            values = [moments[one][0] for one in powers]
            total += factor * math.prod(values)
            for at, one in enumerate(powers):
                rates[one] += factor * math.prod(values[:at]) * math.prod(values[at + 1 :])
        slope = np.zeros_like(numbers)
        for (axis, power), rate in rates.items():
            slope[places[axis]] += rate * moments[axis, power][1]
        return _with_slope(total, flat, slope)


Priced = Callable[[Mapping[str, Tensor]], Tensor]
"""By the probabilities of the gates of every key: a scalar, differentiable."""


class GatePenalty(Protocol):
    """What a method with gates adds to the loss, by their probabilities."""

    def reference(self, topology: Topology) -> float:
        """What values are relative to, taken once from the network as a session finds it."""

    def priced(self, topology: Topology, keys: Collection[str], reference: float) -> Priced:
        """The penalty on the gates of these keys in a network as it is, until it is edited."""


@dataclass(frozen=True)
class ExpectedCost:
    """strength * the expected cost of the coupled network, as a part of what the whole network cost at first.

    A unit counts with all that it brings: the weights that make it and those that read it, in every layer of its axis,
    as long as the units at their other end are there.
    """

    strength: float
    of: Counted = "parameters"

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.of not in get_args(Counted):
            raise MethodError(f"of: expected 'parameters' or 'flops', found {self.of!r}.")

    def reference(self, topology: Topology) -> float:
        return float(self._cost(topology).at({one.name: topology.sizes[one.number] for one in topology.axes.values()}))

    def priced(self, topology: Topology, keys: Collection[str], reference: float) -> Priced:
        sizes = {one.name: topology.sizes[one.number] for one in topology.axes.values()}
        unknown = next((key for key in keys if key not in sizes), None)
        if unknown is not None:
            raise MethodError(f"{unknown} is no axis, whose cost ExpectedCost would know; take PerUnit or another one.")
        cost = self._cost(topology).fixed({name: size for name, size in sizes.items() if name not in keys})
        value, scale = Expected(cost), self.strength / reference
        return lambda probabilities: scale * value(probabilities)

    def _cost(self, topology: Topology) -> Polynomial:
        return (Parameters if self.of == "parameters" else FLOPs)(1).cost(topology, ())


@dataclass(frozen=True)
class PerUnit:
    """strength * the expected number of open gates, axis by axis: the paper's weighting, whatever other axes do.

    Li & Ji (2020) take, for every layer, lambda * the weights that one unit of it holds / a constant.
    """

    strengths: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Name or pattern of axes, or of what else has gates -> strength; the first that fits counts, and none is zero."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "strengths", dict(self.strengths))
        for strength in self.strengths.values():
            check_strength(strength)

    def reference(self, topology: Topology) -> float:
        return 1.0

    def priced(self, topology: Topology, keys: Collection[str], reference: float) -> Priced:
        strengths = {key: self._strength(key) for key in keys}

        def price(probabilities: Mapping[str, Tensor]) -> Tensor:
            return torch.stack([strengths[key] * one.sum() for key, one in probabilities.items()]).sum()

        return price

    def _strength(self, key: str) -> float:
        """That of the name itself, which may hold brackets, or else of the first pattern that fits."""
        if key in self.strengths:
            return self.strengths[key]
        return next((value for pattern, value in self.strengths.items() if fnmatchcase(key, pattern)), 0.0)


__all__ = ["Counted", "Expected", "ExpectedCost", "GatePenalty", "PerUnit", "Priced", "moment"]
