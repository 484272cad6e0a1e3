"""Single weights in a report: how many masks hold at zero, in which parameters, and since when."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from espalier.bench.charts import Series, legend, line_chart, percent, si, whole, width_strip
from espalier.bench.records import LARGEST, Record, Run, as_mapping, as_number, as_pair
from espalier.bench.wording import as_text, section


@dataclass(frozen=True)
class Weights:
    """A parameter that has, or had, a mask."""

    name: str
    live: float
    every: float
    history: tuple[tuple[float, float], ...]
    """(step, live weights) at the start and at each change."""


@dataclass(frozen=True)
class Sparsity:
    """All parameters that have or had masks, over the training."""

    parameters: tuple[Weights, ...]
    over_time: tuple[tuple[float, float], ...]
    """(step, part of all their weights that is held at zero)."""
    last: float
    """The last step."""

    @property
    def every(self) -> float:
        """Weights of these parameters."""
        return sum(one.every for one in self.parameters)

    @property
    def live(self) -> float:
        """Those of them that are live in the end."""
        return sum(one.live for one in self.parameters)


def sparsity_of(run: Run) -> Sparsity | None:
    """What masks held at zero in a run; None if there were none."""
    snapshots = [
        (as_number(record.get("step")), _snapshot(as_mapping(record["weights"])))
        for record in run.records
        if "weights" in record and record["kind"] != "static_epoch"
    ]
    # before its first mask, and without one, a parameter is live as a whole
    now = {name: (every, every) for _, found in reversed(snapshots) for name, (_, every) in found.items()}
    names = dict.fromkeys(name for _, found in snapshots for name in found)
    histories: dict[str, list[tuple[float, float]]] = {name: [(0.0, now[name][1])] for name in names}
    over_time: list[tuple[float, float]] = []
    step = 0.0
    for at, found in snapshots:
        step = step if at is None else at
        now = {name: found.get(name, (every, every)) for name, (_, every) in now.items()}
        for name in names:
            _put(histories[name], step, now[name][0])
        every = sum(size for _, size in now.values())
        over_time.append((step, 1 - sum(live for live, _ in now.values()) / every if every else 0.0))
    if not names:
        return None
    over_time = list({at: (at, held) for at, held in over_time}.values())
    parameters = tuple(Weights(name, *now[name], tuple(histories[name])) for name in names)
    return Sparsity(parameters, tuple(over_time), step)


def _snapshot(weights: Record) -> dict[str, tuple[float, float]]:
    """Parameter -> (live, all), of what can be read."""
    found = {}
    for name, pair in weights.items():
        live, every = (as_number(value) for value in as_pair(pair))
        if live is not None and every is not None and 0 <= live <= every < LARGEST and every > 0:
            found[str(name)] = (live, every)
    return found


def _put(history: list[tuple[float, float]], step: float, live: float) -> None:
    """Note a change. What pruning took and growing gave back at one step is none."""
    if len(history) > 1 and history[-1][0] == step:
        history.pop()
    if history[-1][1] != live:
        history.append((step, live))


def sparsity(run: Run) -> str:
    """Sparsity over time and parameter by parameter; nothing where there were no masks."""
    found = sparsity_of(run)
    if found is None:
        return ""
    held = Series("held at zero", "cost", found.over_time, stepped=True)
    chart = line_chart("Sparsity", [held], "step", whole, percent, x_whole=True, from_zero=True)
    moved = [_moved(run, action, word) for action, word in (("prune", "masked"), ("grow", "made live"))]
    drawn = [line for line in moved if line.points]
    moves = line_chart("Weights per event", drawn, "step", whole, si, x_whole=True, y_whole=True, may_be_log=True)
    cards = (
        f'<figure class="card"><figcaption>Sparsity</figcaption>{chart}</figure>'
        f'<figure class="card"><figcaption>Weights that an event masked or made live</figcaption>{legend(drawn)}{moves}'
        "</figure>"
    )
    about = (
        f"Masks hold {_part(found.live, found.every)} of {whole(found.every)} weights at zero, in "
        f"{len(found.parameters)} parameters. They save no time by themselves; FLOPs count every weight."
    )
    return section("Sparsity", about, f'<div class="plots">{cards}</div>{_table(found)}')


def held_text(run: Run) -> str:
    """The part of weights that masks hold at zero, for a sentence; empty where there are none."""
    found = sparsity_of(run)
    return "" if found is None else _part(found.live, found.every)


def _part(live: float, every: float) -> str:
    return f"{1 - live / every:.1%}"


def _moved(run: Run, action: str, word: str) -> Series:
    points = []
    for event in run.events:
        pairs = [tuple(map(as_number, as_pair(pair))) for pair in as_mapping(event.get("masks")).values()]
        count = sum(abs(after - before) for before, after in pairs if before is not None and after is not None)
        if event.get("action") == action and count:
            points.append((as_number(event.get("step")), count))
    return Series(word, action, tuple(points))


def _table(found: Sparsity) -> str:
    head = (
        '<tr><th>Parameter</th><th class="n">Weights</th><th class="n">Live</th><th class="n">Sparsity</th>'
        '<th class="bars">Live part</th><th class="bars">Live weights over time</th></tr>'
    )
    total = Weights("all of them", found.live, found.every, ())
    rows = [*(_row(one, found.last) for one in found.parameters), _row(total, found.last)]
    return f'<div class="card scroll below"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _row(one: Weights, last: float) -> str:
    strip = width_strip(one.name, one.history, last, 18) if one.history else ""
    return (
        f'<tr><td><code>{escape(one.name)}</code></td><td class="n">{as_text(one.every)}</td>'
        f'<td class="n">{as_text(one.live)}</td><td class="n">{_part(one.live, one.every)}</td>'
        f'<td class="bars"><i class="after" style="width:{100 * one.live / one.every:.2f}%"></i></td>'
        f'<td class="bars">{strip}</td></tr>'
    )


__all__ = ["Sparsity", "Weights", "held_text", "sparsity", "sparsity_of"]
