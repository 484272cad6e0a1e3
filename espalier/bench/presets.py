"""How networks are trained by methods that take no budget: training, stages and penalty belong together.

A row names a network, a method and a setting. Where none fits, the task's row and the method's own defaults hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from espalier.bench.augment import Augment, warp
from espalier.bench.tasks import OptimizerFactory, Schedule, Task, adamw, flat_then, flat_then_cosine
from espalier.method import Method
from espalier.methods.npn import npn_growing, npn_pruning
from espalier.parts.gates.expected import ExpectedCost, PerUnit
from espalier.parts.gates.stages import Stages


@dataclass(frozen=True)
class Preset:
    """What is trained, in place of the values of the task's row, and the method."""

    method: Callable[[], Method]
    epochs: int
    schedule: Schedule
    weight_decay: float = 0.0
    augment: Augment | None = None
    batch_size: int = 128
    optimizer: OptimizerFactory = adamw
    learning_rate: float = 1e-3

    def of(self, row: Task) -> Task:
        """The task, trained like this, by plain cross-entropy."""
        return replace(
            row,
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            label_smoothing=0.0,
            augment=self.augment,
        )


def default_model(task: str, names: Sequence[str]) -> str | None:
    """The network that a task takes with these methods, if it is not the task's own."""
    return next((_MODELS[task, name] for name in names if (task, name) in _MODELS), None)


def find_preset(model: str, names: Sequence[str], setting: str) -> Preset | None:
    """The row of a network and one of these methods in a setting."""
    return next((PRESETS[model, name, setting] for name in names if (model, name, setting) in PRESETS), None)


_MOONS = Stages(1.0, start=0.05, until=0.75, rise=50.0)
_FEW, _EMBEDDED = {"embed": 3, "hidden": 3}, ("embed", "hidden")


def _moons_grown() -> Method:
    return npn_growing(_MOONS, ExpectedCost(0.8), _FEW, fill=3.0, fresh=False, rate=2e-2, axes=_EMBEDDED)


def _moons_pruned() -> Method:
    return npn_pruning(_MOONS, ExpectedCost(0.5), begin=0.73, rate=5e-3, axes=_EMBEDDED)


_GROWN, _PRUNED = Stages(1.0, 0.02, 0.28, rise=50.0), Stages(1.0, 0.0333, 0.4, rise=50.0)
_LENET = ("conv1", "conv2", "fc1")


def _mnist_grown() -> Method:
    penalty = PerUnit({"conv1": 0.0035, "conv2": 0.016, "fc1": 0.0022})
    few = dict.fromkeys(_LENET, 3)
    return npn_growing(_GROWN, penalty, few, fill=1.0, fresh=False, rate=5e-3, begin=0.73, patience=2, axes=_LENET)


def _mnist_pruned() -> Method:
    penalty = PerUnit({"conv1": 0.009, "conv2": 0.0073, "fc1": 0.0073})
    return npn_pruning(_PRUNED, penalty, rate=5e-3, begin=0.55, low=0.25, patience=1, axes=_LENET)


_MODELS: Mapping[tuple[str, str], str] = MappingProxyType({("moons", "npn"): "embedded-mlp"})

PRESETS: Mapping[tuple[str, str, str], Preset] = MappingProxyType(
    {
        ("embedded-mlp", "npn", "growing"): Preset(_moons_grown, 1999, flat_then(_MOONS.until, 0.1)),
        ("embedded-mlp", "npn", "shrinking"): Preset(_moons_pruned, 1999, flat_then(_MOONS.until, 0.1)),
        ("lenet5", "npn", "growing"): Preset(
            _mnist_grown, 60, flat_then_cosine(_GROWN.until, 8.0), weight_decay=0.01, augment=warp(4.0, 0.04, 0.7)
        ),
        ("lenet5", "npn", "shrinking"): Preset(
            _mnist_pruned, 36, flat_then_cosine(_PRUNED.until, 6.0), weight_decay=0.05, augment=warp(6.0, 0.06, 1.0)
        ),
    }
)
"""Network, method, setting -> training. Those of MNIST are measured in docs/results/npn_mnist.md."""
