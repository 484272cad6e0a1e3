"""One event of one method: is it time, what does the method propose, what does surgery make of it, is it kept?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

from espalier.edit.depth_edits import DepthEdit, Insert
from espalier.edit.plan import Plan, Remask, Resize
from espalier.errors import EspalierError, PlanError, SurgeryError
from espalier.measure.stats import calibrate, eval_loss, every_statistic, kept_statistics, new_statistics
from espalier.parts.clock import Clock, Last
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context, Score
from espalier.parts.timing.trigger import Metric, View
from espalier.parts.timing.trigger_losses import probe_loss
from espalier.record import Edit
from espalier.structure import Structure
from espalier.train.controller import Controller, Running
from espalier.train.events import Action, Event, finite
from espalier.train.memories import Memories
from espalier.train.slowing import Slowing
from espalier.train.warning import warn

_CALIBRATION_BATCHES = 4
_ROUNDS = 10
"""Tries to meet a budget that has to be measured."""


@dataclass(frozen=True)
class Acting:
    """Carries out the events of a session."""

    structure: Structure
    controller: Controller
    memories: Memories
    slowing: Slowing
    context: Callable[[Running], Context]
    record: Callable[[Event], None]

    def event(self, one: Running, clock: Clock, metrics: tuple[Metric, ...]) -> None:
        """What is due of one method now: an event, or a look whether it is time for one."""
        started = time.perf_counter()
        self.memories.catch_up()
        self.controller.refresh(one)
        one.last = Last(clock.step, clock.epoch)
        one.over = one.method.schedule.remaining(clock) == 0
        axes = self._axes_due(one, clock, metrics, started)
        if not axes:
            one.passed += 1
        for _ in range(_ROUNDS if axes else 0):
            changed = self._event(one, clock, axes, started)
            if not (changed and one.over and one.method.direction == "prune") or self.controller.measure(one):
                break
        if one.over:
            short = self.controller.short_of_budget(one)
            if short is not None:
                warn(short)

    def _axes_due(self, one: Running, clock: Clock, metrics: tuple[Metric, ...], started: float) -> Collection[str]:
        """The axes that the triggers name; all of them where there is none, or where a budget has to be met now."""
        schedule = one.method.schedule
        if not schedule.triggers:
            return one.axes
        scores = partial(self._scores, one, clock)
        view = View(self.context(one), clock, metrics, None, one.fired, one.acted, scores)
        heard = self.structure.peers.mean("the training loss", one.watch.mean())
        axes, stopped = self.structure.peers.agreed("whether to act", one.watch.look(view, heard))
        if stopped:
            one.over = True
            self._record(one, "stopped", None, None, None, f"{schedule.stop!r} holds", started)
            return ()
        if one.over and one.method.direction == "prune" and schedule.amount.lasts:
            return one.axes
        return axes

    def _scores(self, one: Running, clock: Clock, score: Score | None) -> Scores:
        goal = self.controller.goal(one, clock, one.axes)
        return (one.method.score if score is None else score)(self.context(one), goal)

    def _event(self, one: Running, clock: Clock, axes: Collection[str], started: float) -> bool:
        """One event; whether it changed the network."""
        method, context = one.method, self.context(one)
        loss, held_out = self._measured(context), 0.0
        if loss is not None and math.isfinite(loss) and method.accept is not None:
            held_out = self._held_out(context)
        if loss is not None and not math.isfinite(loss + held_out):
            why = f"the loss is {loss + held_out}, so nothing can be judged by it"
            warn(f"{method.name} skipped its event at step {clock.step}: {why}.")
            self._record(one, "skipped", None, loss, None, why, started)
            return False
        self.controller.begin_event(one, axes)
        edit = self._in_time(one, clock, axes, loss, started)
        one.passed += 1
        if edit is None:
            return False
        one.acted = Last(clock.step, clock.epoch)
        restore = self._calibrate(one, edit, context)
        if method.accept is not None and not method.accept.allows(held_out, after := self._held_out(context)):
            restore()
            self.structure.undo()
            self.memories.catch_up()
            why = f"the held-out loss would have gone from {held_out:.6g} to {after:.6g}"
            self._record(one, "rejected", None, loss, loss, why, started)
            return False
        one.fired += 1
        one.over = one.over or one.fired == method.schedule.max_events
        self.controller.note_edit(one, edit.sizes)
        if method.direction == "grow" and method.recovery.slows:
            self.slowing.begin([each.axis for each in edit.plan.edits if each.add], method.recovery)
        self._record(one, method.direction, edit, loss, self._measured(context), edit.why, started)
        return True

    def _in_time(
        self, one: Running, clock: Clock, axes: Collection[str], loss: float | None, started: float
    ) -> Edit | None:
        """Apply what the method proposes; growth that makes the network too slow for its budget is made smaller."""
        for _ in range(_ROUNDS):
            edit = self._carried_out(one, clock, axes, loss, started)
            if edit is None or one.method.direction == "prune" or self.controller.measure(one):
                return edit
            self.structure.undo()
            self.memories.catch_up()
        why = f"{one.method.schedule.amount.budget!r} leaves no time for more units"
        self._record(one, "rejected", None, loss, loss, why, started)
        return None

    def _carried_out(
        self, one: Running, clock: Clock, axes: Collection[str], loss: float | None, started: float
    ) -> Edit | None:
        """Apply what the method proposes; what is refused is left out, and the method asked again."""
        problem: EspalierError | None = None
        for _ in range(len(one.axes) + 1):  # every further round goes without an axis
            goal = self.controller.goal(one, clock, axes)
            found = one.method.propose(self.context(one), goal) if _anything_to_do(goal) else None
            plan = self.structure.peers.agreed("the plan of an event", found)
            if not plan:
                return None
            try:
                edit = self.structure.apply(plan)
                self.memories.catch_up()
                return edit
            except (PlanError, SurgeryError) as error:
                problem = error
                refused = self._refused_layers(goal, plan) if goal.layers else self._refused(plan)
                if not refused:
                    break
                one.left_out.update(refused)
                self._record_failure(one, ", ".join(refused), "; ".join(refused.values()), loss, started)
        self._record_failure(one, "this event", str(problem), loss, started)
        return None

    def _refused(self, plan: Plan) -> dict[str, str]:
        """The axes and masked parameters of a plan that surgery refuses, and why."""
        accepted: list[Resize] = []
        refused: dict[str, str] = {}
        for edit in plan.edits:
            try:
                self.structure.check(Plan((*accepted, edit), seed=plan.seed))
                accepted.append(edit)
            except (PlanError, SurgeryError) as error:
                refused[edit.axis] = str(error)
        masks: list[Remask] = []
        for mask in plan.masks:
            try:
                self.structure.check(Plan(tuple(accepted), seed=plan.seed, masks=(*masks, mask)))
                masks.append(mask)
            except (PlanError, SurgeryError) as error:
                refused[mask.tensor] = str(error)
        return refused

    def _refused_layers(self, goal: Goal, plan: Plan) -> dict[str, str]:
        """The layers of a plan that surgery refuses to remove or to insert, and why."""
        refused: dict[str, str] = {}
        accepted: tuple[DepthEdit, ...] = ()
        for name, one in goal.layers.items():
            if one.resizes and set(one.resizes) <= set(plan.edits):
                why = self._refused(Plan(one.resizes, seed=plan.seed)).values()
                refused |= {name: "; ".join(why)} if why else {}
            places = {_place(edit) for edit in one.edits}
            edits = tuple(edit for edit in plan.depth if _place(edit) in places)
            if not edits:
                continue
            try:
                self.structure.check(Plan((), seed=plan.seed, depth=(*accepted, *edits)))
                accepted += edits
            except (PlanError, SurgeryError) as error:
                refused[name] = str(error)
        return refused

    def _calibrate(self, one: Running, edit: Edit, context: Context) -> Callable[[], None]:
        """Give batch norms the statistics of their inputs: new units unless the plan did, all if asked for.

        Returns the way back.
        """
        model, count = self.structure.model, one.method.recovery.calibrate
        if count is None and one.method.direction == "grow" and edit.contract != "exact":
            count = _CALIBRATION_BATCHES
        grown = {each.axis: each.add for each in edit.plan.edits if each.add}
        places = new_statistics(model, self.structure.topology, grown, given=edit.given)
        if count:
            places = every_statistic(model)
        batches = context.probe[: count or _CALIBRATION_BATCHES] or (() if context.batch is None else (context.batch,))
        restore = kept_statistics(places)
        calibrate(model, places, [partial(context.loss, batch) for batch in batches])
        return restore

    def _measured(self, context: Context) -> float | None:
        batch = context.batch if context.batch is not None else next(iter(context.probe), None)
        found = None if batch is None else eval_loss(self.structure.model, partial(context.loss, batch))
        return self.structure.peers.agreed("the loss at an event", found)

    def _held_out(self, context: Context) -> float:
        return self.structure.peers.agreed("the held-out loss", probe_loss(context))

    def _record_failure(self, one: Running, what: str, why: str, loss: float | None, started: float) -> None:
        warn(f"{one.method.name} goes on without {what} from step {self.structure.step} on: {why}")
        self._record(one, "failed", None, loss, None, why, started)

    def _record(
        self,
        one: Running,
        action: Action,
        edit: Edit | None,
        before: float | None,
        after: float | None,
        why: str,
        started: float,
    ) -> None:
        cost = self.structure.cost()
        assert one.last is not None
        self.record(
            Event(
                one.last.step,
                one.last.epoch,
                one.method.name,
                action,
                {} if edit is None else dict(edit.sizes),
                cost if edit is None else edit.cost_before,
                cost,
                None if before is None else finite(before),
                None if after is None else finite(after),
                "" if edit is None else edit.contract,
                why,
                time.perf_counter() - started,
                {} if edit is None else dict(edit.masks),
                () if edit is None else tuple(map(str, edit.plan.depth)),
            )
        )


def _place(edit: DepthEdit) -> tuple[str, str]:
    """What tells the edits of one plan apart."""
    return (edit.at, edit.layer.kind) if isinstance(edit, Insert) else (edit.module, "")


def _anything_to_do(goal: Goal) -> bool:
    if not goal.sizes:
        return False
    if goal.direction == "prune":
        return goal.target.excess(goal.sizes) > 0
    return goal.fits(goal.sizes)


__all__ = ["Acting"]
