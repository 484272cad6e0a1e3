"""The page of a run: reads `config.json` and `metrics.jsonl`, writes one self-contained `report.html`."""

from __future__ import annotations

from pathlib import Path

from espalier.bench.charts import si, whole
from espalier.bench.page import document, header, hero, score, tile, tiles
from espalier.bench.records import Record, Run, as_mapping, as_number, count_of, latest, read_run
from espalier.bench.report_depth import depth
from espalier.bench.report_gates import gates
from espalier.bench.report_plots import cost, learning, widths
from espalier.bench.report_sparsity import held_text, sparsity
from espalier.bench.report_tables import architecture, configuration, event_table
from espalier.bench.wording import as_text, duration_text, flops_text, loss_text, relative_text, times_text


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
    sections = (_tiles, learning, cost, gates, depth, sparsity, widths, architecture, event_table)
    parts = [_header(run, title), *(section(run) for section in sections), configuration(run.config)]
    return document(title, parts)


def _header(run: Run, title: str) -> str:
    facts = (("growing", "grow"), ("pruning", "prune"), ("setting", "setting"), ("seed", "seed"), ("device", "device"))
    shown = [(word, run.config[key]) for word, key in facts if run.config.get(key) not in (None, "none")]
    return header("run report", title, run.end is not None, _summary(run), shown, run.notices)


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
        tile(
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
    return tiles(
        [
            _hero(run),
            *costs,
            tile("Events", str(len(run.events)), events),
            tile("Time", as_text(latest(run, "seconds"), duration_text), compute),
        ]
    )


def _hero(run: Run) -> str:
    """Test accuracy with the static twin's beside it, or validation accuracy while the run goes on."""
    if run.end is None:
        last = run.epochs[-1] if run.epochs else {}
        done = [("epoch", f"{as_text(last.get('epoch'))} of {as_text(run.config.get('epochs'))}")]
        columns = [score("ours", "Validation accuracy so far", last.get("val_accuracy"), done)]
        note = "The test set is looked at once, when the run ends."
    else:
        twin = as_mapping(run.end.get("static"))
        columns = [score("ours", "Test accuracy", run.end.get("test_accuracy"), _result(run.end))]
        if twin:
            columns.append(score("theirs", "Static network", twin.get("test_accuracy"), _result(twin)))
        note = _comparison(run.end, twin) if twin else "No static network was trained beside this one."
    return hero(columns, note)


def _result(result: Record) -> list[tuple[str, str]]:
    rows = (
        ("test loss", "test_loss", loss_text),
        ("parameters", "parameters", si),
        ("training", "training_flops", flops_text),
    )
    return [(word, as_text(result[key], form)) for word, key, form in rows if key in result]


def _comparison(ours: Record, twin: Record) -> str:
    mine, other = as_number(ours.get("test_accuracy")), as_number(twin.get("test_accuracy"))
    final = "final size and masks" if as_mapping(ours.get("weights")) else "final size"
    if mine is None or other is None:
        return f"The static network had the {final} from the start."
    gap = round(100 * (mine - other), 2)
    verdict = f"{abs(gap):.2f} points {'above' if gap > 0 else 'below'}" if gap else "Level with"
    return f"{verdict} a static network that had the {final} from the start."
