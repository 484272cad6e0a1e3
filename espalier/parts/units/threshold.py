"""Thresholds: where scores fall into those that are small and those that are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_SMOOTHINGS = 10_000


class Threshold(Protocol):
    """A number that separates the small ones of some values from the others."""

    def __call__(self, values: Tensor, /) -> float:
        """The threshold of values of shape (n,), n >= 1: small are those below it."""


@dataclass(frozen=True)
class Valley:
    """The deepest place between the two modes of the histogram of all values, smoothed until it has two clear ones.

    The minimum method of Prewitt & Mendelsohn 1966: a three-bin mean, repeated until there are two modes, and here also
    until the valley between is at most half as high as the lower one. Where that leads to a single mode there are no
    two groups that can be seen, and the threshold is the one that best separates the values themselves into two (Otsu
    1979: largest variance between groups). Where all values are equal it is that value, so that none lies below.
    Polarized scales of a whole network have two modes; a rule that looks for a change of sign in the slope of a narrow
    layer's histogram, as in the original code, may find none.
    """

    bins: int = 100

    def __call__(self, values: Tensor, /) -> float:
        values = values.detach().double().cpu().flatten()
        least, most = float(values.min()), float(values.max())
        if least == most:
            return most
        counts = torch.histc(values, self.bins, least, most)
        place = _between_modes(counts)
        return _otsu(values) if place is None else least + (most - least) * place / self.bins


def _between_modes(counts: Tensor) -> float | None:
    """The middle of the deepest bins between the two modes, in bins from the left edge; None without two modes."""
    for _ in range(_SMOOTHINGS):
        modes = _modes(counts)
        if len(modes) < 2:
            return None
        if len(modes) == 2:
            first, last = modes
            inside = counts[first : last + 1]
            if inside.min() <= min(counts[first], counts[last]) / 2:
                deepest = (inside == inside.min()).nonzero().flatten()
                return first + float(deepest[0] + deepest[-1]) / 2 + 0.5
        padded = torch.cat([counts[:1], counts, counts[-1:]])
        counts = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    return None


def _modes(counts: Tensor) -> list[int]:
    """The bins that are higher than what lies beside them, at either edge too; the first bin of every plateau."""
    heights, starts = torch.unique_consecutive(counts, return_counts=True)
    firsts = starts.cumsum(0) - starts
    padded = torch.cat([heights.new_full((1,), -1.0), heights, heights.new_full((1,), -1.0)])
    is_mode = (padded[1:-1] > padded[:-2]) & (padded[1:-1] > padded[2:])
    return [int(first) for first in firsts[is_mode]]


def _otsu(values: Tensor) -> float:
    """The middle between the two neighbours in order that are the best border between two groups."""
    ordered = values.sort().values
    below = torch.arange(1, len(ordered), dtype=torch.float64)
    above = len(ordered) - below
    sums = ordered.cumsum(0)
    difference = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    border = int((below * above * difference.square()).argmax())
    return float(ordered[border] + ordered[border + 1]) / 2


__all__ = ["Threshold", "Valley"]
