"""A user's training loop around a session, and networks with made-up targets to run it on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from zoo_small import ZOO

import espalier as esp
from espalier.method import Method
from espalier.structure import Structure
from espalier.train.events import Event

Batch = Any


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """A loss for any network of the zoo: its outputs are pulled towards fixed targets."""
    outputs = model(**batch) if isinstance(batch, dict) else model(*batch)
    outputs = outputs if isinstance(outputs, Tensor) else outputs.logits
    return (outputs - torch.linspace(-1, 1, outputs[0].numel()).view_as(outputs[0])).square().mean()


@dataclass
class Run:
    """A network in training."""

    structure: Structure
    optimizer: Optimizer
    batch: Batch
    session: esp.Session

    def train(self, steps: int, epoch: int = 10) -> "Run":
        """Take some optimizer steps on always the same batch; an epoch ends every `epoch` steps."""
        for _ in range(steps):
            loss = self.session.loss(self.batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.session.step()
            if self.session.steps_done % epoch == 0:
                self.session.epoch_end(0.0)
        return self

    def sizes(self) -> dict[str, int]:
        """Axis -> size."""
        return {name: axis.size for name, axis in self.structure.axes.items()}

    def events(self) -> list[dict[str, Any]]:
        """All that is recorded of events, apart from the time that they took."""
        return [{**event.to_json(), "seconds": 0.0} for event in self.session.events]


def start(
    name: str,
    methods: Sequence[Method],
    total_steps: int,
    *,
    seed: int = 0,
    limits: dict[str, tuple[int | None, int | None]] | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = loss_of,
    probe: Sequence[Batch] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Run:
    """A network of the zoo with a session around it."""
    model, batch = ZOO[name]()
    torch.manual_seed(0)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    structure = esp.attach(model, batch, optimizer=optimizer, limits=limits)
    session = esp.Session(
        structure, methods, loss=loss, total_steps=total_steps, seed=seed, probe=probe, on_event=on_event
    )
    return Run(structure, optimizer, batch, session)
