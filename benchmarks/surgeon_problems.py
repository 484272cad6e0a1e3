"""Problems for the Surgeon's tables: dense networks on small images, good and bad starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.paired import scaled
from espalier.bench.augment import Augment, crop_and_flip
from espalier.bench.data import Dataset, load
from espalier.evolve.problem import Batch, Workbench

PIXELS = {"mnist": 14, "cifar10-jpeg": 8, "digits": 8}
AUGMENT: dict[str, Augment | None] = {"mnist": None, "cifar10-jpeg": crop_and_flip(1), "digits": None}
BATCH = 200
RATE = 1e-2
HELD_OUT = 5000


@dataclass(frozen=True)
class Images:
    """A dense network with ReLU on small images."""

    data: str
    source: str
    """Path of an .npz file, or the name of a data set that is downloaded."""
    widths: tuple[int, ...]
    seed: int
    dead: int | None = None
    """Number of the hidden layer whose units begin dead."""

    def network(self, inputs: int, classes: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        for number, width in enumerate(self.widths):
            layer = nn.Linear(inputs, width)
            if number == self.dead:
                nn.init.constant_(layer.bias, -10.0)
            layers += [layer, nn.ReLU()]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, classes))

    def workbench(self) -> Workbench:
        data, augment = images(self.data, self.source), AUGMENT[self.data]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.network(math.prod(data.input_shape), data.classes)
        per_epoch = len(data.x_train) // BATCH

        def batch(step: int) -> Batch:
            epoch, number = divmod(step, per_epoch)
            chosen = _order(len(data.x_train), self.seed, epoch)[number * BATCH :][:BATCH]
            x = data.x_train[chosen]
            if augment is not None:
                x = augment(x, torch.Generator().manual_seed(self.seed * 1_000_003 + step))
            return x, data.y_train[chosen]

        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-2, fused=True)
        return Workbench(
            model, optimizer, data.x_train[:2], 2, batch,
            lambda one: len(one[1]),
            lambda network, one: F.cross_entropy(network(one[0]), one[1]),
            lambda network, one: F.cross_entropy(network(one[0]), one[1], reduction="none"),
            lambda network, one: (network(one[0]).argmax(1) == one[1]).float(),
            [(data.x_val[:HELD_OUT], data.y_val[:HELD_OUT])], [(data.x_test, data.y_test)],
            lambda done: min(1.0, 0.1 + done * 90) * (1 + math.cos(math.pi * done)) / 2,
        )  # fmt: skip

    @property
    def multiplications(self) -> int:
        """Of a forward pass of one image, as the network starts."""
        data = images(self.data, self.source)
        sizes = (math.prod(data.input_shape), *self.widths, data.classes)
        return sum(one * other for one, other in pairwise(sizes))


@lru_cache(maxsize=2)
def images(data: str, source: str) -> Dataset:
    """The images, made small."""
    loaded = load(Path(source) if source.endswith(".npz") else source, seed=0)
    return scaled(loaded, PIXELS[data])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
