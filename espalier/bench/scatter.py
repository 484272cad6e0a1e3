"""A plain SVG chart of points, in the style of `charts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

from espalier.bench.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Formatter,
    Scale,
    log_ticks,
    span,
    tick_step,
    ticks,
    x_tick,
    y_tick,
)  # fmt: skip

STYLE = """
.spot{fill:var(--c);stroke:var(--card);stroke-width:1.2}.spot.hollow{fill:var(--card);stroke:var(--c);stroke-width:1.8}
.spot.found{stroke-width:2}.spot:hover{stroke:var(--ink)}
.whisker{stroke:var(--c);stroke-width:1.4;opacity:.55}.guide{stroke:var(--edge);stroke-dasharray:5 5}
.stairs{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.tried{--c:var(--even)}.front{--c:var(--green)}.found{--c:var(--blue)}.alone{--c:var(--plum)}
.accepted{--c:var(--green)}.refused{--c:var(--muted)}
.key.hollow i,.key.full i{width:11px;height:11px;border:0;border-radius:50%;background:var(--c)}
.key.hollow i{background:none;border:2px solid var(--c)}
"""
_OUTLIER = 6.0
"""What is further away from the median than this multiple of the median distance is an outlier."""
_OVER_DECADES = 30
"""Ratio of the largest to the smallest x from which the axis is logarithmic."""


@dataclass(frozen=True)
class Spot:
    """A point; `css` names its colour, `tip` (plain text) says what it is, `error` is a standard error of its y."""

    x: float
    y: float
    css: str
    tip: str
    error: float | None = None
    hollow: bool = False
    large: bool = False


def scatter(
    label: str,
    spots: Sequence[Spot],
    x_label: str,
    x_format: Formatter,
    y_format: Formatter,
    *,
    stairs: Sequence[tuple[float, float]] = (),
    diagonal: bool = False,
    may_be_log: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """An SVG of points with what they are on hover; later ones lie on top.

    `stairs` is drawn as a line that keeps each value until the next, `diagonal` where x and y are equal. Points outside
    of a range that is given are drawn at its border.
    """
    if not spots:
        return '<p class="empty">Nothing to draw yet.</p>'
    xs, ys = [one.x for one in spots], [one.y for one in spots]
    log = may_be_log and min(xs) > 0 and max(xs) / min(xs) > _OVER_DECADES
    low, high = x_range or span(min(xs), max(xs))
    if log:
        x_scale = Scale(low, high, LEFT + 14, WIDTH - RIGHT - 6, log=True)
        x_ticks = log_ticks(low, high)
    else:
        x_scale = Scale(low, high, LEFT + 14, WIDTH - RIGHT - 6)
        x_ticks = ticks(low, high, tick_step(low, high, 6))
    low, high = y_range or span(min(ys), max(ys))
    y_scale = Scale(low, high, HEIGHT - BOTTOM - 8, TOP + 6)
    y_ticks = ticks(low, high, tick_step(low, high, 5))
    floor = HEIGHT - BOTTOM
    described = f"{label}; {len(spots)} points over {x_label}"
    parts = [
        f'<svg class="chart" role="img" aria-label="{escape(described)}" viewBox="0 0 {WIDTH} {HEIGHT}">',
        *(y_tick(y_scale(tick), y_format(tick)) for tick in y_ticks),
        *(x_tick(x_scale(tick), x_format(tick)) for tick in x_ticks),
        f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}'
        f"{' · logarithmic' if log else ''}</text>",
    ]
    if diagonal:
        parts.append(_diagonal(x_scale, y_scale))
    if stairs:
        (x0, y0), *rest = [(x_scale(x), y_scale(max(y, y_scale.low))) for x, y in stairs]
        path = f"M{x0:.1f},{y0:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest) + f"H{WIDTH - RIGHT}"
        parts.append(f'<path class="stairs front" d="{path}"/>')
    parts += [_spot(one, x_scale, y_scale) for one in spots]
    return "".join([*parts, "</svg>"])


def _diagonal(x_scale: Scale, y_scale: Scale) -> str:
    low, high = max(x_scale.low, y_scale.low), min(x_scale.high, y_scale.high)
    if low >= high:
        return ""
    x1, y1, x2, y2 = x_scale(low), y_scale(low), x_scale(high), y_scale(high)
    return f'<line class="guide" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _spot(spot: Spot, x_scale: Scale, y_scale: Scale) -> str:
    x = x_scale(min(max(spot.x, x_scale.low), x_scale.high))
    inside = y_scale.low <= spot.y <= y_scale.high
    y = y_scale(min(max(spot.y, y_scale.low), y_scale.high))
    css = f"{spot.css}{' hollow' if spot.hollow else ''}"
    whisker = ""
    if spot.error is not None and inside:
        ends = [y_scale(min(max(spot.y + side * spot.error, y_scale.low), y_scale.high)) for side in (-1, 1)]
        whisker = f'<line class="whisker {spot.css}" x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
    if inside:
        shape = f'<circle class="spot {css}" cx="{x:.1f}" cy="{y:.1f}" r="{6 if spot.large else 4.2}">'
        return f"{whisker}{shape}<title>{escape(spot.tip)}</title></circle>"
    way = 1 if spot.y < y_scale.low else -1
    path = f"M{x - 5:.1f},{y:.1f}h10l-5,{7 * way}Z"
    return f'<path class="spot {css}" d="{path}"><title>{escape(spot.tip)}</title></path>'


def near(values: Sequence[float], *always: float) -> tuple[float, float]:
    """A range that holds the values but for those that are far away from all others, and what it has to hold always."""
    middle = median(values)
    far = _OUTLIER * median(abs(one - middle) for one in values)
    held = [*(one for one in values if abs(one - middle) <= far), *always]
    low, high = min(held), max(held)
    pad = 0.06 * (high - low) or 0.1 * abs(low) or 1.0
    return low - pad, high + pad


def keys(entries: Sequence[tuple[str, str, bool]]) -> str:
    """A legend of points: the name, the class of the colour, and whether they are hollow."""
    parts = (
        f'<span class="key {css} {"hollow" if hollow else "full"}"><i></i>{escape(name)}</span>'
        for name, css, hollow in entries
    )
    return f'<div class="legend">{"".join(parts)}</div>'


__all__ = ["STYLE", "Spot", "keys", "near", "scatter"]
