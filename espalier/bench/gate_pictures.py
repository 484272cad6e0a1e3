"""Pictures of gates at one time: a map of the plane, the units of every axis, and how probable they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from espalier.bench.charts import percent, whole
from espalier.bench.contours import rings
from espalier.bench.gate_history import Gates, Histogram, Map

SIDE = 400
"""Of a map, and the width of the other pictures, in drawing units."""
DOTS = 25
"""In a row."""
MOST_DOTS, MOST_DOTTED = 200, 6
"""Units of a place that are drawn one by one, and places of such sizes; larger networks are drawn as bars."""
MOST_BARS = 40
LEVELS = (0.5, 0.7, 0.9, 0.99)
"""Of the probability of a class, around each of which a map has a line."""

STYLE = """
.map{display:block;width:100%;height:auto;border-radius:8px;background:var(--card)}
.map .zero{--c:var(--blue)}.map .one{--c:var(--orange)}
.map .sure{fill:var(--c);fill-opacity:.15;stroke:var(--c);stroke-opacity:.45;stroke-width:1}
.map .edge{fill:none;stroke:var(--ink);stroke-width:2.4}
.map .points{fill:none;stroke:var(--c);stroke-width:6;stroke-linecap:round}
.map .points.rim{stroke:var(--card);stroke-width:8.5}
.units{display:block;width:100%;height:auto}
.units .on{fill:none;stroke:var(--green);stroke-width:11;stroke-linecap:round}
.units .off{fill:none;stroke:var(--edge);stroke-width:1.2}
.dotted,.barred{display:grid;gap:12px 28px}
.barred{grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr));gap:6px 28px}
.unitrow{display:grid;grid-template-columns:minmax(0,1fr) auto;gap:2px 12px;font-size:13px;align-items:baseline}
.unitrow svg{grid-column:1/-1}
.bar{display:block;width:100%;height:13px;background:none}.bar .on{fill:var(--green)}
.bar .off{fill:var(--well);stroke:var(--edge);stroke-width:.6}
.spread{display:block;width:100%;max-width:540px;height:auto;font-size:11px}.spread rect{fill:var(--green)}
.spread line{stroke:var(--edge)}.spread text{fill:var(--muted)}
"""


def plane_map(found: Map, points: Sequence[tuple[float, float, int]], label: str) -> str:
    """Colour says which class wins, lines how sure the network is, the thick one where it changes its mind."""
    (left, right), (low, high) = found.x, found.y
    across, up = len(found.values[0]) - 1, len(found.values) - 1
    tall = SIDE * min(1.2, max(0.6, (high - low) / (right - left)))
    mirrored = [[1 - value for value in row] for row in found.values]
    parts = []
    for css, field in (("zero", mirrored), ("one", found.values)):
        for level in LEVELS:
            lines = rings(field, level)
            if lines:
                path = "".join(_ring(ring, SIDE / across, tall / up, tall) for ring in lines)
                parts.append(f'<path class="sure {css}" d="{path}"/>')
                if css == "one" and level == LEVELS[0]:
                    edge = f'<path class="edge" d="{path}"/>'
                    parts.append(edge)
    for css, side in (("zero", 0), ("one", 1)):
        places = [
            (SIDE * (x - left) / (right - left), tall * (high - y) / (high - low)) for x, y, c in points if c == side
        ]
        inside = [(x, y) for x, y in places if 0 <= x <= SIDE and 0 <= y <= tall]
        if inside:
            path = "".join(f"M{x:.0f},{y:.0f}h0" for x, y in inside)
            parts.append(f'<path class="points rim" d="{path}"/><path class="points {css}" d="{path}"/>')
    # two units less on each side: lines that close along the border stay outside
    return (
        f'<svg class="map" role="img" aria-label="{escape(label)}" viewBox="2 2 {SIDE - 4} {tall - 4:.0f}">'
        f"{''.join(parts)}</svg>"
    )


def _ring(ring: Sequence[tuple[float, float]], across: float, up: float, tall: float) -> str:
    places = [f"{across * x:.1f},{tall - up * y:.1f}" for x, y in ring]
    kept = [place for at, place in enumerate(places) if place != places[at - 1]] or places[:1]
    return f"M{'L'.join(kept)}Z"


def drawn_as_dots(most: Mapping[str, float]) -> bool:
    """Whether a network is small enough that each of its units is drawn."""
    return len(most) <= MOST_DOTTED and max(most.values(), default=0) <= MOST_DOTS


def units(gates: Gates, most: Mapping[str, float]) -> str:
    """All gates of every place, the surest first, then those that sleep; `most` is how many a place ever had."""
    small = drawn_as_dots(most)
    largest = max(most.values(), default=0) or 1.0
    shown = list(most)[:MOST_BARS]
    rows = [
        f'<div class="unitrow"><code class="name" title="{escape(place)}"><bdi>{escape(place)}</bdi></code>'
        f'<span class="size"><b>{whole(gates.there(place))}</b> of {whole(most[place])}</span>'
        f"{_dots(gates, place, most[place]) if small else _bar(gates, place, largest)}</div>"
        for place in shown
    ]
    left = f'<p class="note">and {len(most) - len(shown)} more</p>' if len(most) > len(shown) else ""
    return f'<div class="{"dotted" if small else "barred"}">{"".join(rows)}</div>{left}'


def _dots(gates: Gates, place: str, most: float) -> str:
    pitch = SIDE / DOTS
    spots = iter(range(int(most)))
    parts = []

    def middles(count: float) -> list[tuple[float, float]]:
        taken = [spot for _, spot in zip(range(int(count)), spots, strict=False)]
        return [(pitch * (spot % DOTS + 0.5), pitch * (spot // DOTS + 0.5)) for spot in taken]

    for chance, count in _surest_first(gates.awake.get(place, ())):
        path = "".join(f"M{x:.0f},{y:.0f}h0" for x, y in middles(count))
        parts.append(f'<path class="on" stroke-opacity="{_shade(chance)}" d="{path}"/>')
    rim = "".join(
        f"M{x - 5:.0f},{y:.0f}a5,5 0 1 0 10,0a5,5 0 1 0 -10,0" for x, y in middles(gates.asleep.get(place, 0))
    )
    parts.append(f'<path class="off" d="{rim}"/>' if rim else "")
    tall = pitch * max(1, -(-int(most) // DOTS))
    return f'<svg class="units" {_label(gates, place)} viewBox="0 0 {SIDE} {tall:.0f}">{"".join(parts)}</svg>'


def _bar(gates: Gates, place: str, largest: float) -> str:
    parts, left = [], 0.0
    for chance, count in _surest_first(gates.awake.get(place, ())):
        wide = SIDE * count / largest
        parts.append(
            f'<rect class="on" fill-opacity="{_shade(chance)}" x="{left:.1f}" width="{wide:.1f}" height="13"/>'
        )
        left += wide
    wide = SIDE * gates.asleep.get(place, 0.0) / largest
    parts.append(f'<rect class="off" x="{left:.1f}" width="{wide:.1f}" height="13"/>' if wide else "")
    return (
        f'<svg class="bar" {_label(gates, place)} viewBox="0 0 {SIDE} 13" preserveAspectRatio="none">'
        f"{''.join(parts)}</svg>"
    )


def _label(gates: Gates, place: str) -> str:
    asleep = gates.asleep.get(place, 0.0)
    words = f"{place}: {whole(gates.open(place))} open, {whole(gates.there(place) - gates.open(place))} rather shut"
    return f'role="img" aria-label="{escape(words)}, {whole(asleep)} asleep"'


def _surest_first(counts: Histogram) -> list[tuple[float, float]]:
    """(probability, count) of every part that is not empty; gates in the outermost parts are taken to be decided."""
    last = len(counts) - 1
    middles = [at / last if at in (0, last) and last else (at + 0.5) / len(counts) for at in range(len(counts))]
    return [(p, count) for p, count in zip(reversed(middles), reversed(counts), strict=True) if count]


def _shade(chance: float) -> str:
    return f"{0.12 + 0.88 * chance:.2f}"


def histogram(gates: Gates, label: str) -> str:
    """How many gates of all places have which probability."""
    pooled = pool(list(gates.awake.values()))
    largest, tall, floor = max(pooled, default=0.0) or 1.0, 84, 98
    wide = SIDE / max(1, len(pooled))
    bars = "".join(
        f'<rect x="{at * wide + 1:.1f}" width="{wide - 2:.1f}" y="{floor - max(1.0, tall * count / largest):.1f}" '
        f'height="{max(1.0, tall * count / largest):.1f}"><title>probability {percent(at / len(pooled))} to '
        f"{percent((at + 1) / len(pooled))}: {whole(count)} gates</title></rect>"
        for at, count in enumerate(pooled)
        if count
    )
    ticks = "".join(
        f'<text x="{SIDE * part:.0f}" y="{floor + 17}" text-anchor="{anchor}">{text}</text>'
        for part, anchor, text in ((0, "start", "0"), (0.5, "middle", "probability of a gate"), (1, "end", "1"))
    )
    return (
        f'<svg class="spread" role="img" aria-label="{escape(label)}" viewBox="0 0 {SIDE} {floor + 22}">{bars}'
        f'<line x1="0" x2="{SIDE}" y1="{floor}" y2="{floor}"/>{ticks}</svg>'
    )


def pool(histograms: Sequence[Histogram]) -> Histogram:
    """The sum of histograms of as many parts as the first one has."""
    alike = [one for one in histograms if len(one) == len(histograms[0])]
    return tuple(map(sum, zip(*alike, strict=True)))


__all__ = ["STYLE", "drawn_as_dots", "histogram", "plane_map", "pool", "units"]
