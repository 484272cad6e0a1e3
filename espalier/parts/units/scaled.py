"""One plan that brings a whole network to a budget: all widths by one factor, then single units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from espalier.edit.changes import Limits
from espalier.edit.plan import Plan, Resize
from espalier.errors import MethodError
from espalier.parts.budget import Budget
from espalier.parts.goal import UNBOUNDED, Cap, Direction, Goal
from espalier.parts.score import Context, GroupNorm, Score, check_scores
from espalier.parts.units.rounding import check_round_to, multiples
from espalier.parts.units.select import Scope, proportional, scope_of
from espalier.parts.units.where import alike, choose_axes, holds_head_size
from espalier.structure import Structure

_WEIGHTS = GroupNorm()

_ENOUGH = 2
"""Units that axes keep where that suffices: with a single one, code tends to go other ways."""


def scaled_plan(
    structure: Structure,
    budget: Budget,
    *,
    score: Score = _WEIGHTS,
    scope: Scope = "axis",
    axes: Sequence[str] | None = None,
    round_to: int = 1,
    uniform: bool = False,
    seed: int = 0,
) -> Plan:
    """The plan after which the network costs as much of the budget as whole units allow, and no more.

    A network that costs more is pruned, one that costs less is grown. All axes get the same factor, found by bisection
    over the cost as a polynomial in their sizes; then single units make up the rest. The plan is not applied:
    `structure.check(plan)` says what it promises (growing every axis is not always exact), `structure.apply(plan)`
    carries it out. It is empty if nothing has to change.

    Args:
        structure: what `attach` returned.
        budget: such as FLOPs(0.5, of="initial") or Parameters(2_000_000).
        score: what each unit is worth, to choose those that go; the norm of all their weights by default.
        scope: ``axis`` keeps the proportions of all axes; ``global`` lets units compete by score per cost (to prune).
        axes: names or patterns of the axes to change; None for all that may, the sizes of attention heads only if the
            budget cannot be reached without.
        round_to: axes that change get sizes at which all matrices divide by this.
        uniform: whether axes of the same role in repeated layers keep one size.
        seed: seeds what is drawn.

    Raises:
        MethodError: an option is not what it should be, a name or pattern fits no axis, or the budget cannot be
            reached with these axes within their limits.
    """
    check_round_to(round_to)
    select = scope_of(scope)
    topology = structure.topology
    sizes = {name: topology.sizes[record.number] for name, record in topology.by_name.items()}
    first = {name: structure.initial_sizes.get(name, size) for name, size in sizes.items()}
    for names in _choices(structure, axes):
        cost = budget.cost(topology, names)
        present, initial = cost.at(sizes), cost.at(first)
        limit = budget.limit(initial, max(initial, present))
        if present == limit:
            return Plan((), seed=seed)
        free = {name: sizes[name] for name in names}
        target = Cap(cost.fixed({name: size for name, size in sizes.items() if name not in free}), limit)
        goal = _goal(structure, "prune" if present > limit else "grow", free, target, round_to, uniform, _ENOUGH)
        if not _is_within_reach(goal):
            goal = _goal(structure, goal.direction, free, target, round_to, uniform, 1)
        if _is_within_reach(goal):
            break
    else:
        raise MethodError(_out_of_reach(budget, goal))
    if goal.direction == "grow":
        counts = {axis: size - free[axis] for axis, size in proportional(goal).items()}
        return Plan(tuple(Resize(axis, add=count) for axis, count in counts.items() if count), seed=seed)
    context = Context(structure, tuple(free), 0, 0, 0.0, seed, no_loss, None, ())
    scores = score(context, goal)
    check_scores(scores, context, goal, "scaled_plan")
    return Plan(tuple(Resize(axis, remove=units) for axis, units in select(scores, goal).items()), seed=seed)


def _choices(structure: Structure, asked: Sequence[str] | None) -> Iterator[list[str]]:
    """The axes to change, and where those do not suffice the next ones to try."""
    if asked is not None:
        yield [name for name, why in choose_axes(structure, "prune", asked).items() if why is None]
        return
    free = [axis for axis in structure.axes.values() if axis.reason is None]
    yield [axis.name for axis in free if not holds_head_size(structure, axis)]
    if any(holds_head_size(structure, axis) for axis in free):
        yield [axis.name for axis in free]


def _goal(
    structure: Structure,
    direction: Direction,
    sizes: Mapping[str, int],
    target: Cap,
    round_to: int,
    uniform: bool,
    enough: int,
) -> Goal:
    limits = {name: structure.limits.get(name, Limits()) for name in sizes}
    growing = direction == "grow"
    return Goal(
        direction,
        sizes,
        least=sizes if growing else {name: min(size, limits[name].at_least or enough) for name, size in sizes.items()},
        most={name: max(size, limits[name].at_most or UNBOUNDED) for name, size in sizes.items()} if growing else sizes,
        reference={name: float(size) for name, size in sizes.items()},
        target=target,
        multiples=multiples(structure, sizes, round_to),
        equal=alike(structure, sizes) if uniform else (),
    )


def _is_within_reach(goal: Goal) -> bool:
    if goal.direction == "prune":
        return goal.fits(goal.smallest())
    return goal.target.excess(goal.most) >= 0


def _out_of_reach(budget: Budget, goal: Goal) -> str:
    shrinking = goal.direction == "prune"
    extreme = goal.target.excess(goal.smallest() if shrinking else goal.most) + goal.target.most
    return (
        f"scaled_plan: {budget!r} allows a cost of {goal.target.most:,}, but the "
        f"{'smallest' if shrinking else 'largest'} network that {len(goal.sizes)} axes within their limits allow costs "
        f"{extreme:,}; give a {'larger' if shrinking else 'smaller'} budget, more axes or wider limits."
    )


def no_loss(batch: Any) -> Tensor:
    """In place of the loss, for scores outside of a session."""
    raise MethodError("this score needs a loss, which only a Session has; choose one of weights alone.")


__all__ = ["no_loss", "scaled_plan"]
