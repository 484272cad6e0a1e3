"""Measured time of a forward pass."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from espalier.graph.trees import call_arguments


def latency(model: nn.Module, example: Any, *, repeats: int = 20, warmup: int = 3) -> float:
    """Median wall-clock seconds of one eval-mode forward pass without gradients.

    Args:
        model: any module; its modes are put back afterwards.
        example: example inputs, as given to `espalier.attach`.
        repeats: timed passes.
        warmup: passes before the first timed one.

    Raises:
        ValueError: fewer than one timed pass is asked for.
    """
    if repeats < 1:
        raise ValueError(f"expected at least 1 repeat, found {repeats}")
    args, kwargs = call_arguments(example)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    times = []
    try:
        with torch.no_grad():
            for turn in range(warmup + repeats):
                start = time.perf_counter()
                model(*args, **kwargs)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn >= warmup:
                    times.append(time.perf_counter() - start)
    finally:
        for module, training in modes:
            module.training = training
    return statistics.median(times)
