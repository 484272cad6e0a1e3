"""One network being trained on a task, step by step, in a state that can be kept at any step and taken up again.

Training FLOPs are counted as three times those of the forward pass (one forward, two backward: Kaplan et al. 2020,
section 2.1) for every sample seen, at the size that the network has at that step; an event adds the two forward passes
in which the loss before and after it is measured. Validation is not training and is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from espalier.bench.data import Dataset, batches
from espalier.bench.tasks import Task
from espalier.errors import RunError
from espalier.method import Method
from espalier.structure import Structure
from espalier.train.checkpoint import load, save
from espalier.train.events import Event
from espalier.train.session import Session

Batch = tuple[Tensor, Tensor]
Record = dict[str, Any]

BACKWARD_FACTOR = 3
EVALUATION_BATCH = 1000
_NETWORK, _RANDOM = "network", "random.safetensors"


@dataclass(frozen=True)
class Plan:
    """What to train: everything but the network itself."""

    task: Task
    data: Dataset
    methods: Sequence[Method]
    total_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the training set."""
        return -(-len(self.data.x_train) // self.task.batch_size)


class Objective:
    """Cross-entropy with the task's label smoothing; remembers the logits, of which the accuracy is read."""

    def __init__(self, label_smoothing: float) -> None:
        self._label_smoothing = label_smoothing
        self._logits: Tensor | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch[0])
        self._logits = logits.detach()
        return F.cross_entropy(logits, batch[1], label_smoothing=self._label_smoothing)

    def correct(self, labels: Tensor) -> Tensor:
        """How many samples of the last batch were classified correctly."""
        assert self._logits is not None, "the loss is evaluated before its accuracy is asked for"
        return (self._logits.argmax(dim=1) == labels).sum()


class Training:
    """A network, its optimizer and all that decides its next step."""

    def __init__(
        self,
        plan: Plan,
        build: Callable[[], Structure],
        *,
        on_event: Callable[[Record], None],
        resume_from: tuple[Mapping[str, Any], Path] | None = None,
    ) -> None:
        pass
