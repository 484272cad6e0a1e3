"""The page of a search: reads what `espalier evolve` wrote, and writes one self-contained `report.html`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path

from espalier.bench.charts import Marker, Series, legend, line_chart, percent, si, whole
from espalier.bench.page import document, header, hero, score, tile, tiles
from espalier.bench.records import Record, as_mapping, as_number
from espalier.bench.report_front import front
from espalier.bench.report_predictions import predictions
from espalier.bench.report_tables import configuration, numbers, table
from espalier.bench.search_records import Branch, SearchRun, read_search
from espalier.bench.tree_picture import gain_text, legend_html, lineage
from espalier.bench.wording import (
    accuracy_text,
    as_text,
    duration_text,
    flops_text,
    loss_text,
    relative_text,
    section,
    times_text,
)  # fmt: skip


def write_search_report(folder: Path) -> Path:
    """Write `report.html` into the folder of a search and return its path, also while the search goes on.

    Raises:
        DataError: `config.json` or `surgeon.jsonl` is missing or holds nothing that can be read.
    """
    page = folder / "report.html"
    page.write_bytes(_page(read_search(folder)).encode("utf-8", "replace"))
    return page


def _page(search: SearchRun) -> str:
    problem = as_mapping(as_mapping(search.config.get("options")).get("problem"))
    source = str(problem.get("source") or "")
    names = [Path(source).stem if source.endswith(".npz") else source, str(problem.get("model") or "")]
    title = " · ".join(one for one in names if one) or "Search"
    facts = [(name, str(problem[name])) for name in ("seed", "width") if name in problem]
    sections = (_tiles, _lineage, _curves, front, predictions, _branches)
    head = header("search report", title, search.end is not None, _summary(search), facts, search.notices)
    return document(title, [head, *(one(search) for one in sections), configuration(search.config)])


def _summary(search: SearchRun) -> str:
    won, tried = sum(one.winner is not None for one in search.cycles), len(search.branches)
    cycles = "1 cycle" if len(search.cycles) == 1 else f"{whole(len(search.cycles))} cycles"
    edits = "1 edit was tried on a copy" if tried == 1 else f"{whole(tried)} edits were tried on copies"
    first = f"In {cycles} {edits} of the network while it was trained; "
    first += f"it was replaced by a copy {times_text(won)}." if won else "none of the copies replaced it."
    end = search.end or (search.records[-1] if search.records else {})
    parameters = relative_text(search.start.get("parameters"), end.get("parameters"))
    flops = relative_text(search.start.get("flops"), end.get("flops"))
    if not parameters or not flops or not won:
        return first
    return f"{first} Compared with its start it has {parameters} parameters and {flops} FLOPs per inference."


def _tiles(search: SearchRun) -> str:
    end = search.end or {}
    last = next((one for one in reversed(search.records) if as_number(one.get("parameters")) is not None), {})
    sizes = [
        tile(
            name,
            f"{as_text(search.start.get(key), si)} <small>→</small> {as_text(end.get(key, last.get(key)), si)}",
            relative_text(search.start.get(key), end.get(key, last.get(key))),
        )
        for name, key in (("Parameters", "parameters"), ("FLOPs per inference", "flops"))
    ]
    lost = sum(one.lost is not None for one in search.branches)
    won = sum(one.winner is not None for one in search.cycles)
    branches = tile("Branches", whole(len(search.branches)), f"{won} gone on with{f', {lost} lost' if lost else ''}")
    spent = sum(one.end - one.begin for one in search.cycles) / search.total
    seconds = [as_number(one.get("seconds")) for one in search.records]
    time = duration_text(math.fsum(one for one in seconds if one is not None))
    detail = f"{spent:.0%} of the training FLOPs for branches and proposals"
    return tiles([_hero(search), *sizes, branches, tile("Time", time, detail)])


def _hero(search: SearchRun) -> str:
    if search.end is None:
        spent = max((as_number(one.get("total_spent")) or 0.0 for one in search.records), default=0.0)
        seen = [accuracy for _, accuracy in _trained(search.records, "accuracy") if accuracy is not None]
        done = [("budget spent", f"{spent / search.total:.0%}")]
        columns = [score("ours", "Held-out accuracy so far", seen[-1] if seen else None, done)]
        return hero(columns, "The test data are looked at once, when the search ends.")
    columns = [score("ours", "Test accuracy", search.end.get("test_accuracy"), _result(search.end))]
    if search.alone is None:
        return hero(columns, "The start alone has not been trained for as many FLOPs.")
    columns.append(score("theirs", "Start alone", search.alone.get("test_accuracy"), _result(search.alone)))
    mine, its = (as_number(one.get("test_accuracy")) for one in (search.end, search.alone))
    if mine is None or its is None:
        return hero(columns, "The start alone was trained for as many FLOPs.")
    gap = round(100 * (mine - its), 2)
    verdict = f"{abs(gap):.2f} points {'above' if gap > 0 else 'below'}" if gap else "Level with"
    return hero(columns, f"{verdict} the start alone, trained for as many FLOPs as everything together took here.")


def _result(end: Record) -> list[tuple[str, str]]:
    rows = (
        ("test loss", "test_loss", loss_text),
        ("parameters", "parameters", si),
        ("training", "total_spent", flops_text),
    )
    return [(word, as_text(end[key], form)) for word, key, form in rows if key in end]


def _lineage(search: SearchRun) -> str:
    about = (
        "Time runs to the right and down. Each branch has a row from where it begins to where it stops; dots are rungs "
        "after which it went on. Beside it: what the edit does, and by how much its held-out loss is lower than that "
        "of the control, with the standard error of the paired difference. The thick line is what was gone on with."
    )
    if not search.cycles:
        dear = any(one["kind"] == "dear" for one in search.records)
        why = ": what a cycle takes was worth more as plain training (<code>--dear</code>)" if dear else ""
        return section("Lineage", f"No edit has been tried{why}.", "")
    return section(
        "Lineage", about, f'<div class="card lineage">{legend_html()}<div class="tree">{lineage(search)}</div></div>'
    )


def _trained(records: Iterable[Record], key: str) -> tuple[tuple[float | None, float | None], ...]:
    """(training FLOPs, value) of the network that is gone on with, as it was, without means of its weights."""
    return tuple(
        (as_number(one.get("total_spent")), as_number(one[key]))
        for one in records
        if one["kind"] in ("start", "trained", "end") and key in one
    )


def _curves(search: SearchRun) -> str:
    cards, series = [], list[Series]()
    rows = (
        ("Held-out accuracy", "accuracy", percent, False, 1.0),
        ("Held-out loss", "loss", loss_text, True, math.inf),
    )
    markers = [_edit(search, number) for number in range(len(search.cycles))]
    for name, key, form, may_be_log, most in rows:
        series = [Series("the search", "val", _trained(search.records, key))]
        if search.baseline:
            series.insert(0, Series("start alone", "twin", _trained(search.baseline, key)))
        chart = line_chart(
            name, series, "training FLOPs", si, form,
            markers=[one for one in markers if one], may_be_log=may_be_log, may_cut=True, most=most,
        )  # fmt: skip
        cards.append(f'<figure class="card"><figcaption>{name}</figcaption>{chart}</figure>')
    about = (
        "Of the network that is gone on with, as it is. All training FLOPs are counted, those of losing branches too; "
        "while branches compete it rests. Ticks on the axis are ends of cycles: green if it grew, orange if it shrank."
    )
    return section("Accuracy over cost", about, f'{legend(reversed(series))}<div class="plots">{"".join(cards)}</div>')


def _edit(search: SearchRun, number: int) -> Marker | None:
    """A tick where a cycle ended."""
    cycle = search.cycles[number]
    if not cycle.decided:
        return None
    winner = next((one for one in cycle.branches if one.name == cycle.winner), None)
    if winner is None:
        return Marker("other", cycle.end, f"cycle {cycle.number}: the control wins")
    after = as_number(winner.judged.get("parameters")) or 0.0
    before = [as_number(one.get("parameters")) for one in cycle.controls]
    action = "grow" if before and before[0] is not None and after > before[0] else "prune"
    return Marker(action, cycle.end, f"cycle {cycle.number}: {winner.what}\nloss falls by {gain_text(winner.judged)}")


def _branches(search: SearchRun) -> str:
    if not search.cycles:
        return ""
    head = (
        '<tr><th class="n">Cycle</th><th>Edit</th><th class="n">Predicted</th><th class="n">Loss falls by</th>'
        '<th class="n">Price</th><th class="n">Parameters</th><th class="n">Held-out</th><th>Outcome</th></tr>'
    )
    rows = [
        _branch_row(cycle.number, branch, branch.name == cycle.winner)
        for cycle in search.cycles
        for branch in cycle.branches
    ]
    about = "Every edit that was tried, against the control of its cycle, as it stood after its last rung."
    return section("Branches", about, table(head, rows))


def _branch_row(cycle: int, branch: Branch, won: bool) -> str:
    judged = branch.judged
    if branch.lost is not None:
        outcome, css = "lost", "changing"
    elif won:
        outcome, css = "gone on with", "exact"
    elif judged.get("accepted") is True:
        outcome, css = "passed", "exact"
    else:
        outcome, css = "not accepted", ""
    why = branch.why if branch.lost is None else f"{branch.why} — {branch.lost}"
    cells = [
        as_text(branch.predicted, lambda value: f"{value:+.4f}"),
        gain_text(judged),
        as_text(judged.get("price"), lambda value: f"{value + 0.0:+.4f}"),
        as_text(judged.get("parameters")),
        as_text(judged.get("accuracy"), accuracy_text),
    ]
    return (
        f'<tr><td class="n">{cycle}</td><td>{escape(branch.what)}<details><summary>why</summary>{escape(why)}</details>'
        f"</td>{numbers(cells)}"
        f'<td class="s"><span class="pill {css}">{outcome}</span></td></tr>'
    )


__all__ = ["write_search_report"]
