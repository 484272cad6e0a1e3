"""Layers and cells in a report: how many blocks each stage of the network has, and since when."""

from __future__ import annotations

from collections.abc import Sequence

from espalier.bench.charts import Series, legend, line_chart, whole
from espalier.bench.records import Run, as_mapping, as_number
from espalier.bench.report_plots import strips
from espalier.bench.wording import section

History = list[tuple[float, float]]


def depths_of(run: Run) -> dict[str, History]:
    """Stage -> (step, number of blocks) at the start and at each change; empty if none was recorded."""
    found: dict[str, History] = {}
    step = 0.0
    for record in run.records:
        if record["kind"] == "static_epoch":
            continue
        step = as_number(record.get("step")) or step
        stages = as_mapping(record.get("depth"))
        counts = {str(name): number for name, count in stages.items() if (number := as_number(count)) is not None}
        if not counts:
            continue
        for name in (*counts, *(known for known in found if known not in counts)):
            count = counts.get(name, 0.0)
            history = found.setdefault(name, [(0.0, count if step == 0 else 0.0)])
            if history[-1][1] != count:
                history.append((step, count))
    return found


def depth(run: Run) -> str:
    """The number of blocks over time, in all and of every stage; nothing where no method changed it."""
    found = depths_of(run)
    if not found:
        return ""
    steps = sorted({step for history in found.values() for step, _ in history})
    last = max([*steps, *(number for one in run.records if (number := as_number(one.get("step"))) is not None)])
    total = [(step, sum(_at(history, step) for history in found.values())) for step in steps]
    line = Series("blocks", "cost", ((*total, (last, total[-1][1]))), stepped=True)
    moved = [_moved(run, action, word) for action, word in (("grow", "came"), ("prune", "went"))]
    drawn = [one for one in moved if one.points]
    charts = [_chart("Layers and cells", [line], "")]
    if any(count > 1 for one in drawn for _, count in one.points if count is not None):
        charts.append(_chart("Layers and cells per event", drawn, legend(drawn)))
    stages = f'<div class="card{" below" if len(charts) > 1 else ""}">{strips(found, last, "number of blocks")}</div>'
    about = (
        f"{whole(total[0][1])} layers or cells at the start, {whole(total[-1][1])} at the end, in "
        f"{len(found)} {'stage' if len(found) == 1 else 'stages'}: rows of blocks of one size."
    )
    if len(charts) > 1:
        return section("Depth", about, f'<div class="plots">{"".join(charts)}</div>{stages}')
    return section("Depth", about, f'<div class="plots">{charts[0]}{stages}</div>')


def _chart(title: str, series: Sequence[Series], keys: str) -> str:
    chart = line_chart(title, series, "step", whole, whole, x_whole=True, y_whole=True, from_zero=True)
    return f'<figure class="card"><figcaption>{title}</figcaption>{keys}{chart}</figure>'


def _at(history: History, step: float) -> float:
    return next((count for since, count in reversed(history) if since <= step), 0.0)


def _moved(run: Run, action: str, word: str) -> Series:
    points = []
    for event in run.events:
        layers = event.get("layers")
        if event.get("action") == action and isinstance(layers, list) and layers:
            points.append((as_number(event.get("step")), float(len(layers))))
    return Series(word, action, tuple(points))


__all__ = ["depth", "depths_of"]
