"""From a suite to its cells: every combination that is asked for, in the order in which it is worth running them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from espalier.errors import RunError
from espalier.suite.suite import Cell, Condition, Contender, Grid, Suite, Track


def contenders(suite: Suite) -> tuple[Contender, ...]:
    """Those that the suite names, and those of its grids.

    Raises:
        RunError: two have one name, or one names a contender or a peer that is not there.
    """
    found = (*suite.contenders, *(one for grid in suite.grids for one in of_grid(grid)))
    names = [one.name for one in found]
    double = {name for name in names if names.count(name) > 1}
    if double:
        raise RunError(f"suite {suite.name!r}: the name {min(double)!r} stands for two contenders")
    for one in found:
        if one.kind == "retrained" and one.of not in names:
            raise RunError(f"suite {suite.name!r}: {one.name!r}: of: expected a contender, found {one.of!r}")
        if one.kind == "retrained" and "unstructured" in one.tracks:
            raise RunError(f"suite {suite.name!r}: {one.name!r}: masks are not retrained; leave out 'unstructured'")
        if one.kind == "peer" and one.peer is None:
            raise RunError(f"suite {suite.name!r}: {one.name!r}: peer: expected the name of one")
        if one.kind == "methods" and one.grow is None and one.prune is None:
            raise RunError(f"suite {suite.name!r}: {one.name!r}: expected grow=, prune= or both")
    return found


def of_grid(grid: Grid) -> Iterator[Contender]:
    """The contenders of a grid: all combinations of levels, or one of so many, every level as often as any other."""
    factors = (grid.grow, grid.prune, grid.periods, grid.swing, grid.order)
    for at in product(*(range(len(factor)) for factor in factors)):
        relations = (sum(factor**power * level for factor, level in enumerate(at)) for power in range(grid.relations))
        if any(relation % grid.modulus for relation in relations):
            continue
        grow, prune = grid.grow[at[0]], grid.prune[at[1]]
        periods, swing, order = grid.periods[at[2]], grid.swing[at[3]], grid.order[at[4]]
        yield Contender(
            name=f"{grid.name} {grow} {prune} {periods}x{swing:g} {order}",
            tracks=grid.tracks,
            grow=None if grow == "none" else grow,
            prune=None if prune == "none" else prune,
            periods=periods,
            swing=swing,
            order=order,
            until=grid.until,
        )


def expand(suite: Suite) -> list[Cell]:
    """All cells, tasks in the order of the file, each with its conditions in theirs; seeds of one cell side by side.

    A cell comes as often as tracks and points share it: a static network is the same whatever it is compared with.

    Raises:
        RunError: as `contenders`, or a condition, comparison or confirmation names what is not there.
    """
    there = contenders(suite)
    _check_names(suite, there)
    cells = []
    for task in suite.tasks:
        for condition in suite.conditions:
            if condition.tasks is not None and task.name not in condition.tasks:
                continue
            for contender, track, point, seed in _combinations(suite, condition, there):
                cells.append(
                    Cell(
                        task, contender, track, point, condition.size, condition.budget, condition.scale, seed,
                        suite.looks,
                    )
                )  # fmt: skip
    return cells


def _combinations(
    suite: Suite, condition: Condition, there: Sequence[Contender]
) -> Iterator[tuple[Contender, Track, float, int]]:
    confirmed = {*suite.confirm, *(one.other for one in suite.comparisons if one.of in suite.confirm)}
    for point, contender in product(suite.points if condition.points is None else condition.points, there):
        if condition.contenders is not None and contender.name not in condition.contenders:
            continue
        seeds = suite.seeds if condition.seeds is None else condition.seeds
        if contender.name in confirmed and condition.seeds is None:
            seeds = (*seeds, *suite.confirm_seeds)
        for track, seed in product(contender.tracks, seeds):
            if condition.tracks is None or track in condition.tracks:
                yield contender, track, point, seed


def _check_names(suite: Suite, there: Sequence[Contender]) -> None:
    known = {one.name: one for one in there}
    tasks = {one.name for one in suite.tasks}
    asked = [(name, "confirm") for name in suite.confirm] + [(name, "timed") for name in suite.timed]
    for number, condition in enumerate(suite.conditions):
        asked += [(name, f"conditions[{number}]") for name in condition.contenders or ()]
        strange = [name for name in condition.tasks or () if name not in tasks]
        if strange:
            raise RunError(f"suite {suite.name!r}: conditions[{number}]: there is no task {strange[0]!r}")
    for one in suite.comparisons:
        asked += [(one.of, "comparisons"), (one.other, "comparisons")]
    for name, where in asked:
        if name not in known:
            raise RunError(f"suite {suite.name!r}: {where}: there is no contender {name!r}")
    for one in suite.comparisons:
        for name in (one.of, one.other):
            if one.track not in known[name].tracks:
                raise RunError(f"suite {suite.name!r}: comparisons: {name!r} is not in the track {one.track!r}")


__all__ = ["contenders", "expand", "of_grid"]
