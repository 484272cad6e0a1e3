"""What a task is trained with: default model, optimizer, schedule, augmentation. One row per data set."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from espalier.bench.augment import Augment, crop_and_flip, warp
from espalier.errors import DataError

# parameters, learning rate, weight decay -> optimizer
OptimizerFactory = Callable[[Iterable[nn.Parameter], float, float], Optimizer]
# fraction of the training that is done, 0..1 -> factor of the learning rate, 0..1
Schedule = Callable[[float], float]


def adamw(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with torch's default moments."""
    return AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)


def sgd_momentum(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> Optimizer:
    """Stochastic gradient descent with Nesterov momentum of 0.9."""
    return SGD(parameters, lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay)


def one_cycle(progress: float) -> float:
    """Rise along a cosine from 1/25 to 1 during the first fifth, then fall along a cosine to 0 (Smith & Topin 2018)."""
    warm_up, start = 0.2, 1 / 25
    if progress < warm_up:
        return start + (1 - start) * (1 - math.cos(math.pi * progress / warm_up)) / 2
    return cosine((progress - warm_up) / (1 - warm_up))


def cosine(progress: float) -> float:
    """Fall from 1 to 0 along half a cosine (Loshchilov & Hutter 2017)."""
    return (1 + math.cos(math.pi * progress)) / 2


def flat_then(until: float, factor: float) -> Schedule:
    """1 for a fraction ``until`` of the training, then ``factor``."""
    return lambda progress: factor if progress >= until else 1.0


def flat_then_cosine(until: float, height: float = 1.0) -> Schedule:
    """1 for a fraction ``until`` of the training, then half a cosine from ``height`` to 0."""
    return lambda progress: height * cosine((progress - until) / (1 - until)) if progress >= until else 1.0


@dataclass(frozen=True)
class Task:
    """How a data set is trained on: everything but the data and the network itself."""

    name: str
    model: str
    epochs: int
    batch_size: int
    optimizer: OptimizerFactory
    learning_rate: float
    weight_decay: float
    schedule: Schedule
    label_smoothing: float = 0.0
    augment: Augment | None = None

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """An optimizer of all parameters of ``model``, in one group."""
        return self.optimizer(model.parameters(), self.learning_rate, self.weight_decay)

    def make_scheduler(self, optimizer: Optimizer, done: Callable[[int], float]) -> LambdaLR:
        """A learning-rate scheduler to be stepped once after each optimizer step; ``done`` says how much of the
        training so many steps are, 0..1."""
        return LambdaLR(optimizer, lambda step: self.schedule(done(step)))

    def content(self) -> list[object]:
        """All that it says but its name and defaults, as what JSON can hold; equal content trains alike."""
        functions = [_content(one) for one in (self.optimizer, self.schedule, self.augment) if one is not None]
        return [self.batch_size, self.learning_rate, self.weight_decay, self.label_smoothing, functions]


def _content(function: Callable[..., object]) -> list[object]:
    """The name of a function, and the numbers that it was made with."""
    return [function.__qualname__, *(one.cell_contents for one in getattr(function, "__closure__", None) or ())]


def task(name: str | Path) -> Task:
    """The task of a data set: a row of ``TASKS``, or a general one without augmentation for any ``.npz`` file.

    Raises:
        DataError: unknown name.
    """
    if Path(name).suffix == ".npz":
        return replace(_ANY_NPZ, name=Path(name).stem)
    if not isinstance(name, str) or name not in TASKS:
        raise DataError(f"unknown task '{name}': expected one of {', '.join(TASKS)}, or the path of a .npz file")
    return TASKS[name]


_DIGITS = Task(
    name="digits",
    model="mlp",
    epochs=300,
    batch_size=64,
    optimizer=adamw,
    learning_rate=1e-2,
    weight_decay=1e-2,
    schedule=one_cycle,
    label_smoothing=0.1,
    augment=warp(degrees=12, scale=0.15, pixels=0.75),
)
_MOONS = Task(
    name="moons",
    model="mlp",
    epochs=100,
    batch_size=32,
    optimizer=adamw,
    learning_rate=5e-3,
    weight_decay=1e-2,
    schedule=one_cycle,
)
_MNIST = Task(
    name="mnist",
    model="lenet5",
    epochs=10,
    batch_size=128,
    optimizer=adamw,
    learning_rate=2e-3,
    weight_decay=1e-2,
    schedule=one_cycle,
    augment=warp(degrees=8, scale=0.1, pixels=2),
)
_CIFAR10 = Task(
    name="cifar10",
    model="resnet20",
    epochs=60,
    batch_size=128,
    optimizer=sgd_momentum,
    learning_rate=0.1,
    weight_decay=5e-4,
    schedule=one_cycle,
    augment=crop_and_flip(),
)
_TEXT = Task(
    name="tinyshakespeare",
    model="gpt",
    epochs=5,
    batch_size=64,
    optimizer=adamw,
    learning_rate=2e-3,
    weight_decay=1e-2,
    schedule=one_cycle,
)
_ANY_NPZ = Task(
    name="npz",
    model="mlp",
    epochs=30,
    batch_size=128,
    optimizer=adamw,
    learning_rate=2e-3,
    weight_decay=1e-2,
    schedule=cosine,
)

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        row.name: row
        for row in (
            _DIGITS,
            _MOONS,
            _MNIST,
            _CIFAR10,
            replace(_CIFAR10, name="cifar100", epochs=100),
            # house numbers are not mirror images
            replace(_CIFAR10, name="svhn", epochs=30, augment=crop_and_flip(flip=False)),
            _TEXT,
        )
    }
)
