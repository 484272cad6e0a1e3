"""A histogram over time as a plain SVG: darker where more is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from espalier.bench.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, percent, tick_step, ticks, whole
from espalier.bench.charts import x_tick as x_text
from espalier.bench.charts import y_tick as y_line

SHADES = 10
MOST_COLUMNS = 160
BAND, GAP = 22, 12
"""Of the row below a plot, for what is outside of the histogram, and its distance."""

STYLE = """
.heat{fill:var(--green);shape-rendering:crispEdges}.heat.out{fill:var(--even)}
.mark{stroke:var(--ink);stroke-dasharray:3 4;opacity:.55}
"""


@dataclass(frozen=True)
class Column:
    """A histogram over [0, 1] up to an x, and what is outside of it."""

    x: float
    counts: tuple[float, ...]
    outside: float
    tip: str


def heat_chart(
    label: str, columns: Sequence[Column], x_label: str, outside: str, marks: Sequence[tuple[float, str]]
) -> str:
    """Columns in order of x, of the same number of parts; each cell is shaded by the root of its share of the column.

    `outside` names the row below, and `marks` are lines across with a text at their foot.
    """
    step = math.ceil(len(columns) / MOST_COLUMNS)
    columns = [*columns[:-1:step], columns[-1]] if columns else []
    if not columns or not columns[0].counts:
        return '<p class="empty">Nothing to draw yet.</p>'
    xs = [column.x for column in columns]
    first = xs[0] - (xs[1] - xs[0] if len(xs) > 1 else 1.0)
    scale = Scale(first, xs[-1], LEFT + 6, WIDTH - RIGHT)
    edges = [scale(x) for x in (first, *xs)]
    floor = HEIGHT - BOTTOM - BAND - GAP
    parts, tall = len(columns[0].counts), (floor - TOP) / len(columns[0].counts)
    rows = [
        *([column.counts[at] for column in columns] for at in range(parts)),
        [column.outside for column in columns],
    ]
    tops = [*(floor - (at + 1) * tall for at in range(parts)), float(HEIGHT - BOTTOM - BAND)]
    everything = [sum(column.counts) + column.outside or 1.0 for column in columns]
    cells: dict[tuple[str, int], list[str]] = {}
    for row, top in zip(rows, tops, strict=True):
        shades = [math.ceil(SHADES * math.sqrt(count / all_)) for count, all_ in zip(row, everything, strict=True)]
        css, high = ("heat out", BAND) if row is rows[-1] else ("heat", tall)
        for shade, start, end in _runs(shades):
            path = f"M{edges[start]:.1f},{top:.1f}H{edges[end]:.1f}v{high:.1f}H{edges[start]:.1f}Z"
            cells.setdefault((css, shade), []).append(path)
    middle, row_middle = (LEFT + WIDTH - RIGHT) // 2, HEIGHT - BOTTOM - BAND // 2 + 4
    return "".join(
        [
            f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {HEIGHT}">',
            *(y_line(floor - part * (floor - TOP), percent(part)) for part in (0.0, 0.25, 0.5, 0.75, 1.0)),
            f'<text x="{LEFT - 8}" y="{row_middle}" text-anchor="end">{escape(outside)}</text>',
            *(x_text(scale(tick), whole(tick)) for tick in ticks(first, xs[-1], tick_step(first, xs[-1], 6, True))),
            f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>',
            *(
                f'<path class="{css}" fill-opacity="{shade / SHADES:.2f}" d="{"".join(found)}"/>'
                for (css, shade), found in cells.items()
            ),
            *(_mark(scale(x), text, TOP, HEIGHT - BOTTOM) for x, text in marks if first <= x <= xs[-1]),
            *(
                f'<rect class="band" x="{edges[at]:.1f}" width="{edges[at + 1] - edges[at]:.1f}" y="{TOP}" '
                f'height="{HEIGHT - BOTTOM - TOP}"><title>{escape(column.tip)}</title></rect>'
                for at, column in enumerate(columns)
            ),
            "</svg>",
        ]
    )


def _runs(shades: Sequence[int]) -> list[tuple[int, int, int]]:
    """(shade, first, behind the last) of equal neighbours, empty cells left out."""
    found = []
    start = 0
    for at in range(1, len(shades) + 1):
        if at == len(shades) or shades[at] != shades[start]:
            if shades[start]:
                found.append((shades[start], start, at))
            start = at
    return found


def _mark(x: float, text: str, top: float, floor: float) -> str:
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{floor}"/>'
        f'<text x="{x:.1f}" y="{top - 3}">{escape(text)}</text>'
    )


__all__ = ["STYLE", "Column", "heat_chart"]
