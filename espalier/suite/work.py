"""What workers do: one cell, from its values alone, to a record that JSON can hold."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from espalier.bench.architecture import architecture
from espalier.bench.folder import RunFolder
from espalier.bench.training import Training
from espalier.errors import EspalierError, EspalierWarning, RunError
from espalier.method import Method, find, load_methods
from espalier.parts.goal import Direction
from espalier.parts.score import derived_seed
from espalier.suite import machine
from espalier.suite.disturbing import disturb
from espalier.suite.peers import find_peer, installed
from espalier.suite.preparing import Prepared, prepare, preset_of, recipe
from espalier.suite.searching import searched, surgeon_of
from espalier.suite.suite import PROTOCOL, Cell, digest
from espalier.suite.watching import Watching, area, described
from espalier.train.settings import build, without_budget

CELLS = "cells"
Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A cell to be run."""

    cell: Cell
    device: str = "cpu"
    methods_from: str | None = None
    """The absolute path of a Python file that registers methods."""
    sizes: tuple[tuple[str, int], ...] | None = None
    """Of a retrained architecture: the size of every axis."""

    @property
    def key(self) -> str:
        """The address of what it gives: the same for equal content, which is all that a suite's file, the row of the
        task, the defaults of methods, files of others and versions of peers say. Espalier's own code is no part of it
        but by `PROTOCOL`."""
        cell = self.cell
        content: list[Any] = [PROTOCOL, cell.content(), recipe(cell).content(), self.device.split(":")[0]]
        content.append(self.sizes)
        if cell.contender.kind == "peer":
            assert cell.contender.peer is not None
            content.append(installed(find_peer(cell.contender.peer).package))
        if cell.contender.kind == "methods":
            if self.methods_from is not None:
                load_methods(self.methods_from)
            content.append([repr(one) for one in methods_of(cell, 1 / cell.task.start, 1000)])
            content.append(_foreign(cell))
        if cell.contender.kind == "surgeon":
            content.append(repr(surgeon_of(cell)))
        return digest(content)


def carried_out(job: Job, folder: Path, threads: int) -> Record:
    """Do a job; leaves a run folder in ``folder/cells/KEY``. A cell that cannot be run gives ``failed``, the reason.

    ``result`` is a function of the job; ``measured`` and ``place`` are of the machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    said: list[str] = []
    began = time.perf_counter()
    devices = [job.device] if job.device.startswith("cuda") else []
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EspalierWarning)
            torch.manual_seed(job.cell.seed)
            if job.methods_from is not None:
                load_methods(job.methods_from)
            found = _trained(job, folder / CELLS / job.key, threads)
        said = [str(one.message) for one in caught if issubclass(one.category, EspalierWarning)]
    except EspalierError as error:
        found = {"failed": str(error)}
    except (MemoryError, torch.OutOfMemoryError) as error:
        found = {"failed": f"out of memory: {error}"}
    finally:
        torch.set_num_threads(before)
    return {
        "key": job.key,
        "cell": job.cell.names(),
        **found,
        "warnings": said,
        "place": machine.place(job.device, threads),
        "seconds": round(time.perf_counter() - began, 3),
    }


def methods_of(cell: Cell, growth: float, steps: int) -> list[Method]:
    """The methods of a cell.

    Args:
        cell: of the kind ``methods``.
        growth: what a growing network costs in the end, as a multiple of what it costs at first.
        steps: of the whole training, or how finely the budget is counted.

    Raises:
        MethodError: they do not fit the track.
        RunError: options for a method that comes with the training of a network.
    """
    contender = cell.contender
    preset = preset_of(cell)
    if preset is not None:
        if contender.grow_options or contender.prune_options:
            raise RunError(
                f"{contender.name}: its method comes with the training of {cell.task.model!r}; leave options out"
            )
        return [preset.method()]
    options: dict[Direction, Mapping[str, Any]] = {}
    if contender.grow_options:
        options["grow"] = contender.grow_options
    if contender.prune_options:
        options["prune"] = contender.prune_options
    setting: str = cell.track
    if setting == "unstructured":
        setting = "shrinking" if contender.grow is None else "constant"
    size: float | None = {"growing": growth, "constant": 1.0}.get(cell.track, cell.point)
    if decides_itself(cell):
        size = None
    return build(
        setting,
        contender.grow,
        contender.prune,
        total_steps=steps,
        size=size,
        measure="parameters" if cell.track == "unstructured" else cell.size,
        course=contender.course,
        options=options,
    )


def decides_itself(cell: Cell) -> bool:
    """Whether the cell's method decides how large the network becomes; it begins with the large one."""
    return without_budget(cell.contender.grow, cell.contender.prune) is not None


def _foreign(cell: Cell) -> list[str]:
    """Digests of the files in which methods of others are: their code may change while their parts look the same."""
    named: tuple[tuple[Direction, str | None], ...] = (("grow", cell.contender.grow), ("prune", cell.contender.prune))
    makers = [find(direction, name).make for direction, name in named if name is not None]
    files = [inspect.getsourcefile(make) for make in makers if make.__module__.partition(".")[0] != "espalier"]
    return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if file is not None]


def _trained(job: Job, path: Path, threads: int) -> Record:
    cell = job.cell
    prepared = prepare(cell, job.device)
    machine.forget_peak(job.device)
    if path.exists():  # of an interrupted run
        shutil.rmtree(path)
    folder = RunFolder.create(path, _config(job, prepared, threads))
    if cell.contender.kind == "surgeon":
        found, model, seconds = searched(prepared, job.device, path)
        return {"result": found, "measured": _measured(job, prepared, model, seconds)}
    watching = Watching(cell.looks, folder)
    if cell.contender.kind == "peer":
        assert cell.contender.peer is not None
        training = find_peer(cell.contender.peer).train(prepared, watching)
    else:
        training = _own(job, prepared, watching)
    seconds = training.seconds - training.looked
    loss, accuracy = training.evaluate(training.assignment.data.x_test, training.assignment.data.y_test)
    result: Record = {"test_accuracy": accuracy, "test_loss": loss, **described(training)}
    result |= {"training_flops": training.training_flops, "steps": training.step}
    modules = architecture(training.model)
    folder.append({"kind": "end", **result, "architecture": modules, "seconds": round(seconds, 3), "static": None})
    last = prepared.large_training_flops * cell.scale
    result |= {
        "nonzero": sum(int(one.count_nonzero()) for one in training.model.parameters()),
        "curve": watching.curve,
        "edits": watching.edits(),
        "area": area(watching.curve, last / 32, last),
    }
    return {"result": result, "measured": _measured(job, prepared, training.model, seconds)}


def _measured(job: Job, prepared: Prepared, model: nn.Module, seconds: float) -> Record:
    return {
        "seconds": round(seconds, 3),
        "load": machine.load(),
        "peak_memory": machine.peak_memory(job.device),
        "latency": machine.latencies(model, prepared.example, job.device),
    }


def _own(job: Job, prepared: Prepared, watching: Watching) -> Training:
    """A cell of Espalier's own methods, or a static network."""
    cell, contender = job.cell, job.cell.contender
    methods: list[Method] = []
    if contender.kind == "methods":
        first = cell.point if cell.track == "constant" else 1.0
        if cell.track == "growing" and not decides_itself(cell):
            first = cell.point * cell.task.start
        model = prepared.scaled(first)
        start = getattr(prepared.cost(model), cell.size)
        methods = methods_of(cell, cell.point * getattr(prepared.large_cost, cell.size) / start, prepared.steps)
    elif contender.kind == "retrained":
        if job.sizes is None:
            raise RunError(f"{contender.name}: there is no architecture of {contender.of!r} to be trained from scratch")
        model = prepared.sized(dict(job.sizes))
    else:
        part = {"large": 1.0, "small": cell.point * cell.task.start}.get(contender.static, cell.point)
        model = prepared.scaled(part)
    training = Training(prepared.assignment(methods), model)
    watching.begin(training)
    due = contender.course.moments if contender.kind == "no-op" else ()

    def after_step() -> None:
        nonlocal due
        if due and training.done >= due[0]:
            disturb(training.structure, contender.swing, derived_seed(cell.seed, "no-op", len(due)))
            due = tuple(one for one in due if one > training.done)
        watching.after_step(training)

    training.run(after_step, watching.on_epoch, watching.on_event)
    return training


def _config(job: Job, prepared: Prepared, threads: int) -> Record:
    """What the report of a run shows, and all else that decides it."""
    cell, contender = job.cell, job.cell.contender
    return {
        "task": cell.task.name,
        "model": cell.task.model,
        "setting": cell.track,
        "grow": contender.grow or "none",
        "prune": contender.prune or "none",
        "seed": cell.seed,
        "device": job.device,
        "epochs": cell.task.epochs * cell.scale,
        "steps": prepared.steps,
        "cell": dataclasses.asdict(cell),
        "sizes": None if job.sizes is None else dict(job.sizes),
        "place": machine.place(job.device, threads),
    }


__all__ = ["CELLS", "Job", "carried_out", "decides_itself", "methods_of"]
