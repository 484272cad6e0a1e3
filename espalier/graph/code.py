"""What the code says about sizes beside the operators: numbers that it reads here and hands over there.

Every link from a module attribute or a tensor's size to an operator's argument is an equation. An attribute is an
unknown like any other; what it is found equal to tells its value after an edit, and two dimensions that one attribute
sets are one dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import takewhile
from math import prod

from espalier.graph.origins import Attribute, Derived, Origin, SizeOf
from espalier.graph.rules.registry import Dims, Reading, Term, positive
from espalier.graph.solver import Cat, Prod, Solver, Var, concat, product, resolve, size
from espalier.graph.trace import Call, Ref
from espalier.graph.tracking import Link


class CodeSizes:
    """Collects the equations that code states, over all traces of a model, and solves them in the end.

    By then the operators have said what they know, so that what is left to say is mostly what an attribute repeats.
    """

    def __init__(self, solver: Solver, tensors: Mapping[str, Dims]) -> None:
        self._solver = solver
        self._tensors = tensors
        self._equations: list[tuple[Reading, Term, Origin, str]] = []
        self.attributes: dict[Attribute, Var] = {}

    def visit(self, reading: Reading, call: Call) -> None:
        """Note what the arguments of a call say, once its rule has been applied."""
        links = reading.trace.links.get(call.index, ())
        for link in links:
            for term, origin in _named(reading, call, link, links):
                self._equations.append((reading, term, origin, call.where))

    def solve(self) -> None:
        """State every equation: numbers that are handed on as they are first, then those that were computed."""
        for reading, term, origin, where in sorted(self._equations, key=lambda one: _depth(one[2])):
            self._equate(reading, term, origin, where)

    def _equate(self, reading: Reading, term: Term, origin: Origin, where: str) -> None:
        """`term` is as large as the number that `origin` describes."""
        if isinstance(origin, Derived) and origin.operator == "*":
            for factor, rest in ((origin.left, origin.right), (origin.right, origin.left)):
                known = self._term(reading, factor, where)
                quotient = None if known is None else divided(term, known)
                if quotient is not None:
                    self._equate(reading, quotient, rest, where)
                    return
        other = self._term(reading, origin, where)
        if other is not None and _sample(other) != _sample(term):
            self._solver.unify(other, term, f"{where}, by its code")

    def _term(self, reading: Reading, origin: Origin, where: str) -> Term | None:
        """What a number of the code is, as an expression; None if that cannot be said."""
        match origin:
            case int():
                return origin
            case Attribute():
                if origin not in self.attributes:
                    self.attributes[origin] = self._solver.new(origin.value, solid=False)
                return self.attributes[origin]
            case SizeOf():
                dims = self._tensors[origin.value] if isinstance(origin.value, str) else reading.dims.get(origin.value)
                return None if dims is None else dims[origin.dim]
            case Derived():
                left, right = self._term(reading, origin.left, where), self._term(reading, origin.right, where)
                return None if left is None or right is None else self._derived(origin.operator, left, right, where)

    def _derived(self, operator: str, left: Term, right: Term, where: str) -> Term | None:
        if operator == "*":
            return product(left, right)
        if operator == "//" and size(right) and size(left) % size(right) == 0:
            quotient = divided(left, right)
            if quotient is None:
                quotient = self._solver.new(size(left) // size(right), solid=False)
                self._solver.unify(left, product(right, quotient), f"{where}, by a division in its code")
            return quotient
        if isinstance(resolve(left), int) and isinstance(resolve(right), int):
            a, b = size(left), size(right)
            return {"+": a + b, "-": a - b, "//": a // b if b else 0}[operator]
        return None


def _depth(origin: Origin) -> int:
    return 1 + max(_depth(origin.left), _depth(origin.right)) if isinstance(origin, Derived) else 0


def divided(whole: Term, by: Term) -> Term | None:
    """`whole` / `by`, where that can be read off: a product that has it as a factor, or as many equal pieces."""
    whole, by = resolve(whole), resolve(by)
    if size(by) == 0 or size(whole) % size(by):
        return None
    if isinstance(by, int) and (by == 1 or isinstance(whole, int)):
        return whole if by == 1 else size(whole) // by
    if isinstance(whole, Prod):
        for position, factor in enumerate(whole.factors):
            if _sample(factor) == _sample(by):
                return product(*whole.factors[:position], *whole.factors[position + 1 :])
    if isinstance(whole, Cat) and isinstance(by, int) and len(whole.pieces) % by == 0:
        length = len(whole.pieces) // by
        rows = [concat(*whole.pieces[start : start + length]) for start in range(0, len(whole.pieces), length)]
        return rows[0] if len({_sample(row) for row in rows}) == 1 else None
    return None


def _named(reading: Reading, call: Call, link: Link, links: tuple[Link, ...]) -> Iterator[tuple[Term, Origin]]:
    """The dimension, or dimensions, that an argument of a call is the size of, with where that number comes from."""
    arguments = call.arguments()
    value, name = arguments[link.argument], call.name.removeprefix("aten::")
    out = next((ref for ref in call.outputs if ref is not None), None)
    if out is None or out.index not in reading.dims:
        return
    dims = reading.dims[out.index]
    if link.position is not None:
        yield from ((term, link.origin) for term in _of_list(reading, call, link.argument, link.position, dims))
    elif name == "slice" and link.argument == "end":
        length = _length(link, links, arguments["start"] or 0)
        if length is not None:
            yield dims[positive(arguments["dim"], len(dims))], length
    elif link.argument == "split_size":
        if size(dims[positive(arguments["dim"], len(dims))]) == value:
            yield dims[positive(arguments["dim"], len(dims))], link.origin
    else:
        yield from ((term, link.origin) for term in _expected(reading, call, link.argument, value))


def _expected(reading: Reading, call: Call, argument: str, value: int) -> Iterator[Term]:
    """What the rule of a call says that one of its arguments repeats."""
    for one in takewhile(lambda found: found.call == call.index, reversed(reading.expectations)):
        if one.argument == argument and size(one.term) == value:
            yield one.term


def _length(end: Link, links: tuple[Link, ...], start: int) -> Origin | None:
    """How long a slice is, from where it begins and ends."""
    if start == 0:
        return end.origin
    origin = end.origin
    if isinstance(origin, Derived) and origin.operator == "+":
        begins = next((link.origin for link in links if link.argument == "start"), start)
        if origin.left == begins:
            return origin.right
        if origin.right == begins:
            return origin.left
    return None


def _of_list(reading: Reading, call: Call, argument: str, position: int, dims: Dims) -> Iterator[Term]:
    """The dimension that one entry of a list of numbers sets."""
    value = call.arguments()[argument]
    if argument == "split_sizes":
        ref = call.outputs[position]
        if ref is not None:
            yield reading.dims[ref.index][positive(call.arguments()["dim"], len(dims))]
    elif argument == "normalized_shape":
        source = call.arguments()["input"]
        assert isinstance(source, Ref)
        yield reading.of(source)[position - len(value)]
    elif len(value) == 1:
        yield from _expected(reading, call, argument, abs(value[0]))
    elif argument in ("size", "repeats") and len(value) == len(dims) and size(dims[position]) == value[position]:
        yield dims[position]


def _sample(term: Term) -> int:
    """The value of an expression where every unknown has some large value of its own: equal only for equal ones."""
    term = resolve(term)
    if isinstance(term, int):
        return term
    if isinstance(term, Var):
        return 10_007 + (term.serial * 2_654_435_761) % 999_983
    if isinstance(term, Prod):
        return prod(_sample(factor) for factor in term.factors)
    assert isinstance(term, Cat)
    return sum(_sample(piece) for piece in term.pieces)


__all__ = ["CodeSizes"]
