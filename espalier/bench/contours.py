"""Closed lines around where a field on a grid is high: what a map of the plane is drawn from."""

from __future__ import annotations

from collections.abc import Sequence

Place = tuple[float, float]
_Edge = tuple[int, int, bool]
"""The grid point at its lower left end, and whether it goes up instead of to the right."""

_OUTSIDE = -1e12
"""Around the field, so that lines close at its border."""


def rings(field: Sequence[Sequence[float]], level: float) -> list[list[Place]]:
    """Closed lines around where the field is at least `level`, by marching squares with linear interpolation.

    `field[row][column]` holds finite values at whole coordinates x = column, y = row. Lines turn left around what is
    high, and right around holes in it; so they may be filled together by either rule. Where two high corners of a
    square lie across from each other the line parts them.
    """
    columns = len(field[0]) + 2 if field else 0
    border = [[_OUTSIDE] * columns]
    rows = [*border, *([_OUTSIDE, *row, _OUTSIDE] for row in field), *border]
    after: dict[_Edge, _Edge] = {}
    for row in range(len(rows) - 1):
        for column in range(columns - 1):
            after.update(_square(rows, column, row, level))
    found = []
    while after:
        first, edge = after.popitem()
        ring = [_crossing(rows, first, level)]
        while edge != first:
            ring.append(_crossing(rows, edge, level))
            edge = after.pop(edge)
        found.append(ring)
    return found


def _square(rows: Sequence[Sequence[float]], x: int, y: int, level: float) -> list[tuple[_Edge, _Edge]]:
    """Which edge the line goes in by, and which one out, of the square with this lower left corner."""
    corners = [rows[y][x], rows[y][x + 1], rows[y + 1][x + 1], rows[y + 1][x]]  # against the clock
    high = [corner >= level for corner in corners]
    edges: list[_Edge] = [(x, y, False), (x + 1, y, True), (x, y + 1, False), (x, y, True)]
    pairs = []
    for at in range(4):
        # in where the edge leads from low to high, out at the next edge that leads from high to low
        if not high[at] and high[(at + 1) % 4]:
            out = next(to % 4 for to in range(at + 1, at + 4) if high[to % 4] and not high[(to + 1) % 4])
            pairs.append((edges[out], edges[at]))
    return pairs


def _crossing(rows: Sequence[Sequence[float]], edge: _Edge, level: float) -> Place:
    """Where the field crosses the level on an edge, in the coordinates of the field."""
    x, y, up = edge
    a, b = rows[y][x], rows[y + up][x + (not up)]
    part = min(1.0, max(0.0, (level - a) / (b - a)))
    return (x - 1 + part * (not up), y - 1 + part * up)


__all__ = ["Place", "rings"]
