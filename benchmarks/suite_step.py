"""What a training step of the benchmark takes beside the forward and backward pass.

    python benchmarks/suite_step.py [--model vgg11-bn] [--width 1.0] [--pixels 32] [--steps 8] [--device cpu]

Random images of CIFAR-10's size, trained as `espalier bench` does (data and augmentation on the device, channels last)
against nothing but forward and backward passes of the same network on batches of the same size. Times are those of the
processor on a CPU, so that other work beside it does not count, and of the clock on a GPU. Prints milliseconds per step
and the share that is neither forward nor backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from espalier.bench.data import Dataset
from espalier.bench.models import build
from espalier.bench.tasks import task
from espalier.bench.training import Assignment, Training


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a step beside forward and backward.")
    parser.add_argument("--model", default="vgg11-bn")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row = replace(task("cifar10"), batch_size=128)
    count = row.batch_size * given.steps
    images = torch.randn(count + 64, 3, given.pixels, given.pixels).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(count + 64) % 10
    few, rest = slice(0, 32), slice(64, None)
    data = Dataset("random", images[rest], labels[rest], images[few], labels[few], images[few], labels[few], 10)
    data = data.to(given.device)
    model = build(given.model, data.input_shape, 10, width=given.width, seed=0).to(given.device)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    training = Training(Assignment(row, data, (), given.steps, 0), model)

    stamps: list[float] = []
    training.run(lambda: stamps.append(_now(given.device)), lambda record: None, lambda record: None)
    whole, stamps = _median(stamps), []
    for at in range(given.steps):
        chosen = slice(at * row.batch_size, (at + 1) * row.batch_size)
        model.zero_grad()
        F.cross_entropy(model(data.x_train[chosen]), data.y_train[chosen]).backward()
        stamps.append(_now(given.device))
    bare = _median(stamps)
    print(f"{given.model} x {given.width:g}, {given.pixels} pixels, {given.device}, torch {torch.__version__}")
    print(
        f"step {1e3 * whole:.1f} ms, forward and backward {1e3 * bare:.1f} ms, share of the rest {1 - bare / whole:.1%}"
    )


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _median(stamps: list[float]) -> float:
    """Seconds of a step: the median, since other work on the machine makes some longer."""
    return statistics.median(later - earlier for earlier, later in pairwise(stamps))


if __name__ == "__main__":
    main()
