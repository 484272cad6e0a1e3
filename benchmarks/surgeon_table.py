"""The Surgeon against plain training of the start for the same training FLOPs, all branches charged.

    python -m benchmarks.surgeon_table starts RECORDS --cifar cifar10-jpeg.npz    # five kinds of start
    python -m benchmarks.surgeon_table rescue RECORDS    # starts that cannot learn
    python -m benchmarks.surgeon_table moves  RECORDS    # the same starts as the first, edited at random
    python -m benchmarks.surgeon_table short  RECORDS    # two of them with much smaller budgets, on digits too
    python -m benchmarks.surgeon_table report RECORDS TABLES.md

Every run is a line of RECORDS as soon as it ends; the same command goes on with those that are missing. A run of the
Surgeon and the plain one beside it have the same seed: of weights, order and augmentation. Both are judged on the test
data once, at the end. The Surgeon has its default settings everywhere.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.mixed import mixed
from benchmarks.paired import Record, append, interval, origin, read, reading
from benchmarks.surgeon_problems import BATCH, Images
from espalier.evolve.job import FORWARD_AND_BACKWARD
from espalier.evolve.proposals import RandomMoves
from espalier.evolve.surgeon import Search, Surgeon


@dataclass(frozen=True)
class Start:
    """A network to begin with."""

    widths: tuple[int, ...]
    part: float = 1.0
    """Of the steps in `STEPS`."""
    dead: int | None = None


STEPS = {"mnist": 8000, "cifar10-jpeg": 12000, "digits": 8000}
"""For which starts are trained alone: so many that what is left out at the end is worth little to them."""
STARTS = {
    "good": Start((32, 32)),
    "too small": Start((10, 10, 10)),
    "too narrow in one place": Start((32, 2, 32)),
    "too large": Start((200, 200), part=0.3),
    "badly shaped": Start((8, 16, 64)),
}
INSUFFICIENT = ("too small", "too narrow in one place", "badly shaped")
STUCK = {
    "a bottleneck of one unit": Start((32, 1, 32)),
    "a layer of dead units": Start((32, 32, 32), dead=1),
    "twelve layers of six units": Start((6,) * 12),
}
PARTS = (0.005, 0.01, 0.03, 0.1, 0.3)
"""Of the steps above, to which budgets are cut."""
SHORT = {f"{name}, {part:.1%} of the steps": replace(STARTS[name], part=part) for name in ("good", "too small")
         for part in PARTS}  # fmt: skip
FRESH = 8
"""Rules for starts that cannot learn were made when smaller seeds had been seen."""
WAYS = {"plain": Surgeon(cycles=0), "surgeon": Surgeon(), "random": Surgeon(RandomMoves())}
TABLES = {
    "starts": (STARTS, ("surgeon", "plain")),
    "rescue": (STUCK, ("surgeon", "plain")),
    "moves": (STARTS, ("random",)),
    "short": (SHORT, ("surgeon", "plain")),
}


def measure(table: str, path: Path, sources: dict[str, str], seeds: Sequence[int], way: str | None) -> None:
    """Do the runs that are missing, seed by seed; of one way only if one is given."""
    starts, ways = TABLES[table][0], [one for one in TABLES[table][1] if way in (None, one)]
    done = {(one["data"], one["start"], one["seed"], one["way"]) for one in read(path)}
    for seed in seeds:
        for data, source in sources.items():
            for name, start in starts.items():
                for way in ways:
                    if (data, name, seed, way) not in done:
                        steps = round(start.part * STEPS[data])
                        found = _run(Images(data, source, start.widths, seed, start.dead), steps, WAYS[way])
                        line = {"data": data, "start": name, "seed": seed, "way": way, **found, **origin()}
                        append(path, line)
                        print(f"{data} {name} {seed} {way}: {found['accuracy']:.4f}, {found['parameters']}", flush=True)


def _run(problem: Images, steps: int, surgeon: Surgeon) -> Record:
    total = FORWARD_AND_BACKWARD * BATCH * 2 * problem.multiplications * steps
    records: list[Record] = []
    began, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        end = Search(problem, surgeon, total, Path(folder), on_record=lambda one: records.append(dict(one))).run()
    last = {one["name"]: one for one in records if one["kind"] == "branch"}
    won = [last[one["name"]] for one in records if one["kind"] == "won" and one["name"] is not None]
    return {
        "accuracy": end["test_accuracy"], "loss": end["test_loss"], "parameters": end["parameters"],
        "parameters_before": records[0]["parameters"], "flops": end["flops"], "flops_before": records[0]["flops"],
        "steps": end["steps"], "spent": end["total_spent"], "total": total,
        "won": [{name: one[name] for name in ("edit", "what", "gain", "error", "price")} for one in won],
        "tried": len(last), "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu,
    }  # fmt: skip


def report(records: Sequence[Record], path: Path) -> None:
    """Write the tables, above what a person wrote below them."""
    runs = {(one["data"], one["start"], one["seed"], one["way"]): one for one in records}
    title = "# The Surgeon and plain training for the same training FLOPs"
    parts = [title, "", *_starts(runs), "", *_rescue(runs), "", *_short(runs), "", *_moves(runs)]
    path.write_text("\n".join(parts) + "\n" + reading(path))


Runs = dict[tuple[str, str, int, str], Record]


def _pairs(
    runs: Runs, starts: Sequence[str], other: str = "plain"
) -> Iterator[tuple[str, str, list[tuple[Record, Record]]]]:
    for data in sorted({key[0] for key in runs}, reverse=True):
        for start in starts:
            seeds = sorted(key[2] for key in runs if key[:2] == (data, start) and key[3] == "surgeon")
            pairs = [(runs[data, start, seed, "surgeon"], runs[data, start, seed, other])
                     for seed in seeds if (data, start, seed, other) in runs]  # fmt: skip
            if pairs:
                yield data, start, pairs


def _starts(runs: Runs) -> list[str]:
    lines = [
        "| data | start | seeds | plain | Surgeon | difference, points | error | parameters "
        "| seconds, plain | seconds, Surgeon |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[str, list[float]] = {}
    insufficient: dict[str, list[float]] = defaultdict(list)
    for data, start, pairs in _pairs(runs, list(STARTS)):
        points = [100 * (found["accuracy"] - plain["accuracy"]) for found, plain in pairs]
        groups[f"{data}, {start}"] = points
        errors = [sum(1 - one["accuracy"] for one in ones) for ones in zip(*pairs, strict=True)]
        size = fmean(found["parameters"] / found["parameters_before"] for found, _ in pairs)
        if start in INSUFFICIENT:
            insufficient[data].append(errors[0] / errors[1] - 1)
        found, plain = (fmean(one["cpu_seconds"] for one in ones) for ones in zip(*pairs, strict=True))
        lines.append(
            f"| {data} | {start} {_widths(start)} | {len(pairs)} | {fmean(one['accuracy'] for _, one in pairs):.2%} | "
            f"{fmean(one['accuracy'] for one, _ in pairs):.2%} | {_with_interval(points)} | "
            f"{errors[0] / errors[1] - 1:+.0%} | {size:.2f}x | {plain:.0f} | {found:.0f} |"
        )
    if len(groups) > 1 and any(len(one) > 1 for one in groups.values()):
        fit = mixed(groups)
        low, high = fit.interval
        lines += ["", f"Over all starts, by a mixed model with the start as random effect: {fit.mean:+.2f} points, 95% "
                      f"interval {low:+.2f} to {high:+.2f} (standard deviation between starts {fit.between**0.5:.2f}, "
                      f"within {fit.within**0.5:.2f})."]  # fmt: skip
    if insufficient:
        means = ", ".join(f"{fmean(changes):+.0%} on {data}" for data, changes in insufficient.items())
        lines += ["", f"The error from insufficient starts ({', '.join(INSUFFICIENT)}), in the mean: {means}."]
    return lines


def _with_interval(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:+.2f}, of 1 seed" if len(values) == 1 else f"{mean:+.2f} ± {half:.2f}"


def _widths(start: str) -> str:
    return "-".join(map(str, {**STARTS, **STUCK, **SHORT}[start].widths))


def _rescue(runs: Runs) -> list[str]:
    lines = ["| data | start | seeds | plain | Surgeon | of the worst seed | the good start alone | missing, points |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for data, start, pairs in _pairs(runs, list(STUCK)):
        good = [one["accuracy"] for key, one in runs.items() if key[:2] == (data, "good") and key[3] == "plain"]
        for seen in (True, False):
            some = [pair for pair in pairs if (pair[0]["seed"] < FRESH) == seen]
            if not some:
                continue
            found, plain = (fmean(one["accuracy"] for one in ones) for ones in zip(*some, strict=True))
            text = f"{fmean(good):.2%} | {100 * (fmean(good) - found):+.2f}" if good else "|"
            worst = min(one["accuracy"] for one, _ in some)
            seeds = f"{some[0][0]['seed']} to {some[-1][0]['seed']}{', seen before' if seen else ', fresh'}"
            lines.append(
                f"| {data} | {start} {_widths(start)} | {seeds} | {plain:.2%} | {found:.2%} | {worst:.2%} | {text} |"
            )
    return lines


def _short(runs: Runs) -> list[str]:
    lines = ["| data | start | steps alone | seeds | plain | Surgeon | difference, points | test loss, plain | Surgeon "
             "| with edits |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for data, start, pairs in _pairs(runs, list(SHORT)):
        found, plain = (fmean(one["accuracy"] for one in ones) for ones in zip(*pairs, strict=True))
        losses = [f"{fmean(one['loss'] for one in ones):.3f}" for ones in zip(*pairs, strict=True)]
        points = [100 * (one["accuracy"] - other["accuracy"]) for one, other in pairs]
        edited = sum(bool(one["won"]) for one, _ in pairs)
        name = f"{start.partition(',')[0]} {_widths(start)}"
        steps = round(SHORT[start].part * STEPS[data])
        lines.append(
            f"| {data} | {name} | {steps} | {len(pairs)} | {plain:.2%} | {found:.2%} | {_with_interval(points)} | "
            f"{losses[1]} | {losses[0]} | {edited} |"
        )
    return lines


def _moves(runs: Runs) -> list[str]:
    lines = [
        "| data | start | seeds | gain per 10^9 FLOPs, recommended | random | accuracy, recommended | random |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    sums = defaultdict[str, list[float]](list)
    for data, start, pairs in _pairs(runs, list(STARTS), "random"):
        gains = [[1e9 * sum(won["gain"] for won in one["won"]) / one["spent"] for one in ones]
                 for ones in zip(*pairs, strict=True)]  # fmt: skip
        accuracies = [fmean(one["accuracy"] for one in ones) for ones in zip(*pairs, strict=True)]
        for way, values in zip(("recommended", "random"), gains, strict=True):
            sums[way] += values
        lines.append(
            f"| {data} | {start} | {len(pairs)} | {fmean(gains[0]):.4f} | {fmean(gains[1]):.4f} | "
            f"{accuracies[0]:.2%} | {accuracies[1]:.2%} |"
        )
    if sums:
        lines += ["", f"Mean accepted gain per 10^9 training FLOPs: {fmean(sums['recommended']):.4f} recommended, "
                      f"{fmean(sums['random']):.4f} random: "
                      f"{fmean(sums['recommended']) / fmean(sums['random']):.1f} times as much."]  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=(*TABLES, "report"))
    parser.add_argument("records", type=Path)
    parser.add_argument("tables", type=Path, nargs="?", help="where the report goes")
    parser.add_argument("--mnist", default="mnist", help="path of an .npz file, or the name of the data set")
    parser.add_argument("--cifar", help="path of an .npz file; without it MNIST alone")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--way", choices=tuple(WAYS), help="of those of the table; all without it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.table == "report":
        if given.tables is None:
            parser.error("report: where to? Give TABLES.md")
        report(read(given.records), given.tables)
        return
    sources = {"mnist": given.mnist, **({"cifar10-jpeg": given.cifar} if given.cifar else {})}
    if given.table == "short":
        sources["digits"] = "digits"
    measure(given.table, given.records, sources, range(given.seeds), given.way)


if __name__ == "__main__":
    main()
