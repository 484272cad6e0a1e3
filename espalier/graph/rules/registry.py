"""One small rule per operator: what it says about the dimensions of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from espalier.graph.solver import Reason, Solver, Term, Var, is_plain, resolve, size
from espalier.graph.trace import Call, Ref, Trace

Dims = tuple[Term, ...]
Result = Dims | Sequence[Dims | None]
"""What a rule returns: the dimensions of its one output, or a list with those of every output."""
Rule = Callable[["Reading", Call], Result]

_RULES: dict[str, Rule] = {}
_ACROSS_UNITS = frozenset({"batch_norm", "bilinear", "group_norm", "layer_norm", "reduce", "rms_norm", "scale_of_size",
                           "softmax", "sum"})  # fmt: skip
"""Roles that matter wherever they occur: a weight that is standardised across an axis changes with every new unit.

The length of a weight along an axis is another matter (``norm``): units that start at zero do not change it. Where
every unit's own slice is divided by its length (``direction``), it may not be zero."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the named ATen operators (without overload and trailing underscore).

    Raises:
        ValueError: an operator that already has a rule.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if name in _RULES:
                raise ValueError(f"operator {name!r} already has the rule {_RULES[name].__name__}")
            _RULES[name] = function
        return function

    return register


def rule_for(call: Call) -> Rule | None:
    """The rule of a recorded operator; in-place variants share that of their functional form."""
    name = call.name.removeprefix("aten::")
    found = _RULES.get(name)
    if found is None and name.endswith("_") and not name.endswith("__"):
        found = _RULES.get(name[:-1])
    return found


def known_operators() -> tuple[str, ...]:
    """Names of all operators that have a rule, sorted."""
    return tuple(sorted(_RULES))


@dataclass(frozen=True)
class Event:
    """What an operator does to a dimension: the raw material of slots' roles and of taps."""

    role: str
    call: Call
    term: Term
    origins: frozenset[str]
    """Parameters that the value is computed from, if it is computed from nothing else; empty for activations, and
    where units are combined, which is an event of the pass as a whole."""


@dataclass(frozen=True)
class Expectation:
    """An integer argument of a call that has to equal the size of a term, also after an edit."""

    call: int
    argument: str
    term: Term


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a call: `factor` times the product of the sizes of `terms`."""

    call: int
    factor: int
    terms: Dims


@dataclass
class Reading:
    """The state while the rules read one trace: dimensions of every value, and what the operators did to them."""

    trace: Trace
    solver: Solver
    dims: dict[int, Dims] = field(default_factory=dict)
    origins: dict[int, frozenset[str]] = field(default_factory=dict)
    """Values computed from parameters, buffers and constants alone -> those parameters and buffers."""
    events: list[Event] = field(default_factory=list)
    expectations: list[Expectation] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    _used: set[int] = field(default_factory=set)

    def of(self, ref: Ref) -> Dims:
        """The dimensions of a value; a value that no operator made is a constant, and its sizes are plain."""
        if ref.index not in self.dims:
            self.dims[ref.index] = self.trace.shapes[ref.index]
            self.origins.setdefault(ref.index, frozenset())
        return self.dims[ref.index]

    def shape(self, ref: Ref) -> tuple[int, ...]:
        """The recorded sizes of a value."""
        return self.trace.shapes[ref.index]

    def is_weight(self, ref: Ref) -> bool:
        """Whether a value is computed from parameters, buffers and constants alone."""
        self.of(ref)
        return ref.index in self.origins

    def is_used(self, ref: Ref | None) -> bool:
        """Whether a value is an argument of any operator or an output of the model."""
        if not self._used:
            self._used.update(one.index for call in self.trace.calls for one in refs_in((call.args, call.kwargs)))
            self._used.update(one.index for one in self.trace.outputs.values())
        return ref is not None and ref.index in self._used

    def is_parameter(self, ref: Ref) -> bool:
        """Whether a value is computed from at least one parameter or buffer, and from no activation."""
        self.of(ref)
        return bool(self.origins.get(ref.index))

    def tap(self, role: str, call: Call, ref: Ref, dim: int) -> None:
        """Record what `call` does to dimension `dim` of the value `ref`."""
        self.tap_term(role, call, ref, self.of(ref)[dim])

    def tap_term(self, role: str, call: Call, ref: Ref, term: Term) -> None:
        """Record what `call` does to a part of a dimension of the value `ref`."""
        if not isinstance(resolve(term), int):
            origins = frozenset() if role in _ACROSS_UNITS else self.origins.get(ref.index, frozenset())
            self.events.append(Event(role, call, term, origins))

    def unify(self, a: Term, b: Term, call: Call) -> None:
        """Both terms are the same dimension, says `call`."""
        if a is not b:
            self.solver.unify(a, b, call.where)

    def freeze(self, term: Term, kind: str, text: str, call: Call) -> None:
        """`term` may not change because of `call`."""
        self.solver.freeze(term, Reason(kind, f"{text} {call.where}"))

    def expect(self, call: Call, argument: str, term: Term) -> None:
        """The integer `argument` of `call` repeats the size of `term`."""
        self.expectations.append(Expectation(call.index, argument, term))

    def cost(self, call: Call, factor: int, *terms: Term) -> None:
        """`call` takes `factor` times the product of `terms` floating-point operations."""
        self.costs.append(Cost(call.index, factor, terms))

    def split(self, term: Term, left: int, right: int, call: Call) -> tuple[Term, Term]:
        """`term` as ``left x right``, says `call`."""
        return self.solver.split(term, left, right, call.where)

    def cut(self, term: Term, sizes: Sequence[int], call: Call) -> list[Term]:
        """`term` in consecutive pieces of the given sizes, says `call`."""
        pieces: list[Term] = []
        for count in sizes[:-1]:
            piece, term = self.solver.cut(term, count, call.where)
            pieces.append(piece)
        return [*pieces, term]

    def loose(self, count: int) -> Term:
        """A dimension made by code, of uniform content: it follows whatever it meets. A size of one broadcasts."""
        return 1 if count == 1 else self.solver.new(count, solid=False)

    def moved(self, count: int, kind: str, text: str, call: Call) -> Term:
        """A dimension that an operator makes of one that may not change: it may not either, for this reason."""
        return 1 if count == 1 else self.solver.new(count, solid=False, reasons=[Reason(kind, f"{text} {call.where}")])

    def plain(self, term: Term) -> int:
        """`term` as a plain size."""
        return self.solver.plain(term)


def refs_in(tree: Any) -> list[Ref]:
    """All values among (nested) arguments, in order."""
    found: list[Ref] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Ref]) -> None:
    kind = type(tree)
    if kind is Ref:
        found.append(tree)
    elif kind is tuple or kind is list:
        for item in tree:
            _collect(item, found)
    elif kind is dict:
        for item in tree.values():
            _collect(item, found)


def positive(dim: int, rank: int) -> int:
    """A dimension number counted from the front."""
    return dim + rank if dim < 0 else dim


def dissolve(reading: Reading, term: Term) -> Term:
    """A term without any parameter's size becomes a plain size; others stay."""
    return reading.plain(term) if is_plain(term) else term


def freeze_all(reading: Reading, call: Call, kind: str, text: str) -> list[Dims | None]:
    """Freeze whatever `call` touches; what reads its results is frozen for the same reason."""
    solid = False
    for ref in refs_in((call.args, call.kwargs)):
        for term in reading.of(ref):
            solid = solid or not is_plain(term)
            reading.freeze(term, kind, text, call)
    if not solid:
        return [None if ref is None else reading.shape(ref) for ref in call.outputs]
    return [
        None if ref is None else tuple(reading.moved(n, kind, text, call) for n in reading.shape(ref))
        for ref in call.outputs
    ]


__all__ = [
    "Cost", "Dims", "Event", "Expectation", "Reading", "Result", "Rule", "Term", "Var", "dissolve", "freeze_all",
    "known_operators", "positive", "refs_in", "rule", "rule_for", "size",
]  # fmt: skip
