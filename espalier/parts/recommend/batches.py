"""Batches as what they are made of: samples, along the first dimension of every tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.trees import flatten_tensors, map_tensors

_FEWEST = 8
"""Samples below which nothing can be said."""


@dataclass(frozen=True)
class Samples:
    """Samples in two halves: what is proposed is found on one of them and judged on the other."""

    whole: tuple[Any, ...]
    """The batches as they were given."""
    found: tuple[Any, ...]
    """Every second sample of each batch, from the first one on; of a single batch in two parts."""
    judged: tuple[Any, ...]
    """The others, in parts: the loss of each part is one observation of what a plan changes."""
    count: int
    """Of all batches."""
    divisible: bool = True
    """Whether batches can be cut. Otherwise whole ones are found on and judged on in turns."""

    @property
    def weights(self) -> Tensor:
        """The share of each part of `judged`: (parts,)."""
        sizes = torch.tensor([samples_in(one) for one in self.judged], dtype=torch.float64)
        return sizes / sizes.sum()

    def cut(self, parts: int) -> tuple[Any, ...]:
        """All samples in about so many parts, and no more than there are samples."""
        if not self.divisible:
            return self.whole
        each = math.ceil(parts / len(self.whole))
        return tuple(
            picked(batch, index)
            for batch in self.whole
            for index in torch.arange(samples_in(batch)).tensor_split(min(each, samples_in(batch)))
        )


def samples_in(batch: Any) -> int:
    """The number of samples in a batch: the common first size of all its tensors.

    Raises MethodError if there is none.
    """
    sizes = {path: len(tensor) for path, tensor in flatten_tensors(batch, "batch") if tensor.dim()}
    if len(set(sizes.values())) != 1:
        found = ", ".join(f"{path} with {size}" for path, size in list(sizes.items())[:4]) or type(batch).__name__
        raise MethodError(
            "batches: expected tensors, or tuples, lists or mappings of them, with the samples along the first "
            f"dimension of each, found {found}; rearrange them in loss=..., which is what is given the batch."
        )
    return next(iter(sizes.values()))


def picked(batch: Any, index: Tensor) -> Any:
    """The samples of a batch at some positions, (n,), as a batch of the same form."""
    return map_tensors(batch, lambda tensor: tensor[index.to(tensor.device)] if tensor.dim() else tensor)


def halved(batches: Sequence[Any], parts: int, loss: Callable[[Any], object]) -> Samples:
    """Part batches into halves, the second one into about so many parts of equal size.

    Where the network does not run on a part of a batch, since its size is written in the code, whole ones are taken.

    Raises MethodError if there are too few samples or they cannot be told apart, or the network does not run on them.
    """
    sizes = [samples_in(batch) for batch in batches]
    if sum(sizes) < _FEWEST:
        raise MethodError(f"batches: expected {_FEWEST} samples or more in all, found {sum(sizes)}.")
    if min(sizes) < 2:
        raise MethodError("batches: expected 2 samples or more in each, found a batch of 1; put several together.")
    found, judged = [], []
    each = math.ceil(parts / len(sizes))
    for batch, size in zip(batches, sizes, strict=True):
        found += [picked(batch, one) for one in torch.arange(0, size, 2).tensor_split(2 if len(sizes) == 1 else 1)]
        others = torch.arange(1, size, 2)
        judged += [picked(batch, index) for index in others.tensor_split(min(each, len(others)))]
    problem = _problem(loss, batches[0])
    if problem:
        raise MethodError(f"the loss cannot be evaluated on the first batch: {problem}.")
    if problem := _problem(loss, found[0]) or _problem(loss, judged[-1]):
        if len(batches) < 2:
            raise MethodError(f"the network does not run on parts of a batch ({problem}); give several batches.")
        return Samples(tuple(batches), tuple(batches[::2]), tuple(batches[1::2]), sum(sizes), divisible=False)
    return Samples(tuple(batches), tuple(found), tuple(judged), sum(sizes))


def _problem(loss: Callable[[Any], object], batch: Any) -> str | None:
    """Why the loss cannot be evaluated: in words, since anything can go wrong in the code of a user."""
    try:
        with torch.no_grad():
            loss(batch)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


__all__ = ["Samples", "halved", "picked", "samples_in"]
