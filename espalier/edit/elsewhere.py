"""Compares a network before and after layers came or went: everywhere else it has to run as it did.

The operators outside of what changed must be the same, of the same sizes and numbers, and must be wired alike, where
the result of a removed module stands for what went into it, and that of an inserted one likewise. Operators around it
that only make its further arguments, in a loop over a list for one, come and go with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from espalier.graph.dims import size_of
from espalier.graph.flow import operator_name
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.trace import Call, Ref
from espalier.graph.visits import Leaf, Place, Visit

Token = Hashable
_ITSELF = "itself"
"""Marks a boundary value that stands for nothing else."""


@dataclass(frozen=True)
class Changed:
    """The modules in which a network differs, by path; removed and replaced ones before, new ones after."""

    removed: Mapping[str, tuple[Place, Place]] = field(default_factory=dict)
    """What was there before and is not: where among its arguments is what went in, among its results what came out."""
    zero: frozenset[str] = frozenset()
    """Those of them that leave zero."""
    left: Mapping[str, Place | None] = field(default_factory=dict)
    """What stands in the place of removed modules, and where among its arguments is what it gives back; None: zero."""
    inserted: Mapping[str, Place] = field(default_factory=dict)
    """New modules that run between others, and where among their arguments is what they run on."""
    replaced: Mapping[str, str] = field(default_factory=dict)
    """Path before -> path after of modules that were replaced."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Parameters and buffers after -> their names before."""
    out_of_list: Mapping[str, tuple[tuple[Place, ...], Place]] = field(default_factory=dict)
    """What was in a list that hands on its last results: where among its arguments it got them, the oldest first, and
    where its own one is among its results."""
    into_list: Mapping[str, tuple[Place, ...]] = field(default_factory=dict)
    """New modules in such a list, and where they get them."""


def difference(before: Topology, after: Topology, changed: Changed) -> str | None:
    """Where the two do not run alike outside of what changed, in words; None if they do."""
    for prediction in after.predictions:
        old = _like(prediction, before)
        if old is None:
            return "its forward takes other courses than before"
        sides = _old(old, before, changed), _new(prediction, after, changed)
        found = _compared(*sides)
        if found is not None and _compared(*(replace(one, serving=one.makers()) for one in sides)) is not None:
            return found
    return None


def _like(prediction: TracePrediction, before: Topology) -> TracePrediction | None:
    """The prediction before that one after is to be compared with: of the same mode and the same course."""
    if prediction.decisions is not None or any(one.decisions is not None for one in before.predictions):
        return None
    modes = {one.training: one for one in before.predictions}
    return modes.get(prediction.training, before.predictions[0])


@dataclass(frozen=True)
class _Side:
    """One of the two passes to compare."""

    prediction: TracePrediction
    topology: Topology
    inside: tuple[tuple[int, int], ...]
    """The ranges of calls that belong to what changed."""
    stands_for: Mapping[tuple[int, int], Token | tuple[int, int]]
    """Boundary value -> the boundary value or the token that it stands for."""
    names: Mapping[int, str]
    """Parameters and buffers: value -> name before."""
    served: tuple[Visit, ...] = ()
    """Those among them that come or go."""
    serving: frozenset[int] = frozenset()
    """Calls around them that come or go with them."""

    def makers(self) -> frozenset[int]:
        """The calls whose results nothing gets but the modules that come or go, and that is not what these hand on."""
        flow, found = self.prediction.flow, set[int]()
        given = {leaf.value for visit in self.served for leaf in visit.entries}
        starts = [start for start in self.stands_for.values() if isinstance(start, tuple)]
        kept = {start[1] if start[0] == _ITSELF else start[0] for start in starts}
        kept.update(self.prediction.outputs)
        for call in reversed(self.prediction.calls):
            outs = {out.index for out in call.outputs if out is not None}
            readers = {at for out in outs for at in flow.readers.get(out, ())}
            only_there = all(at in found or any(one.first <= at < one.last for one in self.served) for at in readers)
            in_place = any(flow.changes(out) for out in outs)
            if only_there and (readers or outs & given) and not outs & kept and not in_place:
                found.add(call.index)
        return frozenset(found)

    def calls(self) -> Iterator[Call]:
        skip = iter(self.inside)
        first, last = next(skip, (1 << 60, 0))
        for call in self.prediction.calls:
            while call.index >= last > 0:
                first, last = next(skip, (1 << 60, 0))
            if call.index < first and call.index not in self.serving:
                yield call

    def shape(self, value: int) -> tuple[int, ...]:
        return _shape(self.topology, self.prediction, value)

    def boundary(self, value: int, before: int) -> tuple[int, int]:
        return value, self.prediction.flow.version(value, before)


def _old(prediction: TracePrediction, topology: Topology, changed: Changed) -> _Side:
    side = _Side(prediction, topology, (), {}, {})
    stands_for: dict[tuple[int, int], Any] = {}
    inside, served = [], []
    for visit in prediction.visits:
        if visit.module in changed.out_of_list:
            inside.append((visit.first, visit.last))
            served.append(visit)
            places, exit = changed.out_of_list[visit.module]
            stands_for |= _shifted(side, visit, places, exit)
            continue
        ends = changed.removed.get(visit.module)
        if ends is None and visit.module not in changed.replaced:
            continue
        inside.append((visit.first, visit.last))
        if ends is not None:
            served.append(visit)
        for leaf in visit.exits:
            end = side.boundary(leaf.value, visit.last)
            if ends is None:
                stands_for[end] = ("result of", visit.module, leaf.place)
            elif leaf.place == ends[1]:
                start = _at(visit.entries, ends[0], side, visit)
                if visit.module in changed.zero:
                    stands_for[end] = ("zero",)
                elif start is not None and start != end:
                    stands_for[end] = start
    names = {index: name for name, index in prediction.tensors.items()}
    return _Side(prediction, topology, _merged(inside), stands_for, names, tuple(served))


def _new(prediction: TracePrediction, topology: Topology, changed: Changed) -> _Side:
    side = _Side(prediction, topology, (), {}, {})
    back = {new: old for old, new in changed.replaced.items()}
    stands_for: dict[tuple[int, int], Any] = {}
    inside = []
    coming = {*changed.left, *changed.inserted, *changed.into_list}
    served = tuple(one for one in prediction.visits if one.module in coming)
    for visit in prediction.visits:
        if visit.module in changed.left:
            inside.append((visit.first, visit.last))
            place = changed.left[visit.module]
            start = _at(visit.entries, place, side, visit)
            for leaf in visit.exits:
                end = side.boundary(leaf.value, visit.last)
                if place is None:
                    stands_for[end] = ("zero",)
                elif start is not None and start != end:
                    stands_for[end] = start
        elif visit.module in changed.inserted:
            inside.append((visit.first, visit.last))
            start = _at(visit.entries, changed.inserted[visit.module], side, visit)
            for leaf in visit.exits:
                end = side.boundary(leaf.value, visit.last)
                if start is not None and start != end:
                    stands_for[end] = start
        elif visit.module in changed.into_list:
            inside.append((visit.first, visit.last))
            for leaf in visit.exits:
                stands_for |= _shifted(side, visit, changed.into_list[visit.module], leaf.place)
        elif visit.module in back:
            inside.append((visit.first, visit.last))
            for leaf in visit.exits:
                stands_for[side.boundary(leaf.value, visit.last)] = ("result of", back[visit.module], leaf.place)
    names = {index: changed.tensors.get(name, name) for name, index in prediction.tensors.items()}
    return _Side(prediction, topology, _merged(inside), stands_for, names, served)


def _shifted(side: _Side, visit: Visit, places: tuple[Place, ...], exit: Place) -> dict[tuple[int, int], Token]:
    """What the results of a list stand for after a module in it, if it were not there: each for the one before it."""
    given = [_at(visit.entries, place, side, visit) for place in places]
    made = next(side.boundary(leaf.value, visit.last) for leaf in visit.exits if leaf.place == exit)
    return {
        newer: (_ITSELF, *older)
        for older, newer in zip(given, (*given[1:], made), strict=True)
        if older is not None and newer is not None
    }


def _at(leaves: Collection[Leaf], place: Place | None, side: _Side, visit: Visit) -> tuple[int, int] | None:
    return next((side.boundary(one.value, visit.first) for one in leaves if one.place == place), None)


def _merged(ranges: Collection[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges in order, those that are inside of others left out, and empty ones."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(ranges, key=lambda one: (one[0], -one[1])):
        if first < last and (not found or first >= found[-1][1]):
            found.append((first, last))
    return tuple(found)


class _Tokens:
    """Names values of one pass such that those of the other that are the same have the same names."""

    def __init__(self, side: _Side) -> None:
        self._side = side
        self._made: dict[tuple[int, int], Token] = {}
        self._inputs = {index: path for path, index in side.prediction.inputs.items()}

    def of(self, value: int, before: int) -> Token:
        return self._token(self._side.boundary(value, before))

    def arguments(self, call: Call) -> object:
        """What a call got, with names in place of values."""
        return _mapped((call.args, dict(call.kwargs)), lambda ref: self.of(ref.index, call.index))

    def _token(self, key: tuple[int, int]) -> Token:
        seen = set()
        while key in self._side.stands_for and key not in seen:
            seen.add(key)
            other = self._side.stands_for[key]
            if isinstance(other, tuple) and other[0] == _ITSELF:
                return self._plain((other[1], other[2]))
            if not (isinstance(other, tuple) and len(other) == 2 and isinstance(other[0], int)):
                return other
            key = other
        return self._plain(key)

    def _plain(self, key: tuple[int, int]) -> Token:
        if key in self._made:
            return self._made[key]
        value, version = key
        if version == 0:
            if value in self._side.names:
                return "tensor", self._side.names[value]
            if value in self._inputs:
                return "input", self._inputs[value]
            return "constant", self._side.shape(value)
        return "inside of what changed", value, version, id(self._side)

    def note(self, call: Call, number: int) -> None:
        """Name what a call makes, the `number`-th of those that are compared."""
        for position, out in enumerate(call.outputs):
            if out is not None:
                self._made[self._side.boundary(out.index, call.index + 1)] = ("made", number, position)


def _mapped(tree: Any, change: Callable[[Ref], Token]) -> object:
    match tree:
        case Ref():
            return change(tree)
        case tuple() | list():
            return [_mapped(item, change) for item in tree]
        case dict():
            return {key: _mapped(item, change) for key, item in tree.items()}
        case float() if tree != tree:
            return "nan"
    return tree


def _compared(old: _Side, new: _Side) -> str | None:
    old_tokens, new_tokens = _Tokens(old), _Tokens(new)
    for number, (one, other) in enumerate(zip_longest(old.calls(), new.calls())):
        if one is None or other is None:
            return f"{'more' if one is None else 'less'} runs than before, {(one or other).where}"
        if one.op is not other.op:
            return f"{other.where} ran where {one.name} did before"
        if old_tokens.arguments(one) != new_tokens.arguments(other):
            return f"{other.where} got other inputs than before"
        shapes = [[None if out is None else side.shape(out.index) for out in call.outputs]
                  for side, call in ((old, one), (new, other))]  # fmt: skip
        if shapes[0] != shapes[1]:
            return f"{other.where} made sizes {shapes[1]} where it made {shapes[0]} before"
        old_tokens.note(one, number)
        new_tokens.note(other, number)
    ends = [[tokens.of(value, 1 << 60) for value in side.prediction.outputs]
            for tokens, side in ((old_tokens, old), (new_tokens, new))]  # fmt: skip
    return None if ends[0] == ends[1] else "it gives back something else than before"


def repeats(before: Topology, original: str, after: Topology, copy: str) -> bool:
    """Whether a copy of a module runs the same operators, in place or not, of the same sizes, as its original did."""
    for prediction in after.predictions:
        old = _like(prediction, before)
        if old is None or _run(before, old, original) != _run(after, prediction, copy):
            return False
    return True


def _run(topology: Topology, prediction: TracePrediction, path: str) -> list[object]:
    return [
        (
            operator_name(call),
            [None if out is None else _shape(topology, prediction, out.index) for out in call.outputs],
        )
        for visit in prediction.visits
        if visit.module == path
        for call in prediction.calls[visit.first : visit.last]
    ]


def _shape(topology: Topology, prediction: TracePrediction, value: int) -> tuple[int, ...]:
    return tuple(size_of(dim, topology.sizes) for dim in prediction.dims.get(value, ()))


__all__ = ["Changed", "difference", "repeats"]
