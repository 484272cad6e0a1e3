"""Passes that are part of another pass: what is verified of that one is verified of them.

Train mode mostly runs what eval mode runs, by the same lines of code and on the same dimensions, and dropout besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from espalier.graph.decisions import Decisions
from espalier.graph.dims import Dim, substitute
from espalier.graph.trace import Call, Ref


class Pass(Protocol):
    """What is compared of a pass: see `TracePrediction`."""

    @property
    def calls(self) -> Sequence[Call]: ...
    @property
    def dims(self) -> Mapping[int, tuple[Dim, ...]]: ...
    @property
    def expectations(self) -> Mapping[int, Sequence[tuple[str, Dim]]]: ...
    @property
    def decisions(self) -> Decisions: ...


@dataclass(frozen=True)
class Cover:
    """The pass that a pass is part of."""

    by: int
    calls: Mapping[int, int]
    """Number of a call there -> that of the same call here."""


def covered(predictions: Sequence[Pass], plain: Mapping[int, Dim]) -> dict[int, Cover]:
    """Number of a pass -> the one that covers it, for those that one does which is covered by none.

    `plain` are the sizes that no edit changes, by the number of their unknown: passes have unknowns of their own there.
    """
    found: dict[int, Cover] = {}
    for number in sorted(range(len(predictions)), key=lambda one: len(predictions[one].calls)):
        for other in range(len(predictions)):
            if other != number and other not in found:
                calls = _Comparison(predictions[number], predictions[other], plain).shared()
                if calls is not None:
                    found[number] = Cover(other, calls)
                    break
    return found


class _Comparison:
    """Looks for every call of one pass, in order, in another."""

    def __init__(self, part: Pass, whole: Pass, plain: Mapping[int, Dim]) -> None:
        self._part = part
        self._whole = whole
        self._plain = plain
        self._known: dict[tuple[int, int], bool] = {}

    def shared(self) -> dict[int, int] | None:
        """Calls of the whole -> the same ones of the part; None if any is missing, or if values decide what runs."""
        part, whole = self._part, self._whole
        if part.decisions is not None or whole.decisions is not None or len(part.calls) > len(whole.calls):
            return None
        found: dict[int, int] = {}
        for call in whole.calls:
            if len(found) < len(part.calls) and self._are_same(part.calls[len(found)], call):
                found[call.index] = len(found)
        return found if len(found) == len(part.calls) else None

    def _are_same(self, left: Call, right: Call) -> bool:
        """Whether two calls are the same line of code at work on the same dimensions."""
        return (
            left.op is right.op
            and left.frame == right.frame
            and left.modules == right.modules
            and self._agree((left.args, left.outputs), (right.args, right.outputs))
            and left.kwargs.keys() == right.kwargs.keys()
            and all(self._agree(value, right.kwargs[key]) for key, value in left.kwargs.items())
            and self._expect_same(left, right)
        )

    def _agree(self, left: Any, right: Any) -> bool:
        if type(left) is not type(right):
            return False
        if isinstance(left, Ref):
            ours, theirs = self._part.dims[left.index], self._whole.dims[right.index]
            return len(ours) == len(theirs) and all(map(self._equal, ours, theirs))
        if isinstance(left, (tuple, list)):
            return len(left) == len(right) and all(map(self._agree, left, right))
        return bool(left == right)

    def _expect_same(self, left: Call, right: Call) -> bool:
        ours = self._part.expectations.get(left.index, ())
        theirs = self._whole.expectations.get(right.index, ())
        return len(ours) == len(theirs) and all(
            one[0] == other[0] and self._equal(one[1], other[1]) for one, other in zip(ours, theirs, strict=True)
        )

    def _equal(self, left: Dim, right: Dim) -> bool:
        if left is right:
            return True
        key = id(left), id(right)
        if key not in self._known:
            self._known[key] = substitute(left, self._plain) == substitute(right, self._plain)
        return self._known[key]


__all__ = ["Cover", "covered"]
