"""What `espalier evolve` leaves behind, read back: `config.json`, `surgeon.jsonl` and `baseline.jsonl`.

Every line of the latter two is an object with a `kind`, as `espalier.evolve.surgeon.Search` tells of it. Networks that
were judged have parameters, flops (per sample), loss and accuracy (held-out), and latency where it is measured.

    start    the fresh network; total: training FLOPs of the whole search
    trained  the network after a piece of training without rivals: steps, total_spent
    dear     no cycle begun, since what it takes is worth more as plain training: cycle and cost (what the loss would be
             higher by), without them where there will be none at all; total_spent
    cycle    cycle, proposals (how many), total_spent; then, for each rung, a record of kind
    rung     cycle, rung, names and edits (of the branches), steps (of the control and of each branch), total_spent
             before it
    branch   cycle, rung, name, parent (how many edits were accepted before), edit, what, why, predicted; and either
             failed or gain, error, price, accepted, total_spent
    control  cycle, rung, total_spent
    won      cycle, name (None: the control)
    end      test_accuracy, test_loss, total_spent, network, front (networks that no other one beats in everything)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from espalier.bench.records import Record, as_number, read_config, read_records

SURGEON, BASELINE = "surgeon.jsonl", "baseline.jsonl"
KINDS = ("start", "trained", "dear", "cycle", "rung", "branch", "control", "won", "end")


@dataclass(frozen=True)
class Branch:
    """An edit that was tried: its records, one for each rung that it took part in."""

    name: str
    records: tuple[Record, ...]

    @property
    def what(self) -> str:
        """What the edit does, shortly."""
        return what_of(self.records[0])

    @property
    def why(self) -> str:
        """Why it was proposed."""
        return str(self.records[0].get("why"))

    @property
    def predicted(self) -> float | None:
        """By how much the loss was predicted to fall."""
        return as_number(self.records[0].get("predicted"))

    @property
    def lost(self) -> str | None:
        """Why it could not go on, if it could not."""
        failed = self.records[-1].get("failed")
        return None if failed is None else str(failed)

    @property
    def judged(self) -> Record:
        """The last record in which it was judged; empty if it never was."""
        return next((one for one in reversed(self.records) if "failed" not in one), {})


@dataclass(frozen=True)
class Cycle:
    """A competition."""

    number: int
    begin: float
    """Training FLOPs that were spent before."""
    branches: tuple[Branch, ...]
    controls: tuple[Record, ...]
    decided: bool
    winner: str | None
    """Name of the branch that was gone on with; None for the control."""

    @property
    def end(self) -> float:
        """Training FLOPs that were spent after it, as far as is known."""
        spent = [as_number(one.get("total_spent")) for one in self.controls]
        spent += [as_number(one.get("total_spent")) for branch in self.branches for one in branch.records]
        return max((one for one in spent if one is not None), default=self.begin)


@dataclass(frozen=True)
class SearchRun:
    """What the folder of a search holds."""

    config: Record
    records: tuple[Record, ...]
    """Of the Surgeon, as they were written."""
    baseline: tuple[Record, ...]
    """Of the start that is trained alone; empty if there is none yet."""
    cycles: tuple[Cycle, ...]
    notices: tuple[str, ...]

    @property
    def start(self) -> Record:
        """The record of the fresh network."""
        return next((one for one in self.records if one["kind"] == "start"), {})

    @property
    def end(self) -> Record | None:
        """The record of the outcome, once there is one."""
        return _end(self.records)

    @property
    def alone(self) -> Record | None:
        """That of the start trained alone."""
        return _end(self.baseline)

    @property
    def total(self) -> float:
        """Training FLOPs that the search may take, or has taken as far as is known."""
        spent = [as_number(one.get(name)) for one in self.records for name in ("total", "total_spent")]
        return max((one for one in spent if one is not None), default=1.0) or 1.0

    @property
    def branches(self) -> list[Branch]:
        """Of all cycles."""
        return [branch for cycle in self.cycles for branch in cycle.branches]


def is_search(folder: Path) -> bool:
    """Whether the folder is that of a search, rather than of a run."""
    return (folder / SURGEON).exists()


def read_search(folder: Path) -> SearchRun:
    """The search in a folder.

    Raises:
        DataError: `config.json` or `surgeon.jsonl` is missing or holds nothing that can be read.
    """
    config = read_config(folder)
    records, notices = read_records(folder / SURGEON, KINDS)
    baseline: list[Record] = []
    if (folder / BASELINE).exists() and (folder / BASELINE).stat().st_size:
        baseline, more = read_records(folder / BASELINE, KINDS)
        notices += more
    if _end(records) is None:
        notices.insert(
            0, "This search has not ended: it is still going on or was interrupted. The page shows it so far."
        )
    return SearchRun(config, tuple(records), tuple(baseline), _cycles(records), tuple(notices))


def what_of(record: Record) -> str:
    """What the edit of a branch does, shortly."""
    return str(record.get("what") or record.get("edit"))


def _end(records: Sequence[Record]) -> Record | None:
    return next((one for one in reversed(records) if one["kind"] == "end"), None)


def _cycles(records: Sequence[Record]) -> tuple[Cycle, ...]:
    found: list[Cycle] = []
    for begin in (one for one in records if one["kind"] == "cycle"):
        mine = [one for one in records if one.get("cycle") == begin.get("cycle")]
        branches: dict[str, list[Record]] = {}
        for one in mine:
            if one["kind"] == "branch":
                branches.setdefault(str(one.get("name")), []).append(one)
        won = [one for one in mine if one["kind"] == "won"]
        found.append(
            Cycle(
                len(found) + 1,
                as_number(begin.get("total_spent")) or 0.0,
                tuple(Branch(name, tuple(its)) for name, its in branches.items()),
                tuple(one for one in mine if one["kind"] == "control"),
                bool(won),
                None if not won or won[0].get("name") is None else str(won[0]["name"]),
            )
        )
    return tuple(found)


__all__ = ["BASELINE", "SURGEON", "Branch", "Cycle", "SearchRun", "is_search", "read_search", "what_of"]
