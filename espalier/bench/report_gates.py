"""Gates in a report: pictures of the network at a few times, and how probable its units were over time."""

from __future__ import annotations

from html import escape
from itertools import pairwise

from espalier.bench.charts import Series, legend, line_chart, percent, si, whole
from espalier.bench.gate_history import GateHistory, Gates, gates_of
from espalier.bench.gate_pictures import drawn_as_dots, histogram, plane_map, pool, units
from espalier.bench.heat import Column, heat_chart
from espalier.bench.records import Run, as_number
from espalier.bench.stepper import stepped
from espalier.bench.wording import as_text, section

FEW_PLACES = 6
DECIDED = 1000.0
"""A k from which on gates are as good as decided, and need no number."""


def gates(run: Run) -> str:
    """The network at a few times, and its gates over all of them; nothing where no method has any."""
    found = gates_of(run)
    if found is None:
        return ""
    most = {place: max(one.all(place) for one in found.epochs) for place in found.places}
    cards = [_units_over_time(found)]
    if len(most) <= FEW_PLACES:
        cards += [_heat(found, (place,), f"Gates of <code>{escape(place)}</code> over time") for place in most]
    else:
        cards.append(_heat(found, tuple(most), f"All gates of {len(most)} axes over time"))
    frames = [_frame(found, one, most) for one in found.moments()]
    figure = stepped(f"The network at {len(frames)} times", frames, _keys(found))
    return section("Gates", _about(found, most), f'{figure}<div class="plots">{"".join(cards)}</div>')


def _about(found: GateHistory, most: dict[str, float]) -> str:
    last = found.epochs[-1]
    there, asleep = (sum(map(count, found.places)) for count in (last.there, lambda place: last.asleep.get(place, 0.0)))
    text = (
        "Each unit (or single weight, or layer) is multiplied by a gate, which is open with a probability that is "
        "learnt along with the weights. What stays shut leaves the network; units are kept aside, asleep."
    )
    starts = {b.stage: b.epoch for a, b in pairwise(found.epochs) if a.stage != b.stage}
    if "search" in starts:
        until = f" to {whole(starts['fine-tuning'])}" if "fine-tuning" in starts else " on"
        text += f" Gates were undecided in the search, from epoch {whole(starts['search'])}{until}."
    every = max(sum(most.values()), there)
    if there == every:
        return f"{text} All {whole(there)} gates are in the network at last."
    sleep = f", {whole(asleep)} sleep" if asleep else ""
    return f"{text} Of {whole(every)} gates {whole(there)} are in the network at last{sleep}."


def _keys(found: GateHistory) -> str:
    dots = (
        '<span class="key"><svg viewBox="-7 -7 14 14" aria-hidden="true"><circle r="5.5" fill="var(--green)"/></svg>'
        "a unit, the paler the less probable</span>"
        '<span class="key"><svg viewBox="-7 -7 14 14" aria-hidden="true"><circle r="5.5" fill="none" '
        'stroke="var(--muted)"/></svg>asleep</span>'
    )
    if any(one.map is not None for one in found.epochs):
        dots += (
            '<span class="key" style="--c:var(--blue)"><i></i>one class</span>'
            '<span class="key" style="--c:var(--orange)"><i></i>the other</span>'
            '<span class="key" style="--c:var(--ink)"><i></i>the boundary between them</span>'
            f"<span>thin lines: {', '.join(map(percent, (0.7, 0.9, 0.99)))} sure</span>"
        )
    return f'<div class="legend">{dots}</div>'


def _frame(found: GateHistory, one: Gates, most: dict[str, float]) -> tuple[str, str, list[str]]:
    name = f"Epoch {whole(one.epoch)}" if one.epoch else "At the start"
    facts = []
    if one.stage:
        sharp = one.k is None or one.k >= DECIDED
        facts.append(one.stage if sharp else f"{one.stage}, k = {as_text(one.k, si)}")
    accuracy = as_number(one.record.get("val_accuracy"))
    if accuracy is not None:
        facts.append(f"{accuracy:.1%} of validation right")
    if as_number(one.record.get("parameters")) is not None:
        facts.append(f"{as_text(one.record['parameters'])} parameters")
    views = [units(one, most), histogram(one, f"how probable gates are, {name}")]
    if one.map is not None:
        views = [plane_map(one.map, found.points, f"the plane as the network sees it, {name}"), "".join(views)]
    elif not drawn_as_dots(most):
        views = ["".join(views)]
    return name, " · ".join(facts), views


def _units_over_time(found: GateHistory) -> str:
    there = Series(
        "in the network", "twin", tuple((one.epoch, sum(map(one.there, found.places))) for one in found.epochs)
    )
    open_ = Series(
        "open: probability of at least 1/2", "grow",
        tuple((one.epoch, sum(map(one.open, found.places))) for one in found.epochs),
    )  # fmt: skip
    chart = line_chart(
        "Gates over time", [there, open_], "epoch", whole, whole, x_whole=True, y_whole=True, from_zero=True
    )
    return (
        f'<figure class="card"><figcaption>What is in the network over time</figcaption>{legend([open_, there])}'
        f"{chart}</figure>"
    )


def _heat(found: GateHistory, places: tuple[str, ...], title: str) -> str:
    parts = max(len(one.awake[place]) for one in found.epochs for place in places if place in one.awake)
    columns = []
    for one in found.epochs:
        counts = pool([one.awake[place] for place in places if len(one.awake.get(place, ())) == parts])
        asleep = sum(one.asleep.get(place, 0.0) for place in places)
        open_ = sum(map(one.open, places))
        tip = [
            f"epoch {whole(one.epoch)}{', ' if one.stage else ''}{one.stage}",
            f"open: {whole(open_)}",
            f"rather shut: {whole(sum(counts) - open_)}",
            f"asleep: {whole(asleep)}",
        ]
        columns.append(Column(one.epoch, counts or (0.0,) * parts, asleep, "\n".join(tip)))
    marks = [(a.epoch, b.stage) for a, b in pairwise(found.epochs) if a.stage != b.stage]
    chart = heat_chart(f"Probabilities of gates of {', '.join(places)} over epochs", columns, "epoch", "asleep", marks)
    return f'<figure class="card"><figcaption>{title}</figcaption>{chart}</figure>'


__all__ = ["gates"]
