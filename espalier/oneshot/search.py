"""Finds the plan that just meets a target: planned by a model of the cost, judged by the cost itself.

Time is taken to be a + b FLOPs + c results (their elements, which norms and activations move), fitted to a few
measurements of the network with axes cut to half. Planning needs no more than that; how far to go is then searched by
measuring what plans lead to, each carried out and undone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np

from espalier.edit.changes import Limits
from espalier.edit.plan import Plan, Resize
from espalier.errors import MethodError, PlanError, ShrinkError, SurgeryError
from espalier.graph.topology import Topology
from espalier.measure.repeated import Reading
from espalier.oneshot.target import Target, Timed
from espalier.oneshot.worth import Known
from espalier.parts.budget import Budget, FLOPs, Parameters, Polynomial, volumes_of
from espalier.parts.goal import Scores
from espalier.parts.units.scaled import scaled_plan
from espalier.parts.units.select import Scope
from espalier.parts.units.where import choose_axes
from espalier.structure import Structure

_TRIES, _FEW_TRIES, _CONFIRMATIONS = 7, 4, 3
_CLOSE = 0.95
"""Part of the limit that a measured network has to need, or it could be larger."""
_ROUND = (1, 4, 8, 16, 32)
_SCOPES: tuple[Scope, ...] = ("global", "axis")
_BETTER = 0.98
"""What is lost with a rounding has to be so much less than with the finer one before it."""
_PROBES = 6
_SAME = 0.004
"""Parts of the work that are closer lead to the same network."""


@dataclass(frozen=True)
class Work(Budget):
    """FLOPs and the elements of all results, in the proportion in which they take time; planned by, never shown."""

    results: float = 0.0
    """What an element of a result costs, in FLOPs."""

    def cost(self, topology: Topology, axes: Iterable[str]) -> Polynomial:
        total: dict[tuple[str, ...], int] = defaultdict(int, FLOPs(1).cost(topology, axes).terms)
        if round(self.results):
            for names, count in _results(topology).terms.items():
                total[names] += round(self.results) * count
        return Polynomial(dict(total))

    def at(self, topology: Topology) -> int:
        """The work of the network at its present sizes."""
        return self.cost(topology, ()).at(_sizes(topology))


class Search:
    """Plans for one network and one target."""

    def __init__(self, structure: Structure, axes: Sequence[str], target: Target) -> None:
        self.structure, self.axes, self.target = structure, list(axes), target
        self.refused: dict[str, str] = {}
        """Axis -> why surgery refused to change it."""
        self.round_to = 1
        self.scope: Scope = "global"
        self.per_result = self.overhead = 0.0
        """What an element of a result costs, in FLOPs; and what the target counts where there is no work at all."""

    def learn_costs(self) -> None:
        """Fit how long FLOPs and results take; for targets that are measured."""
        if self._is_exact:
            return
        rows, values = [], []
        groups = [self.axes[at::_PROBES] for at in range(min(_PROBES, len(self.axes)))]
        for group in ([], *groups, self.axes):
            plan = self._cut(group, 0.5)
            with self.tried(plan) as done:
                if done:
                    topology = self.structure.topology
                    rows.append([1.0, Work(1).at(topology), _results(topology).at(_sizes(topology))])
                    values.append(self.target.read(self.structure.model, math.inf, rough=True).value)
        self.per_result, self.overhead = _fitted(np.array(rows), np.array(values))

    def choose_rounding(self, scores: Scores) -> None:
        """Take the widths with which the target is met at the least loss of what units are worth.

        Multiples of some number that kernels like, the coarsest that help; and whether axes compete or all keep their
        proportions, which kernels may like as well.
        """
        if not isinstance(self.target, Timed):
            return
        best, chosen, now = math.inf, (self.scope, 1), self.target.initial
        for self.scope, self.round_to in product(_SCOPES, _ROUND):
            plan, _ = self._measured(self.target.limit, now, scores, _FEW_TRIES)
            if plan is not None:
                lost = sum(float(scores.values[edit.axis][list(edit.remove)].sum()) for edit in plan.edits)
                if lost < _BETTER * best:
                    best, chosen = lost, (self.scope, self.round_to)
        self.scope, self.round_to = chosen

    def smallest(self) -> Reading:
        """What the smallest network that the limits allow costs."""
        while True:  # every further one goes without an axis that was refused
            with self.tried(self._cut(self.axes, 0.0)) as done:
                if done:
                    return self.target.read(self.structure.model, self.target.limit, rough=True)

    def restart(self, structure: Structure) -> None:
        """Go on with another structure, or with this one after blocks went."""
        self.structure = structure
        if any(axis not in structure.axes for axis in self.axes):
            self.axes = [name for name, why in choose_axes(structure, "prune", None).items() if why is None]

    def plan(self, limit: float, scores: Scores, *, roughly: bool = False) -> tuple[Plan | None, Reading]:
        """The plan after which the network needs just no more than a limit, and what it needs then.

        An empty plan if it meets it as it is; None, and the least that was found, where no plan leads there. Roughly:
        after fewer measurements.
        """
        now = self.target.read(self.structure.model, limit, rough=True)
        if now.within(limit):
            return Plan(()), now
        if self._is_exact:
            return self._counted(limit, now, scores)
        if roughly:
            return self._measured(limit, now, scores, _FEW_TRIES)
        return self._confirmed(limit, now, scores)

    @property
    def _is_exact(self) -> bool:
        """Whether what the target counts is what plans are made by."""
        return isinstance(self.target.budget, (FLOPs, Parameters))

    def _counted(self, limit: float, now: Reading, scores: Scores) -> tuple[Plan | None, Reading]:
        for _ in range(len(self.axes)):  # every further one goes without an axis that was refused
            plan = self._plan(type(self.target.budget)(math.floor(limit)), scores)
            if not plan:
                break
            with self.tried(plan) as done:
                if done:
                    return plan, self.target.read(self.structure.model, limit)
        return None, now

    def _confirmed(self, limit: float, now: Reading, scores: Scores) -> tuple[Plan | None, Reading]:
        """A plan that meets the limit by a thorough measurement too; else the one that came nearest."""
        best, aim = self._measured(limit, now, scores, _TRIES), limit
        for _ in range(_CONFIRMATIONS):
            plan = best[0]
            if plan is None:
                break
            with self.tried(plan):
                reading = self.target.read(self.structure.model, limit)
            best = plan, reading
            if reading.high <= limit:
                break
            aim *= limit / reading.high
            smaller = self._measured(aim, now, scores, _TRIES)
            if smaller[0] is None:
                break
            best = smaller
        return best

    def _measured(self, limit: float, now: Reading, scores: Scores, tries: int) -> tuple[Plan | None, Reading]:
        best: tuple[Plan | None, Reading] = None, now
        high = 1.0, now.value  # (part of the work, what it needs): too much, and little enough
        low = 0.0, min(self.overhead, 0.9 * limit)
        part = _between(low, high, limit)
        for _ in range(tries):
            plan = self._plan(self._work(min(max(part, 0.001), 0.995)), scores)
            if not plan:
                low = part, low[1]  # there is none so small
                part = (part + high[0]) / 2
                continue
            with self.tried(plan) as done:
                if not done:
                    continue
                reading = self.target.read(self.structure.model, limit, rough=True)
            if reading.value <= limit and _better(best, reading, limit):
                best = plan, reading
            elif best[0] is None and reading.value < best[1].value:
                best = None, reading
            if reading.high <= limit:
                low = part, reading.value
                if reading.value >= _CLOSE * limit:
                    break
            else:
                high = part, max(reading.value, limit)
            if high[0] - low[0] < _SAME:
                break
            part = _between(low, high, limit)
        return best

    @contextmanager
    def tried(self, plan: Plan) -> Iterator[bool]:
        """The network as a plan makes it, while the body runs; False where it cannot be carried out."""
        if not plan:
            yield True
            return
        try:
            self.structure.apply(plan)
        except (PlanError, SurgeryError) as problem:
            self._find_refused(plan, problem)
            yield False
            return
        try:
            yield True
        finally:
            self.structure.undo()

    def _find_refused(self, plan: Plan, problem: Exception) -> None:
        """Leave out the axes that cannot change by themselves, so that the next plan goes without them."""
        for edit in plan.edits:
            try:
                self.structure.check(Plan((edit,), seed=plan.seed))
            except (PlanError, SurgeryError) as error:
                self.refused[edit.axis] = str(error)
        if not any(edit.axis in self.refused for edit in plan.edits):
            raise ShrinkError(f"the network cannot be made smaller as planned: {problem}") from problem
        self.axes = [axis for axis in self.axes if axis not in self.refused]
        if not self.axes:
            raise ShrinkError(f"no axis can shrink any more: {problem}") from problem

    def _cut(self, axes: Sequence[str], part: float) -> Plan:
        """The plan that leaves this part of the units of axes, the first ones, or as few as the limits allow."""
        sizes, edits = _sizes(self.structure.topology), []
        for axis in axes:
            least = self.structure.limits.get(axis, Limits()).above(math.ceil(part * sizes[axis]) - 1)
            if least is not None and 0 < least < sizes[axis]:
                edits.append(Resize(axis, remove=tuple(range(least, sizes[axis]))))
        return Plan(tuple(edits))

    def _work(self, part: float) -> Work:
        work = Work(1, results=self.per_result)
        return Work(max(1, round(part * work.at(self.structure.topology))), results=self.per_result)

    def _plan(self, budget: Budget, scores: Scores) -> Plan:
        """The plan for a budget; an empty one where the sizes that there are do not lead so far."""
        known = Known(scores.values)
        try:
            return scaled_plan(
                self.structure, budget, score=known, scope=self.scope, axes=self.axes, round_to=self.round_to
            )
        except MethodError:
            return Plan(())


def _better(best: tuple[Plan | None, Reading], found: Reading, limit: float) -> bool:
    """Whether a network that meets the limit is better than the best so far: surely within it, then larger."""
    return best[0] is None or (found.high <= limit, found.value) > (best[1].high <= limit, best[1].value)


def _between(low: tuple[float, float], high: tuple[float, float], limit: float) -> float:
    """Where a straight line between two measurements meets a hair less than the limit, kept off both ends."""
    (left, least), (right, most) = low, high
    aim = (0.5 + _CLOSE / 2) * limit
    part = left + (right - left) * (aim - least) / (most - least) if most > least else (left + right) / 2
    inset = 0.1 * (right - left)
    return min(max(part, left + inset), right - inset)


def _fitted(rows: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """c / b and a of the least-squares fit values = a + b x + c y; without y, or 0, where that would be negative."""
    for columns in (3, 2):
        if len(rows) >= columns:
            scale = rows.max(0)[:columns]
            fit = np.linalg.lstsq(rows[:, :columns] / scale, values, rcond=None)[0] / scale
            if (fit[1:] > 0).all():
                return (float(fit[2] / fit[1]) if columns == 3 else 0.0), max(0.0, float(fit[0]))
    return 0.0, 0.0


def _results(topology: Topology) -> Polynomial:
    """Elements of what all operators of the eval-mode pass give."""
    prediction = topology.predictions[0]
    given = {*prediction.tensors.values(), *prediction.inputs.values()}
    return volumes_of(topology, ((1, dims) for value, dims in prediction.dims.items() if value not in given))


def _sizes(topology: Topology) -> Mapping[str, int]:
    return {name: topology.sizes[record.number] for name, record in topology.by_name.items()}


__all__ = ["Search", "Work"]
