"""`espalier evolve`: the Surgeon on a task, and beside it the start trained alone for the same FLOPs.

    config.json      the options: written once
    surgeon.jsonl    what the search did, one record per line; written anew when it goes on
    baseline.jsonl   likewise, of the start that is trained alone
    surgeon/         ledger and checkpoints, from which an interrupted search goes on
    baseline/        likewise
    network/         the network that was found, as `espalier.save` writes it
    report.html      the page, also of a search that was interrupted

The command given again goes on where it was interrupted; nothing is computed twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from espalier.attaching import attach
from espalier.bench.charts import si, whole
from espalier.bench.models import MODELS
from espalier.bench.report_search import write_search_report
from espalier.bench.search_progress import SearchProgress, Watcher
from espalier.bench.search_records import BASELINE, SURGEON
from espalier.bench.task_problem import TaskProblem
from espalier.bench.tasks import task
from espalier.errors import RunError
from espalier.evolve.job import FORWARD_AND_BACKWARD
from espalier.evolve.judge import Objective
from espalier.evolve.processes import Processes
from espalier.evolve.proposals import Proposer, RandomMoves
from espalier.evolve.recommended import Recommended
from espalier.evolve.runners import InProcess, Runner
from espalier.evolve.surgeon import Search, Surgeon

Record = Mapping[str, Any]
PROPOSALS = ("recommended", "random")
_PROPOSERS: Mapping[str, Proposer] = MappingProxyType({"recommended": Recommended(), "random": RandomMoves()})
CONFIG = "config.json"


@dataclass(frozen=True)
class EvolveOptions:
    """All that decides the result."""

    problem: TaskProblem
    epochs: int
    """Of the start; the budget of training FLOPs is what these cost."""
    surgeon: Surgeon
    baseline: bool = True

    @property
    def total(self) -> int:
        """Training FLOPs of each of the two."""
        bench = self.problem.workbench()
        flops = attach(bench.model, bench.example).cost().flops // bench.examples
        return FORWARD_AND_BACKWARD * flops * self.problem.batch_size * self.problem.steps(self.epochs)


def chosen(given: Mapping[str, Any]) -> EvolveOptions:
    """Options from what was given, and defaults for what is None or absent.

    Raises:
        RunError: a value out of range, or two data sets.
        DataError: an unknown task or model.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if "data" in asked and "task" in asked:
        raise RunError(f"the task '{asked['task']}' and --data {asked['data']} name two data sets: give only one")
    source = str(Path(asked["data"]).resolve()) if "data" in asked else asked.get("task", "digits")
    row = task(Path(source) if "data" in asked else source)
    model, proposals = asked.get("model", row.model), asked.get("proposals", PROPOSALS[0])
    if model not in MODELS:
        raise RunError(f"unknown model '{model}': expected one of {', '.join(MODELS)}")
    if proposals not in PROPOSALS:
        raise RunError(f"unknown proposals '{proposals}': expected one of {', '.join(PROPOSALS)}")
    for name in ("epochs", "batch_size", "width", "lr"):
        if name in asked and not asked[name] > 0:
            raise RunError(f"--{name.replace('_', '-')}: expected a number above 0, found {asked[name]}")
    problem = TaskProblem(
        source,
        model,
        asked.get("width", 1.0),
        asked.get("batch_size", row.batch_size),
        asked.get("lr", row.learning_rate),
        asked.get("seed", 0),
        latency="price_latency" in asked,
    )
    prices = {name: asked.get(f"price_{name}", 0.0) for name in ("parameters", "flops", "latency")}
    surgeon = Surgeon(
        _PROPOSERS[proposals],
        Objective(**prices),
        cycles=asked.get("cycles", Surgeon.cycles),
        candidates=asked.get("candidates", Surgeon.candidates),
        dear=asked.get("dear", Surgeon.dear),
        watched=True,
    )
    return EvolveOptions(problem, asked.get("epochs", row.epochs), surgeon, asked.get("baseline", True))


def evolve(options: EvolveOptions, out: Path, progress: SearchProgress, workers: int = 1) -> str:
    """Search, train the baseline, and say how they compare. Goes on with what is in the folder.

    Raises:
        RunError: the folder holds another search or something else, or the search cannot go on.
        KeyboardInterrupt: Ctrl-C; what was finished is kept, and the report shows it.
    """
    _claim(out, {"options": asdict(options), "text": repr(options)})
    try:
        found, alone = _both(options, out, progress, workers)
    finally:
        if (out / SURGEON).exists() and (out / SURGEON).stat().st_size:
            write_search_report(out)
    kept = out / "surgeon" / "store" / str(found["network"])
    shutil.copytree(kept, out / "network", dirs_exist_ok=True)
    lines = [f"found:  {_outcome(found)}"]
    if alone is not None:
        lines.append(f"start:  {_outcome(alone)}")
    return "\n".join([*lines, f"report: {out / 'report.html'}", f"the network is in {out / 'network'}"])


def _both(options: EvolveOptions, out: Path, progress: SearchProgress, workers: int) -> tuple[Record, Record | None]:
    """What the search ends with, and what the start trained alone does, if that is wanted: with several workers at the
    same time, since a search has less for them to do while it trains one network."""

    def budget() -> int:
        total = options.total
        progress.say(f"{si(total)} training FLOPs, as many as {options.epochs} epochs of the start take")
        return total

    def searched(surgeon: Surgeon, name: str, runner: Runner, alone: Runner, shown: str) -> Record:
        return _searched(options.problem, surgeon, total, out, name, runner, alone, progress.begin(shown, total))

    plain = Surgeon(cycles=0, watched=True)
    if workers == 1:
        total = budget()
        found = searched(options.surgeon, SURGEON, InProcess(), InProcess(), "search")
        return found, searched(plain, BASELINE, InProcess(), InProcess(), "alone") if options.baseline else None
    with ThreadPoolExecutor(1) as beside, Processes(workers, prepare=options.problem.workbench) as runner:
        total = budget()  # which takes a while, too
        alone = beside.submit(searched, plain, BASELINE, runner, runner, "alone") if options.baseline else None
        found = searched(options.surgeon, SURGEON, runner, InProcess(), "search")
        return found, None if alone is None else alone.result()


def _searched(
    problem: TaskProblem,
    surgeon: Surgeon,
    total: int,
    out: Path,
    name: str,
    runner: Runner,
    alone: Runner,
    watcher: Watcher,
) -> Record:
    with (out / name).open("w", encoding="utf-8") as file:

        def on_record(record: Record) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()
            watcher.record(record)

        folder = out / Path(name).stem
        return Search(
            problem, surgeon, total, folder, runner, on_record, lambda job, result: watcher.result(), alone
        ).run()


def _outcome(end: Record) -> str:
    return (
        f"{end['test_accuracy']:.2%} on the test data, {whole(end['parameters'])} parameters, "
        f"{si(end['flops'])} FLOPs, {si(end['total_spent'])} training FLOPs"
    )


def _claim(out: Path, config: Mapping[str, Any]) -> None:
    path, text = out / CONFIG, json.dumps(config, indent=2, default=repr) + "\n"
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise RunError(
                f"{out} holds something with other options: give another --out, or the same options to go on"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is not empty, and no search; give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{out}: cannot write a search there ({error.strerror}); choose another --out") from error
