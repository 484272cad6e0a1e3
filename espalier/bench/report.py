"""The page of a run: reads `config.json` and `metrics.jsonl`, writes one self-contained `report.html`.

Everything in the folder is data from others: names are escaped, and the page carries a content security policy under
which nothing loads from a network and no script runs but its own.
"""

from __future__ import annotations

import json
import shlex
from base64 import b64encode
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from pathlib import Path

from espalier.bench.charts import (
    SCRIPT,
    Formatter,
    Marker,
    Series,
    event_icon,
    legend,
    line_chart,
    percent,
    si,
    whole,
    width_strip,
)
from espalier.bench.charts import STYLE as CHART_STYLE
from espalier.errors import DataError

Record = Mapping[str, object]

KINDS = ("start", "epoch", "event", "static_epoch", "end")
LARGEST = 1e90  # beyond this a value is no measurement, and drawing it would overflow
FEW_AXES = 12
NAMED_AXES = 3
MISSING = "—"

PAGE_STYLE = """
:root{color-scheme:light dark;--bg:#f5f4f0;--card:#fff;--ink:#1b222c;--muted:#5c6673;--edge:#c4c7cb;--line:#e9e8e3;
--well:#f1f0ec;--even:#a9b4c0;--blue:#0b62b0;--sky:#7db3e0;--plum:#a2447f;--green:#00875f;--orange:#d0570a;
--tip:#1b222c;--tip-ink:#f4f5f7}
@media (prefers-color-scheme:dark){:root{--bg:#0f1318;--card:#181e25;--ink:#e8ebef;--muted:#9ca7b4;--edge:#465161;
--line:#28303a;--well:#212932;--even:#5d6b7b;--blue:#62b1ff;--sky:#34699c;--plum:#e08fc2;--green:#2fc497;
--orange:#ff9346;--tip:#eef1f4;--tip-ink:#161b21}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);line-height:1.5;font-size:15px;
font-family:Inter,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1160px;margin:0 auto;padding:36px 24px 64px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;margin:6px 0 10px;font-weight:650;overflow-wrap:anywhere}
h2{font-size:19px;letter-spacing:-.01em;margin:44px 0 4px;font-weight:650}
h3,figcaption{font-size:14.5px;margin:0;font-weight:650}h3{margin-bottom:10px}
figure{margin:0}
p{margin:0}code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.88em}
.brand{display:flex;align-items:center;gap:9px;color:var(--muted);font-size:14px}
.brand svg{width:24px;height:24px;color:var(--green)}
.badge{margin-left:auto;padding:2px 11px;border-radius:99px;font-size:13px;font-weight:600;color:var(--green);
background:color-mix(in srgb,currentColor 13%,transparent)}.badge.open{color:var(--orange)}
.lead{font-size:16.5px;max-width:75ch}.about{color:var(--muted);max-width:80ch;margin-bottom:14px}
.facts{display:flex;flex-wrap:wrap;gap:2px 20px;color:var(--muted);margin-top:10px;font-size:14px}
.facts b{color:var(--ink);font-weight:600;overflow-wrap:anywhere}
.warn{margin-top:18px;padding:11px 15px;border-left:4px solid var(--orange);border-radius:6px;background:var(--card)}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:16px;margin-top:26px}
.card{background:var(--card);border-radius:12px;padding:18px 20px;box-shadow:0 1px 2px rgb(0 0 0/.07);min-width:0}
.tile p{color:var(--muted);font-size:13.5px}.tile b{display:block;font-size:25px;letter-spacing:-.02em;line-height:1.3;
font-weight:650;font-variant-numeric:tabular-nums;color:var(--ink);white-space:nowrap}.tile b small{font-size:17px;
color:var(--muted);font-weight:500}
.tile.hero{grid-column:span 2;grid-row:span 2;display:flex;flex-direction:column;gap:14px;justify-content:space-between}
.hero b{font-size:48px;line-height:1.2;margin-bottom:4px}.hero strong{color:var(--ink);font-weight:600}
.pair{display:flex;flex-wrap:wrap;gap:10px 56px}
.hero .ours b{color:var(--blue)}.hero .theirs b{color:var(--plum)}
.plots{margin-top:14px;display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.plots .card{display:flex;flex-direction:column;gap:10px}
.note,.empty{color:var(--muted);font-size:13px}.empty{padding:40px 0;text-align:center}
.minis{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:20px 28px;margin-top:16px}
.rows{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr));gap:5px 36px;margin-top:16px}
.mini{display:grid;grid-template-columns:minmax(0,1fr) auto;gap:4px 12px;align-items:baseline}
.mini .strip{grid-column:1/-1}
.row{display:grid;grid-template-columns:min(40%,var(--name)) minmax(0,1fr) 92px;gap:10px;align-items:center;
font-size:13px}
.name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;direction:rtl;text-align:left}
.size{font-variant-numeric:tabular-nums;white-space:nowrap;text-align:right}
.up{color:var(--green)}.down{color:var(--orange)}
.scroll{overflow:auto;max-height:560px;padding:0}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th{position:sticky;top:0;z-index:1;background:var(--card);box-shadow:0 1px var(--edge);font-weight:600;text-align:left;
color:var(--muted);font-size:12.5px;white-space:nowrap}
th,td{padding:8px 14px;vertical-align:middle}tr+tr td{border-top:1px solid var(--line)}
th:first-child,td:first-child{padding-left:20px}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}.s{white-space:nowrap}
td code{margin-right:4px}
.bars{width:30%;min-width:130px}.bars i{display:block;height:7px;border-radius:2px;min-width:1px;margin:2px 0}
.bars .before,.key.before{--c:var(--even)}.bars .after,.key.after{--c:var(--blue)}.bars i{background:var(--c)}
.act{display:inline-flex;align-items:center;gap:7px;white-space:nowrap}.act svg{width:12px;height:12px}
.act path{fill:var(--c)}
.pill{padding:1px 9px;border-radius:99px;font-size:12.5px;background:var(--well)}
.pill.exact{color:var(--green)}.pill.changing{color:var(--orange)}
details summary{cursor:pointer;color:var(--muted)}details code{overflow-wrap:anywhere}
pre{margin:0;padding:14px 18px;background:var(--well);border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere;
user-select:all}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,230px),1fr));gap:14px 28px;margin:18px 0 0}
dt{color:var(--muted);font-size:13px}dd{margin:0;overflow-wrap:anywhere}
@media (max-width:860px){main{padding:24px 18px 48px}.plots{grid-template-columns:minmax(0,1fr)}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}.tile.hero{grid-row:auto}}
@media (max-width:460px){.tile{grid-column:1/-1}}
@media print{body{background:#fff}.scroll{max-height:none}.card{break-inside:avoid;box-shadow:none}}
"""

LOGO = (
    '<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="1.8" stroke-linecap="round" '
    'aria-hidden="true"><path d="M12 22V3M12 18H6Q3 18 3 15V13M12 18H18Q21 18 21 15V13M12 11H8Q6 11 6 9V6'
    'M12 11H16Q18 11 18 9V6"/></svg>'
)


@dataclass(frozen=True)
class Run:
    """What a run folder holds: `records` in the order written, and the same ones by kind."""

    config: Record
    records: tuple[Record, ...]
    start: Record
    epochs: tuple[Record, ...]
    events: tuple[Record, ...]
    static_epochs: tuple[Record, ...]
    end: Record | None
    notices: tuple[str, ...]


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path. A run that has not ended gets a page that says so.

    Raises DataError where `config.json` or `metrics.jsonl` is missing or holds nothing that can be read.
    """
    page = folder / "report.html"
    # A lone surrogate is legal in JSON and not in UTF-8, hence "replace".
    page.write_bytes(_page(_read_run(folder)).encode("utf-8", "replace"))
    return page


def _read_run(folder: Path) -> Run:
    try:
        config = json.loads(_read_text(folder / "config.json"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{folder / 'config.json'}: expected one JSON object with the run's configuration, found something that is "
            f"not JSON ({error}); restore the file or run again"
        ) from error
    if not isinstance(config, dict):
        raise DataError(
            f"{folder / 'config.json'}: expected a JSON object with the run's configuration, found "
            f"{type(config).__name__}; restore the file or run again"
        )
    records, notices = _read_records(folder / "metrics.jsonl")
    by_kind = {kind: tuple(record for record in records if record["kind"] == kind) for kind in KINDS}
    end = by_kind["end"][-1] if by_kind["end"] else None
    if end is None:
        notices.insert(0, "This run has not ended: it is still going on or was interrupted. The page shows it so far.")
    return Run(
        config,
        tuple(records),
        by_kind["start"][0] if by_kind["start"] else {},
        by_kind["epoch"],
        by_kind["event"],
        by_kind["static_epoch"],
        end,
        tuple(notices),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise DataError(
            f"{path}: expected a file written by a run, found none that can be read ({error.strerror}); "
            f"give the folder that the run's --out named"
        ) from error


def _read_records(path: Path) -> tuple[list[Record], list[str]]:
    """The readable records, and a sentence for the reader about each kind of line that was left out."""
    # Not splitlines(): JSON text may hold U+2028 and other characters that it would split at.
    lines = [(at, line) for at, line in enumerate(_read_text(path).split("\n"), start=1) if line.strip()]
    records: list[Record] = []
    broken, unknown = [], 0
    for at, line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            broken.append(at)
        elif record.get("kind") in KINDS:
            records.append(record)
        else:
            unknown += 1
    if not records:
        raise DataError(
            f"{path}: expected one JSON object per line with a kind among {', '.join(KINDS)}, found {len(lines)} lines "
            f"and none of these; the run wrote nothing yet, or this is another file"
        )
    notices = []
    if broken and broken[-1] == lines[-1][0]:
        broken.pop()
        notices.append("The last line of metrics.jsonl was cut short (an interrupted run) and is left out.")
    if broken:
        notices.append(f"Lines of metrics.jsonl that cannot be read and are left out: {', '.join(map(str, broken))}.")
    if unknown:
        notices.append(f"{unknown} records of a kind that this version does not know are left out.")
    return records, notices


def _number(value: object) -> float | None:
    """A finite number, or None: null, booleans, text such as "nan" and absurd magnitudes are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -LARGEST < value < LARGEST else None


def _pair(value: object) -> tuple[object, object]:
    return (value[0], value[1]) if isinstance(value, list) and len(value) == 2 else (None, None)


def _mapping(value: object) -> Record:
    return value if isinstance(value, dict) else {}


def _text(value: object, form: Formatter = whole) -> str:
    """Escaped text for the page: formatted where it is a number, a dash where it is missing."""
    number = _number(value)
    if number is not None:
        return escape(form(number))
    return MISSING if value is None else escape(str(value))


def _change(before: object, after: object, form: Formatter = whole) -> str:
    """`before → after`, or one value where both are the same."""
    old, new = _text(before, form), _text(after, form)
    return new if old == new else f"{old} → {new}"


def _loss(value: float) -> str:
    return f"{value:.4g}"


def _accuracy(value: float) -> str:
    return f"{100 * value:.2f}%"


def _flops(value: float) -> str:
    number = si(value)
    return f"{number[:-1]} {number[-1]}FLOPs" if number[-1].isalpha() else f"{number} FLOPs"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _relative(before: object, after: object) -> str:
    """How many fewer or more, in words that a noun can follow; empty where it cannot be said."""
    old, new = _number(before), _number(after)
    if old is None or new is None or old <= 0:
        return ""
    if new == old:
        return "just as many"
    if new >= 2 * old:
        return f"{new / old:.1f} times as many"
    return f"{abs(new / old - 1):.0%} {'fewer' if new < old else 'more'}"


def _latest(run: Run, key: str) -> object:
    """The last value that any record of our own network has for `key`; events hold [before, after]."""
    for record in reversed(run.records):
        value = record.get(key)
        if record["kind"] != "static_epoch" and value is not None:
            return _pair(value)[1] if isinstance(value, list) else value
    return None


def _count(run: Run, action: str) -> int:
    return sum(event.get("action") == action for event in run.events)


def _actions(run: Run) -> list[str]:
    return sorted({str(event.get("action")) for event in run.events})


# ---------------------------------------------------------------------------------------------------- the page


def _page(run: Run) -> str:
    title = " · ".join(str(run.config[key]) for key in ("task", "model") if run.config.get(key)) or "Run"
    digest = b64encode(sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = (_tiles, _learning, _cost, _widths, _architecture, _event_table, _configuration)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)} · Espalier</title><style>{PAGE_STYLE}{CHART_STYLE}</style></head><body><main>",
            _header(run, title),
            *(section(run) for section in sections),
            f"</main><script>{SCRIPT}</script></body></html>",
        ]
    )


def _header(run: Run, title: str) -> str:
    ended = run.end is not None
    badge = f'<span class="badge{"" if ended else " open"}">{"finished" if ended else "not ended"}</span>'
    facts = (("growing", "grow"), ("pruning", "prune"), ("setting", "setting"), ("seed", "seed"), ("device", "device"))
    shown = [f"<span>{word} <b>{_text(run.config[key])}</b></span>" for word, key in facts if key in run.config]
    notices = "".join(f'<p class="warn">{escape(notice)}</p>' for notice in run.notices)
    return (
        f'<header><div class="brand">{LOGO}<span>Espalier run report</span>{badge}</div><h1>{escape(title)}</h1>'
        f'<p class="lead">{_summary(run)}</p><div class="facts">{"".join(shown)}</div>'
        f"{notices}</header>"
    )


def _summary(run: Run) -> str:
    """The run in two sentences."""
    grown, pruned = _times(_count(run, "grow")), _times(_count(run, "prune"))
    epochs = "1 epoch" if len(run.epochs) == 1 else f"{len(run.epochs)} epochs"
    first = f"The network grew {grown} and was pruned {pruned} in {epochs} of training."
    parameters = _relative(run.start.get("parameters"), _latest(run, "parameters"))
    flops = _relative(run.start.get("flops"), _latest(run, "flops"))
    if not parameters or not flops:
        return first
    verb = "ended with" if run.end is not None else "now has"
    second = f"Compared with its start it {verb} {parameters} parameters and {flops} FLOPs per inference."
    return f"{first} {second}"


# ------------------------------------------------------------------------------------------------------- tiles


def _tiles(run: Run) -> str:
    costs = [
        _tile(
            name,
            f"{_text(run.start.get(key), si)} <small>→</small> {_text(_latest(run, key), si)}",
            _relative(run.start.get(key), _latest(run, key)),
        )
        for name, key in (("Parameters", "parameters"), ("FLOPs per inference", "flops"))
    ]
    grown, pruned = _count(run, "grow"), _count(run, "prune")
    others = len(run.events) - grown - pruned
    events = f"{grown} grow, {pruned} prune{f', {others} other' if others else ''}"
    training = _latest(run, "training_flops")
    compute = "" if training is None else f"{_text(training, _flops)} of training"
    return "".join(
        [
            f'<section class="tiles" aria-label="Results">{_hero(run)}',
            *costs,
            _tile("Events", str(len(run.events)), events),
            _tile("Time", _text(_latest(run, "seconds"), _duration), compute),
            "</section>",
        ]
    )


def _tile(name: str, value: str, detail: str) -> str:
    return f'<div class="card tile"><p>{name}</p><b>{value}</b><p>{detail}</p></div>'


def _hero(run: Run) -> str:
    """Test accuracy with the static twin's beside it, or validation accuracy while the run goes on."""
    if run.end is None:
        last = run.epochs[-1] if run.epochs else {}
        done = [("epoch", f"{_text(last.get('epoch'))} of {_text(run.config.get('epochs'))}")]
        columns = _score("ours", "Validation accuracy so far", last.get("val_accuracy"), done)
        note = "The test set is looked at once, when the run ends."
    else:
        twin = _mapping(run.end.get("static"))
        columns = _score("ours", "Test accuracy", run.end.get("test_accuracy"), _result(run.end))
        columns += _score("theirs", "Static network", twin.get("test_accuracy"), _result(twin)) if twin else ""
        note = _comparison(run.end, twin) if twin else "No static network was trained beside this one."
    return f'<div class="card tile hero"><div class="pair">{columns}</div><p>{note}</p></div>'


def _result(result: Record) -> list[tuple[str, str]]:
    rows = (("test loss", "test_loss", _loss), ("parameters", "parameters", si), ("training", "training_flops", _flops))
    return [(word, _text(result[key], form)) for word, key, form in rows if key in result]


def _score(css: str, name: str, accuracy: object, details: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<p>{word} <strong>{value}</strong></p>" for word, value in details)
    return f'<div class="{css}"><p>{name}</p><b>{_text(accuracy, _accuracy)}</b>{lines}</div>'


def _comparison(ours: Record, twin: Record) -> str:
    mine, other = _number(ours.get("test_accuracy")), _number(twin.get("test_accuracy"))
    if mine is None or other is None:
        return "The static network had the final size from the start."
    gap = round(100 * (mine - other), 2)
    verdict = f"{abs(gap):.2f} points {'above' if gap > 0 else 'below'}" if gap else "Level with"
    return f"{verdict} a static network that had the final size from the start."


# ------------------------------------------------------------------------------------------------------- plots


def _learning(run: Run) -> str:
    rows = (
        ("Accuracy", "accuracy", percent, False),
        ("Loss", "loss", _loss, True),
    )
    over = (("epoch", "epoch", whole, True), ("training FLOPs", "training_flops", si, False))
    cards = []
    for name, key, form, may_be_log in rows:
        for x_label, x_key, x_form, x_whole in over:
            series = [
                Series("training", "train", _points(run.epochs, x_key, f"train_{key}")),
                Series("validation", "val", _points(run.epochs, x_key, f"val_{key}")),
            ]
            if run.static_epochs:
                twin = _points(run.static_epochs, x_key, f"val_{key}")
                series.insert(1, Series("static network, validation", "twin", twin))
            chart = line_chart(
                name, series, x_label, x_form, form,
                markers=_rug(run, x_key), x_whole=x_whole, may_be_log=may_be_log,
            )  # fmt: skip
            cards.append(_card(f"{name} over {'epochs' if x_whole else x_label}", chart))
    about = "Ticks on the axis are grow and prune events. Point at a plot to read its values."
    keys = legend(reversed(series), _actions(run))
    return _section("Learning", about, f'{keys}<div class="plots">{"".join(cards)}</div>')


def _points(records: Iterable[Record], x_key: str, y_key: str) -> tuple[tuple[float | None, float | None], ...]:
    return tuple((_number(record.get(x_key)), _number(record.get(y_key))) for record in records)


def _card(title: str, chart: str) -> str:
    return f'<figure class="card"><figcaption>{title}</figcaption>{chart}</figure>'


def _section(title: str, about: str, body: str) -> str:
    return f'<section><h2>{title}</h2><p class="about">{about}</p>{body}</section>'


def _rug(run: Run, x_key: str) -> list[Marker]:
    """Every event as a tick: placed by its own training FLOPs, or within its epoch by its step."""
    return [
        Marker(
            str(event.get("action")),
            _epoch_at(run, event) if x_key == "epoch" else _number(event.get(x_key)),
            _event_tip(event),
        )
        for event in run.events
        if run.epochs
    ]


def _epoch_at(run: Run, event: Record) -> float | None:
    """Where an event lies on the epoch axis, on which a whole number is the end of that epoch."""
    step = _number(event.get("step"))
    pairs = [(_number(record.get("step")), _number(record.get("epoch"))) for record in run.epochs]
    known = sorted((s, e) for s, e in pairs if s is not None and e is not None)
    if step is None or not known:
        return _number(event.get("epoch"))
    known = [(0.0, known[0][1] - 1), *known]
    right = min(max(bisect_left(known, (step, -LARGEST)), 1), len(known) - 1)
    (step0, epoch0), (step1, epoch1) = known[right - 1], known[right]
    return epoch0 + (epoch1 - epoch0) * (step - step0) / (step1 - step0) if step1 > step0 else epoch1


def _cost(run: Run) -> str:
    cards = []
    for name, key in (("Parameters", "parameters"), ("FLOPs per inference", "flops")):
        points, markers = _cost_history(run, key)
        series = [Series(name, "cost", tuple(points), stepped=True)]
        chart = line_chart(name, series, "step", whole, si, markers=markers, from_zero=True)
        cards.append(_card(name, chart))
    about = "Each triangle is one grow or prune event, placed at the size it led to."
    keys = legend((), _actions(run))
    return _section("Size and cost", about, f'{keys}<div class="plots">{"".join(cards)}</div>')


def _cost_history(run: Run, key: str) -> tuple[list[tuple[float, float]], list[Marker]]:
    """(step, value) in the order of the records, and a marker for every event."""
    points: list[tuple[float, float]] = []
    markers = []
    step = 0.0
    for record in run.records:
        if record["kind"] == "static_epoch":
            continue
        step = _number(record.get("step")) or step
        value = _number(_pair(record.get(key))[1] if record["kind"] == "event" else record.get(key))
        if value is not None:
            points.append((step, value))
        if record["kind"] == "event":
            # An event whose cost was not recorded is still marked, at the last cost known.
            height = points[-1][1] if points else 0.0
            markers.append(Marker(str(record.get("action")), step, _event_tip(record), height))
    return points, markers


def _event_tip(event: Record) -> str:
    """Plain text (the chart escapes it)."""
    axes = [f"{name}: {_plain(pair, whole)}" for name, pair in _mapping(event.get("axes")).items()]
    rest = [f"and {len(axes) - 6} more axes"] if len(axes) > 6 else []
    lines = [
        f"{event.get('action')} by {event.get('method')}, step {event.get('step')}, epoch {event.get('epoch')}",
        *axes[:6],
        *rest,
        f"parameters: {_plain(event.get('parameters'), whole)}",
        f"FLOPs: {_plain(event.get('flops'), si)}",
        f"loss on the same batch: {_plain(event.get('loss'), _loss)}",
        f"contract: {event.get('contract')}",
    ]
    return "\n".join(lines)


def _plain(pair: object, form: Formatter) -> str:
    values = [(_number(value), value) for value in _pair(pair)]
    return " → ".join(MISSING if raw is None else str(raw) if value is None else form(value) for value, raw in values)


# ------------------------------------------------------------------------------------------------------ widths


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
        step = _number(record.get("step")) or step
        axes = record.get("axes")
        if not isinstance(axes, dict):
            continue
        if record["kind"] == "event":
            for name, pair in axes.items():
                before, after = (_number(value) or 0.0 for value in _pair(pair))
                put(str(name), after, before)
            continue
        snapshot = {str(name): max(0.0, _number(size) or 0.0) for name, size in axes.items()}
        for name in [*snapshot, *(known for known in sizes if known not in snapshot)]:
            size = snapshot.get(name, 0.0)
            put(name, size, 0.0 if complete else size)
        complete = True
    return sizes, step


def _widths(run: Run) -> str:
    sizes, last = _width_history(run)
    moved = {name: history for name, history in sizes.items() if len(history) > 1}
    still = {name: history[0][1] for name, history in sizes.items() if len(history) == 1}
    few = len(moved) <= FEW_AXES
    figures = [_width_figure(name, history, last, few) for name, history in moved.items()]
    keys = (
        '<div class="legend"><span class="key grow"><i></i>wider than at the start</span>'
        '<span class="key prune"><i></i>narrower</span>'
        f'<span class="key" style="--c:var(--even)"><i></i>as at the start</span>'
        f"<span>each strip runs from step 0 to step {whole(last)}; its height is the width</span></div>"
    )
    longest = max(map(len, moved), default=0) + 1
    grid = f'<div class="{"minis" if few else "rows"}" style="--name:{longest}ch">{"".join(figures)}</div>'
    body = keys + grid if moved else ""
    if still:
        names = ", ".join(f"<code>{escape(name)}</code> {whole(size)}" for name, size in still.items())
        count = f"{len(still)} axes that never changed" if len(still) > 1 else "1 axis that never changed"
        body += f'<details style="margin-top:16px"><summary>{count}</summary>{names}</details>'
    about = f"{len(moved)} of {len(sizes)} axes changed. An axis is a class of coupled units such as channels."
    return _section("Width of every axis", about, f'<div class="card">{body or "No axis was recorded."}</div>')


def _width_figure(name: str, history: Sequence[tuple[float, float]], last: float, few: bool) -> str:
    first, final = history[0][1], history[-1][1]
    css = "up" if final > first else "down" if final < first else ""
    name_html = f'<code class="name" title="{escape(name)}"><bdi>{escape(name)}</bdi></code>'
    size_html = f'<span class="size">{whole(first)} → <b class="{css}">{whole(final)}</b></span>'
    strip = width_strip(name, history, last, 64 if few else 18)
    parts = (name_html, size_html, strip) if few else (name_html, strip, size_html)
    return f'<div class="{"mini" if few else "row"}">{"".join(parts)}</div>'


# ------------------------------------------------------------------------------------------------------ tables


def _architecture(run: Run) -> str:
    before = _modules(run.start)
    after = _modules(run.end) if run.end is not None else None
    names = list(before) if after is None else _merged(list(before), list(after))
    parameters = [_number(row.get("parameters")) for table in (before, after or {}) for row in table.values()]
    largest = max((value for value in parameters if value is not None), default=0.0) or 1.0
    rows = [_module_row(name, before.get(name), None if after is None else after.get(name), largest) for name in names]
    about = "Every module that holds parameters, as it was at the start and as it is at the end."
    if after is None:
        about = "Every module that holds parameters at the start; the other half comes when the run ends."
    head = (
        '<tr><th>Module</th><th>Type</th><th>Shape before</th><th>Shape after</th><th class="n">Parameters</th>'
        '<th class="bars"><span class="legend"><span class="key before"><i></i>before</span>'
        '<span class="key after"><i></i>after</span></span></th></tr>'
    )
    return _section("Architecture", about, _table(head, rows))


def _modules(record: Record) -> dict[str, Record]:
    rows = record.get("architecture")
    entries = [_mapping(row) for row in rows] if isinstance(rows, list) else []
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
        for css, value in zip(("before", "after"), map(_number, sizes), strict=True)
        if value is not None
    )
    kind = (after or before or {}).get("type")
    count = _change(sizes[0], sizes[1])
    return (
        f"<tr><td><code>{escape(name)}</code></td><td>{_text(kind)}</td>"
        f'<td class="s">{_text(shapes[0])}</td><td class="s">{_text(shapes[1])}</td>'
        f'<td class="n">{count}</td><td class="bars">{bars}</td></tr>'
    )


def _table(head: str, rows: Sequence[str]) -> str:
    return f'<div class="card scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _event_table(run: Run) -> str:
    head = (
        '<tr><th class="n">Step</th><th class="n">Epoch</th><th>Action</th><th>Method</th><th>Axes</th>'
        '<th class="n">Parameters</th><th class="n">FLOPs</th><th class="n">Loss, same batch</th><th>Contract</th></tr>'
    )
    if not run.events:
        return _section("Events", "No grow or prune event has happened.", "")
    about = "What changed, what it cost, and the loss on the same batch right before and after."
    return _section("Events", about, _table(head, [_event_row(event) for event in run.events]))


def _event_row(event: Record) -> str:
    action = str(event.get("action"))
    css = action if action in ("grow", "prune") else "other"
    contract = _text(event.get("contract"))
    pill = f'<span class="pill {contract if contract in ("exact", "changing") else ""}">{contract}</span>'
    return (
        f'<tr><td class="n">{_text(event.get("step"))}</td><td class="n">{_text(event.get("epoch"))}</td>'
        f'<td><span class="act {css}">{event_icon(action)}{escape(action)}</span></td>'
        f"<td>{_text(event.get('method'))}</td><td>{_event_axes(_mapping(event.get('axes')))}</td>"
        f'<td class="n">{_change(*_pair(event.get("parameters")), whole)}</td>'
        f'<td class="n">{_change(*_pair(event.get("flops")), si)}</td>'
        f'<td class="n">{_loss_change(event.get("loss"))}</td><td>{pill}</td></tr>'
    )


def _loss_change(pair: object) -> str:
    """Both values even where they are equal: that is what an exact edit promises."""
    before, after = _pair(pair)
    return MISSING if before is None and after is None else f"{_text(before, _loss)} → {_text(after, _loss)}"


def _event_axes(axes: Record) -> str:
    items = [
        f'<span class="s"><code>{escape(str(name))}</code> {_change(*_pair(pair))}</span>'
        for name, pair in axes.items()
    ]
    shown = "<br>".join(items[:NAMED_AXES])
    if len(items) <= NAMED_AXES:
        return shown
    rest = "<br>".join(items[NAMED_AXES:])
    return f"{shown}<details><summary>and {len(items) - NAMED_AXES} more</summary>{rest}</details>"


def _configuration(run: Run) -> str:
    command = run.config.get("command")
    words = shlex.join(map(str, command)) if isinstance(command, list) else command
    pre = "" if words is None else f"<h3>Command</h3><pre>{escape(str(words))}</pre>"
    items = "".join(
        f"<div><dt>{escape(str(key)).replace('_', ' ')}</dt><dd>{_value(value)}</dd></div>"
        for key, value in run.config.items()
        if key != "command"
    )
    about = "What it takes to run this again."
    return _section("Configuration", about, f'<div class="card">{pre}<dl>{items}</dl></div>')


def _value(value: object) -> str:
    if isinstance(value, (dict, list)):
        return f"<code>{escape(json.dumps(value, ensure_ascii=False))}</code>"
    return MISSING if value is None else escape(str(value))
