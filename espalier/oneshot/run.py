"""A shrinking that is under way: prune, train, evaluate, measure, and what became of it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from espalier.edit.plan import Plan
from espalier.errors import EspalierWarning, ShrinkError
from espalier.measure.repeated import Reading
from espalier.oneshot.asked import Score, Train, put_modes
from espalier.oneshot.blocks import Block, droppable, plan_without
from espalier.oneshot.folder import Kept, done, sizes_of
from espalier.oneshot.meter import FORWARD, TRAINED, Meter
from espalier.oneshot.result import Outcome, Shrunk
from espalier.oneshot.rounds import Round
from espalier.oneshot.search import Search
from espalier.oneshot.target import Timed
from espalier.oneshot.tuning import Tuning, shares
from espalier.oneshot.worth import Inputs, context_of, worth_of
from espalier.parts.goal import Scores
from espalier.parts.score import Context
from espalier.parts.units.refit import Refit
from espalier.structure import Structure
from espalier.train.checkpoint import load

OnRound = Callable[[Round], None]


@dataclass(frozen=True)
class _Trial:
    """What came of trying a number of blocks."""

    score: float
    plan: Plan
    """What pruned it, the blocks aside."""
    state: Mapping[str, Tensor]
    valued: tuple[Context, Scores]
    """What units were worth before."""


class Run:
    """The network on its way from round to round, and the best one so far."""

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        search: Search,
        score: Score,
        max_drop: float,
        kept: Kept,
        inputs: Sequence[Inputs],
        seed: int,
        meter: Meter,
        on_round: OnRound | None,
    ) -> None:
        self._model, self._example = model, example
        self._search, self._target, self._score, self._drop = search, search.target, score, max_drop
        self._kept, self._inputs, self._seed, self._on_round = kept, inputs, seed, on_round
        self._meter = meter
        meter.set_aside(inputs)
        self._best, self._best_round, self._floor = self._net, 0, math.nan
        self._modes = {path: module.training for path, module in model.named_modules()}
        self._notes: dict[str, None] = {}
        self._valued: tuple[Context, Scores] | None = None
        self._order: list[Block] = []
        """Blocks that may go, in that order."""
        self.left = 1.0
        """The part of the training that trials have left."""
        self._is_pruned = False
        """Whether the next round has its network already: that of a trial."""
        self._dropped: tuple[str, ...] = ()
        """Names of the blocks that went, as they were given."""
        self._beyond: Reading | None = None
        """What the smallest network that was found needs, where that is more than it should."""

    @property
    def _structure(self) -> Structure:
        return self._search.structure

    @property
    def _net(self) -> nn.Module:
        return self._structure.model

    def begin(self, first: float) -> None:
        """Take in the network as it was given, with its score, or the rounds that a folder holds."""
        if not self._inputs:
            self._notes["evaluate never called the network itself, so that units are judged by their weights."] = None
        kept = self._kept
        if not kept.rounds:
            initial = self._target.initial
            self._add(0, initial.value, initial, first)
        self._floor = self._score.floor(kept.rounds[0].score, self._drop)
        held = [one.number for one in kept.rounds[1:] if self._score.holds(one.score, self._floor)]
        self._best_round, last = max(held, default=0), done(kept.rounds)
        self._best = copy.deepcopy(self._net)
        if self._best_round:
            load(kept.checkpoint(self._best_round), self._best, self._example)
        if last:
            fresh = copy.deepcopy(self._model)
            self._search.restart(load(kept.checkpoint(last), fresh, self._example))

    def settled_at_once(self) -> Shrunk | None:
        """The result where nothing has to be trained: the target is met already, or out of reach."""
        target = self._target
        if done(self._kept.rounds):
            return None
        if target.initial.within(target.limit):
            return self._ended("already met", f"the network as it was given needs {target.text(target.initial.value)}.")
        smallest = self._search.smallest()
        if self._order and smallest.within(target.limit) is False:
            with self._without(self._order):
                smallest = self._search.smallest()
        if smallest.within(target.limit) is not False:
            return None
        why = (
            f"the smallest network that limits, min_fraction and frozen axes allow needs "
            f"{target.text(smallest.value)}, and the target is {target.text(target.limit)}; nothing was trained."
        )
        if isinstance(target, Timed) and target.budget.of is None and smallest.value > 100 * target.limit:
            why += " measure= has to return seconds, not milliseconds."
        return self._ended("out of reach", why)

    def prepare(self, round_to: int | Literal["auto"]) -> None:
        """Learn what time is made of, and which sizes the runtime likes."""
        search, found = self._search, self._kept.found
        if found:
            search.per_result, search.overhead = float(found["per_result"]), float(found["overhead"])
            search.round_to, search.scope = int(found["round_to"]), found["scope"]
            self.left, self._dropped = float(found["left"]), tuple(found["dropped"])
            self._meter.spent += float(found["spent"])
            return
        search.learn_costs()
        if round_to == "auto":
            search.choose_rounding(self._worth()[1])
        else:
            search.round_to = round_to

    def consider_blocks(self, keep: Iterable[str]) -> None:
        """Find out which blocks may go, where time is what counts and there is something to judge them by."""
        if isinstance(self._target, Timed) and self._inputs and not self._kept.found:
            self._order = droppable(self._structure, keep, self._inputs, self._meter)

    def drop_blocks(self, train: Train, tuning: Tuning, refit: bool) -> None:
        """Leave out as many of the blocks that are considered as is found to be best.

        None, as many as meet the target by themselves, and two numbers in between are tried: each pruned to the target
        in width too, and trained for a short time. One round goes on from the best of these networks.

        Raises:
            ShrinkError: one of the user's functions failed; what was reached before is in its `reached`.
        """
        order, found = self._order, dict[int, _Trial]()
        most = self._enough(order)
        counts = sorted({-(-most * third // 3) for third in range(4)}) if most else []
        for at, count in enumerate(counts):
            with self._without(order[:count]):
                trial = self._trial(train, tuning, refit, ahead=len(counts) - at - 1)
            if trial is not None and math.isfinite(trial.score):
                found[count] = trial
        best = max(found, key=lambda count: (self._score.rank(found[count].score), -count), default=0)
        if best:
            self._structure.apply(plan_without(order[:best]))
            self._search.restart(self._structure)
            self._dropped = tuple(block.name for block in order[:best])
        if best in found:
            self._valued = found[best].valued
            if tuning.rounds == 1:
                if found[best].plan:
                    self._structure.apply(found[best].plan)
                self._net.load_state_dict(found[best].state)
                self._is_pruned = True

    def pruned(self, tuning: Tuning, refit: bool) -> bool:
        """Remove units until the network costs no more than after this round; False where that cannot be."""
        if self._is_pruned:
            self._is_pruned = False
            return True
        context, scores = self._worth()
        self._valued = None
        plan, reading = self._search.plan(self._limit(tuning), scores)
        if plan is None:
            self._beyond = reading
            return False
        if plan:
            self._structure.apply(self._refitted(plan, context, scores) if refit and self._inputs else plan)
        return True

    def trained(self, train: Train, tuning: Tuning) -> None:
        """Train, evaluate and measure the network that was pruned.

        Raises:
            ShrinkError: one of the user's functions failed; what was reached before is in its `reached`.
        """
        rest = sum(shares(tuning.rounds, self.left)[tuning.number - 1 :])
        score = self._scored(self._net, train, tuning, rest, ahead=tuning.rounds - tuning.number)
        limit = self._limit(tuning)
        self._add(tuning.number, limit, self._target.read(self._net, limit), score)
        if self._score.holds(score, self._floor):
            self._best, self._best_round = copy.deepcopy(self._net), tuning.number

    def result(self) -> Shrunk:
        """What was reached, after the last round."""
        last, target = self._kept.rounds[-1], self._target
        within, shown, first = last.cost.within(target.limit), target.text(last.cost.value), self._kept.rounds[0].score
        wanted = f"the target is {target.text(target.limit)}"
        scored = f"scores {last.score:.4g} (at first {first:.4g}, floor {self._floor:.4g})"
        if self._beyond is not None:
            least = target.text(self._beyond.value)
            return self._ended("out of reach", f"no network was found below {least}, and {wanted}; the last {scored}.")
        if not self._score.holds(last.score, self._floor):
            instead = "as it was given" if self._best_round == 0 else f"of round {self._best_round}"
            return self._ended(
                "accuracy missed",
                f"the network needs {shown} ({wanted}), but {scored}; `model` is the one {instead}. Train longer, "
                "learn from a teacher, or ask for less.",
            )
        if within is None:
            interval = f"{target.text(last.cost.low)} to {target.text(last.cost.high)}"
            return self._ended(
                "uncertain",
                f"the network needs {shown}, by {last.cost.count} measurements between {interval}, and {wanted}; it "
                f"{scored}. Measure on a machine with less other work, or more than one pass at a time.",
            )
        outcome: Outcome = "reached" if within else "target missed"
        return self._ended(outcome, f"the network needs {shown}, {wanted}; it {scored}.")

    def _scored(self, net: nn.Module, train: Train, tuning: Tuning, rest: float, ahead: int) -> float:
        """The score of a network of the present sizes after it was trained.

        Args:
            rest: the part of the whole training that is left for this call and those after it.
            ahead: how many more networks will be valued, refitted and evaluated after this one.
        """
        what, cost = "train", self._meter.of(self._structure)
        granted = None
        if self._meter.most is not None:
            granted = self._meter.granted(tuning.share / rest, cost, ahead * (cost if tuning.number else 1.0))
            tuning = replace(tuning, samples=int(granted / (cost + self._meter.of_teacher)))
        try:
            net.train()
            with self._meter.watching(net, cost, granted):
                train(net, tuning)
            net.zero_grad(set_to_none=True)
            what = "evaluate"
            with self._meter.watching(net, cost):
                return self._score.of(net)
        except Exception as error:
            where = f"round {tuning.number} of {tuning.rounds}" if tuning.number else "a trial"
            raise self._failed(f"{what} failed in {where}", error) from error

    def _enough(self, order: Sequence[Block]) -> int:
        """The smallest number of blocks without which the target is met, or all."""
        low, high = 0, len(order) + 1
        while high - low > 1:
            middle = (low + high) // 2
            with self._without(order[:middle]):
                meets = self._target.read(self._net, self._target.limit, rough=True).value <= self._target.limit
            low, high = (low, middle) if meets else (middle, high)
        return min(high, len(order))

    @contextmanager
    def _without(self, blocks: Sequence[Block]) -> Iterator[None]:
        """The network without some blocks, while the body runs."""
        if not blocks:
            yield
            return
        axes, valued = self._search.axes, self._valued
        self._structure.apply(plan_without(blocks))
        self._valued = None
        self._search.restart(self._structure)
        try:
            yield
        finally:
            self._structure.undo()
            self._search.axes, self._valued = axes, valued

    def _trial(self, train: Train, tuning: Tuning, refit: bool, ahead: int) -> _Trial | None:
        """A copy that was pruned to the target and trained for a short time; None if the target cannot be met."""
        if self._search.smallest().within(self._target.limit) is False:
            return None
        valued = context, scores = self._worth()
        plan, _ = self._search.plan(self._target.limit, scores, roughly=tuning.rounds > 1)
        if plan is None:
            return None
        if plan:
            plan = self._refitted(plan, context, scores) if refit else plan
            self._structure.apply(plan)
        try:
            net = copy.deepcopy(self._net)
            score = self._scored(net, train, tuning, self.left, ahead + tuning.rounds)
        finally:
            if plan:
                self._structure.undo()
        self.left -= tuning.share
        return _Trial(score, plan, net.state_dict(), valued)

    def _worth(self) -> tuple[Context, Scores]:
        """What units are worth in the network as it is; once for every round."""
        if self._valued is None:
            context = context_of(self._structure, self._search.axes, self._inputs, self._seed)
            self._valued = context, worth_of(context)
            self._meter.charge([draw.inputs for draw in context.probe], TRAINED * self._meter.of(self._structure))
        return self._valued

    def _limit(self, tuning: Tuning) -> float:
        """What the network may cost after a round."""
        first, last = self._target.initial.value, self._target.limit
        return (
            last if tuning.number == tuning.rounds else float(first * (last / first) ** (tuning.number / tuning.rounds))
        )

    def _refitted(self, plan: Plan, context: Context, scores: Scores) -> Plan:
        """The plan with what its readers become; what cannot be refitted is noted."""
        self._meter.charge(self._inputs, FORWARD * self._meter.of(self._structure))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            start = Refit(batches=len(self._inputs))(context, {edit.axis: edit.remove for edit in plan.edits}, scores)
        for one in caught:
            if issubclass(one.category, EspalierWarning):
                self._notes[str(one.message)] = None
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        return replace(plan, deltas=start.deltas)

    def _ended(self, outcome: Outcome, why: str) -> Shrunk:
        gone = [f"without the blocks {', '.join(self._dropped)}, by the names they had."] if self._dropped else []
        refused = (f"{axis} did not change: {reason}" for axis, reason in self._search.refused.items())
        last = self._best if self._best_round == done(self._kept.rounds) else self._net
        for network in (self._best, last):
            put_modes(network, self._modes)
        timed = isinstance(self._target, Timed)
        return Shrunk(
            model=self._best,
            outcome=outcome,
            why=why,
            rounds=tuple(self._kept.rounds),
            floor=self._floor,
            chosen=self._best_round,
            last=last,
            target=repr(self._target.budget),
            limit=self._target.limit,
            unit=f"{self._target.unit} [ms]" if timed else self._target.unit,
            scale=1000.0 if timed else 1.0,
            spent=None if self._meter.most is None else self._meter.spent,
            round_to=self._search.round_to,
            notes=(*gone, *self._notes, *refused),
        )

    def _failed(self, what: str, error: Exception) -> ShrinkError:
        reached = self._ended("interrupted", f"{what}; this is what was reached before.")
        found = ShrinkError(
            f"{what}: {type(error).__name__}: {error}. What was reached before is the `reached` of this error; with "
            "folder=..., shrink goes on after the last round."
        )
        found.reached = reached
        return found

    def _add(self, number: int, limit: float, reading: Reading, score: float) -> None:
        cost = self._structure.cost()
        one = Round(number, limit, reading, score, cost.parameters, cost.flops, sizes_of(self._structure))
        search = self._search
        learnt = {
            "per_result": search.per_result,
            "overhead": search.overhead,
            "round_to": search.round_to,
            "scope": search.scope,
            "left": self.left,
            "dropped": list(self._dropped),
            "spent": self._meter.spent,
        }
        found = learnt if number else {}
        self._kept.add(one, self._structure, found)
        if self._on_round is not None:
            self._on_round(one)


__all__ = ["OnRound", "Run"]
