"""One training, in one process or in several that have equal parts of the same batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import espalier as esp

BATCH = 8
Batch = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    """Without batch norm, whose statistics are over the batch of one process; GELU, since new units behind a LayerNorm
    are zero, where rounding alone decides on the gradient of a ReLU."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 3))


def batches(steps: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    drawn = [(torch.randn(BATCH, 6, generator=generator), torch.rand(BATCH, generator=generator)) for _ in range(steps)]
    return [(x, (3 * y).long()) for x, y in drawn]


def part(batch: Batch, rank: int, size: int) -> Batch:
    count = BATCH // size
    return batch[0][rank * count : (rank + 1) * count], batch[1][rank * count : (rank + 1) * count]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def optimizer_of(kind: str, model: nn.Module) -> Optimizer:
    if kind == "sgd":
        return SGD(model.parameters(), lr=0.05, momentum=0.9)
    return AdamW(model.parameters(), lr=0.003)


def methods(first: int, between: int) -> list[esp.Method]:
    """Grow, prune, grow and prune, `between` steps apart."""
    every = esp.steps(2 * between)
    until = first + 2 * between + 1
    return [
        esp.grow.Random(amount=0.3, every=every, start=esp.steps(first), until=esp.steps(until)),
        esp.prune.Taylor(amount=0.2, every=every, start=esp.steps(first + between), until=esp.steps(until + between)),
    ]


def train(kind: str, rank: int, size: int, steps: int, chosen: list[esp.Method], **settings: Any) -> dict[str, Any]:
    """The losses of all samples of every step, and the edits that were made."""
    model: nn.Module = network()
    if size > 1:
        model = DistributedDataParallel(model, **settings)
    optimizer = optimizer_of(kind, model)
    session = esp.Session(
        esp.attach(model, torch.randn(2, 6), optimizer=optimizer), chosen, loss=loss_of, total_steps=steps
    )
    losses = []
    for batch in batches(steps):
        loss = session.loss(part(batch, rank, size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step()
        losses.append(mean(loss, size))
    return {
        "losses": losses,
        "edits": [str(edit.plan) for edit in session.structure.history],
        "state": {name: tensor.clone() for name, tensor in session.structure.model.state_dict().items()},
        "same": session.model is model,
    }


def mean(loss: Tensor, size: int) -> float:
    total = loss.detach().clone()
    if size > 1:
        dist.all_reduce(total)
    return float(total) / size


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))
