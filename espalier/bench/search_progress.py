"""What a person sees while a search goes on: plain lines, or a live display where there is a terminal and rich."""

from __future__ import annotations

import abc
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from espalier.bench.charts import si, whole
from espalier.bench.progress import SECONDS_BETWEEN_LINES
from espalier.bench.search_records import what_of

if TYPE_CHECKING:
    import rich.console
    import rich.live
    import rich.progress

Record = Mapping[str, Any]
_SHOWN_LINEAGE = 4


class Watcher(abc.ABC):
    """Told what happens in one search; nothing depends on what it does with it."""

    @abc.abstractmethod
    def record(self, record: Record) -> None:
        """What a search tells (`espalier.bench.search_records`)."""

    @abc.abstractmethod
    def result(self) -> None:
        """A job ended."""


class SearchProgress(abc.ABC):
    """Where searches are shown, several of them at a time."""

    @abc.abstractmethod
    def begin(self, name: str, total: int) -> Watcher:
        """A search for so many training FLOPs begins or goes on."""

    @abc.abstractmethod
    def say(self, text: str) -> None:
        """A line for the reader."""


class SearchLines(SearchProgress):
    """Lines of text: all that is decided, and how training goes every few seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def begin(self, name: str, total: int) -> Watcher:
        return _Lines(name, total, self.say)

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class _Lines(Watcher):
    def __init__(self, name: str, total: int, say: Callable[[str], None]) -> None:
        self._name, self._total, self._say = name, total, say
        self._due = 0.0

    def record(self, record: Record) -> None:
        text, now = line(record, self._total), time.monotonic()
        if text is None or (record["kind"] == "trained" and now < self._due):
            return
        self._due = now + SECONDS_BETWEEN_LINES
        self._say(f"{self._name:<6} {text}")

    def result(self) -> None:
        """Jobs are told of by their records."""


@dataclass
class Population:
    """What a search is doing: the networks that compete now, and those that were gone on with before."""

    name: str
    total: int
    spent: int = 0
    doing: str = "training"
    lineage: list[str] = field(default_factory=list)
    best: str = ""
    """Accuracy and size of the network that is gone on with."""
    names: tuple[str, ...] = ()
    """Of the branches that compete in this rung."""
    edits: dict[str, str] = field(default_factory=dict)
    """What each branch of the cycle does."""
    judged: dict[str, Record] = field(default_factory=dict)
    """What is known of each of them."""
    done: int = 0
    """Jobs of this rung that ended."""

    def record(self, record: Record) -> None:
        """Take in what the search tells."""
        kind = record["kind"]
        self.spent = record.get("total_spent", self.spent)
        if kind in ("start", "trained", "end"):
            self.doing = "done" if kind == "end" else "training"
            self.names, self.judged, self.edits = (), {}, {}
            self.best = _network(record) or self.best
        if kind == "start":
            self.lineage = [f"start {whole(record['parameters'])}"]
        elif kind == "cycle":
            self.doing = f"cycle {record['cycle'] + 1}: {record['proposals']} edits"
        elif kind == "rung":
            self.doing = f"cycle {record['cycle'] + 1}, rung {record['rung'] + 1}"
            self.names, self.done = tuple(record["names"]), 0
            self.edits |= dict(zip(record["names"], record["edits"], strict=True))
        elif kind == "branch":
            self.judged[record["name"]] = record
        elif kind == "won" and record["name"] in self.judged:
            size = whole(self.judged[record["name"]]["parameters"])
            self.lineage.append(f"{self.edits.get(record['name'], record['name'])} {size}")

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Name, edit, by how much its loss is lower, parameters and state of each branch of the cycle."""
        found = []
        for name, edit in self.edits.items():
            one = self.judged.get(name, {})
            competes = name in self.names
            state = "lost" if "failed" in one else "" if competes else "out"
            gain = f"{one['gain']:+.4f} ± {one['error']:.4f}" if "gain" in one else ""
            size = whole(one["parameters"]) if "parameters" in one else ""
            found.append((name, edit, gain, size, state))
        return found

    def path(self) -> str:
        """The networks that were gone on with, the last ones."""
        hidden = len(self.lineage) - _SHOWN_LINEAGE
        return " → ".join([*(["…"] if hidden > 0 else []), *self.lineage[-_SHOWN_LINEAGE:]])


class SearchDisplay(SearchProgress):
    """A bar for what each search has spent, its lineage, and a table of the branches that compete."""

    def __init__(self, console: rich.console.Console, live: rich.live.Live, bar: rich.progress.Progress) -> None:
        self._console, self._live, self._bar = console, live, bar
        self._populations: list[Population] = []

    def begin(self, name: str, total: int) -> Watcher:
        population = Population(name, total)
        self._populations.append(population)
        task = self._bar.add_task(name, total=total)

        def show() -> None:
            self._bar.update(task, completed=total if population.doing == "done" else population.spent)
            self._show()

        return _Shown(population, show, self.say)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self) -> None:
        from rich.console import Group

        parts = [part for one in self._populations if one.doing != "done" for part in _shown(one)]
        self._live.update(Group(self._bar, *parts))


class _Shown(Watcher):
    def __init__(self, population: Population, show: Callable[[], None], say: Callable[[str], None]) -> None:
        self._population, self._show, self._say = population, show, say

    def record(self, record: Record) -> None:
        self._population.record(record)
        if record["kind"] == "won":
            self._say(str(line(record, self._population.total)))
        self._show()

    def result(self) -> None:
        self._population.done += 1
        self._show()


def _shown(now: Population) -> list[Any]:
    """What a display shows of a search below the bars."""
    from rich.table import Table
    from rich.text import Text

    heading = f"{now.name}: {now.doing}"
    if now.names:
        heading += f", {min(now.done, len(now.names) + 1)} of {len(now.names) + 1} networks trained"
    parts: list[Any] = [_plain(f"{heading}  {now.best}")]
    if len(now.lineage) > 1:
        parts.append(_plain(now.path()))
    rows = now.rows()
    if rows:
        table = Table("branch", "edit", "loss lower by", "parameters", "", box=None, pad_edge=False)
        for row in rows:
            cells = (Text(cell, overflow="ellipsis", no_wrap=True) for cell in row)
            table.add_row(*cells, style="dim" if row[-1] else "")
        parts.append(table)
    return parts


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ellipsis")


def _network(record: Record) -> str:
    if "accuracy" not in record:
        return ""
    return f"{record['accuracy']:.1%} of the held-out samples, {whole(record['parameters'])} parameters"


def line(record: Record, total: int) -> str | None:
    """A record in words; None where nothing worth a line happened."""
    spent = f"{record['total_spent'] / total:>4.0%}" if "total_spent" in record else "    "
    if record["kind"] == "start":
        return f"{spent}  start: {whole(record['parameters'])} parameters, {si(record['flops'])} FLOPs"
    if record["kind"] == "cycle":
        count = record["proposals"]
        edits = {0: "no edit is", 1: "1 edit is"}.get(count, f"{count} edits are")
        return f"{spent}  cycle {record['cycle'] + 1}: {edits} tried"
    if record["kind"] == "dear":
        when = "at all" if record.get("cycle") is None else "yet"
        return f"{spent}  no cycle {when}: what it takes is worth more as plain training"
    if record["kind"] == "branch" and "failed" in record:
        return f"        {record['name']:<5} {what_of(record)} is lost: {record['failed']}"
    if record["kind"] == "branch":
        price = f", price {record['price']:+.4f}" if record["price"] else ""
        better = f"loss {-record['gain']:+.4f} ± {record['error']:.4f}{price}"
        return f"{spent}    {record['name']:<5} rung {record['rung'] + 1}  {better}  {what_of(record)}"
    if record["kind"] == "won":
        return f"{spent}  the control wins" if record["name"] is None else f"{spent}  {record['name']} wins"
    if record["kind"] == "trained" and "accuracy" in record:
        return f"{spent}    {_network(record)}"
    return None


@contextmanager
def search_progress_on(stream: TextIO) -> Iterator[SearchProgress]:
    """Live where the stream is a terminal and rich is installed, else plain lines."""
    if not stream.isatty() or importlib.util.find_spec("rich") is None:
        yield SearchLines(stream)
        return
    from rich.console import Console
    from rich.live import Live
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    console = Console(file=stream)
    label = TextColumn("{task.description}", markup=False)
    columns: Sequence[Any] = (label, BarColumn(24), TaskProgressColumn(), TimeElapsedColumn(), TimeLeft())
    bar = Progress(*columns, console=console)
    with Live(bar, console=console, refresh_per_second=8) as live:
        yield SearchDisplay(console, live, bar)


__all__ = ["Population", "SearchDisplay", "SearchLines", "SearchProgress", "Watcher", "line", "search_progress_on"]
