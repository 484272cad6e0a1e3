"""`espalier run`: train a network that grows and shrinks, then the static network of the size that it ended with.

The *static twin* is the saved network with all of its weights drawn anew, under the same masks if it has any, trained
from scratch on the same data in the same way for as many steps as make its training FLOPs equal, its learning-rate
schedule stretched to these. Each of the two sees the test set once, after its last step.
"""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from espalier.bench.architecture import architecture
from espalier.bench.data import load
from espalier.bench.folder import RunFolder
from espalier.bench.interrupt import Interrupt, delayed_interrupt
from espalier.bench.models import build, redraw
from espalier.bench.options import Options, differences, recorded_options
from espalier.bench.progress import Progress, result_text
from espalier.bench.report import write_report
from espalier.bench.training import FORWARD_AND_BACKWARD, Assignment, Checkpoint, Training
from espalier.errors import EspalierWarning, RunError
from espalier.method import Method
from espalier.train import checkpoint as network_files
from espalier.train.settings import build as build_methods
from espalier.version import __version__

CHECKPOINT_SECONDS = 10.0
TRAINING_PER_CHECKPOINT = 20
"""Training goes on for at least this many times as long as a checkpoint took before the next one is written."""
FEW_FLOPS = 100_000_000
"""Forward FLOPs of a batch below which several threads cost more than they give."""

_NETWORK, _STATIC = "network", "static network"
_RESULTS = {"test_accuracy", "test_loss", "parameters", "flops", "weights", "training_flops", "seconds"}
_Json = Mapping[str, Any]


def start(
    options: Options,
    out: Path,
    progress: Progress,
    *,
    command: Sequence[str] = (),
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> str:
    """Run from the beginning, in a new folder. Returns the outcome in a few lines.

    Raises:
        RunError: the folder is taken, or training failed.
        DataError: the data cannot be had, or the network does not take them.
        MethodError: the methods do not fit the network.
        KeyboardInterrupt: Ctrl-C; the state was kept.
    """
    with _surroundings(options, progress):
        run = _Run(options, progress, checkpoint_seconds)
        training = run.network(None)
        threads = torch.get_num_threads()
        if training.cost()["flops"] * options.batch_size < FEW_FLOPS:
            threads = 1
        begin = {"kind": "start", **_described(training), **training.beginning()}
        folder = RunFolder.create(out, _config(options, command, threads))
        folder.append(begin)
        with _threads(threads):
            return run.to_the_end(folder, training)


def resume(out: Path, given: _Json, progress: Progress, *, checkpoint_seconds: float = CHECKPOINT_SECONDS) -> str:
    """Go on with an interrupted run, to the result that it would have had; a finished one only gets its report again.
    Returns the outcome in a few lines.

    The result is the same to the last bit where torch's kernels repeat, which those of the CPU do.

    Args:
        out: the folder of the run.
        given: options that have to be those of the run; None for those that were not given.
        progress: is told what happens.
        checkpoint_seconds: time between two checkpoints.

    Raises:
        RunError: there is no such run, or it has other options.
        CheckpointError: the checkpoint is damaged.
        DataError, MethodError, KeyboardInterrupt: as `start`.
    """
    folder = RunFolder.reopen(out)
    other = differences(folder.config, given)
    if other:
        raise RunError(f"{out} cannot be resumed with other options: {'; '.join(other)}")
    if folder.finished:
        folder.finish()
        return f"{out} holds a finished run\nreport: {write_report(out)}"
    options = recorded_options(folder.config, out / "config.json")
    threads = folder.config.get("threads")
    with _surroundings(options, progress), _threads(threads if isinstance(threads, int) and threads > 0 else 1):
        run = _Run(options, progress, checkpoint_seconds)
        kept = folder.read_checkpoint()
        if kept is None:
            training = run.network(None)
            folder.append({"kind": "start", **_described(training), **training.beginning()})
            return run.to_the_end(folder, training)
        state, place = kept
        checkpoint = (state["training"], place) if isinstance(state.get("training"), dict) else None
        result = state.get("result")
        if state.get("stage") == _NETWORK and checkpoint is not None:
            return run.to_the_end(folder, run.network(checkpoint))
        if state.get("stage") == _STATIC and isinstance(result, dict) and result.keys() >= _RESULTS:
            return run.beside(folder, result, checkpoint)
        raise RunError(f"{out}: its checkpoint is damaged; start a new run in another folder")


class _Run:
    """The two trainings of a run, and what is kept of them."""

    def __init__(self, options: Options, progress: Progress, checkpoint_seconds: float) -> None:
        self._options = options
        self._progress = progress
        self._checkpoint_seconds = checkpoint_seconds
        self._task = options.make_task()
        with _threads(1):  # sums over several threads would round in another way on another machine
            data = load(options.source, seed=options.seed)
        self._data = data.to(options.device)
        counts = ", ".join(
            f"{len(labels):,} {part}"
            for part, labels in (("training", data.y_train), ("validation", data.y_val), ("test", data.y_test))
        )
        progress.say(f"{data.name}: {counts} samples of shape {'x'.join(map(str, data.input_shape))}")

    def network(self, checkpoint: Checkpoint | None) -> Training:
        """The network that grows and shrinks, fresh or as it was kept."""
        options = self._options
        steps = options.epochs * -(-len(self._data.x_train) // options.batch_size)
        methods: Sequence[Method] = (
            build_methods(
                options.setting,
                options.names["grow"],
                options.names["prune"],
                total_steps=steps,
                size=options.size,
                measure="parameters",
            )
            if options.preset is None
            else [options.preset.method()]
        )
        torch.manual_seed(options.seed)
        model = self._fresh_model()
        return Training(Assignment(self._task, self._data, methods, steps, options.seed), model, checkpoint=checkpoint)

    def to_the_end(self, folder: RunFolder, training: Training) -> str:
        """Train the network, test and save it; then see to the static one. Returns the outcome."""
        self._progress.stage(_NETWORK, self._options.epochs, training.assignment.total_steps)
        self._train(folder, training, _NETWORK, "epoch", None)
        result = {**self._tested(training), **_described(training)}
        network_files.save(training.structure, folder.network)
        folder.write_checkpoint({"stage": _STATIC, "training": None, "result": result}, lambda _: None)
        return self.beside(folder, result, None)

    def beside(self, folder: RunFolder, result: _Json, checkpoint: Checkpoint | None) -> str:
        """Train and test the static network, if it is wanted, and end the run. Returns the outcome."""
        static = None
        if self._options.static:
            twin = self._twin(folder, result, checkpoint)
            epochs = -(-twin.assignment.total_steps // twin.assignment.steps_per_epoch)
            self._progress.stage(_STATIC, epochs, twin.assignment.total_steps)
            self._train(folder, twin, _STATIC, "static_epoch", result)
            static = self._tested(twin)
        end = {"kind": "end", **result, "static": static}
        folder.append(end)
        folder.finish()
        return f"{result_text(end)}\nreport: {write_report(folder.path)}"

    def _twin(self, folder: RunFolder, result: _Json, checkpoint: Checkpoint | None) -> Training:
        options, data = self._options, self._data
        model = self._fresh_model()
        ended = network_files.load(folder.network, model, data.example)
        redraw(model, seed=options.seed)
        steps_per_epoch = -(-len(data.x_train) // options.batch_size)
        epoch_flops = FORWARD_AND_BACKWARD * result["flops"] * len(data.x_train)
        steps = max(1, round(result["training_flops"] / epoch_flops * steps_per_epoch))
        torch.manual_seed(options.seed)
        assignment = Assignment(self._task, data, (), steps, options.seed)
        return Training(assignment, model, checkpoint=checkpoint, masks=ended.masks)

    def _fresh_model(self) -> torch.nn.Module:
        options, data = self._options, self._data
        model = build(options.model, data.input_shape, data.classes, width=options.width, seed=options.seed)
        return model.to(options.device)

    def _train(self, folder: RunFolder, training: Training, stage: str, kind: str, result: _Json | None) -> None:
        """Train to the last step, with every record and now and then a checkpoint in the folder."""
        progress = self._progress
        due = time.monotonic() + self._checkpoint_seconds

        def keep() -> None:
            state = {"stage": stage, "training": training.state(), "result": result}
            folder.write_checkpoint(state, training.write)
            write_report(folder.path)

        def after_step(interrupt: Interrupt) -> None:
            nonlocal due
            progress.step(training.step)
            if interrupt.asked:
                keep()
                raise KeyboardInterrupt
            if (now := time.monotonic()) >= due:
                keep()
                took = time.monotonic() - now
                due = time.monotonic() + max(self._checkpoint_seconds, TRAINING_PER_CHECKPOINT * took)

        def on_epoch(record: dict[str, Any]) -> None:
            folder.append({"kind": kind, **record})
            progress.epoch(record)

        def on_event(record: dict[str, Any]) -> None:
            folder.append({"kind": "event", **record})
            progress.event(record)

        with delayed_interrupt() as interrupt:
            training.run(lambda: after_step(interrupt), on_epoch, on_event)

    def _tested(self, training: Training) -> dict[str, Any]:
        loss, accuracy = training.evaluate(self._data.x_test, self._data.y_test)
        return {
            "test_accuracy": accuracy,
            "test_loss": loss,
            **training.cost(),
            "training_flops": training.training_flops,
            "seconds": round(training.seconds, 3),
        }


def _described(training: Training) -> dict[str, Any]:
    return {
        **training.cost(),
        "axes": training.axes(),
        "weights": training.weights(),
        "depth": training.depth(),
        "architecture": architecture(training.model),
    }


def _config(options: Options, command: Sequence[str], threads: int) -> dict[str, Any]:
    return {
        **asdict(options),
        "command": list(command),
        "threads": threads,
        "espalier_version": __version__,
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


@contextmanager
def _surroundings(options: Options, progress: Progress) -> Iterator[None]:
    """Torch's random state is left alone, and warnings of the session are shown with everything else."""
    device = torch.device(options.device)
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
        show = warnings.showwarning

        def say(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, EspalierWarning):
                progress.say(f"warning: {message}")
            else:
                show(message, category, filename, lineno, file, line)

        warnings.simplefilter("always", EspalierWarning)
        warnings.showwarning = say
        yield


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
