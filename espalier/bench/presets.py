"""How networks are trained by methods that take no budget: training, stages and penalty belong together.

A row names a network and a method of both directions. Where none fits, the task's row and the method's own defaults
hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from espalier.bench.tasks import OptimizerFactory, Schedule, Task, adamw, flat_then, flat_then_cosine
from espalier.method import Method
from espalier.methods.npn import npn_growing, npn_pruning
from espalier.parts.gates.expected import ExpectedCost, PerUnit
from espalier.parts.gates.stages import Stages


@dataclass(frozen=True)
class Preset:
    """What is trained, in place of the values of the task's row, and the method in each setting."""

    epochs: int
    batch_size: int
    optimizer: OptimizerFactory
    learning_rate: float
    weight_decay: float
    schedule: Schedule
    methods: Mapping[str, Callable[[], Method]]
    """Setting -> what makes the method."""

    def of(self, row: Task) -> Task:
        """The task, trained like this: on the data as they are, by plain cross-entropy."""
        return replace(
            row,
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            label_smoothing=0.0,
            augment=None,
        )


def default_model(task: str, names: Sequence[str]) -> str | None:
    """The network that a task takes with these methods, if it is not the task's own."""
    return next((_MODELS[task, name] for name in names if (task, name) in _MODELS), None)


def find_preset(model: str, names: Sequence[str]) -> Preset | None:
    """The row of a network and one of these methods."""
    return next((PRESETS[model, name] for name in names if (model, name) in PRESETS), None)


_MOONS = Stages(1.0, start=0.05, until=0.75, rise=50.0)
_FEW, _EMBEDDED = {"embed": 3, "hidden": 3}, ("embed", "hidden")


def _moons_grown() -> Method:
    return npn_growing(_MOONS, ExpectedCost(0.5), _FEW, fill=1.0, fresh=False, rate=5e-3, axes=_EMBEDDED)


def _moons_pruned() -> Method:
    return npn_pruning(_MOONS, ExpectedCost(0.5), begin=0.73, rate=5e-3, axes=_EMBEDDED)


_MNIST = Stages(1.0, start=0.04, until=0.5, rise=50.0)
_LENET = ("conv1", "conv2", "fc1")


def _mnist_grown() -> Method:
    penalty = PerUnit({"conv1": 0.004, "conv2": 0.0175, "fc1": 0.003})
    few = dict.fromkeys(_LENET, 3)
    return npn_growing(_MNIST, penalty, few, fill=1.0, fresh=False, rate=5e-3, begin=0.73, patience=2, axes=_LENET)


def _mnist_pruned() -> Method:
    penalty = PerUnit({"conv1": 0.010, "conv2": 0.008, "fc1": 0.008})
    return npn_pruning(_MNIST, penalty, rate=5e-3, begin=0.55, low=0.25, patience=1, axes=_LENET)


_MODELS: Mapping[tuple[str, str], str] = MappingProxyType({("moons", "npn"): "embedded-mlp"})

PRESETS: Mapping[tuple[str, str], Preset] = MappingProxyType(
    {
        ("embedded-mlp", "npn"): Preset(
            epochs=1999,
            batch_size=128,
            optimizer=adamw,
            learning_rate=1e-3,
            weight_decay=0.0,
            schedule=flat_then(_MOONS.until, 0.1),
            methods={"growing": _moons_grown, "shrinking": _moons_pruned},
        ),
        ("lenet5", "npn"): Preset(
            epochs=36,
            batch_size=128,
            optimizer=adamw,
            learning_rate=1e-3,
            weight_decay=0.3,
            schedule=flat_then_cosine(_MNIST.until),
            methods={"growing": _mnist_grown, "shrinking": _mnist_pruned},
        ),
    }
)
