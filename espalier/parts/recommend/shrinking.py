"""Units that may go: dead ones, near-duplicates, and those that the others can stand in for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from espalier.edit.plan import Plan, Resize
from espalier.errors import EspalierWarning
from espalier.parts.recommend.judging import Judge, Proposal, attempted, best
from espalier.parts.recommend.recommendation import Evidence, Kind, Recommendation
from espalier.parts.recommend.redundancy import (
    Elimination,
    Twins,
    constant_units,
    elimination,
    makers_of,
    readers_of,
    twins,
    unread_units,
)
from espalier.parts.recommend.rows import Rows
from espalier.parts.recommend.spectra import RankTest, covariance, rank_test, signal_rank, stable_rank, unrelated
from espalier.parts.score import Context
from espalier.parts.units.refit import Looked, Refit

_UNEXPLAINED = 0.01
"""The part of a near-duplicate's variance that the other one may leave unexplained."""
_LOST = (1e-3, 1e-2, 3e-2, 1e-1)
"""Parts of the variance of what readers make that may be lost: as many sizes of an axis are tried."""
_REFIT_ROWS = 4096
_RIDGE, _NO_RIDGE = 1e-3, 1e-6
"""Of the refit; where another unit does all that one does, a ridge would only keep it from taking over."""


@dataclass(frozen=True)
class Redundancy:
    """What the units of an axis have in common."""

    axis: str
    size: int
    samples: int
    constant: tuple[int, ...]
    unread: tuple[int, ...]
    rank: RankTest
    twins: Twins
    elimination: Elimination | None
    stable: float | None
    """Stable rank of the weights that make the units."""
    signal: int | None
    """Their singular values above those of permuted entries."""

    @property
    def dead(self) -> tuple[int, ...]:
        """Units that do nothing."""
        return tuple(sorted({*self.constant, *self.unread}))

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """All of it in words."""
        rank = self.rank
        found = [
            Evidence(
                "effective rank", rank.rank,
                f"its {self.size} units fill {rank.rank:.1f} directions, {rank.null:.1f} if they had nothing in common "
                f"(p = {rank.p:.2g})",
                rank.null, rank.p,
            ),
            Evidence("dead units", len(self.dead), self._dead_words()),
            Evidence(
                "near-duplicates", len(self.twins.units),
                f"{len(self.twins.units)} repeat another unit but for {_UNEXPLAINED:.0%} of their variance "
                f"(correlations of permuted units reach {self.twins.null:.2f})",
                self.twins.null,
            ),
        ]  # fmt: skip
        if self.stable is not None and self.signal is not None:
            words = (
                f"the weights that make them have stable rank {self.stable:.1f}, and {self.signal} singular values "
                "above those of the same entries in another order"
            )
            found.append(Evidence("stable rank", self.stable, words, float(self.signal)))
        return tuple(found)

    def _dead_words(self) -> str:
        parts = []
        if self.constant:
            # none in m samples: with 95% confidence it is fewer than 3 in m (Hanley and Lippman-Hand 1983)
            parts.append(
                f"{len(self.constant)} never vary in {self.samples:,} samples, so that with 95% confidence they would "
                f"in fewer than {3 / self.samples:.2%}"
            )
        if self.unread:
            parts.append(f"{len(self.unread)} are read with weights of zero")
        return "; ".join(parts) or "no unit is dead"


def redundancy(context: Context, axis: str, rows: Rows, permutations: int) -> Redundancy:
    """Look at one axis; changes nothing."""
    generator = context.generator(f"{axis}, permuted")
    readers, makers = readers_of(context.structure, axis), makers_of(context.structure, axis)
    matrix, null = covariance(rows.values), unrelated(rows.values, permutations, generator)
    return Redundancy(
        axis=axis,
        size=len(rows.low),
        samples=len(rows.values),
        constant=constant_units(rows.low, rows.high),
        unread=() if readers is None else unread_units(readers),
        rank=rank_test(matrix, null),
        twins=twins(matrix, _UNEXPLAINED, null),
        elimination=None if readers is None else elimination(matrix, readers),
        stable=None if makers is None else stable_rank(makers),
        signal=None if makers is None else signal_rank(makers, min(permutations, 5), generator),
    )


def smaller(
    context: Context, judge: Judge, found: Redundancy, kinds: Collection[Kind], refused: dict[str, str]
) -> list[Recommendation]:
    """Plans by which units of one axis go, judged: at most one of each of these kinds."""
    recommended: list[Recommendation] = []
    looked = cache(partial(Refit(batches=len(context.probe), rows=_REFIT_ROWS).looked, context, [found.axis]))
    rank, dead, twin, stable = (*found.evidence, None)[:4]
    assert rank is not None and dead is not None and twin is not None  # noqa: PT018
    weights = () if stable is None else (stable,)
    makers: list[tuple[Kind, str, Sequence[int], tuple[Evidence, ...]]] = []
    if found.dead:
        makers.append(("dead", "remove {} dead of {} units", found.dead, (dead,)))
    if repeated := tuple(sorted(set(found.twins.units) - set(found.dead))):
        makers.append(("duplicates", "merge {} of {} units with their doubles", repeated, (twin,)))
    for kind, what, units, evidence in (one for one in makers if one[0] in kinds):
        recommended += _attempt(context, judge, found, looked, kind, what, units, evidence, refused)
    if found.elimination is not None and "redundant" in kinds:
        simple = len({*found.dead, *found.twins.units})  # what goes anyway: to choose others among doubles is no news
        counts = {sum(one <= part for one in found.elimination.lost) for part in _LOST}
        chosen = {count for count in counts if count > simple}
        trials: list[Recommendation] = []
        for count in sorted(chosen):
            lost = found.elimination.lost[count - 1]
            fit = Evidence(
                "lost", lost,
                f"the others, refitted, keep {1 - lost:.2%} of what is made of them" if lost > 1e-6
                else "the others, refitted, keep all that is made of them",
            )  # fmt: skip
            units = found.elimination.order[:count]
            what = "remove {} of {} units"
            trials += _attempt(context, judge, found, looked, "redundant", what, units, (rank, fit, *weights), refused)
        recommended += best(trials)
    return recommended


def _attempt(
    context: Context,
    judge: Judge,
    found: Redundancy,
    looked: Callable[[], Looked],
    kind: Kind,
    what: str,
    units: Sequence[int],
    evidence: tuple[Evidence, ...],
    refused: dict[str, str],
) -> list[Recommendation]:
    allowed = _allowed(context, found.axis, units)
    if not allowed:
        return []
    text = what.format(len(allowed), found.size)
    make: Callable[[], Proposal] = partial(_proposal, found.axis, looked, kind, text, allowed, evidence)
    return attempted(judge, [make], found.axis, refused)


def _proposal(
    axis: str,
    looked: Callable[[], Looked],
    kind: Kind,
    what: str,
    units: tuple[int, ...],
    evidence: tuple[Evidence, ...],
) -> Proposal:
    """The plan in which units go and what reads them is refitted, as far as it can be."""
    ridge = _RIDGE if kind == "redundant" else _NO_RIDGE
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EspalierWarning)
        deltas = looked().beginning({axis: units}, ridge).deltas
    notes = [str(one.message) for one in caught if issubclass(one.category, EspalierWarning)]
    more = tuple(Evidence("refit", 0.0, note.rstrip(".")) for note in notes)
    plan = Plan((Resize(axis, remove=tuple(sorted(units))),), deltas=_finite(deltas))
    return Proposal(kind, axis, what, plan, (*evidence, *more))


def _finite(deltas: object) -> dict[str, Tensor]:
    assert isinstance(deltas, dict)
    return {name: one for name, one in deltas.items() if bool(torch.isfinite(one).all())}


def _allowed(context: Context, axis: str, units: Sequence[int]) -> tuple[int, ...]:
    """As many of these units, in their order, as limits allow; one unit stays in any case."""
    one = context.structure.axes[axis]
    smallest = one.limits.above(max(one.size - len(units), 1) - 1)
    return () if smallest is None or smallest >= one.size else tuple(units[: one.size - smallest])


__all__ = ["Redundancy", "redundancy", "smaller"]
