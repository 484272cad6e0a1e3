"""Judging a network at the mean of its weights over its last steps, in which the noise of single steps is small.

(Polyak & Juditsky 1992; Izmailov et al. 2018, Averaging weights leads to wider optima, arXiv:1803.05407.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from espalier.measure.stats import calibrate, every_statistic, kept_statistics


class Mean:
    """The mean of a model's parameters over the moments at which it was asked to look."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sums: list[Tensor] = []
        self._count = 0

    def look(self) -> None:
        """Take in the parameters as they are."""
        present = [one.detach() for one in self._model.parameters()]
        if not self._sums:
            self._sums = [torch.zeros_like(one) for one in present]
        for total, one in zip(self._sums, present, strict=True):
            total += one
        self._count += 1

    @contextmanager
    def applied(self, forwards: Sequence[Callable[[], object]]) -> Iterator[None]:
        """Run the body with the means as parameters, and statistics of norms that these forwards give under them."""
        if self._count < 2:
            yield
            return
        parameters = [one.detach() for one in self._model.parameters()]
        before = [one.clone() for one in parameters]
        places = every_statistic(self._model)
        restore = kept_statistics(places)
        try:
            for one, total in zip(parameters, self._sums, strict=True):
                one.copy_(total / self._count)
            calibrate(self._model, places, forwards)
            yield
        finally:
            restore()
            for one, old in zip(parameters, before, strict=True):
                one.copy_(old)


__all__ = ["Mean"]
