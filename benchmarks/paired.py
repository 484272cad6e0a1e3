"""What benchmarks that compare methods by seed share: records, one line of JSON each, and intervals."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from espalier.bench.data import Dataset

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""The 97.5% quantile of Student's t by degrees of freedom, from 1."""

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """What was measured so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: Record) -> None:
    """Keep one more record."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def reading(path: Path) -> str:
    """What a person wrote below the tables of a file, which stays when they are written anew."""
    _, heading, text = (path.read_text() if path.exists() else "").partition("\n## Reading\n")
    return heading + text


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95% interval (Student's t)."""
    if len(values) < 2:
        return values[0], math.nan
    freedom = min(len(values) - 1, len(STUDENT))
    return statistics.mean(values), STUDENT[freedom - 1] * statistics.stdev(values) / math.sqrt(len(values))


def scaled(data: Dataset, pixels: int) -> Dataset:
    """Images of that many pixels along each side, by averaging."""
    by = data.input_shape[-1] // pixels
    parts = {name: F.avg_pool2d(getattr(data, name), by) for name in ("x_train", "x_val", "x_test")}
    return data if by == 1 else replace(data, **parts)


def origin() -> Record:
    """The commit and the machine that what follows is measured at."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = f"{os.cpu_count()} shared x86-64 cores, 1 thread, torch {torch.__version__}"
    return {"commit": found.stdout.strip() or "unknown", "machine": machine}
