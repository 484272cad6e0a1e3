"""How many weights of each parameter are to be live, if so many are in all.

All of it is filling in proportion: parameter i gets c s_i live weights, with s_i its part and one c for all, but no
more than it has; what is full is left out and the rest filled anew.

    uniform   s_i = number of its weights: every parameter of the same density
    erk       s_i = sum of its dimensions, a density in proportion to sum / product: Erdos-Renyi-Kernel (Evci et al.,
              2020, arXiv:1911.11134), by which small layers are denser
    present   s_i = its live weights: every parameter loses or gains the same part of what it has
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from espalier.parts.goal import Goal

Density = Literal["uniform", "erk", "present", "global"]
"""``global``: whatever parameter they are in, the weights of the highest scores are live."""


def live_counts(density: Density, goal: Goal) -> dict[str, int]:
    """Parameter -> live weights that it is to have: no more than now when pruning, no fewer when growing."""
    live, total = dict(goal.sizes), goal.live_weights()
    entries = {name: one.live.numel() for name, one in goal.weights.items()}
    parts: dict[str, int] = live
    if density == "uniform":
        parts = entries
    elif density == "erk":
        parts = {name: sum(one.live.shape) for name, one in goal.weights.items()}
    if goal.direction == "prune":
        return filled(parts, live, total)
    wanted = filled(parts, entries, total)
    lacking = {name: max(0, wanted[name] - live[name]) for name in live}
    free = {name: entries[name] - live[name] for name in live}
    added = filled(lacking, free, max(0, total - sum(live.values())))
    return {name: live[name] + added[name] for name in live}


def filled(parts: Mapping[str, int], most: Mapping[str, int], total: int) -> dict[str, int]:
    """Whole numbers in proportion to parts, at most `most` each, that add up to `total` as far as there is room."""
    total = max(0, min(total, sum(most.values())))
    share: dict[str, float] = dict.fromkeys(parts, 0.0)
    open_names, left = [name for name in parts if parts[name] > 0], float(total)
    while open_names:
        scale = left / sum(parts[name] for name in open_names)
        full = [name for name in open_names if scale * parts[name] >= most[name]]
        if not full:
            share.update({name: scale * parts[name] for name in open_names})
            break
        share.update({name: float(most[name]) for name in full})
        left -= sum(most[name] for name in full)
        open_names = [name for name in open_names if name not in full]
    found = {name: min(most[name], math.floor(one + 1e-9)) for name, one in share.items()}
    rest = total - sum(found.values())
    for name in sorted(found, key=lambda one: (found[one] - share[one], one)):
        more = min(1 if share[name] > found[name] else 0, most[name] - found[name], rest)
        found[name], rest = found[name] + more, rest - more
    for name in found:  # parameters of no part take what fits nowhere else
        more = min(rest, most[name] - found[name])
        found[name], rest = found[name] + more, rest - more
    return found


__all__ = ["Density", "filled", "live_counts"]
