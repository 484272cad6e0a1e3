"""Tries a plan out on fake tensors, and learns what code ties together or holds fixed.

Operators state most equations between dimensions, but code can hide one: a single attribute may set two sizes. That
shows when an edit of one of them does not run as predicted, and does with the other one edited along. The topology then
learns the tie; an axis that nothing mends is frozen with what was found.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from espalier.edit.attributes import AttributeChange, known_changes
from espalier.edit.changes import Changes, Limits, changes_of
from espalier.edit.nearby import Tie
from espalier.edit.plan import Plan, grow_plan
from espalier.edit.repair import UnrepairedError, repaired
from espalier.edit.verify import Mismatch, Subject, Verification, verify
from espalier.errors import PlanError
from espalier.graph.dims import axes_of
from espalier.graph.solver import Reason
from espalier.graph.topology import Topology

_MOST_TIES = 12
_DEEPEST = 2
_TRIAL = 7
"""Units by which axes grow on trial: enough for rounding in code (`chunk`) not to hide a tie."""


@dataclass(frozen=True)
class Staged:
    """A plan that runs as predicted on fake tensors; `changes.before` is what was known or learnt of the network."""

    changes: Changes
    attributes: Sequence[AttributeChange]
    verification: Verification


class TiedError(PlanError):
    """The plan names an axis that turned out to follow others; carries the topology that knows it."""

    def __init__(self, topology: Topology) -> None:
        super().__init__(f"{topology.notes[-1]}; name these axes in the plan instead.")
        self.topology = topology


def stage(subject: Subject, topology: Topology, plan: Plan, limits: Mapping[str, Limits]) -> Staged:
    """Check a plan and try it out: as it is, and where that fails with what code ties to the axes that it names.

    Raises:
        PlanError: the plan does not fit the topology (`TiedError`: an axis that it names follows others).
        UnrepairedError: the edited model would not run as predicted.
    """
    try:
        return _tried(subject, topology, plan, limits)
    except UnrepairedError:
        names = [edit.axis for edit in plan.edits]
        known = topology
        for name in names:
            if name in known.by_name:
                known = _with_ties_of(replace(subject, quick=True), known, name)
        if any(name not in known.by_name for name in names):
            raise TiedError(known) from None
        return _tried(subject, known, plan, limits, pairs=True)


def _with_ties_of(subject: Subject, topology: Topology, name: str) -> Topology:
    """The topology with what code ties to one axis, as far as growing it on trial shows."""
    trial = grow_plan({name: _TRIAL}, interface=True)
    try:
        _tried(subject, topology, trial, {})
    except UnrepairedError as problem:
        return _with_ties(subject, topology, trial, problem, _DEEPEST) or topology
    except PlanError:
        return topology
    return topology


def _tried(
    subject: Subject, topology: Topology, plan: Plan, limits: Mapping[str, Limits], *, pairs: bool = False
) -> Staged:
    changes = changes_of(plan, topology, limits)
    return Staged(changes, *repaired(subject, topology, changes.after, pairs=pairs))


def _with_ties(
    subject: Subject, topology: Topology, trial: Plan, problem: UnrepairedError, depth: int
) -> Topology | None:
    """The topology with one tie under which the trial runs, or with one more on top of one that came further."""
    further: list[tuple[Topology, Plan, UnrepairedError]] = []
    named = {edit.axis for edit in trial.edits}
    for tie in problem.ties[:_MOST_TIES]:
        follows = topology.axes[tie.axis].name in named
        if _independent(subject, topology, tie, follows):
            continue
        tied = topology.tied(tie.axis, tie.to)
        attempt = _trial(tied, tie) if follows else trial
        try:
            _tried(subject, tied, attempt, {})
        except UnrepairedError as error:
            if error.progress > problem.progress:
                further.append((tied, attempt, error))
        except PlanError:
            continue
        else:
            return tied
    for tied, attempt, obstacle in further if depth > 1 else ():
        deeper = _with_ties(subject, tied, attempt, obstacle, depth - 1)
        if deeper is not None:
            return deeper
    return None


def _trial(tied: Topology, tie: Tie) -> Plan:
    return grow_plan({tied.axes[number].name: _TRIAL for number in dict.fromkeys(axes_of(tie.to))})


def _independent(subject: Subject, topology: Topology, tie: Tie, follows: bool) -> bool:
    """Whether what the edited axis would be tied to can change on its own: then they merely have the same size."""
    others = dict.fromkeys(axes_of(tie.to)) if follows else (tie.axis,)
    for number in others:
        if topology.axes[number].reasons:
            return True
        try:
            _tried(subject, topology, grow_plan({topology.axes[number].name: _TRIAL}), {})
        except UnrepairedError:
            return False
    return True


def settled(subject: Subject, topology: Topology) -> Topology:
    """The topology in which every axis that may change really can, as far as fake tensors tell.

    Axes are tried all at once first; those around a difference are then tried one by one.
    """
    alone: list[str] = []
    while names := [one.name for one in topology.axes.values() if not one.reasons and one.name not in alone]:
        # By amounts whose sums hardly ever agree, so that sizes that code ties together come apart.
        amounts = {name: 1 + zlib.crc32(name.encode()) % 997 for name in names}
        after = changes_of(grow_plan(amounts), topology, {}).after
        mismatch = verify(subject, after, known_changes(subject.model, topology, after)).mismatch
        if mismatch is None:
            break
        alone += [name for name in _axes_near(topology, mismatch) if name in names] or names
    for name in alone:
        if name in topology.by_name and not topology.by_name[name].reasons:
            topology = _learnt(subject, topology, name)
    return topology


def _learnt(subject: Subject, topology: Topology, name: str) -> Topology:
    """The topology after trying to change one axis on fake tensors."""
    try:
        return stage(subject, topology, grow_plan({name: _TRIAL}), {}).changes.before
    except TiedError as error:
        return error.topology
    except UnrepairedError as error:
        return with_refusal(topology, topology.by_name[name].number, error)


def with_refusal(topology: Topology, number: int, error: UnrepairedError) -> Topology:
    """The topology in which an axis is frozen because nothing mends the code that uses it."""
    return topology.frozen({number: Reason("code", f"cannot change: {error.finding}")})


def _axes_near(topology: Topology, mismatch: Mismatch) -> Iterator[str]:
    """The axes whose sizes the operators at and around a difference see."""
    prediction = topology.predictions[mismatch.trace]
    found: dict[int, None] = {}
    for call in prediction.calls[max(0, mismatch.call - 3) : mismatch.call + 4]:
        for ref in call.outputs:
            for dim in prediction.dims.get(ref.index, ()) if ref is not None else ():
                found.update(dict.fromkeys(axes_of(dim)))
    return (topology.axes[number].name for number in found if number in topology.axes)
