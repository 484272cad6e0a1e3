"""What a module does in one forward pass, seen from outside: the one tensor that goes in and the one that comes out.

A module can be taken out, repeated or joined by another one only as a whole, at its boundary: code calls it with
arguments and uses its result. `region_of` says what that boundary is, from the traces alone, or why there is none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from espalier.graph.bounds import Ranges
from espalier.graph.branches import is_beside
from espalier.graph.dims import size_of
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.trace import Shape
from espalier.graph.visits import Leaf, Place, Visit


@dataclass(frozen=True)
class Region:
    """A module with one used result."""

    module: str
    entry: Place | None
    """Place, among its arguments, of the one tensor that has the shape and the type of its result; None: no such."""
    exit: Place
    """Place of the one used tensor of its result; empty if that is the tensor itself."""
    result: str
    """``tensor``, ``tuple`` or ``list``: see `Visit.result`."""
    items: int
    """Number of items of that tuple or list. What stands in for the module gives None for those but the exit."""
    beside: bool
    """Whether the result is only added to something that its entry comes from: zeros are neutral for it then, not the
    entry."""
    choices: tuple[Place, ...]
    """Where several different tensors have the shape and the type of its result, their places."""
    takes: tuple[Place, ...]
    """Every place, among its arguments, of the value that a layer before the module is to be run on; empty if there is
    no single such."""
    lone: bool
    """Whether its first argument is the only tensor that it gets."""
    written: bool
    """Whether its result or its entry is written in place later: what stands in for it must give a copy of its own."""
    order: tuple[int, ...]
    """The dimensions of its result from the slowest to the fastest in memory: what stands in for it is to have them in
    that order as well, since a `view` may follow."""
    no_removal: str
    """Why `entry` is None, in words that follow the module's name; empty if it is not."""
    no_layer_after: str
    """Why no layer can come after the module, in such words; empty if one can."""
    no_layer_before: str
    """Why none can come before it."""


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be done."""

    reason: str
    """In words that follow the name of the module: ``runs 2 times in a forward``."""


def region_of(topology: Topology, path: str) -> Region | Refusal:
    """What the module at `path` is from outside, or why it cannot be dealt with as a whole."""
    return Boundaries(topology).region(path)


class Boundaries:
    """The regions of all modules of a network, each found when it is asked for."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.passes = tuple(Pass(topology, prediction) for prediction in topology.predictions)
        self._known: dict[str, Region | Refusal] = {}

    def region(self, path: str) -> Region | Refusal:
        """See `region_of`."""
        found = self._known.get(path)
        if found is None:
            found = self._known[path] = self._found(path)
        return found

    def _found(self, path: str) -> Region | Refusal:
        if not path:
            return Refusal("is the model itself")
        runs = [(one, one.visits[path]) for one in self.passes if path in one.visits]
        if not runs:
            return Refusal("is never run by itself")
        times = max(len(visits) for _, visits in runs)
        if times > 1:
            return Refusal(f"runs {times} times in a forward")
        once = [(one, visits[0]) for one, visits in runs]
        kinds = {(visit.result, visit.items) for _, visit in once}
        if len(kinds) > 1:
            return Refusal("does not give back the same in every pass")
        if once[0][1].result == "other":
            return Refusal("gives back something else than a tensor or a tuple or list of tensors")
        found = [_seen(one, visit) for one, visit in once]
        refused = next((one for one in found if isinstance(one, Refusal)), None)
        return refused or _joined([one for one in found if isinstance(one, _Seen)], once[0][1])


@dataclass(frozen=True)
class _Seen:
    """A module in one pass."""

    exit: Place | None
    """None: nothing uses what it gives back."""
    entries: tuple[Place, ...]
    """Places of the one value that its result unifies with."""
    choices: tuple[Place, ...]
    takes: tuple[Place, ...]
    beside: bool | None
    """None: its result is its argument, and what uses it cannot be told from what uses the argument."""
    lone: bool
    written: bool
    order: tuple[int, ...]
    no_removal: str
    no_layer_after: str
    no_layer_before: str


def _joined(found: Sequence[_Seen], visit: Visit) -> Region | Refusal:
    """One region from those of all passes."""
    used = [one for one in found if one.exit is not None]
    exits = {one.exit for one in used}
    if not exits:
        return Refusal("computes nothing that is used")
    if len(exits) > 1:
        return Refusal("has another result used in another pass")
    first = used[0]
    shared = [place for place in first.entries if all(place in one.entries for one in used)]
    no_removal = next((one.no_removal for one in used if one.no_removal), "")
    if len({one.takes for one in used}) > 1:
        return Refusal("does not get the same in every pass")
    if not shared and not no_removal:
        no_removal = "gets what it turns into its result at another place in another pass"
    asked = [one.beside for one in used if one.beside is not None]
    assert first.exit is not None
    return Region(
        module=visit.module,
        entry=None if no_removal else shared[0],
        exit=first.exit,
        result=visit.result,
        items=visit.items,
        beside=not no_removal and bool(asked) and all(asked),
        choices=tuple(place for place in first.choices if all(place in one.choices for one in used)),
        takes=first.takes,
        lone=all(one.lone for one in used),
        written=any(one.written for one in used),
        order=first.order,
        no_removal=no_removal,
        no_layer_after=next((one.no_layer_after for one in used if one.no_layer_after), ""),
        no_layer_before=next((one.no_layer_before for one in used if one.no_layer_before), ""),
    )


class Pass:
    """One pass with what is asked of it again and again."""

    def __init__(self, topology: Topology, prediction: TracePrediction) -> None:
        self.topology = topology
        self.prediction = prediction
        self.flow = prediction.flow
        self.outputs = frozenset(prediction.outputs)
        self.visits: dict[str, list[Visit]] = defaultdict(list)
        for visit in prediction.visits:
            self.visits[visit.module].append(visit)
        self._shapes: dict[int, Shape] = {}

    def shape(self, value: int) -> Shape:
        """The shape of a value at the present sizes."""
        found = self._shapes.get(value)
        if found is None:
            found = tuple(size_of(dim, self.topology.sizes) for dim in self.prediction.dims[value])
            self._shapes[value] = found
        return found

    def kind(self, value: int) -> tuple[Shape, torch.dtype]:
        """Shape and type: values that have the same can take each other's place."""
        return self.shape(value), self.prediction.dtypes[value]

    def is_read(self, value: int, since: int) -> bool:
        """Whether a call, from that one on, or the model's caller gets a value."""
        if value in self.outputs:
            return True
        readers = self.flow.readers.get(value)
        return readers is not None and readers[-1] >= since

    def made(self, value: int, before: int) -> int:
        """The call that wrote the value last before a call; -1 for what came from outside of the forward."""
        call = self.flow.maker(value, before)
        return -1 if call is None else call.index

    @cached_property
    def sharing(self) -> Mapping[int, Sequence[int]]:
        """Memory -> the values that share it, for those that are written in place."""
        found: dict[int, list[int]] = defaultdict(list)
        for value in range(len(self.prediction.dtypes)):
            if self.flow.changes(value):
                found[self.flow.memory(value)].append(value)
        return found

    @cached_property
    def ranges(self) -> Ranges:
        """Between which numbers the values lie."""
        return Ranges(self.flow)

    @cached_property
    def tensors(self) -> Mapping[str, Sequence[str]]:
        """Path of a module -> parameters and buffers in it that the pass reads."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in self.prediction.tensors:
            path = name
            while "." in path:
                path = path.rpartition(".")[0]
                found[path].append(name)
        return found


def _seen(one: Pass, visit: Visit) -> _Seen | Refusal:
    """A module in one pass, or why it is no region there."""
    used = [leaf for leaf in visit.exits if leaf.value >= 0 and one.is_read(leaf.value, visit.last)]
    if len(used) > 1:
        return Refusal(f"gives back {len(used)} tensors that are used")
    escaping = _escaping(one, visit, {leaf.value for leaf in used})
    if escaping:
        return Refusal(escaping)
    if not used:
        return _Seen(None, (), (), (), None, False, False, (), "", "", "")
    exit = used[0]
    if not one.prediction.strides[exit.value] and one.shape(exit.value):
        return Refusal("gives back a sparse tensor")
    entries = [leaf for leaf in visit.entries if leaf.value >= 0 and leaf.value not in one.flow.of_weights]
    takes = _same(entries)
    matching = [leaf for leaf in entries if one.kind(leaf.value) == one.kind(exit.value)]
    unifying, no_removal = _same(matching), ""
    if not matching:
        no_removal = _turning(one, entries, exit)
    elif not unifying:
        names = ", ".join(dict.fromkeys(_shown(leaf.place) for leaf in matching))
        no_removal = f"has several inputs of the size of its result ({names})"
    elif not takes:
        takes = unifying
    passed_on = exit.value in {leaf.value for leaf in visit.entries} and one.made(exit.value, visit.last) < visit.first
    beside = None
    if unifying and not passed_on:
        entry = next(leaf.value for leaf in matching)
        beside = is_beside(one.topology, one.prediction, entry, exit.value, visit.first, visit.last)
    strides = one.prediction.strides[exit.value]
    shared_memory = _hands_on(one, visit, exit.value)
    return _Seen(
        exit=exit.place,
        entries=unifying,
        choices=() if unifying else tuple(leaf.place for leaf in matching),
        takes=takes,
        beside=beside,
        lone=[leaf.place for leaf in visit.entries] == [(0,)],
        written=any(_is_written(one, leaf.value, visit.last) for leaf in (exit, *matching)),
        order=tuple(sorted(range(len(strides)), key=lambda dim: -strides[dim])),
        no_removal=no_removal,
        no_layer_after=shared_memory,
        no_layer_before=shared_memory or _no_layer_before(one, visit, takes),
    )


def _same(leaves: Sequence[Leaf]) -> tuple[Place, ...]:
    """The places of the one value that leaves have; none if there are several."""
    return tuple(leaf.place for leaf in leaves) if len({leaf.value for leaf in leaves}) == 1 else ()


def _is_written(one: Pass, value: int, since: int) -> bool:
    return any(at >= since for at, _ in one.flow.changes(value))


def _hands_on(one: Pass, visit: Visit, value: int) -> str:
    """Whether a write to the result, later, is one to older memory: a copy in its place would leave that as it was."""
    is_older = _is_older(one, one.flow.memory(value), visit)
    return "hands on memory that is written to later" if is_older and _is_written(one, value, visit.last) else ""


def _no_layer_before(one: Pass, visit: Visit, takes: Sequence[Place]) -> str:
    if not takes:
        return "has no single input that a layer before it could be run on"
    values = {leaf.value for leaf in visit.entries if leaf.place in takes}
    if any(visit.first <= at < visit.last for value in values for at, _ in one.flow.changes(value)):
        return "writes its result into its argument, which others may read"
    return ""


def _escaping(one: Pass, visit: Visit, exits: set[int]) -> str:
    """What is made in the module and used outside, but not given back; empty if nothing is."""
    flow = one.flow
    for call in flow.calls[visit.first : visit.last]:
        for out in call.outputs:
            if out is None or out.index in exits:
                continue
            if one.is_read(out.index, visit.last) and one.made(out.index, visit.last) >= visit.first:
                return f"computes something that is used elsewhere, other than its result ({call.where})"
            for at, by in flow.changes(out.index):
                if at == call.index and by == out.index and _spills(one, out.index, visit, exits):
                    return f"writes into memory that is used elsewhere ({call.where})"
    for name in _read_outside(one, visit):
        return f"has its tensor {name} read by others"
    return ""


def _spills(one: Pass, value: int, visit: Visit, exits: Collection[int]) -> bool:
    """Whether a write in the module to the memory of a value is seen through another value that is older."""
    return any(
        other not in exits and other != value and _is_older(one, other, visit) and one.is_read(other, visit.last)
        for other in one.sharing[one.flow.memory(value)]
    )


def _is_older(one: Pass, value: int, visit: Visit) -> bool:
    writers = one.flow.writers.get(value)
    return not writers or writers[0] < visit.first


def _read_outside(one: Pass, visit: Visit) -> Iterator[str]:
    """Tensors of the module, known by no other name, which others read past it: code takes them from it by name."""
    tied = set(one.topology.aliases.values())
    for name in one.tensors.get(visit.module, ()):
        readers = one.flow.readers.get(one.prediction.tensors[name], ())
        if name not in tied and readers and (readers[0] < visit.first or readers[-1] >= visit.last):
            yield name


def _turning(one: Pass, entries: Sequence[Leaf], exit: Leaf) -> str:
    """How the size of the result differs from those of the inputs."""
    after = _size(one.shape(exit.value))
    if not entries:
        return "has no input"
    before = " and ".join(dict.fromkeys(_size(one.shape(leaf.value)) for leaf in entries))
    if before == after:
        return f"turns {before} into another type of number"
    return f"turns {before} into {after}"


def _size(shape: Shape) -> str:
    """A shape in words, without the dimension of the batch."""
    return " x ".join(map(str, shape[1:] or shape)) or "a number"


def _shown(place: Place) -> str:
    return ".".join(
        f"input {part}" if position == 0 and isinstance(part, int) else str(part) for position, part in enumerate(place)
    )


__all__ = ["Boundaries", "Pass", "Refusal", "Region", "region_of"]
