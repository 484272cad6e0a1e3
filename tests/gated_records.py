"""A made-up run with gates."""

from __future__ import annotations

import math

BINS, SIDE = 20, 8


def gates(epoch: int, epochs: int, places: dict[str, int]) -> dict[str, object]:
    """All gates at 0.95 before the search; in it half of them fall, and then sleep."""
    stage = 0 if epoch < epochs / 4 else 1 if epoch < epochs / 2 else 2
    found = {}
    for name, count in places.items():
        bins = [0] * BINS
        half = count // 2
        bins[-1] = count - half
        if stage < 2:
            bins[-1 if stage == 0 else 8] += half
        found[name] = bins
    asleep = {name: count // 2 for name, count in places.items()} if stage == 2 else {}
    return {"stage": stage, "k": 7.0 if stage == 1 else 5000.0, "axes": found, "asleep": asleep}


def plane(middle: float) -> dict[str, object]:
    """The second class to the right of x = middle."""
    xs = [-2 + 4 * at / (SIDE - 1) for at in range(SIDE)]
    row = [1 / (1 + math.exp(-4 * (x - middle))) for x in xs]
    return {"x": [-2.0, 2.0], "y": [-1.0, 1.0], "values": [row] * SIDE}


def gated_records(
    places: dict[str, int], epochs: int = 40, every: int = 10, planar: bool = True
) -> list[dict[str, object]]:
    """Epochs with gates; every few of them with a map, if inputs are points of a plane."""
    start: dict[str, object] = {"kind": "start", "parameters": 100, "flops": 200, "axes": dict(places)}
    if planar:
        start["points"] = {"inputs": [[-1.0, 0.5], [1.0, -0.5], [9.0, 9.0]], "labels": [0, 1, 1]}
    records = [start]
    for epoch in range(1, epochs + 1):
        record = {"kind": "epoch", "epoch": epoch, "step": 4 * epoch, "val_accuracy": 0.75, "parameters": 100 - epoch}
        record["gates"] = gates(epoch, epochs, places)
        if planar and epoch % every == 0:
            record["map"] = plane(0.5)
        records.append(record)
    return records
