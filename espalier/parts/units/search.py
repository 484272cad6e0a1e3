"""The strength of a regulariser that leads to a wanted cost, found by whole trainings.

The target search of Zhuang et al. 2020: the stronger the penalty, the fewer FLOPs are left after pruning, so bisect.
The paper stops bisecting at twice the tolerance and goes on with t in steps of 0.1; here the strength does it all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from espalier.errors import MethodError


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    value: float
    """The argument whose result is nearest to the target."""
    result: float
    trials: tuple[tuple[float, float], ...]
    """(argument, result) of every training, in order."""
    within: bool
    """Whether the result is as near to the target as was asked for."""


def search_lambda(
    train: Callable[[float], float],
    target: float,
    *,
    low: float = 0.0,
    high: float = 2e-4,
    tolerance: float = 0.05,
    rounds: int = 10,
) -> Found:
    """Bisect the strength of a regulariser until training with it leads to a target.

    Args:
        train: strength -> cost that is left, such as the fraction of FLOPs; one whole training each. It should fall as
            the strength rises; where it does not, the nearest trial is returned all the same.
        target: the cost that is wanted.
        low: where to start; the default limits are the paper's, for t = 1.2.
        high: likewise.
        tolerance: how near is near enough, in the unit of the cost (paper: 5% of the FLOPs).
        rounds: trainings at most.

    Raises:
        MethodError: the limits are not in order, or there are no rounds.
    """
    if not 0 <= low < high:
        raise MethodError(f"search_lambda: expected 0 <= low < high, found low={low!r} and high={high!r}.")
    if rounds < 1:
        raise MethodError(f"search_lambda: expected at least one round, found {rounds!r}.")
    trials: list[tuple[float, float]] = []
    for _ in range(rounds):
        value = (low + high) / 2
        result = train(value)
        trials.append((value, result))
        if abs(result - target) < tolerance:
            break
        low, high = (value, high) if result > target else (low, value)
    value, result = min(trials, key=lambda trial: abs(trial[1] - target))
    return Found(value, result, tuple(trials), abs(result - target) < tolerance)


__all__ = ["Found", "search_lambda"]
