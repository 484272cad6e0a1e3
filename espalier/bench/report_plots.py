"""The plots of a report: learning curves, cost and the width of every axis over time."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from espalier.bench.charts import Marker, Series, legend, line_chart, percent, si, whole, width_strip
from espalier.bench.records import LARGEST, Record, Run, action_of, actions_of, as_mapping, as_number, as_pair
from espalier.bench.wording import layer_text, loss_text, plain_change, section

FEW_AXES = 12


def learning(run: Run) -> str:
    """Accuracy and loss, over epochs and over training FLOPs."""
    rows = (
        ("Accuracy", "accuracy", percent, False, 1.0),
        ("Loss", "loss", loss_text, True, math.inf),
    )
    over = (("epoch", "epoch", whole, True), ("training FLOPs", "training_flops", si, False))
    cards = []
    twin_epochs, note = _as_long(run.static_epochs, run.epochs)
    for name, key, form, may_be_log, most in rows:
        for x_label, x_key, x_form, x_whole in over:
            series = [
                Series("training", "train", _points(run.epochs, x_key, f"train_{key}")),
                Series("validation", "val", _points(run.epochs, x_key, f"val_{key}")),
            ]
            if run.static_epochs:
                twin = _points(twin_epochs if x_whole else run.static_epochs, x_key, f"val_{key}")
                series.insert(1, Series("static network, validation", "twin", twin))
            chart = line_chart(
                name, series, x_label, x_form, form,
                markers=_rug(run, x_key), x_whole=x_whole, may_be_log=may_be_log, may_cut=True, most=most,
            )  # fmt: skip
            cards.append(_card(f"{name} over {'epochs' if x_whole else x_label}", chart + (note if x_whole else "")))
    about = "Ticks on the axis are grow and prune events. Point at a plot to read its values."
    keys = legend(reversed(series), actions_of(run))
    return section("Learning", about, f'{keys}<div class="plots">{"".join(cards)}</div>')


def _as_long(others: Sequence[Record], ours: Sequence[Record]) -> tuple[Sequence[Record], str]:
    """Those of the others' epochs that we have too, and a note on what is left out.

    A smaller network trains for many more epochs with the same FLOPs, next to which ours would be a thin strip.
    """
    last = max((as_number(record.get("epoch")) or 0.0 for record in ours), default=math.inf)
    shared = [record for record in others if (as_number(record.get("epoch")) or 0.0) <= last]
    if len(shared) == len(others):
        return others, ""
    end = max(as_number(record.get("epoch")) or 0.0 for record in others)
    return shared, f'<p class="note">The static network trained on to epoch {whole(end)}.</p>'


def _points(records: Iterable[Record], x_key: str, y_key: str) -> tuple[tuple[float | None, float | None], ...]:
    return tuple((as_number(record.get(x_key)), as_number(record.get(y_key))) for record in records)


def _card(title: str, chart: str) -> str:
    return f'<figure class="card"><figcaption>{title}</figcaption>{chart}</figure>'


def _rug(run: Run, x_key: str) -> list[Marker]:
    """Every event as a tick: placed by its own training FLOPs, or within its epoch by its step."""
    return [
        Marker(
            action_of(event),
            _epoch_at(run, event) if x_key == "epoch" else as_number(event.get(x_key)),
            _event_tip(event),
        )
        for event in run.events
        if run.epochs
    ]


def _epoch_at(run: Run, event: Record) -> float | None:
    """Where an event lies on the epoch axis, on which a whole number is the end of that epoch."""
    step = as_number(event.get("step"))
    pairs = [(as_number(record.get("step")), as_number(record.get("epoch"))) for record in run.epochs]
    known = sorted((s, e) for s, e in pairs if s is not None and e is not None)
    if step is None or not known:
        return as_number(event.get("epoch"))
    known = [(0.0, known[0][1] - 1), *known]
    right = min(max(bisect_left(known, (step, -LARGEST)), 1), len(known) - 1)
    (step0, epoch0), (step1, epoch1) = known[right - 1], known[right]
    return epoch0 + (epoch1 - epoch0) * (step - step0) / (step1 - step0) if step1 > step0 else epoch1


def cost(run: Run) -> str:
    """Parameters and FLOPs over time, every event marked."""
    cards = []
    for name, key in (("Parameters", "parameters"), ("FLOPs per inference", "flops")):
        points, markers = _cost_history(run, key)
        series = [Series(name, "cost", tuple(points), stepped=True)]
        chart = line_chart(name, series, "step", whole, si, markers=markers, x_whole=True, from_zero=True)
        cards.append(_card(name, chart))
    about = "Each triangle is one grow or prune event, placed at the size it led to."
    about = about if run.events else "No event has changed them."
    keys = legend((), actions_of(run))
    return section("Size and cost", about, f'{keys}<div class="plots">{"".join(cards)}</div>')


def _cost_history(run: Run, key: str) -> tuple[list[tuple[float, float]], list[Marker]]:
    """(step, value) in the order of the records, and a marker for every event."""
    points: list[tuple[float, float]] = []
    markers = []
    step = 0.0
    for record in run.records:
        if record["kind"] == "static_epoch":
            continue
        step = as_number(record.get("step")) or step
        value = as_number(as_pair(record.get(key))[1] if record["kind"] == "event" else record.get(key))
        if value is not None:
            points.append((step, value))
        if record["kind"] == "event":
            # An event whose cost was not recorded is still marked, at the last cost known.
            height = points[-1][1] if points else 0.0
            markers.append(Marker(action_of(record), step, _event_tip(record), height))
    return points, markers


def _event_tip(event: Record) -> str:
    """Plain text (the chart escapes it)."""
    axes = [f"{name}: {plain_change(pair, whole)}" for name, pair in as_mapping(event.get("axes")).items()]
    axes += [f"{name}: {plain_change(pair, whole)} live" for name, pair in as_mapping(event.get("masks")).items()]
    axes += list(map(layer_text, layers)) if isinstance(layers := event.get("layers"), list) else []
    rest = [f"and {len(axes) - 6} more"] if len(axes) > 6 else []
    lines = [
        f"{action_of(event)} by {event.get('method')}, step {event.get('step')}, epoch {event.get('epoch')}",
        *axes[:6],
        *rest,
        f"parameters: {plain_change(event.get('parameters'), whole)}",
        f"FLOPs: {plain_change(event.get('flops'), si)}",
        f"loss on the same batch: {plain_change(event.get('loss'), loss_text)}",
        f"contract: {event.get('contract')}",
    ]
    return "\n".join(lines)


def _width_history(run: Run) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """For every axis its (step, size) at each change, and the last step; an axis that is not there has size 0."""
    sizes: dict[str, list[tuple[float, float]]] = {}
    step, complete = 0.0, False  # complete: every axis is known, so a name not seen before is an axis that was added

    def put(name: str, size: float, before: float) -> None:
        history = sizes.setdefault(name, [(0.0, before)])
        if history[-1][1] != size:
            history.append((step, size))

    for record in run.records:
        if record["kind"] == "static_epoch":
            continue
        step = as_number(record.get("step")) or step
        axes = record.get("axes")
        if not isinstance(axes, dict):
            continue
        if record["kind"] == "event":
            for name, pair in axes.items():
                before, after = (as_number(value) or 0.0 for value in as_pair(pair))
                put(str(name), after, before)
            axes = record.get("widths")
            if not isinstance(axes, dict):
                continue
        snapshot = {str(name): max(0.0, as_number(size) or 0.0) for name, size in axes.items()}
        for name in [*snapshot, *(known for known in sizes if known not in snapshot)]:
            size = snapshot.get(name, 0.0)
            put(name, size, 0.0 if complete else size)
        complete = True
    return sizes, step


def widths(run: Run) -> str:
    """The width of every axis that changed, over time; the others by name."""
    sizes, last = _width_history(run)
    moved = {name: history for name, history in sizes.items() if len(history) > 1}
    still = {name: history[0][1] for name, history in sizes.items() if len(history) == 1}
    body = strips(moved, last, "width") if moved else ""
    if still:
        names = ", ".join(f"<code>{escape(name)}</code> {whole(size)}" for name, size in still.items())
        count = f"{len(still)} axes that never changed" if len(still) > 1 else "1 axis that never changed"
        body += f'<details style="margin-top:16px"><summary>{count}</summary>{names}</details>'
    about = f"{len(moved)} of {len(sizes)} axes changed. An axis is a class of coupled units such as channels."
    if any(event.get("layers") for event in run.events):
        about += " Layers came or went: an axis goes by the name that it has at each time."
    return section("Width of every axis", about, f'<div class="card">{body or "No axis was recorded."}</div>')


def strips(histories: Mapping[str, Sequence[tuple[float, float]]], last: float, what: str) -> str:
    """For every name how large something was over time, to the step `last`."""
    few = len(histories) <= FEW_AXES
    figures = [_width_figure(name, history, last, few) for name, history in histories.items()]
    keys = (
        '<div class="legend"><span class="key grow"><i></i>more than at the start</span>'
        '<span class="key prune"><i></i>less</span>'
        f'<span class="key" style="--c:var(--even)"><i></i>as at the start</span>'
        f"<span>each strip runs from step 0 to step {whole(last)}; its height is the {what}</span></div>"
    )
    longest = max(map(len, histories), default=0) + 1
    return f'{keys}<div class="{"minis" if few else "rows"}" style="--name:{longest}ch">{"".join(figures)}</div>'


def _width_figure(name: str, history: Sequence[tuple[float, float]], last: float, few: bool) -> str:
    first, final = history[0][1], history[-1][1]
    css = "up" if final > first else "down" if final < first else ""
    name_html = f'<code class="name" title="{escape(name)}"><bdi>{escape(name)}</bdi></code>'
    sizes = [size for _, size in history]
    between = max(sizes, key=lambda size: abs(size - first))
    by_way_of = f"{whole(between)} → " if first == final != between else ""  # what came and went, or went and came
    size_html = f'<span class="size">{whole(first)} → {by_way_of}<b class="{css}">{whole(final)}</b></span>'
    strip = width_strip(name, history, last, 64 if few else 18)
    parts = (name_html, size_html, strip) if few else (name_html, strip, size_html)
    return f'<div class="{"mini" if few else "row"}">{"".join(parts)}</div>'
