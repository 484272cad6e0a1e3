"""What a session costs between its events: paired training steps with and without it.

    python benchmarks/session_overhead.py [STEPS]

Two copies of one network take the same steps in turn, one of them through `esp.Session`. Events are scheduled, but none
falls into the timed steps: what they cost is theirs. Prints the ratio of the medians, at most 1.03 wanted.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import espalier as esp
from espalier.bench.models import build

Batch = tuple[Tensor, Tensor]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Batch], None]:
    def step(batch: Batch) -> None:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def with_session(model: nn.Module, optimizer: torch.optim.Optimizer, example: Tensor) -> Callable[[Batch], None]:
    structure = esp.attach(model, example, optimizer=optimizer)
    methods = [
        esp.grow.Random(width=1.5, every=esp.steps(10**6), start=0.1, until=0.5),
        esp.prune.Magnitude(budget=esp.FLOPs(0.5, of="initial"), every=esp.steps(10**6), start=0.5, until=0.9),
    ]
    session = esp.Session(
        structure, methods, loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), total_steps=10**8
    )

    def step(batch: Batch) -> None:
        loss = session.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step()

    return step


def timed(step: Callable[[Batch], None], batch: Batch) -> float:
    start = time.perf_counter()
    step(batch)
    return time.perf_counter() - start


def compare(name: str, steps: int, batch_size: int) -> None:
    x, y = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    runs = []
    for make in (plain, with_session):
        model = build(name, (3, 32, 32), 10, seed=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        runs.append(make(model, optimizer) if make is plain else with_session(model, optimizer, x[:2]))
    for step in runs:
        step((x, y))
    times: list[tuple[float, float]] = []
    for turn in range(steps):
        order = runs if turn % 2 == 0 else runs[::-1]
        pair = [timed(step, (x, y)) for step in order]
        times.append((pair[0], pair[1]) if turn % 2 == 0 else (pair[1], pair[0]))
    before, after = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(f"{name:10s} batch {batch_size}: plain {before * 1e3:7.1f} ms, with session {after * 1e3:7.1f} ms, "
          f"median of paired ratios {ratio:.4f} (at most 1.03), {steps} pairs")  # fmt: skip


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    compare("vgg11-bn", steps, 32)
    compare("resnet20", steps, 32)


if __name__ == "__main__":
    main()
