"""How far to go along a direction, by the loss itself."""

from __future__ import annotations

from collections.abc import Callable

_SMALLEST, _LARGEST = 2.0**-12, 2.0**6


def best_amplitude(loss: Callable[[float], float]) -> float:
    """The amplitude of the lowest loss among 0 and powers of 2, looked for from 1 on downhill."""
    known = {1.0: loss(1.0)}
    for factor in (2.0, 0.5):
        now = min(known, key=known.__getitem__)
        while _SMALLEST <= now * factor <= _LARGEST:
            if now * factor not in known:
                known[now * factor] = loss(now * factor)
            if not known[now * factor] < known[now]:
                break
            now *= factor
    best = min(known, key=known.__getitem__)
    return best if known[best] < loss(0.0) else 0.0


__all__ = ["best_amplitude"]
