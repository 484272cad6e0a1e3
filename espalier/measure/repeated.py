"""Noisy times, measured until their median is known well enough."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_LEAST = 6
"""Values: of six, smallest and largest lie on both sides of the median with 97%."""


@dataclass(frozen=True)
class Reading:
    """The median of repeated measurements, with an interval that holds the true one with at least 95%."""

    value: float
    low: float
    high: float
    count: int = 1

    @classmethod
    def exactly(cls, value: float) -> Reading:
        """What needs no repetition."""
        return cls(value, value, value)

    @classmethod
    def of(cls, values: Sequence[float]) -> Reading:
        """From at least six values; the interval is between order statistics, whatever the distribution.

        Raises:
            ValueError: fewer than six values, or one that is not finite.
        """
        if len(values) < _LEAST or not all(map(math.isfinite, values)):
            raise ValueError(f"expected at least {_LEAST} finite values, found {list(values)}")
        ordered, count = sorted(values), len(values)
        below, outside = 0, 1.0
        # the median lies below the k-th smallest value if fewer than k of `count` fair coins show heads
        tail = outside / 2**count
        while 2 * tail <= 0.05:
            below += 1
            outside = math.comb(count, below)
            tail += outside / 2**count
        return cls(statistics.median(ordered), ordered[below - 1], ordered[count - below], count)

    def within(self, limit: float) -> bool | None:
        """Whether the value is at most the limit; None if the interval does not say."""
        if self.high <= limit:
            return True
        return False if self.low > limit else None

    def narrow(self, part: float) -> bool:
        """Whether the interval is at most this part of the value."""
        return self.high - self.low <= part * abs(self.value)


def repeated(
    once: Callable[[], float], enough: Callable[[Reading], bool], *, most: int = 200, seconds: float = 20.0
) -> Reading:
    """Measure again and again, at least six times, until it is enough, or until so many values or seconds are spent."""
    start, values = time.perf_counter(), [once() for _ in range(_LEAST)]
    while True:
        found = Reading.of(values)
        if enough(found) or len(values) >= most or time.perf_counter() - start > seconds:
            return found
        values += [once() for _ in range(min(len(values) // 2, most - len(values)))]


__all__ = ["Reading", "repeated"]
