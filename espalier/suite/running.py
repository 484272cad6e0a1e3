"""Run what is missing of a suite, and say how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from espalier.bench.wording import duration_text
from espalier.errors import RunError
from espalier.evolve.processes import Processes
from espalier.evolve.runners import InProcess, Runner
from espalier.suite.cells import expand
from espalier.suite.kept import Kept, Record
from espalier.suite.suite import Cell, Suite
from espalier.suite.work import Job, carried_out
from espalier.table import text_table

Identity: TypeAlias = tuple[str, str, str, float, str, str, float, int]
_FIELDS: Mapping[str, Callable[[Cell], str]] = {
    "task": lambda cell: cell.task.name,
    "model": lambda cell: cell.task.model,
    "contender": lambda cell: cell.contender.name,
    "kind": lambda cell: cell.contender.kind,
    "track": lambda cell: cell.track,
    "point": lambda cell: f"{cell.point:g}",
    "size": lambda cell: cell.size,
    "budget": lambda cell: cell.budget,
    "scale": lambda cell: f"{cell.scale:g}",
    "seed": lambda cell: str(cell.seed),
}


def identity(cell: Cell, contender: str | None = None) -> Identity:
    """What tells a cell from the others of its suite; with a name, that of another contender in the same place."""
    name = cell.contender.name if contender is None else contender
    return (name, cell.task.name, cell.track, cell.point, cell.size, cell.budget, cell.scale, cell.seed)


@dataclass(frozen=True)
class Place:
    """Where a suite is run, and where its records are."""

    out: Path
    device: str = "cpu"
    methods_from: str | None = None
    published: tuple[Path, ...] = ()
    """Files of records beside those of the folder."""

    def kept(self) -> Kept:
        """The records that there are. Raises RunError as `Kept`."""
        return Kept(self.out, self.published)


class Plan:
    """The cells of a suite with their jobs, as far as these are known."""

    def __init__(self, suite: Suite, place: Place, only: Mapping[str, Sequence[str]] | None = None) -> None:
        """Expand the suite.

        Args:
            suite: what is asked for.
            place: where.
            only: field of a cell -> values that it may have.

        Raises:
            RunError: a field is unknown, or nothing is left.
            MethodError: methods do not fit their track.
        """
        self.suite, self.place = suite, place
        everything = expand(suite)
        strange = [field for field in only or {} if field not in _FIELDS]
        if strange:
            raise RunError(f"--only: there is no field {strange[0]!r}; expected one of {', '.join(_FIELDS)}")
        self.cells = [
            cell for cell in everything if all(_FIELDS[name](cell) in values for name, values in (only or {}).items())
        ]
        if not self.cells:
            raise RunError(f"--only: no cell of the suite {suite.name!r} fits {dict(only or {})}")
        self._everything = {identity(cell): cell for cell in everything}
        self._jobs: dict[Identity, Job] = {}

    def job(self, cell: Cell, kept: Kept) -> Job | None:
        """The job of a cell; None while the architecture that is to be retrained is not there."""
        known = self._jobs.get(identity(cell))
        if known is not None:
            return known
        sizes = None
        if cell.contender.kind == "retrained":
            source = self._everything.get(identity(cell, cell.contender.of))
            found = None if source is None else self.record(source, kept)
            if found is None or "result" not in found:
                return None
            sizes = tuple(sorted(found["result"]["axes"].items()))
        job = Job(cell, self.place.device, self.place.methods_from, sizes)
        self._jobs[identity(cell)] = job
        return job

    def record(self, cell: Cell, kept: Kept) -> Record | None:
        """What a cell gave; None if it was not run."""
        job = self.job(cell, kept)
        return None if job is None else kept.get(job.key)

    def missing(self, kept: Kept) -> list[Job]:
        """Jobs that can be done now and were not, each once, in the order of the suite."""
        found: dict[str, Job] = {}
        for cell in self.cells:
            job = self.job(cell, kept)
            if job is not None and kept.get(job.key) is None:
                found.setdefault(job.key, job)
        return list(found.values())


def run(
    plan: Plan, place: Place, say: Callable[[str], None], *, processes: int = 1, minutes: float | None = None
) -> str:
    """Run what is missing; returns how far the suite is.

    Args:
        plan: the cells.
        place: where records go.
        say: is told of every cell that ends.
        processes: of this machine; results do not depend on their number, times do.
        minutes: after which no further cell is begun; None: to the end.

    Raises:
        RunError: records cannot be written, or processes are asked for and pebble is not installed.
        KeyboardInterrupt: Ctrl-C; what was finished is kept.
    """
    kept, until = place.kept(), None if minutes is None else time.monotonic() + 60 * minutes
    context: AbstractContextManager[Runner] = nullcontext(InProcess()) if processes == 1 else Processes(processes)
    lost: set[str] = set()
    with context as runner:
        while jobs := [job for job in plan.missing(kept) if job.key not in lost]:
            left = len(jobs)
            for wave in _waves(jobs, None if until is None else processes):
                if until is not None and time.monotonic() >= until:
                    return status(plan, kept)
                for number, record in runner.run(wave, place.out, carried_out):
                    job, left = wave[number], left - 1
                    if record.get("lost"):  # its worker died: nothing is known of the cell
                        lost.add(job.key)
                    else:
                        kept.put(record)
                    say(f"{left:>6} to go  {_title(job.cell)}: {_outcome(record)}")
    return status(plan, kept)


def status(plan: Plan, kept: Kept) -> str:
    """How many cells of each task and track are done, and how long the others will take."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in plan.cells:
        groups.setdefault((cell.task.name, cell.track), []).append(cell)
    rows, seen, to_go, unknown = [], set[str](), 0.0, 0
    everything = [record for cell in plan.cells if (record := plan.record(cell, kept)) is not None]
    overall = _mean_seconds(everything)
    for (task, track), cells in groups.items():
        records = [record for cell in cells if (record := plan.record(cell, kept)) is not None]
        failed = sum("failed" in record for record in records)
        mean = _mean_seconds(records) or overall
        for cell in cells:
            job = plan.job(cell, kept)
            key = repr(identity(cell)) if job is None else job.key
            if key in seen or (job is not None and kept.get(job.key) is not None):
                continue
            seen.add(key)
            to_go, unknown = to_go + (mean or 0.0), unknown + 1
        each = "" if mean is None else duration_text(mean)
        rows.append([task, track, str(len(cells)), str(len(records) - failed), str(failed), each])
    header = ["task", "track", "cells", "done", "empty", "each"]
    lines = text_table(header, rows, right=(2, 3, 4, 5))
    left = "nothing is left to do"
    if unknown:
        left = f"{unknown} runs are left"
        if overall is not None:
            left += f", about {duration_text(to_go)} of one process"
    return "\n".join([*lines, left])


def _mean_seconds(records: Sequence[Record]) -> float | None:
    seconds = [float(record["seconds"]) for record in records if "result" in record]
    return sum(seconds) / len(seconds) if seconds else None


def _waves(jobs: Sequence[Job], size: int | None) -> list[Sequence[Job]]:
    """All at once; or so many at a time, between which there is time to stop."""
    return [jobs] if size is None else [jobs[at : at + size] for at in range(0, len(jobs), size)]


def _title(cell: Cell) -> str:
    return f"{cell.task.name} {cell.track} {cell.point:g} {cell.contender.name}, seed {cell.seed}"


def _outcome(record: Record) -> str:
    if "failed" in record:
        return str(record["failed"])
    result = record["result"]
    return f"{result['test_accuracy']:.2%}, {result['parameters']:,} parameters, {record['seconds']:.0f} s"


__all__ = ["Identity", "Place", "Plan", "identity", "run", "status"]
