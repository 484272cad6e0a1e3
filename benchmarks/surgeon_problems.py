"""Problems for the Surgeon's tables: small networks on MNIST and cifar10-jpeg, with good and with bad starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.bench.augment import crop_and_flip, warp
from espalier.bench.data import Dataset, load
from espalier.evolve.problem import Batch, Workbench

AUGMENT = {"mnist": warp(degrees=8, scale=0.1, pixels=2), "cifar10-jpeg": crop_and_flip()}


@dataclass(frozen=True)
class Start:
    """A plain network of convolutions, each halving the image unless it is called (width, 1), and dense layers."""

    convolutions: tuple[tuple[int, int], ...]
    """Width and stride of each."""
    dense: tuple[int, ...] = ()

    def build(self, channels: int, classes: int) -> nn.Module:
        layers: list[nn.Module] = []
        for width, stride in self.convolutions:
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        channels *= 4
        for width in self.dense:
            layers += [nn.Linear(channels, width), nn.ReLU()]
            channels = width
        return nn.Sequential(*layers, nn.Linear(channels, classes))


@dataclass(frozen=True)
class Images:
    """A start on a data set."""

    data: str
    start: Start
    seed: int = 0
    rate: float = 3e-3
    batch_size: int = 100
    source: str = ""
    """Path of the .npz file; the name of the data if it is empty."""
    held_out: int = 4000

    def workbench(self) -> Workbench:
        data = _data(self.source or self.data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.start.build(data.input_shape[0], data.classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate, weight_decay=1e-2)
        per_epoch = len(data.x_train) // self.batch_size
        augment = AUGMENT[self.data]

        def batch(step: int) -> Batch:
            epoch, number = divmod(step, per_epoch)
            chosen = _order(len(data.x_train), self.seed, epoch)[number * self.batch_size :][: self.batch_size]
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            return augment(data.x_train[chosen], generator), data.y_train[chosen]

        return Workbench(
            model, optimizer, torch.zeros(2, *data.input_shape), 2, batch, lambda one: len(one[1]),
            lambda network, one: F.cross_entropy(network(one[0]), one[1]),
            lambda network, one: F.cross_entropy(network(one[0]), one[1], reduction="none"),
            lambda network, one: (network(one[0]).argmax(1) == one[1]).float(),
            _split(data.x_val[: self.held_out], data.y_val[: self.held_out]), _split(data.x_test, data.y_test),
            lambda done: min(1.0, 0.1 + done * 18) * (1 + math.cos(math.pi * done)) / 2,
        )  # fmt: skip


@lru_cache(maxsize=1)
def _data(source: str) -> Dataset:
    return load(source, seed=0)


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def _split(x: Tensor, y: Tensor) -> list[Batch]:
    return list(zip(x.split(1000), y.split(1000), strict=True))
