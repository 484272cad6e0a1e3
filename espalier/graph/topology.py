"""What may change in a network, what not, and why: axes, their slots and taps.

A topology is immutable. It is made once, from the traces of a model, and after an edit it is *transformed* (only the
sizes of axes change), not inferred anew.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from espalier.graph.courses import Course, depends_on_values, followed, passes
from espalier.graph.covering import Cover, covered
from espalier.graph.decisions import Decisions
from espalier.graph.dims import Concat, Dim, Fixed, Product, axes_of, labels, size_of, substitute
from espalier.graph.flow import Flow, constants
from espalier.graph.named_tensors import TensorTable, tensor_table
from espalier.graph.origins import Attribute
from espalier.graph.reading import Solved, read
from espalier.graph.solver import Reason, Term, Var, compiled, variables
from espalier.graph.trace import Call, Shape, Trace
from espalier.graph.visits import Visit

INTERFACE = frozenset({"input", "output", "lookup"})
"""Kinds of reasons that do not hold if the user asks for the model's own interface to change."""

ROLE_ORDER = ("contract", "lookup", "produce", "filter", "group", "scale", "shift", "mean", "variance", "elementwise")


@dataclass(frozen=True)
class Slot:
    """A dimension of a parameter or buffer in which an axis appears."""

    tensor: str
    """Qualified name."""
    dim: int
    role: str
    """What the operators do with it: ``produce``, ``contract``, ``filter`` (depthwise), ``group``, ``scale``,
    ``shift``, ``mean`` and ``variance`` (running statistics), ``lookup`` or ``elementwise``."""
    positions: tuple[tuple[int, ...], ...]
    """For every unit its positions along `dim`."""

    def index(self, units: Iterable[int]) -> list[int]:
        """The positions of `units` along the slot's dimension, ascending."""
        return sorted(position for unit in units for position in self.positions[unit])


@dataclass(frozen=True)
class Tap:
    """A place where an axis is a dimension of an activation, and what the operator does along it."""

    module: str
    operator: str
    role: str
    where: str


@dataclass(frozen=True)
class AxisRecord:
    """What the topology knows of one axis, apart from its size."""

    number: int
    name: str
    reasons: tuple[Reason, ...]
    slots: tuple[tuple[str, int, str], ...]
    """(tensor, dimension, role) in the order in which the network runs."""
    taps: tuple[Tap, ...]
    hints: tuple[str, ...]


@dataclass(frozen=True)
class TracePrediction:
    """One trace with the expressions that predict it after any edit."""

    training: bool
    calls: tuple[Call, ...]
    dims: Mapping[int, tuple[Dim, ...]]
    """Value number -> dimensions."""
    inputs: Mapping[str, int]
    outputs: tuple[int, ...]
    tensors: Mapping[str, int]
    """Parameters and buffers that were read -> value number."""
    expectations: Mapping[int, tuple[tuple[str, Dim], ...]]
    """Call number -> integer arguments that repeat a size."""
    costs: tuple[tuple[int, int, tuple[Dim, ...]], ...]
    """(call number, factor, dimensions): floating-point operations."""
    visits: tuple[Visit, ...] = ()
    """Which module ran when, in the order in which they ended."""
    decisions: Decisions = None
    """What values decided, where fake tensors alone could not be run."""
    dtypes: tuple[torch.dtype, ...] = ()
    """By value number."""
    strides: tuple[Shape, ...] = ()
    """By value number, at the sizes of the capture."""

    @cached_property
    def flow(self) -> Flow:
        """Which calls write and read each value."""
        return Flow(self.calls, self.dims, self.tensors)

    @cached_property
    def constants(self) -> Mapping[int, tuple[float, ...]]:
        """Call number -> the numbers that it computes with, where there are any."""
        return {call.index: found for call in self.calls if (found := tuple(constants(call)))}


@dataclass(frozen=True)
class Topology:
    """Axes and everything that is known of them; immutable."""

    axes: Mapping[int, AxisRecord]
    sizes: Mapping[int, int]
    tensors: Mapping[str, tuple[Dim, ...]]
    aliases: Mapping[str, str]
    parameters: frozenset[str]
    predictions: tuple[TracePrediction, ...]
    unknown: Mapping[str, int]
    notes: tuple[str, ...]
    attributes: Mapping[Attribute, Dim] = field(default_factory=dict)
    """Attributes of modules that repeat a size, as the code uses them -> what they repeat."""
    covered: Mapping[int, Cover] = field(default_factory=dict)
    """Number of a prediction -> the one that it is part of."""

    @property
    def courses(self) -> tuple[Course, ...]:
        """The passes through the model's code, to be taken again."""
        return tuple(Course(one.training, one.decisions) for one in self.predictions)

    @cached_property
    def by_name(self) -> Mapping[str, AxisRecord]:
        """Axis records by name, in the order in which the network runs."""
        return {record.name: record for record in self.axes.values()}

    def resized(self, sizes: Mapping[int, int]) -> Topology:
        """The same network with other sizes for some axes."""
        return replace(self, sizes={**self.sizes, **sizes})

    def frozen(self, reasons: Mapping[int, Reason]) -> Topology:
        """The same network with more axes that may not change."""
        axes = dict(self.axes)
        for number, reason in reasons.items():
            axes[number] = replace(axes[number], reasons=(*axes[number].reasons, reason))
        return replace(self, axes=axes)

    def may_be_rebuilt(self, tensor: str) -> bool:
        """Whether a tensor is a buffer of plain sizes, which the forward may give other ones."""
        inside = {axis for dim in self.tensors[tensor] for axis in axes_of(dim)}
        return tensor not in self.parameters and inside.isdisjoint(self.axes)

    def rebuilt(self, shapes: Mapping[str, Shape]) -> Topology:
        """The same network with other plain sizes for some buffers."""
        plain = {name: tuple(Fixed(size) for size in shape) for name, shape in shapes.items()}
        return replace(self, tensors={**self.tensors, **plain})

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a parameter or buffer at the present sizes."""
        return tuple(size_of(dim, self.sizes) for dim in self.tensors[tensor])

    def slot(self, number: int, tensor: str, dim: int, role: str) -> Slot:
        """A slot with the positions of every unit at the present sizes."""
        found: list[list[int]] = [[] for _ in range(self.sizes[number])]
        for position, unit in enumerate(labels(self.tensors[tensor][dim], self.sizes, number).tolist()):
            if unit >= 0:
                found[unit].append(position)
        return Slot(tensor, dim, role, tuple(tuple(one) for one in found))

    def names(self) -> dict[int, str]:
        """Axis number -> name."""
        return {number: record.name for number, record in self.axes.items()}


def _substituted(dims: tuple[Dim, ...], replacement: Mapping[int, Dim]) -> tuple[Dim, ...]:
    return tuple(substitute(dim, replacement) for dim in dims)


def substituted(prediction: TracePrediction, replacement: Mapping[int, Dim]) -> TracePrediction:
    """A prediction in which some axes are replaced by expressions of the same size."""
    return replace(
        prediction,
        dims={index: _substituted(dims, replacement) for index, dims in prediction.dims.items()},
        expectations={
            call: tuple((argument, substitute(dim, replacement)) for argument, dim in found)
            for call, found in prediction.expectations.items()
        },
        costs=tuple((call, factor, _substituted(dims, replacement)) for call, factor, dims in prediction.costs),
    )


def infer(
    model: nn.Module,
    example: Any,
    table: TensorTable | None = None,
    shapes: Mapping[str, Shape] | None = None,
    courses: Sequence[Course] | None = None,
) -> Topology:
    """Capture `model`, in eval mode and, where modules ask for their mode, in train mode, and read the traces.

    `shapes` are other shapes for some tensors, as if the model had these; `courses` those of a topology of the model,
    to be taken again.

    Raises:
        CaptureError: the forward failed.
    """
    table, shapes = table or tensor_table(model), shapes or {}
    if courses is None:
        found = passes(model, example, table, shapes)
    else:
        found = followed(model, example, table, shapes, courses)
    solved = read(model, table, found.traces, shapes)
    return compile_topology(solved, found.traces, table.aliases, _parameters(table.tensors), found.notes)


def _parameters(tensors: Mapping[str, torch.Tensor]) -> frozenset[str]:
    return frozenset(name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter))


def compile_topology(
    solved: Solved,
    traces: Sequence[Trace],
    aliases: Mapping[str, str],
    parameters: frozenset[str],
    notes: tuple[str, ...] = (),
) -> Topology:
    """Number the unknowns that are left, name them, and collect what is known of each."""
    compiler = _Compiler()
    numbers = compiler.numbers
    tensors = {name: compiler.dims(terms) for name, terms in solved.tensors.items()}
    predictions = tuple(_prediction(reading, compiler) for reading in solved.readings)
    by_number = {number: var for var, number in numbers.items()}
    roles, taps, order = _gather(solved, numbers, tensors)
    squared = _met_themselves(tensors)
    with_parameters = [
        number for number in order if any(tensor in parameters for tensor, _, _ in roles.get(number, ()))
    ]
    names = _axis_names(with_parameters, roles, by_number)
    axes = {
        number: AxisRecord(
            number,
            names[number],
            (*by_number[number].reasons, *squared.get(number, ())),
            tuple(roles[number]),
            tuple(taps.get(number, ())),
            tuple(by_number[number].hints),
        )
        for number in with_parameters
    }
    return Topology(
        axes,
        {number: var.size for number, var in by_number.items()},
        tensors,
        aliases,
        parameters,
        predictions,
        solved.unknown,
        notes,
        attributes={
            attribute: compiler.dim(term)
            for attribute, term in solved.attributes.items()
            if (inside := list(variables(term))) and all(numbers.get(var) in axes for var in inside)
        },
        covered=covered(predictions, {n: Fixed(var.size) for n, var in by_number.items() if n not in axes}),
    )


class _Compiler:
    """Solved terms as immutable expressions, each made once: values share most of their dimensions."""

    def __init__(self) -> None:
        self.numbers: dict[Var, int] = {}
        self._known: dict[int, tuple[Term, Dim]] = {}

    def dim(self, term: Term) -> Dim:
        """The expression of one term."""
        found = self._known.get(id(term))
        if found is None:
            found = self._known[id(term)] = term, compiled(term, self.numbers)
        return found[1]

    def dims(self, terms: Iterable[Term]) -> tuple[Dim, ...]:
        """The expressions of several terms."""
        return tuple([self.dim(term) for term in terms])


def _prediction(reading: Any, compiler: _Compiler) -> TracePrediction:
    expectations: dict[int, list[tuple[str, Dim]]] = defaultdict(list)
    for one in reading.expectations:
        expectations[one.call].append((one.argument, compiler.dim(one.term)))
    return TracePrediction(
        reading.trace.training,
        tuple(reading.trace.calls),
        {index: compiler.dims(terms) for index, terms in reading.dims.items()},
        {path: ref.index for path, ref in reading.trace.inputs.items()},
        tuple(ref.index for ref in reading.trace.outputs.values()),
        {name: ref.index for name, ref in reading.trace.tensors.items()},
        {call: tuple(found) for call, found in expectations.items()},
        tuple((one.call, one.factor, compiler.dims(one.terms)) for one in reading.costs),
        tuple(reading.trace.visits),
        reading.trace.decisions,
        tuple(reading.trace.dtypes),
        tuple(reading.trace.strides),
    )


def _met_themselves(tensors: Mapping[str, tuple[Dim, ...]]) -> dict[int, tuple[Reason, ...]]:
    """Axes that occur twice within one product cannot change by single units."""
    found: dict[int, tuple[Reason, ...]] = {}
    for name, dims in tensors.items():
        for dim in dims:
            for number in _squared(dim):
                found.setdefault(number, (Reason("shape", f"is multiplied by itself in {name}"),))
    return found


def _squared(dim: Dim) -> Iterator[int]:
    """Axes that are in more than one factor of a product."""
    match dim:
        case Product(parts):
            held = Counter(axis for part in parts for axis in set(axes_of(part)))
            yield from (axis for axis, count in held.items() if count > 1)
            yield from (axis for part in parts for axis in _squared(part))
        case Concat(parts):
            yield from (axis for part in parts for axis in _squared(part))


Roles = dict[int, list[tuple[str, int, str]]]


def _gather(
    solved: Solved, numbers: Mapping[Var, int], tensors: Mapping[str, tuple[Dim, ...]]
) -> tuple[Roles, Mapping[int, Iterable[Tap]], list[int]]:
    """Roles of slots and taps of every axis, and the axes in the order in which the network produces them."""
    found: dict[tuple[str, int, int], set[str]] = defaultdict(set)
    taps: dict[int, dict[Tap, None]] = defaultdict(dict)
    first: dict[tuple[str, int, int], int] = {}
    place = {name: {id(term): dim for dim, term in enumerate(terms)} for name, terms in solved.tensors.items()}
    holders: dict[int, list[tuple[str, int]]] = defaultdict(list)
    positions: dict[tuple[str, int], list[int]] = defaultdict(list)
    for name, dims in tensors.items():
        for position, dim in enumerate(dims):
            for number in dict.fromkeys(axes_of(dim)):
                holders[number].append((name, position))
                positions[name, number].append(position)
    known: dict[int, list[int]] = {}
    for reading in solved.readings:
        for event in reading.events:
            inside = known.get(id(event.term))
            if inside is None:
                inside = known[id(event.term)] = [numbers[var] for var in variables(event.term) if var in numbers]
            if not event.origins:
                for number in inside:
                    module = next((path for path in reversed(event.call.modules) if path), "")
                    taps[number][Tap(module, event.call.name, event.role, event.call.where)] = None
                continue
            for name in event.origins:
                exact = place[name].get(id(event.term))
                for number in inside:
                    for position in positions.get((name, number), ()):
                        if exact in (None, position):
                            found[name, position, number].add(event.role)
                            first.setdefault((name, position, number), event.call.index)
    if any(depends_on_values(reading.trace) for reading in solved.readings):
        # What runs first may be another branch next time; names are not to depend on it.
        registered = {name: number for number, name in enumerate(tensors)}
        first = {key: registered[key[0]] for key in first}
    roles: Roles = defaultdict(list)
    when: dict[int, tuple[int, int]] = {}
    for number, slots in holders.items():
        listed = []
        for name, position in slots:
            roles_here = found.get((name, position, number), set())
            if "direction" in roles_here and "contract" in roles_here:
                # Every unit's slice is divided by its own length, which may not be zero: what it is multiplied by is.
                roles_here = {*roles_here - {"contract"}, "produce"}
            elif "norm" in roles_here and "contract" not in roles_here:
                # Elsewhere new units start at zero, so that a weight's length along the axis stays.
                taps[number][Tap(name.rpartition(".")[0], "norm", "sum", f"in {name}, which is divided by it")] = None
            role = next((one for one in ROLE_ORDER if one in roles_here), "elementwise")
            start = first.get((name, position, number), 1 << 30)
            listed.append((start, name, position, role))
            produced = 0 if role in ("produce", "filter", "group") else 1
            when[number] = min(when.get(number, (2, 0)), (produced, start))
        roles[number] = [(name, position, role) for _, name, position, role in sorted(listed)]
    order = sorted(when, key=lambda number: (when[number][1], when[number][0], number))
    return roles, taps, order


def _axis_names(order: Sequence[int], roles: Roles, variables_by_number: Mapping[int, Var]) -> dict[int, str]:
    """Axes are named after the first module that produces them; several of one module get a suffix each."""
    owners: dict[str, list[int]] = defaultdict(list)
    for number in order:
        slots = roles[number]
        producing = [slot for slot in slots if slot[2] in ("produce", "filter", "group")]
        chosen = (producing or slots)[0]
        path = chosen[0].rpartition(".")[0] or chosen[0]
        path = path.partition(".parametrizations.")[0]
        if not producing:
            path += ":inputs" if chosen[2] == "contract" else f":{chosen[2]}"
        owners[path].append(number)
    names: dict[int, str] = {}
    for path, members in owners.items():
        if len(members) == 1:
            names[members[0]] = path
            continue
        used: set[str] = set()
        for position, number in enumerate(members):
            hints = variables_by_number[number].hints
            label = next((hint for hint in hints if hint not in used), None) or f"{position}"
            used.add(label)
            names[number] = f"{path}:{label}"
    return names


__all__ = ["INTERFACE", "AxisRecord", "Slot", "Tap", "Topology", "infer", "substituted"]
