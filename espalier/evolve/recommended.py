"""Proposals from what the network itself says: the recommendations of `espalier.recommend`, put together.

One recommendation is for one axis or one layer, and most change little by themselves. So those of a kind are carried
out together, and compete as one:

- *wider*: every axis becomes some times as wide, and at least as wide as the middle one; not where no axis asks for
  units, each has some that others could stand in for and is no narrower than the outputs, and the network is not stuck;
- *smaller*: of every axis of which units could go, a part of them goes, and what reads them is refitted; not where the
  network is stuck;
- *shallower*: all layers go without which the loss is no higher; else the one that is missed least, unless much;
- *wide and shallow*: where the network is stuck, all layers go that can, and what stays becomes wider and begins anew:
  weights that nothing got through are no start;
- *as asked*: the new units that the loss asks for (TINY), where that is more than chance;
- *deeper*: the new layer whose parameters do most.

A network is *stuck* where a layer is idle (the loss is no higher without it) or an axis is closed: its units do not
vary, or, where the outputs have several features, move as one and one of them could stand in for all others. What the
loss then says of a unit or of a layer, it says of how little gets through. Behind a layer of dead units all others
can go for nothing, so that "smaller" would be accepted for what it saves, and between axes that are not of one size
any more no layer can go. Of several closed layers in a row, none is missed, or each is, and only without all of them
is the network better. So units wait until it is not stuck any more, and the race says what all layers together are
worth.

The outputs of a network lie in a space of no more dimensions than any layer on the way to them has units (of logits:
Yang et al. 2018, arXiv:1711.03953). That a narrower axis has units to spare now does not say that it is wide enough.

What the loss is predicted to fall by is what it falls by at once; what is only of use later has no prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from espalier.edit.depth_edits import Remove
from espalier.edit.plan import Plan, Resize
from espalier.errors import EspalierError, MethodError
from espalier.evolve.proposals import Material, Move, Proposal, joined
from espalier.graph.dims import Fixed, size_of
from espalier.parts.recommend.advising import recommend
from espalier.parts.recommend.recommendation import Kind, Recommendation, Recommendations
from espalier.parts.score import derived_seed
from espalier.parts.units.where import choose_axes
from espalier.structure import Structure

_SPARE: tuple[Kind, ...] = ("dead", "duplicates", "redundant")
_NOT_MISSED = 1e-3
"""Part of the loss by which it may rise without a layer that is not missed."""
_LITTLE = 0.1
"""Likewise without one, or without units, that are taken away to see what training makes of it."""
_AS_ONE = 1.5
"""Effective rank below which the units of an axis move as one: nearer to one direction than to two."""
_NOTHING = 0.5
"""Likewise, below which they do not move."""
_STUCK = "a layer is idle, or what goes through an axis is one number at most"


@dataclass(frozen=True)
class Recommended:
    """The recommendations by a criterion, those of a kind together."""

    criterion: str = "loss"
    permutations: int = 19
    """Of each test against chance."""
    wider: int = 3
    """How many times as wide axes become."""
    loose: float = 0.25
    """Units of an axis go if this part of them could, without those that the loss asks for more of."""
    removed: float = 0.2
    """The part of its units that goes then."""

    def __call__(self, material: Material, count: int, /) -> Sequence[Proposal]:
        try:
            found = recommend(
                material.structure,
                loss=lambda model, batch: material.loss(batch),
                batches=material.batches,
                criterion=self.criterion,
                kinds=(*_SPARE, "grow", "remove", "insert"),
                permutations=self.permutations,
                seed=derived_seed(material.seed, "recommended"),
            )
        except MethodError:  # a loss that is not finite, of which nothing can be told, or no FLOPs left to look
            found = None
        return [one for one in self._kinds(material, found) if _possible(material.structure, one.plan)][:count]

    def _kinds(self, material: Material, found: Recommendations | None) -> Iterator[Proposal]:
        structure = material.structure
        asked = [] if found is None else [one for one in found.ranked if one.kind == "grow"]
        wanted = {one.site for one in asked}
        spare = {} if found is None else _spare(structure, found)
        loose = [name for name, units in spare.items() if units >= self.loose * structure.axes[name].size]
        outputs = _outputs(structure)
        stuck = found is not None and _stuck(structure, found, spare, outputs)
        wide = all(structure.axes[name].size >= outputs for name in spare)
        enough = bool(spare) and len(loose) == len(spare) and wide and not wanted and not stuck
        wider = None if enough else _wider(structure, self.wider, material.seed)
        if wider:
            what = ", ".join(f"add {edit.add} units to {edit.axis}" for edit in wider.edits)
            asking = f"the loss asks for units of {', '.join(sorted(wanted))}" if wanted else "no axis asks by itself"
            yield Proposal(wider, "wider", what, asking)
        if found is None:
            return
        if not stuck:
            yield from self._smaller(material, {name: spare[name] for name in loose if name not in wanted})
        gone = _unmissed(found, _NOT_MISSED) or _unmissed(found, _LITTLE)[:1]
        yield from _together("shallower", gone)
        if stuck and wider and not structure.masks:
            yield from _anew(found, wider)
        yield from _together("as asked", asked)
        yield from _together("deeper", [one for one in found.ranked if one.kind == "insert"][:1])

    def _smaller(self, material: Material, spare: Mapping[str, int]) -> Iterator[Proposal]:
        sizes = {name: one.size for name, one in material.structure.axes.items()}
        plan = (
            Move.of("prune", "taylor", amount=self.removed, refit=True).plan(material, list(spare)) if spare else None
        )
        if plan:
            what = ", ".join(f"remove {len(edit.remove)} units of {edit.axis}" for edit in plan.edits)
            told = ", ".join(f"{units} of {sizes[axis]} units of {axis}" for axis, units in spare.items())
            yield Proposal(plan, "smaller", what, f"the others could stand in for {told}")


def _spare(structure: Structure, found: Recommendations) -> dict[str, int]:
    """Axis that can be pruned -> how many of its units others could stand in for at little loss."""
    able = choose_axes(structure, "prune", None)
    spare = {name: 0 for name, why in able.items() if why is None}
    for one in (*found.ranked, *found.others):
        if one.kind in _SPARE and one.loss <= _LITTLE * abs(found.loss):
            spare[one.site] = max(spare[one.site], _removed(one.plan))
    return spare


def _anew(found: Recommendations, wider: Plan) -> Iterator[Proposal]:
    """Without all the layers that can go, the rest wider, with fresh weights."""
    every = _apart(_unmissed(found, math.inf))
    plan = joined([wider, *(one.plan for one in every)]) if every else None
    if plan is not None:
        what = f"remove the layers {', '.join(one.site for one in every)}, and widen the rest"
        yield Proposal(plan, "wide and shallow", what, _STUCK, anew=True)


def _stuck(structure: Structure, found: Recommendations, spare: Mapping[str, int], outputs: int) -> bool:
    """Whether a layer is idle or an axis is closed, in a network of so many features at most that an output has."""
    least = _AS_ONE if outputs > 1 else _NOTHING
    closed = (
        spare[name] == structure.axes[name].size - 1 > 0 and one.value < least
        for name in spare
        for one in found.measured.get(name, ())
        if one.measure == "effective rank"
    )
    return bool(_unmissed(found, _NOT_MISSED)) or any(closed)


def _outputs(structure: Structure) -> int:
    """Features of the output that has most of them; 1 if none is known to have any."""
    topology = structure.topology
    shapes = [one.dims[index] for one in topology.predictions for index in one.outputs]
    features = [[dim for dim in shape if not isinstance(dim, Fixed)] for shape in shapes]
    return max((math.prod(size_of(dim, topology.sizes) for dim in dims) for dims in features), default=1)


def _wider(structure: Structure, times: int, seed: int) -> Plan | None:
    """All axes that can grow without a change so many times as wide, or as wide as the middle one."""
    axes = [structure.axes[name] for name, why in choose_axes(structure, "grow", None).items() if why is None]
    middle = int(median(one.size for one in axes)) if axes else 0
    sizes = {one.name: one.limits.below(max(times * one.size, middle) + 1) or one.size for one in axes}
    edits = tuple(Resize(one.name, add=sizes[one.name] - one.size) for one in axes if sizes[one.name] > one.size)
    return Plan(edits, seed=seed) if edits else None


def _unmissed(found: Recommendations, part: float) -> list[Recommendation]:
    """Layers without which the loss is higher by no more than this part of it, the least missed first."""
    layers = [one for one in (*found.ranked, *found.others) if one.kind == "remove"]
    return sorted((one for one in layers if one.loss <= part * abs(found.loss)), key=lambda one: one.loss)


def _apart(parts: Sequence[Recommendation]) -> list[Recommendation]:
    """Those, from the first one on, that take away no module, nor a part of one, that an earlier one takes."""
    taken, kept = set[str](), list[Recommendation]()
    for one in parts:
        paths = {f"{edit.module}." for edit in one.plan.depth if isinstance(edit, Remove)}
        if not any(path.startswith(other) or other.startswith(path) for path in paths for other in taken):
            taken |= paths
            kept.append(one)
    return kept


def _together(kind: str, parts: Sequence[Recommendation]) -> Iterator[Proposal]:
    """One proposal of several recommendations; of the first one, if they cannot be joined."""
    if parts:
        plan = joined([one.plan for one in parts])
        parts = parts if plan is not None else parts[:1]
        what = ", ".join(f"{one.what} ({one.site})" for one in parts)
        why = "; and ".join(one.reason for one in parts)
        yield Proposal(plan or parts[0].plan, kind, what, why, -sum(one.loss for one in parts))


def _removed(plan: Plan) -> int:
    return sum(len(edit.remove) for edit in plan.edits)


def _possible(structure: Structure, plan: Plan) -> bool:
    try:
        structure.check(plan)
    except EspalierError:
        return False
    return True


__all__ = ["Recommended"]
