"""The page of a shrinking: cost and score by round against target and floor, every round, every axis."""

from __future__ import annotations

import math
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from html import escape

from espalier.bench import charts
from espalier.bench.charts import Series, legend, line_chart, si, whole
from espalier.bench.page_style import LOGO, PAGE_STYLE
from espalier.bench.report_plots import strips
from espalier.bench.wording import section
from espalier.oneshot.rounds import Round, shown

_STYLE = charts.STYLE + PAGE_STYLE


@dataclass(frozen=True)
class Page:
    """What is on the page; as in `espalier.Shrunk`."""

    target: str
    outcome: str
    reached: bool
    why: str
    notes: tuple[str, ...]
    unit: str
    scale: float
    limit: float
    floor: float
    chosen: int
    rounds: tuple[Round, ...]

    def html(self) -> str:
        """One self-contained page: nothing is loaded, and no script runs but the one that shows values."""
        digest = b64encode(sha256(charts.SCRIPT.encode()).digest()).decode()
        policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        notes = "".join(f'<p class="warn">{escape(note)}</p>' for note in self.notes)
        badge = f'<span class="badge{"" if self.reached else " open"}">{escape(self.outcome)}</span>'
        about = "The network that was chosen is marked; intervals hold the median with 95%."
        return "\n".join(
            [
                '<!doctype html><html lang="en"><head><meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{escape(self.target)} · Espalier</title><style>{_STYLE}</style></head><body><main>",
                f'<header><div class="brand">{LOGO}<span>Espalier shrink report</span>{badge}</div>',
                f'<h1>{escape(self.target)}</h1><p class="lead">{escape(self.why)}</p>{notes}</header>',
                _plots(self),
                section("Rounds", about, _table(self)),
                _widths(self.rounds),
                f"</main><script>{charts.SCRIPT}</script></body></html>",
            ]
        )


def _plots(found: Page) -> str:
    ends = (0.0, max(float(found.rounds[-1].number), 1.0))
    cost = [
        Series(found.unit, "val", tuple((float(one.number), one.cost.value * found.scale) for one in found.rounds)),
        Series("target", "twin", tuple((at, found.limit * found.scale) for at in ends)),
    ]
    scores = [
        Series("score", "val", tuple((float(one.number), _finite(one.score)) for one in found.rounds)),
        Series("floor", "twin", tuple((at, _finite(found.floor)) for at in ends)),
    ]
    cards = [
        f'<figure class="card"><figcaption>{escape(name)}</figcaption>{legend(series)}'
        f"{line_chart(name, series, 'round', whole, si, x_whole=True)}</figure>"
        for name, series in ((found.unit.capitalize(), cost), ("Score", scores))
    ]
    return section(
        "Target and floor", "Round 0 is the network as it was given.", f'<div class="plots">{"".join(cards)}</div>'
    )


def _table(found: Page) -> str:
    head = (
        f'<tr><th class="n">Round</th><th></th><th class="n">{escape(found.unit)}</th><th class="n">Score</th>'
        '<th class="n">Parameters</th><th class="n">FLOPs</th></tr>'
    )
    rows = "".join(
        f'<tr><td class="n">{one.number}</td><td>{"chosen" if one.number == found.chosen else ""}</td>'
        f'<td class="n">{escape(shown(one.cost, found.scale))}</td><td class="n">{one.score:.6g}</td>'
        f'<td class="n">{whole(one.parameters)}</td><td class="n">{si(one.flops)}</td></tr>'
        for one in found.rounds
    )
    return f'<div class="card scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _widths(rounds: tuple[Round, ...]) -> str:
    histories = {
        name: [(float(one.number), float(one.sizes[name])) for one in rounds if name in one.sizes]
        for name in rounds[0].sizes
    }
    changed = {name: found for name, found in histories.items() if len({size for _, size in found}) > 1}
    if not changed:
        return ""
    last = float(rounds[-1].number) + 0.5
    return section(
        "Widths",
        "Of every axis that changed; a step of the strips is a round.",
        f'<div class="card">{strips(changed, last, "width")}</div>',
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


__all__ = ["Page"]
