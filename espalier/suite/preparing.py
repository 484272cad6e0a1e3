"""Data, networks and budgets of a cell, before it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.attaching import attach
from espalier.bench.data import DATASETS, Dataset, default_root, load
from espalier.bench.models import build, redraw
from espalier.bench.presets import Preset, find_preset
from espalier.bench.tasks import Task, task
from espalier.bench.training import FORWARD_AND_BACKWARD, Assignment, Spending
from espalier.edit.plan import Plan, Resize
from espalier.errors import RunError
from espalier.measure.cost import Cost
from espalier.method import Method
from espalier.parts.budget import Budget, FLOPs, Parameters
from espalier.parts.units.scaled import scaled_plan
from espalier.structure import Structure
from espalier.suite import machine
from espalier.suite.suite import Cell, SuiteTask
from espalier.train.settings import Measure

_SPLIT, _SHUFFLE = 0, 0
"""Which samples validate, and which are left out, is the same for all seeds: these differ in weights and order."""


@dataclass(frozen=True)
class Prepared:
    """What a cell is trained on, and for how long."""

    cell: Cell
    data: Dataset
    row: Task
    steps: int
    """Optimizer steps, or how finely the budget is counted."""
    spending: Spending | None
    large_cost: Cost
    """Of the large network, with the FLOPs of one sample."""

    @property
    def large_training_flops(self) -> int:
        """The task's budget: what its epochs of the large network take."""
        samples = len(self.data.x_train) * self.cell.task.epochs
        return round(FORWARD_AND_BACKWARD * self.large_cost.flops * samples)

    @property
    def example(self) -> Tensor:
        """Inputs to attach with: two samples."""
        return self.data.example

    def assignment(self, methods: Sequence[Method]) -> Assignment:
        """What to train, by the clock of the machine."""
        clock = machine.clock(self.data.x_train.device.type)
        return Assignment(
            self.row, self.data, methods, self.steps, self.cell.seed, self.spending, self.cell.task.bfloat16, clock
        )

    def large(self) -> nn.Module:
        """The large network, freshly drawn."""
        cell, data = self.cell, self.data
        model = build(cell.task.model, data.input_shape, data.classes, width=cell.task.width, seed=cell.seed)
        return _fast(model.to(data.x_train.device))

    def scaled(self, part: float) -> nn.Module:
        """A static network: all widths by one factor, so that it costs this part of the large one and no more."""
        model = self.large()
        if part < 1:
            structure = attach(model, self.example)
            structure.apply(scaled_plan(structure, _budget(self.cell.size, part)))
            redraw(model, seed=self.cell.seed)
        return _fast(model)

    def sized(self, sizes: Mapping[str, int]) -> nn.Module:
        """A network of given widths, freshly drawn.

        Raises:
            RunError: the large network has other axes, as it has where layers came or went.
        """
        model = self.large()
        structure = attach(model, self.example)
        free = {name for name, axis in structure.axes.items() if axis.reason is None}
        if free != sizes.keys():
            raise RunError(
                f"an architecture is made again from the sizes of the large network's axes, {sorted(free)}; found "
                f"{sorted(sizes)}: layers came or went, which cannot be made again from the start"
            )
        present = {name: structure.axes[name].size for name in sizes}
        edits = [
            Resize(name, remove=tuple(range(size, present[name])))
            for name, size in sizes.items()
            if size < present[name]
        ]
        edits += [Resize(name, add=size - present[name]) for name, size in sizes.items() if size > present[name]]
        structure.apply(Plan(tuple(edits)))
        redraw(model, seed=self.cell.seed)
        return _fast(model)

    def cost(self, model: nn.Module) -> Cost:
        """Parameters, and FLOPs of the forward pass of one sample."""
        return _per_sample(attach(model, self.example), len(self.example))


def prepare(cell: Cell, device: str) -> Prepared:
    """Data and budget of a cell.

    Raises:
        DataError: the data cannot be had, or the network does not take them.
        RunError: the budget is wall time, and the task does not say how much.
    """
    chosen = cell.task
    data = _data(chosen.data, chosen.samples, chosen.pixels, device)
    row = recipe(cell)
    per_epoch = -(-len(data.x_train) // row.batch_size)
    steps = max(2, round(cell.scale * chosen.epochs * per_epoch))
    prepared = Prepared(cell, data, row, steps, None, _large_cost(chosen, device))
    spending = None
    if cell.budget == "training_flops":
        spending = Spending("training_flops", prepared.large_training_flops * cell.scale)
    elif cell.budget == "seconds":
        if chosen.seconds is None:
            raise RunError(f"the task {chosen.name!r} has no 'seconds', which a budget of wall time needs")
        spending = Spending("seconds", chosen.seconds * cell.scale)
    return dataclasses.replace(prepared, spending=spending)


def preset_of(cell: Cell) -> Preset | None:
    """How the network is trained by methods that come with a training of their own; None if these do not."""
    if cell.contender.kind != "methods":
        return None
    names = [one for one in (cell.contender.grow, cell.contender.prune) if one is not None]
    return find_preset(cell.task.model, names, cell.track)


def recipe(cell: Cell) -> Task:
    """Optimizer, schedule and augmentation: those of the task's row or of the preset, and what the suite says."""
    chosen, preset = cell.task, preset_of(cell)
    row = task(chosen.like) if preset is None else preset.of(task(chosen.like))
    return dataclasses.replace(
        row,
        batch_size=chosen.batch_size or row.batch_size,
        learning_rate=chosen.learning_rate or row.learning_rate,
        weight_decay=row.weight_decay if chosen.weight_decay is None else chosen.weight_decay,
    )


@lru_cache(maxsize=8)
def _large_cost(chosen: SuiteTask, device: str) -> Cost:
    """Parameters, and FLOPs of the forward pass of one sample, of the large network."""
    data = _data(chosen.data, chosen.samples, chosen.pixels, device)
    model = build(chosen.model, data.input_shape, data.classes, width=chosen.width, seed=0)
    example = data.example.cpu()
    return _per_sample(attach(model, example), len(example))


def _per_sample(structure: Structure, samples: int) -> Cost:
    cost = structure.cost()
    return Cost(cost.parameters, cost.flops // samples)


def _budget(measure: Measure, part: float) -> Budget:
    return (Parameters if measure == "parameters" else FLOPs)(part, of="initial")


@lru_cache(maxsize=1)
def _data(name: str, samples: int | None, pixels: int | None, device: str) -> Dataset:
    file = default_root() / f"{name}.npz"
    source: str | Path = file if name not in DATASETS and file.is_file() else name
    data = load(source, seed=_SPLIT)
    if samples is not None:
        chosen = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(_SHUFFLE))[:samples]
        held_out = max(samples // 6, data.classes)
        data = dataclasses.replace(
            data,
            x_train=data.x_train[chosen],
            y_train=data.y_train[chosen],
            x_val=data.x_val[:held_out],
            y_val=data.y_val[:held_out],
        )
    if pixels is not None:
        data = dataclasses.replace(
            data,
            x_train=_averaged(data.x_train, pixels),
            x_val=_averaged(data.x_val, pixels),
            x_test=_averaged(data.x_test, pixels),
        )
    data = data.to(device)
    if data.x_train.dim() != 4:
        return data
    return dataclasses.replace(
        data, x_train=_laid_out(data.x_train), x_val=_laid_out(data.x_val), x_test=_laid_out(data.x_test)
    )


def _averaged(images: Tensor, pixels: int) -> Tensor:
    return F.interpolate(images, size=(pixels, pixels), mode="area")


def _fast(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = _laid_out(parameter.data)
    return model


def _laid_out(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


__all__ = ["Prepared", "prepare", "preset_of", "recipe"]
