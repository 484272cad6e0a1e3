"""Plain SVG charts for a report: no library, no network. Colours are CSS variables, so one drawing fits both themes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 20, 12, 44
MOST_BANDS = 240  # hover targets per chart; a run of 10,000 epochs must not make a page of 100 MB
MOST_POINTS = 1500  # per line
MOST_RUNS = 160  # pieces per width strip, for the same reason
FEW_MARKERS = 40  # more are drawn smaller
EARLY = 0.1  # the part of the x range whose values need not fit where they would flatten all others
FEWEST_TO_CUT = 20
FAR = 10 * HEIGHT  # how far outside of the plot a line may go: a diverged loss must not overflow the renderer
MARGIN = 4  # drawing units that a line may be outside of the plot: half its width

Formatter = Callable[[float], str]
Point = tuple[float | None, float | None]

STYLE = """
.chart{display:block;width:100%;height:auto;font-size:12.5px}
.chart text{fill:var(--muted)}
.grid{stroke:var(--line)}.base{stroke:var(--edge)}
.line{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.fill{fill:var(--c);opacity:.09}.lone{fill:var(--c)}
.val{--c:var(--blue)}.train{--c:var(--sky)}.twin{--c:var(--plum)}.cost{--c:var(--blue)}
.line.train{stroke-width:1.8}.line.twin{stroke-dasharray:6 5}
.band{fill:transparent}.cross{stroke:var(--edge);opacity:0}.dot{fill:var(--c);stroke:var(--card);stroke-width:2;opacity:0}
.pt:hover .cross,.pt:hover .dot{opacity:1}
.grow{--c:var(--green)}.prune{--c:var(--orange)}.other{--c:var(--muted)}
.event{fill:var(--c);stroke:var(--card);stroke-width:1.6;cursor:default}
.event:hover{stroke:var(--ink)}
.rug{stroke:var(--c);stroke-width:2}
.strip{display:block;width:100%;background:var(--well);border-radius:3px}
.strip rect{shape-rendering:crispEdges}.strip .grow,.strip .prune{fill:var(--c)}.strip .even{fill:var(--even)}
.strip rect:hover{fill:var(--ink);fill-opacity:.55}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--muted)}
.key{display:inline-flex;align-items:center;gap:7px;white-space:nowrap}
.key i{width:20px;border-top:3px solid var(--c);border-radius:2px}.key.twin i{border-top-style:dashed;border-radius:0}
.key svg{width:12px;height:12px}.key path{fill:var(--c)}
#tip{position:fixed;z-index:9;left:0;top:0;max-width:min(360px,90vw);padding:8px 11px;border-radius:7px;
background:var(--tip);color:var(--tip-ink);font-size:12.5px;line-height:1.5;white-space:pre-line;overflow-wrap:anywhere;
pointer-events:none;box-shadow:0 4px 18px rgb(0 0 0/.22);font-variant-numeric:tabular-nums}
"""

# Without the script the browser shows the same <title> texts in its own, slower way.
SCRIPT = """
(() => {
  const tip = document.createElement("div");
  tip.id = "tip"; tip.hidden = true; document.body.append(tip);
  for (const title of document.querySelectorAll("svg title")) {
    const owner = title.parentNode;
    owner.dataset.tip = title.textContent; owner.setAttribute("aria-label", title.textContent); title.remove();
  }
  document.addEventListener("pointermove", (event) => {
    const owner = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.hidden = !owner;
    if (!owner) return;
    tip.textContent = owner.dataset.tip;
    const box = tip.getBoundingClientRect();
    const x = event.clientX + 16 + box.width > innerWidth ? event.clientX - 16 - box.width : event.clientX + 16;
    const y = Math.min(event.clientY + 16, innerHeight - box.height - 8);
    tip.style.transform = `translate(${Math.max(8, x)}px,${Math.max(8, y)}px)`;
  });
})();
"""


@dataclass(frozen=True)
class Series:
    """One line. `css` names its colour; a point with a None is a gap; `stepped` holds each value until the next."""

    name: str
    css: str
    points: tuple[Point, ...]
    stepped: bool = False


@dataclass(frozen=True)
class Marker:
    """A grow or prune event; without `y` it is a short tick on the x axis."""

    action: str
    x: float | None
    tip: str
    y: float | None = None


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] linearly (or by logarithm) to [start, end] in drawing units."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = math.log10(value) if self.log else value
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def si(value: float) -> str:
    """Three significant digits and a unit prefix: 12,345 -> 12.3k."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{prefix}" if abs(value) < 999.5 * size else f"{value:.2e}"
    return f"{value:.3g}"


def whole(value: float) -> str:
    """An integer with thousands separated."""
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """A fraction as a percentage with as few digits as it needs."""
    return f"{100 * value:.4g}%"


def line_chart(
    label: str,
    series: Sequence[Series],
    x_label: str,
    x_format: Formatter,
    y_format: Formatter,
    *,
    markers: Sequence[Marker] = (),
    x_whole: bool = False,
    y_whole: bool = False,
    from_zero: bool = False,
    may_be_log: bool = False,
    may_cut: bool = False,
    most: float = math.inf,
) -> str:
    """An SVG of lines with hover targets and event markers; values that are not finite leave gaps and are counted.

    `x_whole` and `y_whole` say that there is nothing between whole numbers, and so no tick; `most` is what no value
    can exceed, and so no tick.
    With `may_cut` the y axis fits what comes after the first tenth where that takes less than half of the whole range;
    the beginning then lies outside of the plot, and a note says so.
    """
    drawn = [(line, _segments(line.points)) for line in series]
    points = [point for _, segments in drawn for segment in segments for point in segment]
    if not points:
        return '<p class="empty">Nothing to draw yet.</p>'
    xs, ys = [x for x, _ in points], [y for _, y in points]
    late = _late(points) if may_cut else ys
    cut, ys = len(late) < len(ys), late
    xs += [marker.x for marker in markers if marker.x is not None]
    log = may_be_log and min(ys) > 0 and max(ys) / min(ys) > 30
    x_scale = Scale(*span(min(xs), max(xs), 0.5 if x_whole else None), LEFT + 6, WIDTH - RIGHT)
    if log:
        y_scale = Scale(*span(min(ys), max(ys)), HEIGHT - BOTTOM, TOP, log=True)
        y_ticks = log_ticks(y_scale.low, y_scale.high)
    else:
        low, high = span(min(0.0, *ys) if from_zero else min(ys), max(ys))
        low, high = (low, min(high, most)) if low < most else (low, high)
        step = tick_step(low, high, 5, y_whole)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        y_scale, y_ticks = Scale(low, high, HEIGHT - BOTTOM, TOP), ticks(low, high, step)
    x_ticks = ticks(x_scale.low, x_scale.high, tick_step(x_scale.low, x_scale.high, 6, x_whole))
    floor = HEIGHT - BOTTOM
    described = f"{label}; over {x_label}; {', '.join(line.name for line in series)}"
    return "".join(
        [
            f'<svg class="chart" role="img" aria-label="{escape(described)}" viewBox="0 0 {WIDTH} {HEIGHT}">',
            *(y_tick(y_scale(tick), y_format(tick)) for tick in y_ticks),
            *(x_tick(x_scale(tick), x_format(tick)) for tick in x_ticks),
            f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>',
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">',
            f"{escape(x_label)}{' · logarithmic y axis' if log else ''}</text>",
            # an inner drawing cuts off what lies outside of it
            f'<svg y="{TOP - MARGIN}" width="{WIDTH}" height="{floor - TOP + 2 * MARGIN}" '
            f'viewBox="0 {TOP - MARGIN} {WIDTH} {floor - TOP + 2 * MARGIN}">',
            *(_line(line, segments, x_scale, y_scale) for line, segments in drawn),
            *_bands(drawn, x_scale, y_scale, x_label, x_format, y_format),
            "</svg>",
            *(_marker(marker, x_scale, y_scale, 1.0 if len(markers) <= FEW_MARKERS else 0.6) for marker in markers),
            "</svg>",
            '<p class="note">The first values lie outside of the plot.</p>' if cut else "",
            _missing(series),
        ]
    )


def width_strip(name: str, sizes: Sequence[tuple[float, float]], last: float, height: int) -> str:
    """One axis over time: height shows its size, colour how far it is above (green) or below (orange) its start.

    `sizes` holds (step, size) at each change, in order; `last` is the step where the strip ends.
    """
    largest, first = max(size for _, size in sizes) or 1.0, sizes[0][1]
    last = max(last, sizes[-1][0], 1.0)
    if len(sizes) > MOST_RUNS:
        sizes = list({int(step / last * MOST_RUNS): (step, size) for step, size in sizes}.values())
    parts = [
        f'<svg class="strip" role="img" aria-label="{escape(f"width of {name} over time")}" height="{height}" '
        f'viewBox="0 0 1000 100" preserveAspectRatio="none">'
    ]
    for index, (step, size) in enumerate(sizes):
        end = sizes[index + 1][0] if index + 1 < len(sizes) else last
        left, right, tall = 1000 * step / last, 1000 * end / last, 100 * size / largest
        if first > 0 and size > 0:
            change = max(-1.0, min(1.0, math.log2(size / first) / 2))  # full colour at four times or a quarter
        else:
            change = float(size > first) - float(size < first)
        css = "grow" if change > 0 else "prune" if change < 0 else "even"
        of_start = f" ({100 * size / first:.0f}% of the start)" if first > 0 else ""
        parts.append(
            f'<rect class="{css}" x="{left:.1f}" y="{100 - tall:.1f}" width="{max(right - left, 1):.1f}" '
            f'height="{tall:.1f}" fill-opacity="{0.4 + 0.55 * abs(change):.2f}">'
            f"<title>{escape(name)}\nsteps {whole(step)} to {whole(end)}: {whole(size)}{of_start}</title></rect>"
        )
    return "".join([*parts, "</svg>"])


def legend(series: Iterable[Series], actions: Iterable[str] = ()) -> str:
    """Keys for lines and event markers, as HTML, so that they wrap on a narrow page."""
    lines = (f'<span class="key {escape(line.css)}"><i></i>{escape(line.name)}</span>' for line in series)
    events = (f'<span class="key {_css(action)}">{event_icon(action)}{escape(action)}</span>' for action in actions)
    return f'<div class="legend">{"".join([*lines, *events])}</div>'


def event_icon(action: str) -> str:
    """The marker of an action as a small stand-alone drawing."""
    return f'<svg viewBox="-7 -7 14 14" aria-hidden="true"><path d="{_shape(action)}"/></svg>'


def _css(action: str) -> str:
    return action if action in ("grow", "prune") else "other"


def _shape(action: str) -> str:
    shapes = {"grow": "M0,-6.5L6.3,5H-6.3Z", "prune": "M0,6.5L6.3,-5H-6.3Z"}
    return shapes.get(action, "M0,-6L6,0L0,6L-6,0Z")


def _segments(points: Iterable[Point]) -> list[list[tuple[float, float]]]:
    """Runs of complete points; a point with a missing coordinate ends a run."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if x is not None and y is not None:
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _late(points: Sequence[tuple[float, float]]) -> list[float]:
    """The y values after the first tenth of the x range, if they leave out at least half of the range of all."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    start = min(xs) + EARLY * (max(xs) - min(xs))
    late = [y for x, y in points if x >= start]
    enough = late and len(points) >= FEWEST_TO_CUT
    return late if enough and max(late) - min(late) < 0.5 * (max(ys) - min(ys)) else ys


def span(low: float, high: float, pad: float | None = None) -> tuple[float, float]:
    """The range, widened where it is empty or too narrow for floating point."""
    if high - low > 1e-9 * max(abs(low), abs(high), 1e-90):
        return low, high
    pad = pad if pad is not None else 0.1 * abs(low) or 1.0
    return low - pad, high + pad


def tick_step(low: float, high: float, count: int, whole_numbers: bool = False) -> float:
    """A round distance between about `count` ticks."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= rough), 10 * power)
    if whole_numbers:  # 2.5 becomes 5
        step = max(1.0, step if step % 1 == 0 else 2 * step)
    return step


def ticks(low: float, high: float, step: float) -> list[float]:
    """The multiples of `step` from `low` to `high`."""
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or these alone, from `low` to `high`: eight at most."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    inside = [value for value in values if low <= value <= high]
    return inside[:: math.ceil(len(inside) / 8)]


def y_tick(y: float, text: str) -> str:
    """A line across the plot, and its text beside it."""
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def x_tick(x: float, text: str) -> str:
    """A text below the plot."""
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(text)}</text>'


def _line(series: Series, segments: list[list[tuple[float, float]]], x_scale: Scale, y_scale: Scale) -> str:
    parts = []
    for segment in segments:
        drawn = _thinned([(x_scale(x), max(-FAR, min(FAR, y_scale(y)))) for x, y in segment])
        places = [(f"{x:.1f}", f"{y:.1f}") for x, y in drawn]
        (x0, y0), rest = places[0], places[1:]
        if not rest:
            parts.append(f'<circle class="lone {series.css}" cx="{x0}" cy="{y0}" r="3.2"/>')
            continue
        path = f"M{x0},{y0}" + "".join(f"H{x}V{y}" if series.stepped else f"L{x},{y}" for x, y in rest)
        if series.stepped:
            floor = f"{y_scale.start:.1f}"
            parts.append(f'<path class="fill {series.css}" d="{path}V{floor}H{x0}Z"/>')
        parts.append(f'<path class="line {series.css}" d="{path}"/>')
    return "".join(parts)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of a long line the lowest and the highest point in each column as wide as the line, in their order."""
    if len(points) <= MOST_POINTS:
        return points
    columns: dict[int, list[int]] = {}
    for at, (x, _) in enumerate(points):
        columns.setdefault(int(x), []).append(at)
    kept = {0, len(points) - 1}
    for found in columns.values():
        kept |= {min(found, key=lambda at: points[at][1]), max(found, key=lambda at: points[at][1])}
    return [points[at] for at in sorted(kept)]


def _bands(
    drawn: Sequence[tuple[Series, list[list[tuple[float, float]]]]],
    x_scale: Scale,
    y_scale: Scale,
    x_label: str,
    x_format: Formatter,
    y_format: Formatter,
) -> list[str]:
    """Invisible columns that show, on hover, what each line had reached there: its last value at or before that x."""
    lines = [(line, sorted((p for run in runs for p in run), key=lambda point: point[0])) for line, runs in drawn]
    xs = sorted({x for _, points in lines for x, _ in points})
    xs = xs[:: math.ceil(len(xs) / MOST_BANDS)]
    centres = [x_scale(x) for x in xs]
    edges = [float(LEFT), *((a + b) / 2 for a, b in pairwise(centres)), float(WIDTH - RIGHT)]
    bands = []
    for index, (x, centre) in enumerate(zip(xs, centres, strict=True)):
        rows, dots = [f"{x_label} {x_format(x)}"], []
        for line, points in lines:
            at = bisect_right(points, x, key=lambda point: point[0]) - 1
            if at >= 0:
                px, py = points[at]
                rows.insert(1, f"{line.name}: {y_format(py)}")  # the last drawn is on top: first in the text
                px = x if line.stepped else px
                dots.append(f'<circle class="dot {line.css}" cx="{x_scale(px):.1f}" cy="{y_scale(py):.1f}" r="4.5"/>')
        bands.append(
            f'<g class="pt"><title>{escape(chr(10).join(rows))}</title>'
            f'<rect class="band" x="{edges[index]:.1f}" y="{TOP}" width="{edges[index + 1] - edges[index]:.1f}" '
            f'height="{HEIGHT - BOTTOM - TOP}"/>'
            f'<line class="cross" x1="{centre:.1f}" x2="{centre:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f"{''.join(dots)}</g>"
        )
    return bands


def _marker(marker: Marker, x_scale: Scale, y_scale: Scale, size: float) -> str:
    if marker.x is None:
        return ""
    x = x_scale(marker.x)
    css, title = _css(marker.action), f"<title>{escape(marker.tip)}</title>"
    if marker.y is None:
        floor = HEIGHT - BOTTOM
        return f'<line class="rug {css}" x1="{x:.1f}" x2="{x:.1f}" y1="{floor - 8}" y2="{floor}">{title}</line>'
    place = f"translate({x:.1f},{y_scale(marker.y):.1f}){'' if size == 1 else f'scale({size:g})'}"
    return f'<path class="event {css}" transform="{place}" d="{_shape(marker.action)}">{title}</path>'


def _missing(series: Iterable[Series]) -> str:
    count = sum(x is None or y is None for line in series for x, y in line.points)
    return f'<p class="note">{count} values are missing or not finite and leave a gap.</p>' if count else ""
