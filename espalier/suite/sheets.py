"""The tables of a suite's results, as text in cells; `pages` writes them as markdown and as a page."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from espalier.bench.charts import si
from espalier.bench.wording import duration_text
from espalier.suite.comparing import Results, Value, accuracy, mean_of
from espalier.suite.kept import Record
from espalier.suite.statistics import Effect
from espalier.suite.suite import Contender

MISSING = ""


@dataclass(frozen=True)
class Sheet:
    """One table: what it shows, and its cells. Columns after the first are numbers."""

    title: str
    about: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)
    """Columns that hold words."""


def sheets(results: Results) -> list[Sheet]:
    """All tables that have rows."""
    found = [progress(results), claims(results)]
    for task in results.suite.tasks:
        for track in ("growing", "shrinking", "constant", "unstructured"):
            found += [accuracies(results, task.name, track), costs(results, task.name, track)]
    found += [speeds(results), edits(results), empty(results)]
    return [one for one in found if one.rows]


def progress(results: Results) -> Sheet:
    """What was run, by task and track; nothing once all is there."""
    asked = Counter((cell.task.name, cell.track) for cell in results.everything)
    there = Counter((cell.task.name, cell.track) for cell, record in results.cells if "result" in record)
    empty = Counter((cell.task.name, cell.track) for cell, record in results.cells if "failed" in record)
    rows = [(*one, str(count), str(there[one]), str(empty[one])) for one, count in asked.items()]
    whole = len(results.cells) == len(results.everything)
    header = ("task", "track", "cells", "done", "empty")
    return Sheet(
        "How far it is", "A cell counts on every track that it is on.", header, () if whole else tuple(rows), (0, 1)
    )


def claims(results: Results) -> Sheet:
    """What the suite set out to test."""
    rows = []
    for row in results.rows():
        one = row.comparison
        more = f", budget x {row.condition.scale:g} against x {one.other_scale:g}" if one.other_scale else ""
        claim = "better" if one.claim == "better" else f"not worse by {_points(one.margin, one.value)}"
        by_task = ", ".join(f"{task} {_signed(effect, one.value)}" for task, effect in row.by_task.items())
        rows.append(
            (
                f"{one.of} against {one.other}",
                one.track,
                f"{claim} ({one.value}{more})",
                row.condition.name,
                _signed(row.effect, one.value),
                f"{row.corrected:.2g}",
                f"{row.pairs}" + (f" of {row.pairs + row.missing}" if row.missing else ""),
                row.verdict,
                by_task,
            )
        )
    about = (
        "Each claim was named before the runs. Differences are paired by seed: of each seed the mean over operating "
        "points, then the mean over seeds with Student's t, then over tasks by random effects, with 95% intervals, in "
        "points of accuracy, or in nats where the loss is compared. p is two-sided; of *not worse* it is one-sided, "
        "against the margin, and the largest of the tasks'. All are after Holm's correction over the rows of the same "
        "seeds. With p < 0.05 a claim *holds* on screening seeds and is *confirmed* on fresh ones, or the opposite is "
        "true (*worse*); all else is *open*."
    )
    header = ("comparison", "track", "claim", "equal", "difference", "p (Holm)", "pairs", "verdict", "by task")
    return Sheet("What was tested", about, header, tuple(rows), (0, 1, 2, 3, 7, 8))


def accuracies(results: Results, task: str, track: str) -> Sheet:
    """Test accuracy of every contender of a track at every operating point and under every condition."""
    conditions = [one for one in results.suite.conditions if one.tracks is None or track in one.tracks]
    columns = [(one, point) for one in conditions for point in sorted(results.points(one))]
    filled = [
        (condition, point)
        for condition, point in columns
        if any(results.of(task, track, one.name, point, condition) for one in results.contenders)
    ]
    rows = []
    for contender in _in(results, track):
        runs = [list(results.of(task, track, contender.name, point, one).values()) for one, point in filled]
        if any(runs):
            rows.append((_named(contender), *(_accuracy(mean_of(some, accuracy)) for some in runs)))
    header = ["method", *(f"{point:g} ({one.name})" for one, point in filled)]
    about = (
        "Test accuracy in %, mean ± 95% over seeds. Columns are final sizes, as parts of the large network, and what "
        "is equal between the rows."
    )
    return Sheet(f"{task}, {track}: accuracy", about, tuple(header), tuple(rows))


def costs(results: Results, task: str, track: str) -> Sheet:
    """What training took and what the network at the end costs, at the operating point that most runs are of."""
    condition = results.suite.conditions[0]
    counts = Counter(
        {
            point: sum(len(results.of(task, track, one.name, point, condition)) for one in _in(results, track))
            for point in results.points(condition)
        }
    )
    point = max(counts, key=lambda one: (counts[one], -one))
    large = [
        record
        for name in (one.name for one in results.contenders if one.kind == "static" and one.static == "large")
        for record in results.of(task, track, name, point, condition).values()
    ]
    rows = []
    for contender in _in(results, track):
        some = list(results.of(task, track, contender.name, point, condition).values())
        if some:
            rows.append(
                (_named(contender), *_cost(some, large, "nonzero" if track == "unstructured" else "parameters"))
            )
    header = (
        "method", "parameters", "FLOPs", "training FLOPs", "steps", "training time", "x large", "peak memory",
        "latency of 1", "of 256", "area", "test loss",
    )  # fmt: skip
    about = (
        f"At {point:g} of the large network, {condition.name} equal; means over seeds. FLOPs are those of one "
        "inference; parameters of single weights are those that are not 0; latencies are eager and measured, and "
        "follow FLOPs only where these are what takes the time. *Area* is the mean validation accuracy in % over the "
        "logarithm of training FLOPs, over the last factor of 32."
    )
    return Sheet(f"{task}, {track}: costs", about, header, tuple(rows))


def edits(results: Results) -> Sheet:
    """What edits did to the loss, and how long it took to make that good."""
    rows = []
    for task in results.suite.tasks:
        for contender in results.contenders:
            found = [
                edit
                for cell, record in results.cells
                if cell.task.name == task.name and cell.contender.name == contender.name and "result" in record
                for edit in record["result"]["edits"]
                if edit["action"] in ("grow", "prune")
            ]
            for action in ("grow", "prune"):
                some = [one for one in found if one["action"] == action]
                if some:
                    rows.append((task.name, contender.name, action, *_edit(some)))
    about = (
        "Loss after an edit minus before it, on the same batch in eval mode: median and 90th percentile. *Recovery* is "
        "the number of steps until the mean training loss of the steps since the edit, 10 at most, was no higher than "
        "that of the 10 steps before it; *open* is the share of edits after which the next one came first."
    )
    header = ("task", "method", "edit", "edits", "jump", "90%", "recovery", "90%", "open")
    return Sheet("Edits", about, header, tuple(rows), (0, 1, 2))


def speeds(results: Results) -> Sheet:
    """What the networks at the end take in every runtime, and how much of it FLOPs can change."""
    rows = []
    runtimes = list(dict.fromkeys(name for _, record in results.speeds for name in record["speed"]))
    for task in dict.fromkeys(cell.task.name for cell, _ in results.speeds):
        some = [(cell, record) for cell, record in results.speeds if cell.task.name == task]
        for cell, record in sorted(some, key=lambda one: (one[0].contender.name, -one[0].point)):
            large, small = record["flops"]
            times = [record["speed"].get(name, MISSING) for name in runtimes]
            rows.append(
                (task, cell.contender.name, f"{cell.point:g}", f"{large / small:.2f}", *map(_times_faster, times))
            )
        parts = [_fixed_part([record for _, record in some], name) for name in runtimes]
        rows.append(
            (task, "not for FLOPs", MISSING, MISSING, *(MISSING if one is None else f"{one:.0%}" for one in parts))
        )
    why = dict.fromkeys(
        f"{name}: {value}"
        for _, record in results.speeds
        for name, value in record["speed"].items()
        if isinstance(value, str)
    )
    about = (
        "How many times faster one pass is than that of the large network, for batches of 1 and of 256 samples; the "
        "two take turns. *FLOPs* is the factor that it would be if time were FLOPs. *not for FLOPs* is the part of the "
        "large network's time that is left at no FLOPs at all, on the straight line of time over FLOPs through all "
        "networks of the task: calls, memory traffic and layers that are as before. " + "; ".join(why)
    )
    header = ("task", "method", "size", "FLOPs", *runtimes)
    return Sheet("Realised speed", about.strip(), header, tuple(rows), (0, 1))


def empty(results: Results) -> Sheet:
    """Cells that could not be run, and why."""
    reasons = Counter(
        (cell.task.name, cell.track, cell.contender.name, str(record["failed"]))
        for cell, record in results.cells
        if "failed" in record
    )
    rows = tuple((task, track, name, str(count), why) for (task, track, name, why), count in reasons.items())
    header = ("task", "track", "method", "cells", "why")
    return Sheet(
        "Empty cells", "What a method or a package cannot do is empty, with its reason.", header, rows, (0, 1, 2, 4)
    )


def _times_faster(value: Sequence[float] | str) -> str:
    return MISSING if isinstance(value, str) else f"{value[0] / value[1]:.2f}"


def _fixed_part(records: Sequence[Record], runtime: str) -> float | None:
    """Where the line of least squares through (FLOPs, seconds), both as parts of the large network's, begins; None
    without two networks of different FLOPs."""
    times = [(one["flops"], one["speed"].get(runtime, MISSING)) for one in records]
    points = [(flops[1] / flops[0], pair[1] / pair[0]) for flops, pair in times if not isinstance(pair, str)]
    points += [(1.0, 1.0)] * len(points)  # each was beside the large one
    if len({x for x, _ in points}) < 2:
        return None
    middle, height = (statistics.fmean(column) for column in zip(*points, strict=True))
    slope: float = sum((x - middle) * (y - height) for x, y in points) / sum((x - middle) ** 2 for x, _ in points)
    return height - slope * middle


def _in(results: Results, track: str) -> list[Contender]:
    return [one for one in results.contenders if track in one.tracks]


def _named(contender: Contender) -> str:
    return contender.name if contender.role == "candidate" else f"{contender.name} ({contender.role})"


def _cost(some: Sequence[Record], large: Sequence[Record], size: str) -> tuple[str, ...]:
    seconds = _mean(some, lambda one: one["measured"]["seconds"])
    of_large = _mean(large, lambda one: one["measured"]["seconds"])
    memory = _mean(some, lambda one: one["measured"]["peak_memory"])
    area = _mean(some, lambda one: one["result"]["area"])
    loss = _mean(some, lambda one: one["result"]["test_loss"])
    first, many = (_mean(some, _latency(samples)) for samples in (1, 256))
    return (
        _si(_mean(some, lambda one: one["result"][size])),
        _si(_mean(some, lambda one: one["result"]["flops"])),
        _si(_mean(some, lambda one: one["result"]["training_flops"])),
        _si(_mean(some, lambda one: one["result"]["steps"])),
        MISSING if seconds is None else duration_text(seconds),
        MISSING if not seconds or not of_large else f"{seconds / of_large:.2f}",
        MISSING if memory is None else f"{si(memory)}B",
        MISSING if first is None else f"{si(1e6 * first)} µs",
        MISSING if many is None else f"{si(1e6 * many)} µs",
        MISSING if area is None else f"{100 * area:.2f}",
        MISSING if loss is None else f"{loss:.4f}",
    )


def _latency(samples: int) -> Value:
    return lambda one: one["measured"]["latency"].get(f"eager {samples}")


def _edit(some: Sequence[Record]) -> tuple[str, ...]:
    jumps = sorted(one["jump"] for one in some if one["jump"] is not None)
    steps = sorted(one["recovery"] for one in some if one["recovery"] is not None)
    left = 1 - len(steps) / len(some)
    return (
        str(len(some)),
        *(f"{_part(jumps, part):+.3g}" if jumps else MISSING for part in (0.5, 0.9)),
        *(f"{_part(steps, part):g}" if steps else MISSING for part in (0.5, 0.9)),
        f"{left:.0%}",
    )


def _part(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def _mean(some: Iterable[Record], value: Value) -> float | None:
    found = [number for one in some if (number := value(one)) is not None]
    return statistics.fmean(found) if found else None


def _si(value: float | None) -> str:
    return MISSING if value is None else si(value)


def _accuracy(effect: Effect | None) -> str:
    if effect is None:
        return MISSING
    return f"{100 * effect.mean:.2f}" + ("" if math.isinf(effect.half) else f" ± {100 * effect.half:.2f}")


def _points(value: float, of: str) -> str:
    return f"{100 * value:g} points" if of == "accuracy" else f"{value:g} nats"


def _signed(effect: Effect, of: str) -> str:
    times, digits = (100, 2) if of == "accuracy" else (1, 4)
    half = "" if math.isinf(effect.half) else f" ± {times * effect.half:.{digits}f}"
    return f"{times * effect.mean:+.{digits}f}{half}"


__all__ = ["Sheet", "accuracies", "claims", "costs", "edits", "empty", "progress", "sheets", "speeds"]
