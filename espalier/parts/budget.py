"""Budgets: what a network may cost, as a polynomial in the sizes of the axes that a method may change.

Every cost of Espalier is such a polynomial: parameters and FLOPs are sums of products of axis sizes, and the number of
units is a sum of sizes. So one mechanism serves all targets, and what a unit costs is known for any sizes without
running the network.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, get_args

from espalier.errors import MethodError
from espalier.graph.dims import Concat, Dim, Fixed, Leaf, Product
from espalier.graph.topology import Topology
from espalier.measure.runtimes import Measure

Reference = Literal["initial", "largest"]
Terms = Mapping[tuple[str, ...], int]


@dataclass(frozen=True)
class Polynomial:
    """A cost by the sizes of named axes: coefficients of products of sizes."""

    terms: Terms

    @cached_property
    def _of_axis(self) -> Mapping[str, tuple[tuple[tuple[str, ...], int], ...]]:
        found: dict[str, list[tuple[tuple[str, ...], int]]] = defaultdict(list)
        for axes, factor in self.terms.items():
            for axis in dict.fromkeys(axes):
                found[axis].append((axes, factor))
        return {axis: tuple(terms) for axis, terms in found.items()}

    def at(self, sizes: Mapping[str, int]) -> int:
        """The cost at these sizes."""
        return sum(factor * math.prod([sizes[axis] for axis in axes]) for axes, factor in self.terms.items())

    def step(self, axis: str, sizes: Mapping[str, int], by: int) -> int:
        """How much the cost changes if `by` units more (fewer, if negative) are in one axis."""
        changed = 0
        for axes, factor in self._of_axis.get(axis, ()):
            before = after = factor
            for other in axes:
                before *= sizes[other]
                after *= sizes[other] + by if other == axis else sizes[other]
            changed += after - before
        return changed

    def fixed(self, sizes: Mapping[str, int]) -> Polynomial:
        """The cost by the sizes of the other axes, with these ones put in."""
        total: dict[tuple[str, ...], int] = defaultdict(int)
        for axes, factor in self.terms.items():
            known = math.prod([sizes[axis] for axis in axes if axis in sizes])
            total[tuple(axis for axis in axes if axis not in sizes)] += factor * known
        return Polynomial(dict(total))

    def merged(self, names: Mapping[str, str]) -> Polynomial:
        """The cost where every axis has the size of the one that `names` gives for it; the others keep their own."""
        total: dict[tuple[str, ...], int] = defaultdict(int)
        for axes, factor in self.terms.items():
            total[tuple(sorted(names.get(axis, axis) for axis in axes))] += factor
        return Polynomial(dict(total))

    def neighbours(self, axis: str) -> frozenset[str]:
        """The axes whose units cost something else once the size of `axis` has changed, itself included."""
        return frozenset(other for axes, _ in self._of_axis.get(axis, ()) for other in axes)


@dataclass(frozen=True)
class Budget(ABC):
    """What the network may cost: an absolute number, or a fraction of what it cost before."""

    value: int | float
    of: Reference | None = None
    """``initial``: a fraction of the network as it was attached; ``largest``: of the largest that it has been since."""
    whole: ClassVar[bool] = True
    """Whether absolute numbers are whole ones."""

    def __post_init__(self) -> None:
        name, value = type(self).__name__, self.value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise MethodError(f"{name}: expected a number above 0, found {value!r}.")
        if self.of is None and self.whole and not isinstance(value, int):
            raise MethodError(
                f"{name}({value!r}): expected a whole number; for a fraction write {name}({value!r}, of='initial')."
            )
        if self.of is not None and self.of not in get_args(Reference):
            raise MethodError(f"{name}: expected of='initial', of='largest' or of=None, found of={self.of!r}.")

    @abstractmethod
    def cost(self, topology: Topology, axes: Iterable[str]) -> Polynomial:
        """The cost as a polynomial in the sizes of axes; `axes` are those that the method may change."""

    def limit(self, initial: int, largest: int) -> int:
        """The cost that is allowed, where the network cost `initial` at first and `largest` at most."""
        if self.of is None:
            return int(self.value)
        # a hair more, so that 0.29 of 100 is 29
        return math.floor(self.value * {"initial": initial, "largest": largest}[self.of] * (1 + 1e-12))


@dataclass(frozen=True)
class Parameters(Budget):
    """A number of parameters, trainable and frozen; tied ones count once, buffers not at all."""

    def cost(self, topology: Topology, axes: Iterable[str]) -> Polynomial:
        volumes = ((1, topology.tensors[name]) for name in topology.parameters)
        return volumes_of(topology, volumes)


@dataclass(frozen=True)
class FLOPs(Budget):
    """Floating-point operations of one forward pass on the example inputs (their whole batch), two per multiply-add."""

    def cost(self, topology: Topology, axes: Iterable[str]) -> Polynomial:
        volumes = ((factor, dims) for _, factor, dims in topology.predictions[0].costs)
        return volumes_of(topology, volumes)


@dataclass(frozen=True)
class Units(Budget):
    """A number of units, summed over the axes that the method may change: a width."""

    def cost(self, topology: Topology, axes: Iterable[str]) -> Polynomial:
        return Polynomial({(axis,): 1 for axis in axes})


@dataclass(frozen=True)
class Sparsity(Budget):
    """The fraction of single weights that masks hold at zero, of all in the parameters that the method may change.

    For methods of the level ``weights``. It counts what there is when it is asked: weights that came since are counted.
    """

    whole: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)) or not 0 <= self.value < 1:
            raise MethodError(f"Sparsity: expected a fraction from 0 to less than 1, found {self.value!r}.")
        if self.of is not None:
            raise MethodError("Sparsity is a fraction of the weights that there are; it takes no of=.")

    def cost(self, topology: Topology, axes: Iterable[str]) -> Polynomial:
        return Polynomial({(name,): 1 for name in axes})

    def limit(self, initial: int, largest: int) -> int:
        """Live weights, of `initial` in all."""
        return round((1 - self.value) * initial)


@dataclass(frozen=True)
class Pace:
    """How fast a network was when it was last measured."""

    initial: float
    """Seconds that it took as it was attached."""
    seconds: float
    """Seconds that it takes now."""
    flops: int
    """What it computes in that time."""


@dataclass(frozen=True)
class Latency(Budget):
    """Seconds of one eval-mode forward pass on the example inputs, measured; or milliseconds, as ``Latency(ms=12)``.

    Time is no polynomial in axis sizes. So methods count in FLOPs, and how many of these fit is taken from a
    measurement at every event, as if time were in proportion to them. What follows is measured again: growth beyond
    the budget is undone and tried with less, and the last pruning goes on until the budget is met. It is kept as far
    as times can be measured, and a run with it does not repeat to the same bits, since times do not.
    """

    value: int | float = 0
    _: KW_ONLY
    ms: InitVar[int | float | None] = None
    measure: Measure | None = field(default=None, repr=False, compare=False)
    """What measures: network and example inputs -> seconds; such as `espalier.measure.Compiled()`. None: eager PyTorch
    on the machine that trains."""
    whole: ClassVar[bool] = False

    def __post_init__(self, ms: int | float | None = None) -> None:  # noqa: RUF033 - as its base takes no argument
        if ms is not None:
            number = not isinstance(ms, bool) and isinstance(ms, (int, float))
            if self.value != 0 or self.of is not None or not number:
                raise MethodError("Latency: give either seconds, or a fraction and of='initial', or a number ms=.")
            object.__setattr__(self, "value", ms / 1000)
        if self.of == "largest":
            raise MethodError("Latency: the time of the largest network is not known later; give of='initial' or None.")
        if self.measure is not None and not callable(self.measure):
            raise MethodError(
                f"Latency: measure= is a function of a network and example inputs that returns seconds, found "
                f"{self.measure!r}."
            )
        super().__post_init__()

    def cost(self, topology: Topology, axes: Iterable[str]) -> Polynomial:
        return FLOPs(1).cost(topology, axes)

    def limit(self, initial: int, largest: int) -> int:
        """Unknown without a measurement. Raises MethodError."""
        raise MethodError(f"{self!r} is kept by methods in a session, which measures; give FLOPs or Parameters here.")

    def limit_at(self, pace: Pace) -> int:
        """The FLOPs that fit into the time that is allowed, as fast as the network is now."""
        return math.floor(pace.flops * self.seconds(pace) / pace.seconds * (1 + 1e-12))

    def seconds(self, pace: Pace) -> float:
        """The time that is allowed."""
        return self.value if self.of is None else self.value * pace.initial


@dataclass(frozen=True)
class Memory(Budget):
    """Bytes that one eval-mode forward pass on the example inputs holds at most (`espalier.measure.peak_memory`).

    Parameters, buffers and the results that are alive at once. What is alive when depends on the sizes, so that this is
    no polynomial in them: it is a target of `espalier.shrink` and not of methods.
    """

    def cost(self, topology: Topology, axes: Iterable[str]) -> Polynomial:
        return FLOPs(1).cost(topology, axes)

    def limit(self, initial: int, largest: int) -> int:
        """Unknown without running the network. Raises MethodError."""
        raise MethodError(f"{self!r} is a target of espalier.shrink; give FLOPs or Parameters to methods and plans.")


def volumes_of(topology: Topology, volumes: Iterable[tuple[int, tuple[Dim, ...]]]) -> Polynomial:
    names = topology.names()
    total: dict[tuple[str, ...], int] = defaultdict(int)
    for factor, dims in volumes:
        for product, coefficient in _product([terms_of(dim, names, topology.sizes) for dim in dims]).items():
            total[product] += factor * coefficient
    return Polynomial(dict(total))


def terms_of(dim: Dim, names: Mapping[int, str], sizes: Mapping[int, int]) -> Terms:
    """The size of a dimension as a polynomial in the sizes of the named axes; the others count as they are."""
    match dim:
        case Fixed(size):
            return {(): size}
        case Leaf(axis):
            return {(names[axis],): 1} if axis in names else {(): sizes[axis]}
        case Product(factors):
            return _product([terms_of(factor, names, sizes) for factor in factors])
        case Concat(pieces):
            total: dict[tuple[str, ...], int] = defaultdict(int)
            for piece in pieces:
                for product, coefficient in terms_of(piece, names, sizes).items():
                    total[product] += coefficient
            return total


def _product(factors: Iterable[Terms]) -> Terms:
    result: dict[tuple[str, ...], int] = {(): 1}
    for terms in factors:
        longer: dict[tuple[str, ...], int] = defaultdict(int)
        for left, one in result.items():
            for right, other in terms.items():
                longer[tuple(sorted(left + right))] += one * other
        result = longer
    return result


__all__ = [
    "Budget",
    "FLOPs",
    "Latency",
    "Memory",
    "Pace",
    "Parameters",
    "Polynomial",
    "Reference",
    "Sparsity",
    "Units",
    "terms_of",
]
