"""Layers and cells that may go, come, or become thinner."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from espalier.edit.depth_edits import DepthEdit, Insert, Remove, Replace
from espalier.edit.plan import Plan
from espalier.edit.recipes.folded import BATCH_NORMS
from espalier.edit.recipes.folding import fold_plan
from espalier.edit.recipes.kinds import Factorised
from espalier.edit.steps import lookup
from espalier.errors import EspalierError, MethodError
from espalier.graph.sites import Site
from espalier.parts.budget import Polynomial
from espalier.parts.candidate import Candidate, seeded
from espalier.parts.depth.ends import features, watched
from espalier.parts.depth.places import Copies, NewLayers
from espalier.parts.depth.rank import rank_by_energy
from espalier.parts.depth.scores import GateTaylor, cosines
from espalier.parts.depth.trial import gains
from espalier.parts.goal import Cap, Goal
from espalier.parts.recommend.judging import Judge, Proposal, attempted, best, stepped
from espalier.parts.recommend.nulls import p_low, shuffled
from espalier.parts.recommend.planned import as_planned
from espalier.parts.recommend.recommendation import Evidence, Kind, Recommendation
from espalier.parts.recommend.spectra import signal_rank, stable_rank
from espalier.parts.score import Context, derived_seed

_ENERGIES = (0.9999, 0.99, 0.95)
"""Parts of the squared singular values of a weight that a factorised one keeps: as many ranks are tried."""
_INSERTED = 4
"""New layers that are tried, those with the largest gradients."""
MOST = 64
"""Layers that are tried of a kind, where none are named."""


@dataclass(frozen=True)
class Influence:
    """Block influence of a layer, against outputs that belong to other samples."""

    value: float
    """1 - cosine of what goes in and what comes out, averaged."""
    null: float
    """The median of the same over permutations of the samples of what comes out."""
    p: float


def chosen_sites(
    context: Context, asked: Sequence[str] | None, refused: dict[str, str]
) -> tuple[list[Site], list[Site]]:
    """Sites that may go, and sites that may become two thinner layers or a part of another.

    Raises MethodError for a pattern that fits none.
    """
    every = context.structure.sites()
    if asked is not None:
        for pattern in asked:
            if not any(fnmatchcase(one.name, pattern) for one in every):
                raise MethodError(f"layers: no layer fits {pattern!r}; structure.sites() lists them.")
        every = tuple(one for one in every if any(fnmatchcase(one.name, pattern) for pattern in asked))
    removable = [one for one in every if one.removal is not None and one.parameters and one.flops]
    thinner = [one for one in every if (one.factorisable or one.folds_into) and one.parameters]
    if asked is None:
        for found, what in ((removable, "removal"), (thinner, "another form")):
            for one in found[MOST:]:
                refused[f"layer {one.name}"] = (
                    f"{what} was not tried, since there are more than {MOST} such; name it in layers="
                )
            del found[MOST:]
        named = {one.name for one in (*removable, *thinner)}
        for one in every:
            if one.parameters and one.flops and one.name not in named and "removal" in one.why_not:
                refused.setdefault(f"layer {one.name}", f"cannot go: {one.why_not['removal']}")
    return removable, thinner


def without_layers(
    context: Context, judge: Judge, sites: Sequence[Site], permutations: int, refused: dict[str, str]
) -> tuple[list[Recommendation], dict[str, tuple[Evidence, ...]]]:
    """Plans by which layers go, judged, and what was measured."""
    candidates = {one.name: Candidate(_removal(one), one.parameters, one.flops, "", one.modules) for one in sites}
    straight = {one.name: candidates[one.name] for one in sites if one.removal == "entry"}
    seen = influences(context, straight, permutations)
    worth = _worth(context, candidates)
    measured: dict[str, tuple[Evidence, ...]] = {}
    recommended: list[Recommendation] = []
    for one in sites:
        evidence = []
        if one.name in seen:
            found = seen[one.name]
            words = (
                f"it turns what goes in by 1 - cosine = {found.value:.3g} (block influence), {found.null:.3g} if what "
                f"comes out were of another sample (p = {found.p:.2g})"
            )
            evidence.append(Evidence("block influence", found.value, words, found.null, found.p))
        if one.name in worth:
            words = f"to the first order the loss would change by {worth[one.name]:.3g} without it"
            evidence.append(Evidence("layer Taylor", worth[one.name], words))
        measured[f"layer {one.name}"] = tuple(evidence)
        noun = "cell" if one.kind == "cell" else "layer"
        plan = Plan((), depth=_removal(one))
        make = partial(Proposal, "remove", one.name, f"remove the {noun}", plan, tuple(evidence))
        recommended += attempted(judge, [make], f"layer {one.name}", refused)
    return recommended, measured


def influences(context: Context, layers: Mapping[str, Candidate], permutations: int) -> dict[str, Influence]:
    """Block influence (Men et al. 2024) of layers whose entry could take the place of their result."""
    try:
        return _influences(context, layers, permutations)
    except MethodError:  # of one of them; which one is found out one by one
        if len(layers) <= 1:
            return {}
        return {key: one for name in layers for key, one in influences(context, {name: layers[name]},
                                                                       permutations).items()}  # fmt: skip


def _influences(context: Context, layers: Mapping[str, Candidate], permutations: int) -> dict[str, Influence]:
    wide = features(context.structure, layers)
    found: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in layers}
    generator = context.generator("results of layers permuted")

    def seen(name: str, entry: Tensor, exit: Tensor) -> None:
        def influence(result: Tensor) -> float:
            return float((1 - cosines(entry, result, wide[name])).mean())

        orders = [shuffled(len(exit), generator).to(exit.device) for _ in range(permutations)]
        found[name].append((influence(exit), [influence(exit[order]) for order in orders]))

    if layers:
        with watched(context.structure, layers, seen), torch.no_grad():
            for batch in context.probe:
                context.loss(batch)
    result = {}
    for name, batches in found.items():
        if batches:
            value = sum(one for one, _ in batches) / len(batches)
            null = [sum(one) / len(batches) for one in zip(*(one for _, one in batches), strict=True)]
            result[name] = Influence(value, float(torch.tensor(null).median()), p_low(value, null))
    return result


def _worth(context: Context, layers: Mapping[str, Candidate]) -> dict[str, float]:
    if not layers:
        return {}
    goal = Goal("prune", {}, {}, {}, {}, Cap(Polynomial({}), 0), layers=layers)
    try:
        found = GateTaylor(batches=len(context.probe))(context, goal)
    except EspalierError:  # of one that could not be watched; the others still have what is measured
        return {}
    return {name: float(one[0]) for name, one in found.values.items()}


def with_layers(context: Context, judge: Judge, refused: dict[str, str]) -> list[Recommendation]:
    """Plans by which new layers come, judged: those whose parameters get the largest gradients."""
    candidates = {
        **NewLayers("suited")(context.structure, None).candidates,
        **Copies("zero")(context.structure, None).candidates,
    }
    found = gains(context, candidates)
    able = sorted((name for name, one in found.items() if one > 0), key=lambda name: -found[name])
    recommended: list[Recommendation] = []
    for name in able[:_INSERTED]:
        edits = seeded(candidates[name], derived_seed(context.seed, name))
        kind = name.partition(" + ")[2]
        place = f"number {able.index(name) + 1} of {len(able)} new layers"
        words = f"the squared gradient of its parameters is {found[name]:.3g}, {place}"
        evidence = Evidence("sensitivity", found[name], words)
        what = "add a copy" if kind == "copy" else f"insert {kind} layers"
        make = partial(_inserted, context, judge, name.partition(" + ")[0], what, edits, evidence)
        recommended += attempted(judge, [make], f"layer {name}", refused)
    return recommended


def _inserted(
    context: Context, judge: Judge, at: str, what: str, edits: tuple[DepthEdit, ...], evidence: Evidence
) -> Proposal:
    """A new layer after one best step of its own parameters, which change nothing before."""
    (edit,) = edits
    assert isinstance(edit, Insert)
    built = edit.layer.build(lookup(context.structure.model), edit.at)
    inside = [name for name, _ in built.named_parameters()]
    with as_planned(context.structure, Plan((), depth=edits), judge.given) as planned:
        values = stepped(planned, judge.samples.found, planned.fresh)
        ends = {name.removesuffix(inside[0]) for name in planned.fresh if name.endswith(inside[0])}
        found = [end for end in ends if {end + name for name in inside} == planned.fresh.keys()]
    if len(found) != 1:
        raise MethodError(f"the parameters of the new layer after {at} are not known by their names.")
    start = {name: values[found[0] + name] for name in inside}
    return Proposal("insert", at, what, Plan((), depth=edits, starts={0: start}), (evidence,), trained=True)


def thinner_layers(
    context: Context,
    judge: Judge,
    sites: Sequence[Site],
    kinds: Collection[Kind],
    permutations: int,
    refused: dict[str, str],
) -> tuple[list[Recommendation], dict[str, tuple[Evidence, ...]]]:
    """Plans by which layers become two thinner ones, or one of two, judged, and what was measured."""
    recommended: list[Recommendation] = []
    measured: dict[str, tuple[Evidence, ...]] = {}
    for one in sites:
        module = context.structure.model.get_submodule(one.modules[0])
        if one.factorisable and "factorise" in kinds:
            found, evidence = _factorised(context, judge, one, module, permutations, refused)
            recommended += found
            measured[f"layer {one.name}"] = evidence
        if one.folds_into is not None and "fold" in kinds and not isinstance(module, BATCH_NORMS):
            recommended += _folded(context, judge, one)
    return recommended, measured


def _factorised(
    context: Context, judge: Judge, site: Site, module: nn.Module, permutations: int, refused: dict[str, str]
) -> tuple[list[Recommendation], tuple[Evidence, ...]]:
    weight = module.get_parameter("weight").detach()
    matrix = weight.double().cpu().flatten(1)
    generator = context.generator(f"{site.name}, entries permuted")
    signal, stable = signal_rank(matrix, min(permutations, 5), generator), stable_rank(matrix)
    words = (
        f"its weight has {signal} of {min(matrix.shape)} singular values above those of the same entries in another "
        f"order, and stable rank {stable:.1f}"
    )
    measured = Evidence("stable rank", stable, words, float(signal))
    ranks = {found.rank: found for energy in _ENERGIES if (found := rank_by_energy(weight, energy)).worth_it}
    makers: list[Callable[[], Proposal]] = []
    for rank, found in ranks.items():
        kept = Evidence("energy", 1 - found.error**2, f"rank {rank} keeps {1 - found.error**2:.2%} of its square")
        plan = Plan((), depth=(Replace(site.modules[0], Factorised(rank)),))
        what = f"two layers of rank {rank}"
        makers.append(partial(Proposal, "factorise", site.name, what, plan, (measured, kept)))
    return best(attempted(judge, makers, f"layer {site.name}", refused)), (measured,)


def _folded(context: Context, judge: Judge, site: Site) -> list[Recommendation]:
    try:
        edits = fold_plan(context.structure.topology, lookup(context.structure.model), site.modules[0])
    except EspalierError:
        return []
    words = f"it is linear, and so is {site.folds_into}: together they are one layer"
    plan = Plan((), depth=edits)
    make = partial(Proposal, "fold", site.name, f"fold into {site.folds_into}", plan, (Evidence("linear", 1.0, words),))
    return attempted(judge, [make], site.name, {})


def _removal(site: Site) -> tuple[DepthEdit, ...]:
    assert site.removal is not None
    *first, last = site.modules
    return (*(Remove(path) for path in first), Remove(last, site.removal))


__all__ = ["Influence", "chosen_sites", "influences", "thinner_layers", "with_layers", "without_layers"]
