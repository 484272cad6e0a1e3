"""A shrinking that is under way: prune, train, evaluate, measure, and what became of it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from espalier.edit.plan import Plan
from espalier.errors import EspalierWarning, ShrinkError
from espalier.measure.repeated import Reading
from espalier.oneshot.asked import Score, Train, put_modes
from espalier.oneshot.bounds import Bounds
from espalier.oneshot.folder import Kept, done, sizes_of
from espalier.oneshot.result import Outcome, Shrunk
from espalier.oneshot.rounds import Round
from espalier.oneshot.search import Search
from espalier.oneshot.target import Timed
from espalier.oneshot.tuning import Tuning
from espalier.oneshot.worth import Inputs, context_of, worth_of
from espalier.parts.goal import Scores
from espalier.parts.score import Context
from espalier.parts.units.refit import Refit
from espalier.structure import Structure

OnRound = Callable[[Round], None]


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
        on_round: OnRound | None,
    ) -> None:
        self._model, self._example = model, example
        self._search, self._target, self._score, self._drop = search, search.target, score, max_drop
        self._kept, self._inputs, self._seed, self._on_round = kept, inputs, seed, on_round
        self._best, self._best_round, self._floor = self._net, 0, math.nan
        self._modes = {path: module.training for path, module in model.named_modules()}
        self._notes: dict[str, None] = {}
        self._valued: tuple[Context, Scores] | None = None
        self._beyond: Reading | None = None
        """What the smallest network that was found needs, where that is more than it should."""

    @property
    def _structure(self) -> Structure:
        return self._search.structure

    @property
    def _net(self) -> nn.Module:
        return self._structure.model

    def begin(self, first: float, bounds: Bounds) -> None:
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
            bounds.loaded(kept.checkpoint(self._best_round), self._best, self._example, self._structure)
        if last:
            fresh = copy.deepcopy(self._model)
            self._search.structure = bounds.loaded(kept.checkpoint(last), fresh, self._example, self._structure)

    def settled_at_once(self) -> Shrunk | None:
        """The result where nothing has to be trained: the target is met already, or out of reach."""
        target = self._target
        if done(self._kept.rounds):
            return None
        if target.initial.within(target.limit):
            return self._ended("already met", f"the network as it was given needs {target.text(target.initial.value)}.")
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
            return
        search.learn_costs()
        if round_to == "auto":
            search.choose_rounding(self._worth()[1])
        else:
            search.round_to = round_to

    def pruned(self, tuning: Tuning, refit: bool) -> bool:
        """Remove units until the network costs no more than after this round; False where that cannot be."""
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
        what = "train"
        try:
            self._net.train()
            train(self._net, tuning)
            self._net.zero_grad(set_to_none=True)
            what = "evaluate"
            score = self._score.of(self._net)
        except Exception as error:
            raise self._failed(f"{what} failed in round {tuning.number} of {tuning.rounds}", error) from error
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

    def _worth(self) -> tuple[Context, Scores]:
        """What units are worth in the network as it is; once for every round."""
        if self._valued is None:
            context = context_of(self._structure, self._search.axes, self._inputs, self._seed)
            self._valued = context, worth_of(context)
        return self._valued

    def _limit(self, tuning: Tuning) -> float:
        """What the network may cost after a round."""
        first, last = self._target.initial.value, self._target.limit
        return (
            last if tuning.number == tuning.rounds else float(first * (last / first) ** (tuning.number / tuning.rounds))
        )

    def _refitted(self, plan: Plan, context: Context, scores: Scores) -> Plan:
        """The plan with what its readers become; what cannot be refitted is noted."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            start = Refit()(context, {edit.axis: edit.remove for edit in plan.edits}, scores)
        for one in caught:
            if issubclass(one.category, EspalierWarning):
                self._notes[str(one.message)] = None
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        return replace(plan, deltas=start.deltas)

    def _ended(self, outcome: Outcome, why: str) -> Shrunk:
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
            round_to=self._search.round_to,
            notes=(*self._notes, *refused),
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
        }
        found = learnt if number else {}
        self._kept.add(one, self._structure, found)
        if self._on_round is not None:
            self._on_round(one)


__all__ = ["OnRound", "Run"]
