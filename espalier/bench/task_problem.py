"""A task as a problem for the Surgeon: the built-in networks on the built-in data, trained as `espalier run` does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.bench.data import Dataset, load
from espalier.bench.models import build, example_inputs
from espalier.bench.tasks import task
from espalier.evolve.problem import Batch, Workbench
from espalier.measure.latency import latency
from espalier.parts.score import derived_seed

_JUDGED_AT_ONCE = 1000


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
        row, data = task(source), _data(self.source, self.seed, self.device)
        model = build(self.model, data.input_shape, data.classes, width=self.width, seed=self.seed).to(self.device)
        per_epoch = max(1, len(data.x_train) // self.batch_size)

        def batch(step: int) -> Batch:
            epoch, number = divmod(step, per_epoch)
            chosen = _order(len(data.x_train), self.seed, epoch)[number * self.batch_size :][: self.batch_size]
            inputs = data.x_train[chosen.to(self.device)]
            if row.augment is not None:
                inputs = row.augment(inputs, _generator(self.seed, "augment", step))
            return inputs, data.y_train[chosen.to(self.device)]

        def loss(network: nn.Module, one: Batch) -> Tensor:
            return F.cross_entropy(network(one[0]), one[1], label_smoothing=row.label_smoothing)

        return Workbench(
            model,
            row.optimizer(model.parameters(), self.learning_rate, row.weight_decay),
            example := example_inputs(data.input_shape, self.device),
            len(example),
            batch,
            lambda one: len(one[1]),
            loss,
            lambda network, one: F.cross_entropy(network(one[0]), one[1], reduction="none"),
            lambda network, one: (network(one[0]).argmax(1) == one[1]).float(),
            _parts(data.x_val, data.y_val),
            _parts(data.x_test, data.y_test),
            row.schedule,
            partial(latency, example=example) if self.latency else None,
        )

    def steps(self, epochs: int) -> int:
        """Optimizer steps of so many passes over the training data."""
        return epochs * max(1, len(_data(self.source, self.seed, self.device).x_train) // self.batch_size)


@lru_cache(maxsize=1)
def _data(source: str, seed: int, device: str) -> Dataset:
    return load(Path(source) if source.endswith(".npz") else source, seed=seed).to(device)


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=_generator(seed, "order", epoch))


def _generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(*parts))


def _parts(x: Tensor, y: Tensor) -> list[Batch]:
    count = -(-len(x) // _JUDGED_AT_ONCE)
    return list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))
