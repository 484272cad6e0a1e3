"""The lineage of a search as a picture: every branch from where it begins to where it stops, over training FLOPs.

Time runs to the right and down: below the network that is gone on with lie its branches, one per row, and the winner's
line goes on to the next cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from espalier.bench.charts import si, tick_step, ticks, whole
from espalier.bench.records import Record, as_number
from espalier.bench.search_records import Branch, Cycle, SearchRun
from espalier.bench.wording import accuracy_text

Place = Callable[[float], float]
"""Training FLOPs -> x."""

STYLE = """
.tree{overflow-x:auto}.tree>svg{display:block;width:100%;min-width:820px;height:auto;font-size:11.5px}
.lineage text{fill:var(--muted)}.lineage text.won{fill:var(--ink);font-weight:600}.lineage .lost{--c:var(--orange)}
.lineage .trunk{fill:none;stroke:var(--blue);stroke-width:2.6;stroke-linejoin:round;stroke-linecap:round}
.lineage .twig{fill:none;stroke:var(--c);stroke-width:1.6}.lineage .control{--c:var(--even)}
.lineage .tip{fill:var(--card);stroke:var(--c);stroke-width:1.8}.lineage .tip.won{fill:var(--blue);stroke:var(--blue)}
.lineage .tip.passed{fill:var(--c)}.lineage .rung{fill:var(--c)}
.lineage .cross{stroke:var(--c);stroke-width:2;opacity:1}
.lineage g.row:hover text{fill:var(--ink)}
.tree-keys{margin-bottom:10px}
"""
_WIDTH, _ROW, _TOP, _BOTTOM = 960.0, 19.0, 22.0, 40.0
_LEFT, _RIGHT = 12.0, 16.0
_MOST_TEXT = 64
_MOST_ROWS = 400
"""Of a longer search only the branches that went to the last rung are drawn, and of a very long one the winners."""


@dataclass(frozen=True)
class _Row:
    branch: Branch
    y: float
    end: float


@dataclass(frozen=True)
class _Block:
    """A cycle on the page."""

    cycle: Cycle
    y: float
    """Of the control."""
    rows: tuple[_Row, ...]

    @property
    def out(self) -> float:
        """Height at which the search goes on."""
        return next((row.y for row in self.rows if row.branch.name == self.cycle.winner), self.y)

    @property
    def bottom(self) -> float:
        return max([self.y, *(row.y for row in self.rows)])


def lineage(search: SearchRun) -> str:
    """The picture, as HTML."""
    blocks, y = list[_Block](), _TOP + _ROW
    for cycle in search.cycles:
        shown = _shown(cycle, sum(len(one.branches) + 2 for one in search.cycles))
        rows = [_Row(one, y + _ROW * (at + 1), _stops(one, cycle)) for at, one in enumerate(shown)]
        blocks.append(_Block(cycle, y, tuple(rows)))
        y = blocks[-1].bottom + 1.6 * _ROW
    height = y + _BOTTOM
    total = search.total

    def x(spent: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(max(spent / total, 0.0), 1.0)

    parts = [
        f'<svg role="img" aria-label="lineage of the search: {len(search.branches)} branches in {len(blocks)} cycles" '
        f'viewBox="0 0 {_WIDTH:.0f} {height:.0f}">'
    ]
    for tick in ticks(0, total, tick_step(0, total, 8)):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="4" y2="{height - 34:.0f}"/>')
        anchor = "start" if tick == 0 else "middle"
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 20:.0f}" text-anchor="{anchor}">{si(tick)}</text>')
    parts.append(f'<text x="{_WIDTH / 2:.0f}" y="{height - 4:.0f}" text-anchor="middle">training FLOPs</text>')
    parts += [_block(block, x) for block in blocks]
    return "".join([*parts, _trunk(search, blocks, y, x), "</svg>"])


def legend_html() -> str:
    """What the marks mean."""
    marks = (
        ("gone on with", '<circle class="tip won" r="5"/>', ""),
        ("passed the test, another was better", '<circle class="tip passed" r="5"/>', "grow"),
        ("not accepted", '<circle class="tip" r="5"/>', "refused"),
        ("lost", '<path class="cross" d="M-4,-4L4,4M4,-4L-4,4"/>', "lost"),
        ("control", '<path class="twig" d="M-7,0H7"/>', "control"),
    )
    parts = (
        f'<span class="key {css}"><svg viewBox="-7 -7 14 14" aria-hidden="true">{mark}</svg>{name}</span>'
        for name, mark, css in marks
    )
    return f'<div class="legend tree-keys">{"".join(parts)}</div>'


def _shown(cycle: Cycle, rows: int) -> Sequence[Branch]:
    if rows <= _MOST_ROWS:
        return cycle.branches
    last = max((len(one.records) for one in cycle.branches), default=0)
    kept = [one for one in cycle.branches if len(one.records) == last or one.name == cycle.winner]
    return kept if rows <= 4 * _MOST_ROWS else [one for one in kept if one.name == cycle.winner]


def _stops(branch: Branch, cycle: Cycle) -> float:
    """Training FLOPs at which a branch stops; one that is lost, with the rung that it was lost in."""
    rung = as_number(branch.records[-1].get("rung")) or 0.0
    spent = as_number(branch.records[-1].get("total_spent"))
    if spent is None:
        its = (as_number(one.get("total_spent")) for one in cycle.controls if as_number(one.get("rung")) == rung)
        spent = next((one for one in its if one is not None), None)
    return cycle.end if spent is None else spent


def _block(block: _Block, x: Place) -> str:
    begin, cycle = x(block.cycle.begin), block.cycle
    parts = []
    if block.rows:
        parts.append(f'<path class="twig control" d="M{begin:.1f},{block.y:.1f}V{block.bottom:.1f}"/>')
    if cycle.controls and cycle.winner is not None:
        end = x(cycle.end)
        parts.append(f'<path class="twig control" d="M{begin:.1f},{block.y:.1f}H{end:.1f}"/>')
        parts.append(f'<text x="{end + 6:.1f}" y="{block.y + 4:.1f}">control</text>')
    parts += [_row(row, block, begin, x) for row in block.rows]
    return "".join(parts)


def _row(row: _Row, block: _Block, begin: float, x: Place) -> str:
    branch, end, won = row.branch, x(row.end), row.branch.name == block.cycle.winner
    passed = branch.judged.get("accepted") is True and branch.lost is None
    css = "lost" if branch.lost is not None else "grow" if passed else "refused"
    rungs = [as_number(one.get("total_spent")) for one in branch.records[:-1]]
    dots = "".join(
        f'<circle class="rung" cx="{x(one):.1f}" cy="{row.y:.1f}" r="2.4"/>' for one in rungs if one is not None
    )
    if branch.lost is not None:
        tip = f'<path class="cross" transform="translate({end:.1f},{row.y:.1f})" d="M-4,-4L4,4M4,-4L-4,4"/>'
    else:
        how = " won" if won else " passed" if passed else ""
        tip = f'<circle class="tip{how}" cx="{end:.1f}" cy="{row.y:.1f}" r="4.4"/>'
    text, full = _label(branch)
    last = x(block.cycle.end)
    place, anchor = (last + 16, "start") if last < _WIDTH * 0.56 else (begin - 10, "end")
    return (
        f'<g class="row {css}"><title>{escape(full)}</title>'
        f'<path class="twig" d="M{begin:.1f},{row.y:.1f}H{end:.1f}"/>{dots}{tip}'
        f'<text class="{"won" if won else ""}" x="{place:.1f}" y="{row.y + 4:.1f}" text-anchor="{anchor}">'
        f"{escape(text)}</text></g>"
    )


def _label(branch: Branch) -> tuple[str, str]:
    """What stands beside a branch, and all that is known of it."""
    what = branch.what if len(branch.what) <= _MOST_TEXT else f"{branch.what[: _MOST_TEXT - 1]}…"
    if branch.lost is not None:
        return f"{what}: lost", f"{branch.what}\n{branch.lost}"
    gain = gain_text(branch.judged)
    lines = [
        branch.what,
        f"loss falls by {gain} against the control",
        f"{len(branch.records)} {'rung' if len(branch.records) == 1 else 'rungs'}",
    ]
    if (parameters := as_number(branch.judged.get("parameters"))) is not None:
        lines.append(f"{whole(parameters)} parameters")
    if (accuracy := as_number(branch.judged.get("accuracy"))) is not None:
        lines.append(f"{accuracy_text(accuracy)} of the held-out samples")
    return f"{what}  {gain}", "\n".join(lines)


def gain_text(record: Record) -> str:
    """By how much the loss fell, and the standard error."""
    gain, error = as_number(record.get("gain")), as_number(record.get("error"))
    return "—" if gain is None or error is None else f"{gain:+.4f} ± {error:.4f}"


def _trunk(search: SearchRun, blocks: Sequence[_Block], y: float, x: Place) -> str:
    """The line of the networks that were gone on with, from the start to the end."""
    first = blocks[0].y if blocks else _TOP + _ROW
    path, at = [f"M{x(0):.1f},{first:.1f}"], first
    for block in blocks:
        path.append(f"H{x(block.cycle.begin):.1f}")
        if not block.cycle.decided:
            return f'<path class="trunk" d="{"".join(path)}"/>'
        if block.out != block.y:
            path.append(f"V{block.out:.1f}")
        path.append(f"H{x(block.cycle.end) + 8:.1f}")
        at = block.bottom + 1.6 * _ROW
        path.append(f"V{at:.1f}")
    spent = [as_number(one.get("total_spent")) for one in search.records]
    last = x(max((one for one in spent if one is not None), default=0.0))
    path.append(f"H{last:.1f}")
    marks = [_word(x(0), first - 8, "start", search.start, "start")]
    if search.end is not None:
        marks.append(f'<circle class="tip won" cx="{last:.1f}" cy="{at:.1f}" r="5.5"/>')
        marks.append(_word(last, at - 10, "end", search.end, "end"))
    return f'<path class="trunk" d="{"".join(path)}"/>{"".join(marks)}'


def _word(x: float, y: float, name: str, record: Record, anchor: str) -> str:
    parameters = as_number(record.get("parameters"))
    text = name if parameters is None else f"{name}: {whole(parameters)} parameters"
    return f'<text class="won" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


__all__ = ["STYLE", "gain_text", "legend_html", "lineage"]
