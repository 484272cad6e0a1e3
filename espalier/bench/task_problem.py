"""A task as a problem for the Surgeon: the built-in networks on the built-in data, trained as `espalier run` does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.bench.data import Dataset, load
from espalier.bench.models import build
from espalier.bench.tasks import Task, task
from espalier.evolve.problem import Batch, Workbench
from espalier.measure.timing import latency
from espalier.parts.score import derived_seed

_JUDGED_AT_ONCE = 250
"""Activations of many more are slow: they come from memory that has to be asked for anew every time."""


@dataclass(frozen=True)
class TaskProblem:
    """A task, or a file of data, and what is trained on it."""

    source: str
    """Name of a task, or the absolute path of an .npz file."""
    model: str
    width: float
    batch_size: int
    learning_rate: float
    seed: int
    device: str = "cpu"
    latency: bool = False
    """Whether the latency of one example is measured of every network that is judged."""

    def workbench(self) -> Workbench:
        """A fresh network with its data.

        Raises:
            DataError: the data cannot be had, or the network does not take them.
        """
        source = Path(self.source) if self.source.endswith(".npz") else self.source
        data = _data(self.source, self.seed, self.device)
        row = replace(task(source), batch_size=self.batch_size, learning_rate=self.learning_rate)
        model = build(self.model, data.input_shape, data.classes, width=self.width, seed=self.seed).to(self.device)
        bench = workbench(model, data, row, self.seed)
        return replace(bench, latency=partial(latency, example=bench.example)) if self.latency else bench

    def steps(self, epochs: int) -> int:
        """Optimizer steps of so many passes over the training data."""
        return epochs * max(1, len(_data(self.source, self.seed, self.device).x_train) // self.batch_size)


def workbench(model: nn.Module, data: Dataset, row: Task, seed: int) -> Workbench:
    """A network with its data, to be trained as the task says; the seed is that of the order of samples."""
    per_epoch, device = max(1, len(data.x_train) // row.batch_size), data.x_train.device

    def batch(step: int) -> Batch:
        epoch, number = divmod(step, per_epoch)
        chosen = _order(len(data.x_train), seed, epoch)[number * row.batch_size :][: row.batch_size].to(device)
        inputs = data.x_train[chosen]
        if row.augment is not None:
            inputs = row.augment(inputs, _generator(seed, "augment", step))
        return inputs, data.y_train[chosen]

    def loss(network: nn.Module, one: Batch) -> Tensor:
        return F.cross_entropy(network(one[0]), one[1], label_smoothing=row.label_smoothing)

    return Workbench(
        model,
        row.make_optimizer(model),
        data.example,
        len(data.example),
        batch,
        lambda one: len(one[1]),
        loss,
        lambda network, one: _per_sample(F.cross_entropy(network(one[0]), one[1], reduction="none")),
        lambda network, one: _per_sample((network(one[0]).argmax(1) == one[1]).float()),
        _parts(data.x_val, data.y_val),
        _parts(data.x_test, data.y_test),
        row.schedule,
    )


@lru_cache(maxsize=1)
def _data(source: str, seed: int, device: str) -> Dataset:
    return load(Path(source) if source.endswith(".npz") else source, seed=seed).to(device)


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=_generator(seed, "order", epoch))


def _generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(*parts))


def _per_sample(values: Tensor) -> Tensor:
    """Means over the places of each sample, of which text has several."""
    return values.view(len(values), -1).mean(dim=1)


def _parts(x: Tensor, y: Tensor) -> list[Batch]:
    count = -(-len(x) // _JUDGED_AT_ONCE)
    return list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))
