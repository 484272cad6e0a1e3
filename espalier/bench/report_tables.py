"""The tables of a report: architecture before and after, events, configuration."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from html import escape

from espalier.bench.charts import event_icon, si, whole
from espalier.bench.records import Record, Run, action_of, as_mapping, as_number, as_pair
from espalier.bench.wording import MISSING, as_text, change, layer_text, loss_text, section

NAMED_AXES = 3
MANY_ROWS = 12
"""That are more than the window of a table shows."""


def architecture(run: Run) -> str:
    """The modules before and after."""
    before = _modules(run.start)
    after = _modules(run.end) if run.end is not None else None
    names = list(before) if after is None else _merged(list(before), list(after))
    parameters = [as_number(row.get("parameters")) for table in (before, after or {}) for row in table.values()]
    largest = max((value for value in parameters if value is not None), default=0.0) or 1.0
    rows = [_module_row(name, before.get(name), None if after is None else after.get(name), largest) for name in names]
    about = "Every module that holds parameters, as it was at the start and as it is at the end."
    if after is None:
        about = "Every module that holds parameters at the start; the other half comes when the run ends."
    about += f" Scroll for all {len(rows)}." if len(rows) > MANY_ROWS else ""
    head = (
        '<tr><th>Module</th><th>Type</th><th>Shape before</th><th>Shape after</th><th class="n">Parameters</th>'
        '<th class="bars"><span class="legend"><span class="key before"><i></i>before</span>'
        '<span class="key after"><i></i>after</span></span></th></tr>'
    )
    return section("Architecture", about, table(head, rows))


def _modules(record: Record) -> dict[str, Record]:
    rows = record.get("architecture")
    entries = [as_mapping(row) for row in rows] if isinstance(rows, list) else []
    return {str(entry.get("module")): entry for entry in entries if entry}


def _merged(before: list[str], after: list[str]) -> list[str]:
    """The modules of the end in their order, each removed one where it used to be."""
    kept = set(after)
    removed_after: dict[str | None, list[str]] = {}
    anchor: str | None = None
    for name in before:
        if name in kept:
            anchor = name
        else:
            removed_after.setdefault(anchor, []).append(name)
    merged = list(removed_after.get(None, []))
    for name in after:
        merged += [name, *removed_after.get(name, [])]
    return merged


def _module_row(name: str, before: Record | None, after: Record | None, largest: float) -> str:
    sizes = [None if row is None else row.get("parameters") for row in (before, after)]
    shapes = [None if row is None else row.get("shape") for row in (before, after)]
    bars = "".join(
        f'<i class="{css}" style="width:{100 * max(0.0, value) / largest:.2f}%"></i>'
        for css, value in zip(("before", "after"), map(as_number, sizes), strict=True)
        if value is not None
    )
    kind = (after or before or {}).get("type")
    count = change(sizes[0], sizes[1])
    return (
        f"<tr><td><code>{escape(name)}</code></td><td>{as_text(kind)}</td>"
        f'<td class="s">{as_text(shapes[0])}</td><td class="s">{as_text(shapes[1])}</td>'
        f'<td class="n">{count}</td><td class="bars">{bars}</td></tr>'
    )


def table(head: str, rows: Sequence[str]) -> str:
    """A card with a table that scrolls: a row of headings and the others, as HTML."""
    return f'<div class="card scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def numbers(cells: Iterable[str]) -> str:
    """Cells of a row that hold numbers, one below the other."""
    return "".join(f'<td class="n">{cell}</td>' for cell in cells)


def event_table(run: Run) -> str:
    """Every event with what it changed."""
    head = (
        '<tr><th class="n">Step</th><th class="n">Epoch</th><th>Action</th><th>Method</th><th>Axes, masks, layers</th>'
        '<th class="n">Parameters</th><th class="n">FLOPs</th><th class="n">Loss, same batch</th><th>Contract</th></tr>'
    )
    if not run.events:
        return section("Events", "No grow or prune event has happened.", "")
    about = "What changed, what it cost, and the loss on the same batch right before and after."
    about += f" Scroll for all {len(run.events)}." if len(run.events) > MANY_ROWS else ""
    return section("Events", about, table(head, [_event_row(event) for event in run.events]))


def _event_row(event: Record) -> str:
    action = action_of(event)
    css = action if action in ("grow", "prune") else "other"
    contract = as_text(event.get("contract"))
    pill = f'<span class="pill {contract if contract in ("exact", "changing") else ""}">{contract}</span>'
    places = [*_places(event, "axes", ""), *_places(event, "masks", " live"), *_layers(event)]
    return (
        f'<tr><td class="n">{as_text(event.get("step"))}</td><td class="n">{as_text(event.get("epoch"))}</td>'
        f'<td><span class="act {css}">{event_icon(action)}{escape(action)}</span></td>'
        f"<td>{as_text(event.get('method'))}</td><td>{_listed(places)}</td>"
        f'<td class="n">{change(*as_pair(event.get("parameters")), whole)}</td>'
        f'<td class="n">{change(*as_pair(event.get("flops")), si)}</td>'
        f'<td class="n">{_loss_change(event.get("loss"))}</td><td>{pill}</td></tr>'
    )


def _loss_change(pair: object) -> str:
    """Both values even where they are equal: that is what an exact edit promises."""
    before, after = as_pair(pair)
    return (
        MISSING if before is None and after is None else f"{as_text(before, loss_text)} → {as_text(after, loss_text)}"
    )


def _places(event: Record, key: str, unit: str) -> list[str]:
    return [
        f'<span class="s"><code>{escape(str(name))}</code> {change(*as_pair(pair))}{unit}</span>'
        for name, pair in as_mapping(event.get(key)).items()
    ]


def _layers(event: Record) -> list[str]:
    layers = event.get("layers")
    return [f'<span class="l">{escape(layer_text(one))}</span>' for one in layers] if isinstance(layers, list) else []


def _listed(items: Sequence[str]) -> str:
    shown = "<br>".join(items[:NAMED_AXES])
    if len(items) <= NAMED_AXES:
        return shown
    rest = "<br>".join(items[NAMED_AXES:])
    return f"{shown}<details><summary>and {len(items) - NAMED_AXES} more</summary>{rest}</details>"


def configuration(config: Record) -> str:
    """The command and the options."""
    command = config.get("command")
    words = shlex.join(map(str, command)) if isinstance(command, list) else command
    pre = "" if words is None else f"<h3>Command</h3><pre>{escape(str(words))}</pre>"
    items = "".join(
        f"<div><dt>{escape(str(key)).replace('_', ' ')}</dt><dd>{_value(value)}</dd></div>"
        for key, value in config.items()
        if key != "command"
    )
    about = "What it takes to run this again."
    return section("Configuration", about, f'<div class="card">{pre}<dl>{items}</dl></div>')


def _value(value: object) -> str:
    if isinstance(value, (dict, list)):
        return f"<code>{escape(json.dumps(value, ensure_ascii=False))}</code>"
    return MISSING if value is None else escape(str(value))
