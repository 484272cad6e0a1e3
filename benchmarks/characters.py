"""A text as characters, and the training of networks on it: for the benchmarks that prune language models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from espalier.bench.tasks import cosine

CONTEXT, BATCH, RATE, DECAY, WARM_UP = 64, 24, 2e-3, 0.1, 100

Loss = Callable[[nn.Module, Tensor], Tensor]
"""Model and characters (N, T) -> mean loss in nats."""
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Text:
    """A text as numbers, in the parts that training, choosing what goes, and testing see: 90%, 5% and 5%."""

    train: Tensor
    choose: Tensor
    test: Tensor
    characters: int

    @classmethod
    def read(cls, path: Path) -> Text:
        data = path.read_text()
        numbers = {one: at for at, one in enumerate(sorted(set(data)))}
        whole = torch.tensor([numbers[one] for one in data])
        cuts = [round(0.9 * len(whole)), round(0.95 * len(whole))]
        return cls(*whole.tensor_split(cuts), characters=len(numbers))

    def drawn(self, seed: int, steps: int, length: int) -> Iterator[Tensor]:
        """Batches (N, length) of training text, from random places."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            starts = torch.randint(len(self.train) - CONTEXT, (BATCH, 1), generator=generator)
            yield self.train[starts + torch.arange(length)]


def windows(text: Tensor, count: int, length: int) -> Tensor:
    """The first windows (count, length) of a text, one at every `CONTEXT` characters."""
    return text.unfold(0, length, CONTEXT)[:count]


def loss_on(model: nn.Module, loss_of: Loss, held: Tensor) -> float:
    """The mean loss on windows (count, T)."""
    with torch.no_grad():
        return statistics.mean(float(loss_of(model, part)) for part in held.split(64))


def train(
    model: nn.Module, loss_of: Loss, batches: Iterator[Tensor], steps: int, rate: float = RATE, warm_up: int = WARM_UP
) -> None:
    """AdamW with a cosine schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=DECAY)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / warm_up) * cosine(step / steps)
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 199:
            print(f"  step {step + 1}: {float(loss.detach()):.4f}", flush=True)


def trained_once(model: Network, kept: Path, loss_of: Loss, batches: Iterator[Tensor], steps: int) -> Network:
    """The network, trained, or with the weights that an earlier call has kept."""
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
        return model
    started = time.perf_counter()
    train(model, loss_of, batches, steps)
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), kept)
    print(f"trained {kept.stem} in {time.perf_counter() - started:.0f} s", flush=True)
    return model
