"""How a layer or cell can be made to hand on its input unchanged: which of its parameters have to be zero.

A new copy of a residual block changes nothing as long as the end of its branch is zero. Which tensors that takes is
read from the operators: from the entry on it is known of every value what has to be zero for it to be zero, and what
for it to equal the entry.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from espalier.graph.bounds import activation
from espalier.graph.flow import operator_name
from espalier.graph.regions import Boundaries, Pass, Refusal, Region
from espalier.graph.topology import Topology
from espalier.graph.trace import Call, Ref
from espalier.graph.visits import Visit
from espalier.graph.zeros import gives_all, zero_given


@dataclass(frozen=True, slots=True)
class _Settled:
    """That an activation function leaves the entry as it is."""

    by: str


Needed = frozenset[str | _Settled]
"""Parameters that have to be zero, and activation functions that must not change the entry."""


@dataclass(frozen=True)
class Silence:
    """What it takes for a module to hand on its input."""

    tensors: tuple[str, ...]
    """Qualified names of parameters of the module: with these set to zero its result equals its entry, in eval and in
    train mode, whatever its other parameters are."""
    settled: tuple[str, ...] = ()
    """Activation functions at its end, which leave what it gets at its place as it is (see `settled`): a copy at
    another place hands on its input if they do so there as well."""


def silencing(topology: Topology, path: str, copied_after: str | None = None) -> Silence | Refusal:
    """Which parameters of a module to set to zero for its result to equal its entry exactly, or why there are none.

    Exactly means entry for entry, as long as what is multiplied by zero is finite.

    Args:
        topology: what is known of the network.
        path: the module.
        copied_after: ask for a copy of it that runs on the result of the module of that path; else it is asked for the
            module itself, at its place.
    """
    return silenced(Boundaries(topology), path, copied_after)


def silenced(boundaries: Boundaries, path: str, copied_after: str | None = None) -> Silence | Refusal:
    """`silencing`, with the boundaries at hand."""
    found = _silenced(boundaries, path)
    if isinstance(found, Silence) and copied_after is not None:
        known = settled(boundaries, copied_after, "exit")
        lost = next((name for name in found.settled if name not in known), None)
        if lost is not None:
            return Refusal(f"ends in {lost}, which would change what comes out of {copied_after}")
    return found


def _silenced(boundaries: Boundaries, path: str) -> Silence | Refusal:
    region = boundaries.region(path)
    if isinstance(region, Refusal):
        return region
    if region.entry is None:
        return Refusal(region.no_removal)
    needed: Needed = frozenset()
    for one in boundaries.passes:
        for visit in one.visits.get(path, ()):
            found = _Walk(one, visit, region).needed()
            if isinstance(found, Refusal):
                return found
            needed |= found
    return Silence(
        tuple(sorted(one for one in needed if isinstance(one, str))),
        tuple(sorted(one.by for one in needed if isinstance(one, _Settled))),
    )


def settled_by(topology: Topology, path: str, side: Literal["entry", "exit"]) -> str | None:
    """The activation function that would leave what goes into a module, or comes out of it, as it is.

    ``relu`` if nothing there is negative, as after a ReLU, pooled or rearranged or not; ``relu6`` or ``hardtanh`` if
    it lies between 0 and 6 or between -1 and 1 and may be negative in the latter case; None if nothing is known.
    """
    names = settled(Boundaries(topology), path, side)
    return names[0] if names else None


def settled(boundaries: Boundaries, path: str, side: Literal["entry", "exit"]) -> tuple[str, ...]:
    """All activation functions of which `settled_by` gives the first."""
    region = boundaries.region(path)
    place = None if isinstance(region, Refusal) else region.exit if side == "exit" else next(iter(region.takes), None)
    if place is None:
        return ()
    shared: list[str] | None = None
    for one in boundaries.passes:
        for visit in one.visits.get(path, ()):
            leaves, at = (visit.exits, visit.last) if side == "exit" else (visit.entries, visit.first)
            value = next(leaf.value for leaf in leaves if leaf.place == place)
            names = list(one.ranges.settled(value, at)) if value >= 0 else []
            shared = names if shared is None else [name for name in shared if name in names]
    return tuple(shared or ())


class _Walk:
    """One pass through a module, forward, with what has to be zero for each value to be zero or to equal the entry."""

    def __init__(self, one: Pass, visit: Visit, region: Region) -> None:
        self._one = one
        self._flow = one.flow
        self._visit = visit
        self._entry = next(leaf.value for leaf in visit.entries if leaf.place == region.entry)
        self._exit = next(leaf.value for leaf in visit.exits if leaf.place == region.exit)
        self._settled = tuple(one.ranges.settled(self._entry, visit.first))
        self._zero: dict[tuple[int, int], Needed] = {}
        self._equal: dict[tuple[int, int], Needed] = {}
        self._equal[self._key(self._entry, visit.first)] = frozenset()
        self._own = _own_parameters(one, visit.module)

    def needed(self) -> Needed | Refusal:
        """What has to be zero for the result to equal the entry."""
        for call in self._flow.calls[self._visit.first : self._visit.last]:
            zero, equal = self._to_be_zero(call), self._to_equal(call)
            for number, out in enumerate(call.outputs):
                if out is None:
                    continue
                key = self._key(out.index, call.index + 1)
                if zero is not None and (not number or gives_all(call)):
                    self._zero[key] = zero
                if equal is not None and not number:
                    self._equal[key] = equal
        found = self._known(self._equal, self._exit, self._visit.last)
        return self._refusal() if found is None else found

    def _key(self, value: int, before: int) -> tuple[int, int]:
        return value, self._flow.version(value, before)

    def _known(self, table: dict[tuple[int, int], Needed], value: int, before: int) -> Needed | None:
        found = table.get(self._key(value, before))
        return None if found is None or self._flow.is_stale(value, before) else found

    def _zeroed(self, value: int, before: int) -> Needed | None:
        name = self._own.get(value)
        return frozenset({name}) if name is not None else self._known(self._zero, value, before)

    def _equalled(self, value: int, before: int) -> Needed | None:
        return self._known(self._equal, value, before)

    def _to_be_zero(self, call: Call) -> Needed | None:
        return _fewest(_union([self._zeroed(value, call.index) for value in needed]) for needed in zero_given(call))

    def _to_equal(self, call: Call) -> Needed | None:
        """Views, copies and settled activations of what equals the entry, and sums of it and of zeros."""
        out, name = call.outputs[0] if call.outputs else None, operator_name(call)
        operands = [one.index for one in call.args[:2] if isinstance(one, Ref)]
        if (
            out is None
            or not operands
            or self._one.prediction.dtypes[out.index] != self._one.prediction.dtypes[self._entry]
        ):
            return None
        if name in _SAME:
            return self._equalled(operands[0], call.index)
        function = activation(call)
        if function in self._settled:
            return _union([self._equalled(operands[0], call.index), frozenset({_Settled(function)})])
        if name not in ("add", "sub") or len(operands) < 2:
            return None
        left, right = operands
        ways = [(left, right)]
        if name == "add" and call.arguments()["alpha"] == 1:
            ways.append((right, left))
        return _fewest(
            _union([self._equalled(kept, call.index), self._zeroed(other, call.index)])
            for kept, other in ways
            if self._one.shape(kept) == self._one.shape(out.index)
        )

    def _refusal(self) -> Refusal:
        """Names the last operator on the way to the exit at which it was still the entry that went in."""
        value, before = self._exit, self._visit.last
        while True:
            call = self._flow.maker(value, before)
            if call is None or call.index < self._visit.first:
                return Refusal("gives back something that does not come from its entry")
            operands = [ref.index for ref in self._flow.operands[call.index]]
            kept = [one for one in operands if self._equalled(one, call.index) is not None]
            if kept or operator_name(call) not in (*_SAME, "add", "sub", "relu", "hardtanh"):
                return Refusal(_reason(call, bool(kept)))
            value, before = operands[0], call.index


_SAME = frozenset(
    "_reshape_alias _to_copy _unsafe_view alias clone contiguous detach flatten reshape squeeze unsqueeze view".split()
)
"""Operators whose result holds the entries of the first operand in the same order."""


def _reason(call: Call, of_entry: bool) -> str:
    if of_entry and operator_name(call) in ("add", "sub"):
        return f"adds something to its entry that no parameter of its own makes zero ({call.where})"
    if of_entry:
        return f"changes its entry even where its parameters are zero ({call.where})"
    return f"adds nothing to its entry: its result is made anew ({call.where})"


def _own_parameters(one: Pass, path: str) -> dict[int, str]:
    """Value -> name of the parameters that belong to a module alone."""
    topology = one.topology
    tied = {name for alias, name in topology.aliases.items() if not alias.startswith(f"{path}.")}
    return {
        one.prediction.tensors[name]: name
        for name in one.tensors.get(path, ())
        if name in topology.parameters and name not in tied
    }


def _union(parts: Iterable[Needed | None]) -> Needed | None:
    found: Needed = frozenset()
    for part in parts:
        if part is None:
            return None
        found |= part
    return found


def _fewest(ways: Iterable[Needed | None]) -> Needed | None:
    return min((way for way in ways if way is not None), key=len, default=None)


__all__ = ["Silence", "settled", "settled_by", "silenced", "silencing"]
