"""From records to what may be claimed: the comparisons of a suite, under each of its conditions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from espalier.suite.cells import contenders
from espalier.suite.kept import Kept, Record
from espalier.suite.running import Plan
from espalier.suite.speed import timings
from espalier.suite.statistics import Effect, holm, not_worse, over_tasks, paired
from espalier.suite.suite import Cell, Comparison, Condition

Value = Callable[[Record], float | None]


@dataclass(frozen=True)
class Row:
    """One comparison under one condition, on screening or on confirming seeds."""

    comparison: Comparison
    condition: Condition
    confirming: bool
    by_task: Mapping[str, Effect]
    """Differences of the test accuracy: of each seed the mean over points, paired."""
    effect: Effect
    """Over tasks."""
    p: float
    """Of the claim being wrong, before correction."""
    corrected: float
    """After Holm's correction over all comparisons of the same seeds."""
    pairs: int
    """Pairs of runs that it rests on."""
    missing: int
    """Pairs that the suite asks for and that are not there."""

    @property
    def verdict(self) -> str:
        """What may be said."""
        if math.isinf(self.effect.half):
            return "too few runs"
        if self.corrected >= 0.05:
            return "open"
        if self.comparison.claim == "better" and self.effect.mean < 0:
            return "worse"
        return "confirmed" if self.confirming else "holds"


class Results:
    """The records of a suite by what they are of."""

    def __init__(self, plan: Plan, kept: Kept) -> None:
        self.suite = plan.suite
        self.contenders = contenders(plan.suite)
        self.cells: list[tuple[Cell, Record]] = []
        """Those that were run, empty ones included."""
        self.everything = plan.cells
        self.speeds = [
            (one.cell, record) for one in timings(plan, kept) if (record := kept.get(one.key(plan.place.device)))
        ]
        """Networks that were timed, and what that gave."""
        for cell in plan.cells:
            record = plan.record(cell, kept)
            if record is not None:
                self.cells.append((cell, record))
        self._by: dict[tuple[Any, ...], dict[int, Record]] = {}
        for cell, record in self.cells:
            if "result" in record:
                self._by.setdefault(_where(cell), {})[cell.seed] = record

    def of(self, task: str, track: str, name: str, point: float, condition: Condition) -> Mapping[int, Record]:
        """Seed -> record of the runs that ended."""
        return self._by.get((task, track, name, point, condition.size, condition.budget, condition.scale), {})

    def points(self, condition: Condition) -> tuple[float, ...]:
        """The final sizes that are run under a condition."""
        return self.suite.points if condition.points is None else condition.points

    def tasks(self, condition: Condition) -> list[str]:
        """The tasks that are run under a condition."""
        return [one.name for one in self.suite.tasks if condition.tasks is None or one.name in condition.tasks]

    def rows(self) -> list[Row]:
        """All comparisons under all conditions under which anything was run; the confirming ones last."""
        found = []
        for confirming in (False, True):
            seeds = frozenset(self.suite.confirm_seeds if confirming else self.suite.seeds)
            some = [
                row
                for comparison in self.suite.comparisons
                for condition in self.suite.conditions
                if not confirming or comparison.of in self.suite.confirm
                if (row := self._row(comparison, condition, seeds, confirming)) is not None
            ]
            for row, corrected in zip(some, holm([row.p for row in some]), strict=True):
                found.append(replace(row, corrected=corrected))
        return found

    def _row(self, comparison: Comparison, condition: Condition, seeds: frozenset[int], confirming: bool) -> Row | None:
        value = accuracy if comparison.value == "accuracy" else minus_loss
        opposite = condition
        if comparison.other_scale is not None:
            if condition.scale == comparison.other_scale:
                return None
            opposite = replace(condition, scale=comparison.other_scale)
        elif condition.scale != 1:
            return None
        by_task: dict[str, Effect] = {}
        differences: list[list[float]] = []
        pairs = missing = 0
        for task in self.tasks(condition):
            by_seed: dict[int, list[float]] = {}
            for point in self.points(condition):
                own = self.of(task, comparison.track, comparison.of, point, condition)
                other = self.of(task, comparison.track, comparison.other, point, opposite)
                asked = seeds if condition.seeds is None else seeds & {*condition.seeds}
                both = own.keys() & other.keys() & asked
                missing += len(asked) - len(both)
                for seed in both:
                    by_seed.setdefault(seed, []).append(value(own[seed]) - value(other[seed]))
            pairs += sum(map(len, by_seed.values()))
            # a seed that lacks a point would weigh the others differently
            most = max(map(len, by_seed.values()), default=0)
            whole = [math.fsum(one) / len(one) for one in by_seed.values() if len(one) == most]
            if whole:
                by_task[task] = paired(whole)
                differences.append(whole)
        if not by_task:
            return None
        effect = over_tasks(list(by_task.values()))
        # a loss of the margin has to be ruled out on every task
        ruled_out = max(not_worse(one, comparison.margin) for one in differences)
        p = effect.p if comparison.claim == "better" else ruled_out
        return Row(comparison, condition, confirming, by_task, effect, p, p, pairs, missing)


def accuracy(record: Record) -> float:
    """On the test data, which were looked at once."""
    return float(record["result"]["test_accuracy"])


def minus_loss(record: Record) -> float:
    """Of the test data, so that more is better."""
    return -float(record["result"]["test_loss"])


def _where(cell: Cell) -> tuple[Any, ...]:
    return (
        cell.task.name, cell.track, cell.contender.name, cell.point, cell.size, cell.budget, cell.scale
    )  # fmt: skip


def mean_of(records: Sequence[Record], value: Value) -> Effect | None:
    """The mean of a value over runs with its interval; None if no run has it."""
    found = [number for one in records if (number := value(one)) is not None]
    return paired(found) if found else None


__all__ = ["Results", "Row", "Value", "accuracy", "mean_of"]
