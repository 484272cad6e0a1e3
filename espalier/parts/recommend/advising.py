"""`espalier.recommend`: which edits of a trained network are likely to help, and why."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch

from espalier.errors import EspalierError, MethodError
from espalier.measure.stats import without_a_trace
from espalier.parts.checks import check_count
from espalier.parts.recommend.batches import halved
from espalier.parts.recommend.criteria import WBIC, Criterion, criterion_named
from espalier.parts.recommend.deepening import chosen_sites, thinner_layers, with_layers, without_layers
from espalier.parts.recommend.growing import larger
from espalier.parts.recommend.judging import PARTS, Judge
from espalier.parts.recommend.planned import Loss
from espalier.parts.recommend.recommendation import KINDS, ROUNDING, Evidence, Kind, Recommendation, Recommendations
from espalier.parts.recommend.rows import rows_of
from espalier.parts.recommend.shrinking import redundancy, smaller
from espalier.parts.score import Context
from espalier.parts.units.where import choose_axes
from espalier.structure import Structure


def recommend(
    structure: Structure,
    *,
    loss: Loss,
    batches: Sequence[Any],
    criterion: str | Criterion | WBIC = "aic-effective",
    samples: int | None = None,
    axes: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    kinds: Collection[Kind] | None = None,
    level: float = 0.05,
    permutations: int = 39,
    seed: int = 0,
) -> Recommendations:
    """Look at every axis and every layer of a trained network, and rank the edits that are likely to help.

    Axes: effective rank of activations, stable rank of weights, dead units, near-duplicates, units that others can
    stand in for, and what new units could give that the present ones cannot. Layers: how much each changes what goes
    through it and the loss, what new ones could give, low-rank weights, linear maps one after the other. What permuting
    samples or weights would show is beside every measure, so that no threshold depends on a scale. Every plan is tried,
    in eval mode, on samples that it was not made from; the network stays as it is, to the last bit.

    Args:
        structure: of the trained network.
        loss: model and batch -> mean loss of a sample. The criteria other than ``loss`` take it for a mean negative
            log-likelihood in nats.
        batches: a few: tensors, or tuples, lists or mappings of them, samples along the first dimension. Of held-out
            samples the predicted loss is that of new data; of training samples it is too low where the network has
            learnt them by heart, which is what criteria with a penalty are for.
        criterion: ``loss``, ``aic``, ``bic`` (by the number of parameters), ``aic-effective``, ``bic-effective`` (by
            effective degrees of freedom), ``wbic``, or a `Criterion` or `WBIC` value.
        samples: the number of independent samples that the network was trained on; those of `batches` by default.
        axes: names or patterns of the axes to look at; all by default, but for the size of attention heads.
        layers: names or patterns of layers and cells; all by default; ``[]`` for none, new ones included.
        kinds: of edits to look for, as `Recommendation.kind` names them; all by default. What others would be is then
            not tried, which is most of the time that looking takes.
        level: of the tests against permuted data.
        permutations: of each of these tests; at least 1 / level - 1 are needed for any to be passed. That of growing
            ends as soon as it cannot be passed any more.
        seed: of permutations and of new weights.

    Raises:
        MethodError: batches that have no samples, an argument out of range, names that fit nothing, or a loss that is
            not finite.
        CaptureError: the model does not run.
    """
    judged_by = criterion_named(criterion)
    wanted = KINDS if kinds is None else frozenset(kinds)
    if unknown := sorted(wanted - KINDS):
        raise MethodError(f"kinds: expected some of {', '.join(sorted(KINDS))}, found {', '.join(map(repr, unknown))}.")
    check_count("permutations", permutations)
    if samples is not None:
        check_count("samples", samples, 2)
    if isinstance(level, bool) or not 0 < level < 1:
        raise MethodError(f"level: expected a probability between 0 and 1, found {level!r}.")
    if (1 + permutations) * level < 1:
        raise MethodError(
            f"permutations: with {permutations} no test can reach level {level}; expected {round(1 / level)} or more."
        )
    with without_a_trace(structure.model):
        for module in structure.model.modules():
            module.training = False
        parted = halved(batches, PARTS, partial(loss, structure.model))
    chosen = choose_axes(structure, "prune", axes)
    growable = choose_axes(structure, "grow", axes)
    refused = {axis: structure.axes[axis].reason or why for axis, why in chosen.items() if why is not None}
    able = tuple(axis for axis, why in chosen.items() if why is None)
    context = Context(
        structure, able, 0, 0, 1.0, seed, partial(loss, structure.model), parted.found[0], parted.found
    )  # fmt: skip
    measured: dict[str, tuple[Evidence, ...]] = {}
    found: list[Recommendation] = []
    with without_a_trace(structure.model):
        for module in structure.model.modules():
            module.training = False
        judge = Judge.of(structure, loss, parted, samples or parted.count, judged_by, seed)
        if not bool(torch.isfinite(judge.before).all()):
            raise MethodError(f"the loss of the network as it is, {judge.loss}, is not finite on these batches.")
        rows, problems = rows_of(structure, able, parted.whole, loss, context.generator("positions"))
        refused |= problems
        for axis in able:
            if axis in rows:
                seen = redundancy(context, axis, rows[axis], permutations)
                measured[axis] = seen.evidence
                if structure.axes[axis].prunable:
                    found += smaller(context, judge, seen, wanted, refused)
            if growable.get(axis) is not None:
                refused.setdefault(axis, f"not grown: {growable[axis]}")
            elif structure.axes[axis].growable and "grow" in wanted:
                try:
                    grown, evidence = larger(context, judge, axis, permutations, level, refused)
                except EspalierError as error:
                    refused.setdefault(axis, f"not grown: {' '.join(str(error).split())}")
                else:
                    found += grown
                    measured[axis] = (*measured.get(axis, ()), *evidence)
        if layers is None or layers:
            found += _of_layers(context, judge, layers, wanted, permutations, measured, refused)
        found = _by_criterion(found, judge, judged_by)
    ranked = sorted((one for one in found if _helps(one, level, judge.loss)), key=_order)
    others = sorted((one for one in found if not _helps(one, level, judge.loss)), key=_order)
    return Recommendations(
        tuple(ranked), tuple(others), str(judged_by), judge.loss, judge.own_step, judge.count, level, measured, refused
    )  # fmt: skip


def _of_layers(
    context: Context,
    judge: Judge,
    asked: Sequence[str] | None,
    kinds: Collection[Kind],
    permutations: int,
    measured: dict[str, tuple[Evidence, ...]],
    refused: dict[str, str],
) -> list[Recommendation]:
    removable, thinner = chosen_sites(context, asked, refused)
    gone, seen = without_layers(context, judge, removable if "remove" in kinds else (), permutations, refused)
    thin, weights = thinner_layers(context, judge, thinner, kinds, permutations, refused)
    for one in (seen, weights):
        for site, evidence in one.items():
            measured[site] = (*measured.get(site, ()), *evidence)
    new = with_layers(context, judge, refused) if asked is None and "insert" in kinds else []
    return [*gone, *thin, *new]


def _by_criterion(found: list[Recommendation], judge: Judge, criterion: Criterion | WBIC) -> list[Recommendation]:
    if isinstance(criterion, Criterion):
        return found
    best = sorted(found, key=_order)[: criterion.most]
    return [judge.by_wbic(one, criterion) for one in best]


def _helps(one: Recommendation, level: float, loss: float) -> bool:
    """Whether a plan costs nothing, or improves the criterion and passes its tests."""
    if one.is_free:
        return True
    if one.kind in ("grow", "insert"):
        tests = [each.p for each in one.evidence if each.p is not None]
        if any(p > level for p in tests):
            return False
    return one.criterion < -ROUNDING * abs(loss)


def _order(one: Recommendation) -> tuple[bool, float, int]:
    """What costs nothing first, by what it saves; the others by the criterion."""
    return not one.is_free, one.parameters if one.is_free else one.criterion, one.parameters


__all__ = ["recommend"]
