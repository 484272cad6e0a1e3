"""What masks cost: paired training steps of one network with and without them.

    python benchmarks/mask_overhead.py [STEPS] [cpu|cuda]

Two copies of one network take the same steps in turn, the second with 90% of the weights of its matrices and filters
masked. Nothing is faster by masks: zeros are multiplied as other numbers are. Prints the median of the paired ratios,
at most 1.03 wanted.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import espalier as esp
from espalier.bench.models import build
from espalier.edit.plan import mask_plan
from espalier.parts.weights.weights import choose_weights

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
}


def made(name: str, optimizer: str, x: Tensor, y: Tensor, masked: bool) -> Callable[[], None]:
    model = build(name, (3, 32, 32), 10, seed=0).to(x.device)
    optim = OPTIMIZERS[optimizer](model.parameters())
    if masked:
        structure = esp.attach(model, x[:2], optimizer=optim)
        generator = torch.Generator().manual_seed(0)
        shapes = {one: model.get_parameter(one).shape for one in choose_weights(structure, None)}
        structure.apply(mask_plan({one: torch.rand(shape, generator=generator) < 0.1 for one, shape in shapes.items()}))

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        optim.zero_grad()
        loss.backward()
        optim.step()

    return step


def timed(step: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, optimizer: str, steps: int, batch_size: int, device: str) -> None:
    x = torch.randn(batch_size, 3, 32, 32, device=device)
    y = torch.randint(10, (batch_size,), device=device)
    runs = [made(name, optimizer, x, y, masked) for masked in (False, True)]
    for _ in range(3):
        for step in runs:
            timed(step, device)
    times: list[tuple[float, float]] = []
    for turn in range(steps):
        order = runs if turn % 2 == 0 else runs[::-1]
        pair = [timed(step, device) for step in order]
        times.append((pair[0], pair[1]) if turn % 2 == 0 else (pair[1], pair[0]))
    before, after = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(f"{name:10s} {optimizer:6s} batch {batch_size}: plain {before * 1e3:7.2f} ms, masked {after * 1e3:7.2f} ms, "
          f"median of paired ratios {ratio:.4f} (at most 1.03), {steps} pairs")  # fmt: skip


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    device = sys.argv[2] if len(sys.argv) > 2 else "cpu"
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    for name in ("vgg11-bn", "resnet20"):
        for optimizer in OPTIMIZERS:
            compare(name, optimizer, steps, 64, device)


if __name__ == "__main__":
    main()
