"""The page of a run: reads `config.json` and `metrics.jsonl`, writes one self-contained `report.html`.

Everything in the folder is data from others: names are escaped, and the page carries a content security policy under
which nothing loads from a network and no script runs but its own.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from html import escape
from pathlib import Path

from espalier.bench import charts, gate_pictures, heat, stepper
from espalier.bench.charts import si, whole
from espalier.bench.page_style import LOGO, PAGE_STYLE
from espalier.bench.records import Record, Run, as_mapping, as_number, count_of, latest, read_run
from espalier.bench.report_depth import depth
from espalier.bench.report_gates import gates
from espalier.bench.report_plots import cost, learning, widths
from espalier.bench.report_sparsity import held_text, sparsity
from espalier.bench.report_tables import architecture, configuration, event_table
from espalier.bench.wording import (
    accuracy_text,
    as_text,
    duration_text,
    flops_text,
    loss_text,
    relative_text,
    times_text,
)

STYLE = "".join([charts.STYLE, heat.STYLE, gate_pictures.STYLE, stepper.STYLE, PAGE_STYLE])
SCRIPT = charts.SCRIPT + stepper.SCRIPT


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path. A run that has not ended gets a page that says so.

    Raises DataError where `config.json` or `metrics.jsonl` is missing or holds nothing that can be read.
    """
    page = folder / "report.html"
    # A lone surrogate is legal in JSON and not in UTF-8, hence "replace".
    page.write_bytes(_page(read_run(folder)).encode("utf-8", "replace"))
    return page


def _page(run: Run) -> str:
    names = dict.fromkeys(str(run.config[key]) for key in ("task", "model") if run.config.get(key))
    title = " · ".join(names) or "Run"
    digest = b64encode(sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = (_tiles, learning, cost, gates, depth, sparsity, widths, architecture, event_table, configuration)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)} · Espalier</title><style>{STYLE}</style></head><body><main>",
            _header(run, title),
            *(section(run) for section in sections),
            f"</main><script>{SCRIPT}</script></body></html>",
        ]
    )


def _header(run: Run, title: str) -> str:
    ended = run.end is not None
    badge = f'<span class="badge{"" if ended else " open"}">{"finished" if ended else "not ended"}</span>'
    facts = (("growing", "grow"), ("pruning", "prune"), ("setting", "setting"), ("seed", "seed"), ("device", "device"))
    shown = [
        f"<span>{word} <b>{as_text(run.config[key])}</b></span>"
        for word, key in facts
        if run.config.get(key) not in (None, "none")
    ]
    notices = "".join(f'<p class="warn">{escape(notice)}</p>' for notice in run.notices)
    return (
        f'<header><div class="brand">{LOGO}<span>Espalier run report</span>{badge}</div><h1>{escape(title)}</h1>'
        f'<p class="lead">{_summary(run)}</p><div class="facts">{"".join(shown)}</div>'
        f"{notices}</header>"
    )


def _summary(run: Run) -> str:
    """The run in two sentences."""
    did = [
        f"{word} {times_text(count)}"
        for word, count in (("grew", count_of(run, "grow")), ("was pruned", count_of(run, "prune")))
        if count
    ]
    epochs = "1 epoch" if len(run.epochs) == 1 else f"{whole(len(run.epochs))} epochs"
    first = f"The network {' and '.join(did) or 'neither grew nor was pruned'} in {epochs} of training."
    parameters = relative_text(run.start.get("parameters"), latest(run, "parameters"))
    flops = relative_text(run.start.get("flops"), latest(run, "flops"))
    held = f" Masks hold {held_text(run)} of the weights that have one at zero." if held_text(run) else ""
    if not parameters or not flops:
        return f"{first}{held}"
    verb = "ended with" if run.end is not None else "now has"
    second = f"Compared with its start it {verb} {parameters} parameters and {flops} FLOPs per inference."
    return f"{first} {second}{held}"


def _tiles(run: Run) -> str:
    masked = f", {held_text(run)} masked" if held_text(run) else ""
    costs = [
        _tile(
            name,
            f"{as_text(run.start.get(key), si)} <small>→</small> {as_text(latest(run, key), si)}",
            relative_text(run.start.get(key), latest(run, key)) + more,
        )
        for name, key, more in (("Parameters", "parameters", masked), ("FLOPs per inference", "flops", ""))
    ]
    grown, pruned = count_of(run, "grow"), count_of(run, "prune")
    others = len(run.events) - grown - pruned
    events = f"{grown} grow, {pruned} prune{f', {others} other' if others else ''}"
    training = latest(run, "training_flops")
    compute = "" if training is None else f"{as_text(training, flops_text)} of training"
    return "".join(
        [
            f'<section class="tiles" aria-label="Results">{_hero(run)}',
            *costs,
            _tile("Events", str(len(run.events)), events),
            _tile("Time", as_text(latest(run, "seconds"), duration_text), compute),
            "</section>",
        ]
    )


def _tile(name: str, value: str, detail: str) -> str:
    return f'<div class="card tile"><p>{name}</p><b>{value}</b><p>{detail}</p></div>'


def _hero(run: Run) -> str:
    """Test accuracy with the static twin's beside it, or validation accuracy while the run goes on."""
    if run.end is None:
        last = run.epochs[-1] if run.epochs else {}
        done = [("epoch", f"{as_text(last.get('epoch'))} of {as_text(run.config.get('epochs'))}")]
        columns = _score("ours", "Validation accuracy so far", last.get("val_accuracy"), done)
        note = "The test set is looked at once, when the run ends."
    else:
        twin = as_mapping(run.end.get("static"))
        columns = _score("ours", "Test accuracy", run.end.get("test_accuracy"), _result(run.end))
        columns += _score("theirs", "Static network", twin.get("test_accuracy"), _result(twin)) if twin else ""
        note = _comparison(run.end, twin) if twin else "No static network was trained beside this one."
    return f'<div class="card tile hero"><div class="pair">{columns}</div><p>{note}</p></div>'


def _result(result: Record) -> list[tuple[str, str]]:
    rows = (
        ("test loss", "test_loss", loss_text),
        ("parameters", "parameters", si),
        ("training", "training_flops", flops_text),
    )
    return [(word, as_text(result[key], form)) for word, key, form in rows if key in result]


def _score(css: str, name: str, accuracy: object, details: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<p>{word} <strong>{value}</strong></p>" for word, value in details)
    return f'<div class="{css}"><p>{name}</p><b>{as_text(accuracy, accuracy_text)}</b>{lines}</div>'


def _comparison(ours: Record, twin: Record) -> str:
    mine, other = as_number(ours.get("test_accuracy")), as_number(twin.get("test_accuracy"))
    final = "final size and masks" if as_mapping(ours.get("weights")) else "final size"
    if mine is None or other is None:
        return f"The static network had the {final} from the start."
    gap = round(100 * (mine - other), 2)
    verdict = f"{abs(gap):.2f} points {'above' if gap > 0 else 'below'}" if gap else "Level with"
    return f"{verdict} a static network that had the {final} from the start."
