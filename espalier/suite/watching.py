"""What is recorded of a training: looks at held-out data, edits and how long they took to be made good, the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from espalier.bench.architecture import architecture
from espalier.bench.folder import RunFolder
from espalier.bench.training import Training

GROWTH = 1.5
"""Each look is at this many times the part of the budget of the one before."""
WINDOW = 10
"""Steps whose mean training loss is compared before and after an edit."""
Record = dict[str, Any]


class Watching:
    """Follows one training, or several that follow each other, through a run folder."""

    def __init__(self, looks: int, folder: RunFolder) -> None:
        self._folder = folder
        self._due = [GROWTH ** (at - looks + 1) for at in range(looks)]
        self._losses: list[Tensor] = []
        self._fresh = False
        self.curve: list[Record] = []
        self.events: list[Record] = []

    def begin(self, training: Training) -> None:
        """Keep what the network is at first."""
        self._folder.append({"kind": "start", **described(training), "architecture": architecture(training.model)})

    def after_step(self, training: Training) -> None:
        """Look, if it is time."""
        self._losses.append(training.loss)
        done = training.done
        if not self._due or done < self._due[0] - 1e-12:
            return
        while self._due and self._due[0] <= done + 1e-12:
            self._due.pop(0)
        loss, accuracy = training.evaluate(training.assignment.data.x_val, training.assignment.data.y_val)
        self.curve.append(
            {
                "done": round(done, 4),
                "training_flops": float(f"{training.training_flops:.5g}"),
                "parameters": training.cost()["parameters"],
                "val_loss": round(loss, 5),
                "val_accuracy": round(accuracy, 5),
            }
        )
        self._fresh = True

    def on_epoch(self, record: Record) -> None:
        """Keep the first record after each look; a small network may have thousands of epochs."""
        if self._fresh:
            self._folder.append({"kind": "epoch", **record})
            self._fresh = False

    def on_event(self, record: Record) -> None:
        """Keep an edit."""
        self._folder.append({"kind": "event", **record})
        self.events.append(record)

    def edits(self) -> list[Record]:
        """The edits, each with the steps until the mean training loss was again what it was before it."""
        losses = torch.stack(self._losses).tolist() if self._losses else []
        starts = [event["step"] for event in self.events]
        found = []
        for number, event in enumerate(self.events):
            end = next((step for step in starts[number + 1 :] if step > event["step"]), len(losses))
            found.append(
                {
                    "step": event["step"],
                    "action": event["action"],
                    "jump": _difference(event["loss"]),
                    "recovery": recovery(losses, event["step"], end),
                }
            )
        return found


def described(training: Training) -> Record:
    """What the network is now."""
    sizes = {"axes": training.axes(), "weights": training.weights(), "depth": training.depth()}
    return {**training.cost(), **sizes}


def recovery(losses: Sequence[float], step: int, end: int) -> int | None:
    """Steps after an edit until the mean loss of the steps since then, at most `WINDOW` of them, is no higher than that
    of the last `WINDOW` before it; None if it did not come to that before `end`, or if there was nothing before."""
    before = losses[max(0, step - WINDOW) : step]
    if not before:
        return None
    level = math.fsum(before) / len(before)
    for at in range(step + 1, end + 1):
        since = losses[max(step, at - WINDOW) : at]
        if math.fsum(since) / len(since) <= level:
            return at - step
    return None


def _difference(pair: Sequence[float | None]) -> float | None:
    before, after = pair
    return None if before is None or after is None else float(f"{after - before:.4g}")


def area(curve: Sequence[Mapping[str, Any]], first: float, last: float) -> float | None:
    """Mean accuracy over the logarithm of the training FLOPs between two amounts, linear between looks.

    What comes before the first look counts as its accuracy; None without looks.
    """
    points = sorted((float(one["training_flops"]), float(one["val_accuracy"])) for one in curve)
    if not points or not 0 < first < last:
        return None
    x = [math.log(flops) for flops, _ in points]
    y = [accuracy for _, accuracy in points]

    def at(place: float) -> float:
        if place <= x[0]:
            return y[0]
        for (x0, y0), (x1, y1) in pairwise(zip(x, y, strict=True)):
            if place <= x1:
                return y0 + (y1 - y0) * (place - x0) / (x1 - x0) if x1 > x0 else y1
        return y[-1]

    low, high = math.log(first), math.log(last)
    nodes = [low, *(one for one in x if low < one < high), high]
    total = sum((b - a) * (at(a) + at(b)) / 2 for a, b in pairwise(nodes))
    return total / (high - low)


__all__ = ["GROWTH", "WINDOW", "Watching", "area", "described", "recovery"]
