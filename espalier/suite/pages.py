"""The results of a suite as a page to read (`report.html`, self-contained) and as markdown (`report.md`)."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from espalier.bench.charts import Point, Series, line_chart
from espalier.bench.page import document, header
from espalier.bench.wording import duration_text, section
from espalier.errors import RunError
from espalier.suite.comparing import Results
from espalier.suite.sheets import Sheet, sheets
from espalier.suite.suite import Contender

_COLOURS = ("blue", "plum", "green", "orange", "sky", "ink", "muted", "edge")
_STYLE = "".join(f".c{at}{{--c:var(--{colour})}}" for at, colour in enumerate(_COLOURS)) + (
    ".dashed.line{stroke-dasharray:6 5}.key.dashed i{border-top-style:dashed;border-radius:0}.wide{grid-column:1/-1}"
)
BUSY = 1.3
"""Load per core above which times are not those of the benchmark alone."""
_EMPHASIS = re.compile(r"\*(\w[^*]*)\*")


def write_pages(results: Results, folder: Path, command: Sequence[str], text: Path | None = None) -> list[Path]:
    """Write both pages; returns their paths.

    Args:
        results: what was run of a suite.
        folder: where its records are.
        command: what was called, as words.
        text: the file of markdown; None for report.md in the folder.

    Raises:
        RunError: one cannot be written.
    """
    found = sheets(results)
    made = _made(results, command)
    pages = {
        folder / "report.html": _page(results, found, made),
        text or folder / "report.md": _markdown(results, found, made),
    }
    for path, content in pages.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror}); choose another --out or --page") from error
    return list(pages)


def _made(results: Results, command: Sequence[str]) -> list[tuple[str, str]]:
    """How the records came about, by name."""
    places = Counter(json.dumps(record["place"], sort_keys=True) for _, record in results.cells)
    keys = {str(record["key"]): float(record["seconds"]) for _, record in results.cells}
    suite = results.suite
    machines = [
        ", ".join(f"{name} {value}" for name, value in json.loads(place).items()) + f" ({count} cells)"
        for place, count in places.most_common()
    ]
    tuned = [f"{one.name}: {one.tuning or 'defaults, no tuning'}" for one in results.contenders if one.kind != "static"]
    return [
        ("Command", shlex.join(command)),
        ("To go on", "the same with run in place of report, and without --page, runs what is missing"),
        (
            "Cells",
            f"{len(results.cells)} of {len(results.everything)} are there, {len(keys)} runs, "
            f"{duration_text(sum(keys.values()))}",
        ),
        (
            "Seeds",
            f"{_listed(suite.seeds)} to screen; {_listed(suite.confirm_seeds)} to confirm",
        ),
        ("To be confirmed", ", ".join(suite.confirm) or "nothing named yet"),
        ("Machine", "; ".join(machines)),
        ("Tuning", "; ".join(tuned)),
    ]


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "none"


def _notices(results: Results) -> list[str]:
    """What a reader has to know first."""
    found = []
    left = len(results.everything) - len(results.cells)
    if left:
        found.append(
            f"This suite has not ended: {left} of {len(results.everything)} cells are missing. "
            "What follows is what there is."
        )
    loads = [record["measured"]["load"] for _, record in results.cells if "result" in record]
    known = [one for one in loads if one is not None]
    busy = sum(one > BUSY for one in known)
    if busy:
        found.append(
            f"The machine did other work beside {busy} of {len(loads)} cells (more than {BUSY:g} processes per core): "
            "times and latencies, though those of the processor where it is a CPU, are longer than they would be by "
            "themselves."
        )
    return found


def _markdown(results: Results, found: Sequence[Sheet], made: Sequence[tuple[str, str]]) -> str:
    lines = [f"# The suite {results.suite.name}", "", results.suite.about, ""]
    for notice in _notices(results):
        lines += [f"**{notice}**", ""]
    for sheet in found:
        lines += [f"## {sheet.title}", "", sheet.about, ""]
        lines.append(_line(sheet.header))
        lines.append(_line(["---" if at in sheet.words else "---:" for at in range(len(sheet.header))]))
        lines += [_line(row) for row in sheet.rows]
        lines.append("")
    lines += ["## How it was made", "", *(f"- **{name}**: {value}" for name, value in made), ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(one.replace('|', '/') for one in cells)} |"


def _page(results: Results, found: Sequence[Sheet], made: Sequence[tuple[str, str]]) -> str:
    title, ended = f"The suite {results.suite.name}", len(results.cells) == len(results.everything)
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in made)
    parts = [
        f"<style>{_STYLE}</style>",
        header("benchmark", title, ended, escape(results.suite.about), (), _notices(results)),
        *map(_section, found[:1]),
        _curves(results),
        *map(_section, found[1:]),
        section("How it was made", "", f"<dl>{facts}</dl>"),
    ]
    return document(title, parts)


def _section(sheet: Sheet) -> str:
    about = _EMPHASIS.sub(r"<i>\1</i>", escape(sheet.about))
    return section(escape(sheet.title), about, _table(sheet))


def _table(sheet: Sheet) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if at in sheet.words else ' class=n'}>{escape(one)}</{tag}>" for at, one in enumerate(row)
        )

    rows = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in sheet.rows)
    head = cells(sheet.header, "th")
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _curves(results: Results) -> str:
    """Validation accuracy over training FLOPs, of every track of every task at the point that most runs are of."""
    condition = results.suite.conditions[0]
    figures = []
    for task in results.suite.tasks:
        for track in ("growing", "shrinking", "constant", "unstructured"):
            for point in sorted(results.points(condition)):
                lines = []
                for contender in results.contenders:
                    records = results.of(task.name, track, contender.name, point, condition).values()
                    drawn = _mean_curve([record["result"]["curve"] for record in records])
                    if drawn:
                        lines.append((contender, drawn))
                if len(lines) > 1:
                    figures.append(_figure(f"{task.name}, {track} to {point:g}", lines))
    if not figures:
        return ""
    about = (
        "Accuracy on validation data while training goes on, mean over seeds, over the part of the budget of training "
        "FLOPs that is spent (logarithmic). Learning rates fall to zero at the end of the budget, for all alike."
    )
    return section("Anytime curves", about, f'<div class="plots">{"".join(figures)}</div>')


def _mean_curve(curves: Sequence[Sequence[dict[str, float]]]) -> tuple[Point, ...]:
    """Over looks that all seeds have."""
    if not curves:
        return ()
    count = min(map(len, curves))
    return tuple(
        (
            math.log2(math.fsum(one[at]["done"] for one in curves) / len(curves)),
            math.fsum(one[at]["val_accuracy"] for one in curves) / len(curves),
        )
        for at in range(count)
    )


def _figure(title: str, lines: Sequence[tuple[Contender, tuple[Point, ...]]]) -> str:
    series, keys = [], []
    for at, (contender, points) in enumerate(lines):
        css = f"c{at % len(_COLOURS)}" + (" dashed" if contender.role in ("control", "peer") else "")
        series.append(Series(contender.name, css, points))
        keys.append(f'<span class="key {css}"><i></i>{escape(contender.name)}</span>')
    chart = line_chart(
        title,
        series,
        "part of the budget",
        lambda x: f"{2**x:.2g}",
        lambda y: f"{100 * y:.4g}%",
        may_cut=True,
        most=1.0,
    )
    legend = f'<div class="legend">{"".join(keys)}</div>'
    return f'<figure class="card"><figcaption>{escape(title)}</figcaption>{legend}{chart}</figure>'


__all__ = ["write_pages"]
