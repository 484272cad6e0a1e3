"""What depends on the machine and not on the cell: latency, peak memory, versions."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.measure.runtimes import Eager
from espalier.version import __version__

SATURATED = 256
"""Samples in the batch that stands for a machine that is kept busy."""


def clock(device: str) -> Callable[[], float]:
    """Seconds. On a CPU, where a cell has one thread, those of the processor: what others do on the machine does not
    count; elsewhere those on the wall."""
    return time.process_time if device == "cpu" else time.monotonic


def latencies(model: nn.Module, example: Tensor, device: str) -> dict[str, float]:
    """Seconds of a forward pass of 1 sample and of `SATURATED`, eager."""
    found = {}
    for samples in (1, SATURATED):
        inputs = example[:1].expand(samples, *example.shape[1:]).contiguous()
        found[f"eager {samples}"] = float(f"{Eager(clock(device))(model, inputs):.4g}")
    return found


def forget_peak(device: str) -> None:
    """Begin to measure the peak of memory anew, where the machine can."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system than Linux, or not allowed: the peak is then that of the process
        return


def peak_memory(device: str) -> int | None:
    """Bytes: of a GPU what torch had allocated at most, else what the process had resident; None if nobody knows."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    peak = next((line for line in lines if line.startswith("VmHWM:")), None)
    return None if peak is None else 1024 * int(peak.split()[1])


def load() -> float | None:
    """Processes that wanted to run during the last minute, per core; None if nobody knows."""
    try:
        return round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)
    except OSError:
        return None


def place(device: str, threads: int) -> dict[str, Any]:
    """Versions and hardware."""
    kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {
        "device": device.split(":")[0],
        "hardware": kind,
        "cores": os.cpu_count(),
        "threads": threads,
        "espalier": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line for line in lines if line.startswith("model name")), None)
    return platform.processor() or platform.machine() if named is None else named.partition(":")[2].strip()


__all__ = ["SATURATED", "clock", "forget_peak", "latencies", "load", "peak_memory", "place"]
