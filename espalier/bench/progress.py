"""What a person sees while a run goes on: plain lines, or a live display where there is a terminal and rich."""

from __future__ import annotations

import abc
import importlib.util
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from espalier.bench.charts import si, whole
from espalier.bench.wording import duration_text, loss_text

if TYPE_CHECKING:
    import rich.console
    import rich.progress
    import rich.text

Record = Mapping[str, Any]

SECONDS_BETWEEN_LINES = 2.0
_NAMED_AXES = 3


class Progress(abc.ABC):
    """Told what happens; nothing depends on what it does with it."""

    @abc.abstractmethod
    def stage(self, name: str, epochs: int, total_steps: int) -> None:
        """The training of a network begins or goes on."""

    @abc.abstractmethod
    def step(self, step: int) -> None:
        """A step was made: the number of steps so far."""

    @abc.abstractmethod
    def epoch(self, record: Record) -> None:
        """An epoch ended; the record is the one of `metrics.jsonl`."""

    @abc.abstractmethod
    def event(self, record: Record) -> None:
        """The network grew or was pruned, or could not be."""

    @abc.abstractmethod
    def say(self, text: str) -> None:
        """A line for the reader."""


class Silent(Progress):
    """Shows nothing."""

    def stage(self, name: str, epochs: int, total_steps: int) -> None: ...
    def step(self, step: int) -> None: ...
    def epoch(self, record: Record) -> None: ...
    def event(self, record: Record) -> None: ...
    def say(self, text: str) -> None: ...


class Lines(Progress):
    """Lines of text: every event, and an epoch every few seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._epochs = self._total_steps = 0
        self._due = 0.0

    def stage(self, name: str, epochs: int, total_steps: int) -> None:
        self.say(f"training the {name}")
        self._epochs, self._total_steps, self._due = epochs, total_steps, 0.0

    def step(self, step: int) -> None:
        """Steps are too many to be shown."""

    def epoch(self, record: Record) -> None:
        now = time.monotonic()
        if now >= self._due or record["epoch"] == self._epochs:
            self._due = now + SECONDS_BETWEEN_LINES
            self.say(f"  epoch {record['epoch']:>{len(str(self._epochs))}}/{self._epochs}  {epoch_text(record)}")

    def event(self, record: Record) -> None:
        self.say(f"  epoch {record['epoch']:>{len(str(self._epochs))}}/{self._epochs}  {event_text(record)}")

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class Display(Progress):
    """A bar for each stage and the figures of the last epoch; events scroll by above."""

    def __init__(self, console: rich.console.Console, bar: rich.progress.Progress, figures: rich.text.Text) -> None:
        self._console, self._bar, self._figures = console, bar, figures
        self._task: rich.progress.TaskID | None = None
        self._epochs = 0

    def stage(self, name: str, epochs: int, total_steps: int) -> None:
        if self._task is not None:
            self._bar.stop_task(self._task)
        self._epochs = epochs
        self._task = self._bar.add_task(name, total=total_steps)

    def step(self, step: int) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=step)

    def epoch(self, record: Record) -> None:
        self._figures.plain = f"epoch {record['epoch']}/{self._epochs}  {epoch_text(record)}"

    def event(self, record: Record) -> None:
        self.say(f"epoch {record['epoch']:>{len(str(self._epochs))}}/{self._epochs}  {event_text(record)}")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def epoch_text(record: Record) -> str:
    """The figures of an epoch in one line."""
    figures = [
        f"loss {loss_text(record['train_loss'])}",
        f"validation {100 * record['val_accuracy']:.1f}%",
        f"{si(record['parameters'])} parameters",
        f"{si(record['flops'])} FLOPs",
    ]
    return "  ".join(figures)


def event_text(record: Record) -> str:
    """What an event changed, in one line."""
    sizes = [f"{name} {before} → {after}" for name, (before, after) in record["axes"].items()]
    if record["masks"]:
        before, after = (sum(live) for live in zip(*record["masks"].values(), strict=True))
        return f"{record['action']:<5} {whole(before)} → {whole(after)} live weights ({record['method']})"
    sizes += record["layers"]
    if not sizes:
        return f"{record['action']} ({record['method']}): {record['why']}"
    if len(sizes) > _NAMED_AXES:
        sizes = [*sizes[:_NAMED_AXES], f"{len(sizes) - _NAMED_AXES} more axes"]
    before, after = record["parameters"]
    return f"{record['action']:<5} {', '.join(sizes)}; {whole(before)} → {whole(after)} parameters"


def result_text(end: Record) -> str:
    """The outcome of a run in a few lines."""
    lines = [
        f"test accuracy {100 * end['test_accuracy']:.2f}%  "
        f"{whole(end['parameters'])} parameters, {si(end['flops'])} FLOPs per inference"
    ]
    if end["weights"]:
        live, every = (sum(counts) for counts in zip(*end["weights"].values(), strict=True))
        lines[0] += f", {whole(live)} of {whole(every)} weights live"
    seconds, static = end["seconds"], end["static"]
    if static is not None:
        seconds += static["seconds"]
        same = "size and masks" if end["weights"] else "size"
        lines.append(
            f"static twin   {100 * static['test_accuracy']:.2f}%  the same {same} from the start, trained with "
            f"{static['training_flops'] / end['training_flops']:.1%} of the FLOPs"
        )
    return "\n".join([*lines, f"training took {duration_text(seconds)}"])


@contextmanager
def progress_on(stream: TextIO) -> Iterator[Progress]:
    """Live where the stream is a terminal and rich is installed, else plain lines."""
    if not stream.isatty() or importlib.util.find_spec("rich") is None:
        yield Lines(stream)
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    console, figures = Console(file=stream), Text(no_wrap=True, overflow="ellipsis")
    label = TextColumn("{task.description}", markup=False)
    bars = Bars(label, BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn(), console=console)
    with Live(Group(bars, figures), console=console, refresh_per_second=8):
        yield Display(console, bars, figures)
