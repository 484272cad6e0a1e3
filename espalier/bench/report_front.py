"""The Pareto front of a search in its report: how good every network that was judged is at what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from espalier.bench.charts import percent, si, whole
from espalier.bench.records import Record, as_mapping, as_number
from espalier.bench.report_tables import numbers, table
from espalier.bench.scatter import Spot, keys, near, scatter
from espalier.bench.search_records import SearchRun, what_of
from espalier.bench.wording import accuracy_text, as_text, loss_text, section
from espalier.evolve.pareto import Front, Judged


def front(search: SearchRun) -> str:
    """Accuracy over each cost, and the networks of the front with their checkpoints."""
    judged = [one for one in search.records if one["kind"] in ("start", "branch", "control", "end")]
    costs = [("parameters", si), ("flops", si)]
    if any("latency" in one for one in judged):
        costs.append(("latency", si))
    words = {"parameters": "parameters", "flops": "FLOPs per inference", "latency": "latency"}
    cards = []
    for key, form in costs:
        spots, stairs = _judged(search, judged, key)
        chart = scatter(
            f"Accuracy over {words[key]}", spots, words[key], form, percent, stairs=stairs, may_be_log=True,
            y_range=near([one.y for one in spots], max(one.y for one in spots)) if spots else None,
        )  # fmt: skip
        cards.append(f'<figure class="card"><figcaption>Accuracy over {words[key]}</figcaption>{chart}</figure>')
    entries = [("judged", "tried", False), ("on the front", "front", False), ("found", "found", False)]
    if search.alone is not None:
        entries.append(("start alone", "alone", False))
    about = "Held-out accuracy of every network that was judged; the line is what no cheaper one reaches."
    return section("Pareto front", about, f'{keys(entries)}<div class="plots">{"".join(cards)}</div>{_members(search)}')


def _judged(search: SearchRun, judged: Sequence[Record], key: str) -> tuple[list[Spot], list[tuple[float, float]]]:
    """Of all judged networks a spot each, and the corners of the front over one cost."""
    best_of, points = Front(), list[tuple[float, float, Record]]()
    for number, one in enumerate(judged):
        cost, accuracy = as_number(one.get(key)), as_number(one.get("accuracy"))
        if cost is not None and accuracy is not None:
            points.append((cost, accuracy, one))
            best_of.add(Judged(str(number), accuracy, 0.0, (cost,)))
    best = [(one.costs[0], one.accuracy) for one in best_of.members()]
    spots = [
        Spot(cost, accuracy, "front" if (cost, accuracy) in best else "tried", _tip(one))
        for cost, accuracy, one in sorted(points, key=lambda point: point[:2] in best)
    ]
    for css, end in (("alone", search.alone), ("found", search.end)):
        cost, accuracy = (None, None) if end is None else (as_number(end.get(key)), as_number(end.get("accuracy")))
        if end is not None and cost is not None and accuracy is not None:
            spots.append(
                Spot(cost, accuracy, css, _tip(end, {"found": "found", "alone": "start alone"}[css]), large=True)
            )
    return spots, best


def _tip(record: Record, name: str | None = None) -> str:
    if name is None:
        name = what_of(record) if record["kind"] == "branch" else str(record["kind"])
    lines = [name, f"{percent(as_number(record.get('accuracy')) or 0.0)} of the held-out samples"]
    lines += [
        f"{form(value)} {word}"
        for key, word, form in (("parameters", "parameters", whole), ("flops", "FLOPs", si))
        if (value := as_number(record.get(key))) is not None
    ]
    return "\n".join(lines)


def _members(search: SearchRun) -> str:
    members = search.end.get("front") if search.end is not None else None
    rows = [as_mapping(one) for one in members] if isinstance(members, list) else []
    if not rows:
        return ""
    latency = any("latency" in one for one in rows)
    head = '<tr><th class="n">Parameters</th><th class="n">FLOPs</th>'
    head += '<th class="n">Latency</th>' if latency else ""
    head += '<th class="n">Held-out accuracy</th><th class="n">Held-out loss</th><th>Checkpoint</th></tr>'
    body = []
    for one in rows:
        cells = [as_text(one.get("parameters")), as_text(one.get("flops"), si)]
        cells += [as_text(one.get("latency"), si)] if latency else []
        cells += [as_text(one.get("accuracy"), accuracy_text), as_text(one.get("loss"), loss_text)]
        place = f"<td><code>surgeon/store/{escape(str(one.get('network')))}</code></td>"
        body.append(f"<tr>{numbers(cells)}{place}</tr>")
    return f'<div class="below">{table(head, body)}</div>'


__all__ = ["front"]
