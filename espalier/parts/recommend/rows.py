"""Activations of axes by sample: what permutations of samples need to know is which dimension holds them.

It is found by running one batch turned round: the dimension along which its activations come out turned round as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from espalier.errors import CaptureError
from espalier.measure.activations import activations, check_read
from espalier.parts.recommend.batches import picked, samples_in
from espalier.parts.recommend.planned import Loss
from espalier.structure import Structure

_ROWS = 4096
"""Samples times positions that are kept of an axis, about."""
_CLOSE = 1e-3
"""Part of the largest activation by which those of the batch turned round may differ."""


@dataclass(frozen=True)
class Rows:
    """Activations of one axis, as the weights that read it get them."""

    values: Tensor
    """(samples, positions, units), on the CPU; of many positions some, the same in all samples."""
    low: Tensor
    high: Tensor
    """(units,): the smallest and largest activation of each unit over all positions."""


def rows_of(
    structure: Structure, axes: Iterable[str], batches: Sequence[Any], loss: Loss, generator: torch.Generator
) -> tuple[dict[str, Rows], dict[str, str]]:
    """Axis -> its activations in eval mode, and axis -> why they cannot be had."""
    problems: dict[str, str] = {}
    able = []
    for axis in axes:
        try:
            check_read(structure.topology, [axis])
        except CaptureError:
            problems[axis] = "no weights read its activations"
        else:
            able.append(axis)
    first = batches[0]
    turned = picked(first, torch.arange(samples_in(first) - 1, -1, -1))
    forwards = [partial(loss, structure.model, batch) for batch in (*batches, turned)]
    counts = [samples_in(batch) for batch in batches]
    found: dict[str, Rows] = {}
    for axis, seen in _activations(structure, able, forwards, problems):
        layout = _layout(seen[0], seen[-1], counts[0])
        if layout is None:
            problems[axis] = "samples cannot be told apart in its activations"
        else:
            found[axis] = _gathered([layout(one, count) for one, count in zip(seen, counts, strict=False)], generator)
    return found, problems


def _activations(
    structure: Structure, axes: Sequence[str], forwards: Sequence[Callable[[], object]], problems: dict[str, str]
) -> Iterator[tuple[str, list[Tensor]]]:
    """Of all axes in one go; where that cannot be, one by one."""
    try:
        yield from activations(structure.model, structure.topology, axes, forwards).items()
        return
    except CaptureError as error:
        if len(axes) == 1:
            problems[axes[0]] = str(error)
            return
    for axis in axes:
        yield from _activations(structure, [axis], forwards, problems)


Layout = Callable[[Tensor, int], Tensor]


def _layout(seen: Tensor, turned: Tensor, samples: int) -> Layout | None:
    """How to bring activations, (..., places, units), into (samples, positions, units); None if that is not clear."""
    largest = float(seen.abs().max()) if seen.numel() else 0.0
    for dim in range(seen.dim() - 2):
        for layout in (partial(_split, dim, True), partial(_split, dim, False)):
            if seen.shape[dim] % samples:
                continue
            straight, other = layout(seen, samples), layout(turned, samples)
            if torch.allclose(straight.flip(0), other, rtol=0.0, atol=_CLOSE * largest):
                return layout
    return None


def _split(dim: int, samples_first: bool, seen: Tensor, samples: int) -> Tensor:
    """With a dimension of samples and perhaps something else as (samples, positions, units)."""
    moved = seen.movedim(dim, 0)
    sizes = (samples, -1) if samples_first else (moved.shape[0] // samples, samples)
    parted = moved.reshape(*sizes, *moved.shape[1:])
    parted = parted if samples_first else parted.movedim(1, 0)
    return parted.reshape(samples, -1, parted.shape[-1])


def _gathered(seen: list[Tensor], generator: torch.Generator) -> Rows:
    low = torch.stack([one.amin((0, 1)) for one in seen]).amin(0).double().cpu()
    high = torch.stack([one.amax((0, 1)) for one in seen]).amax(0).double().cpu()
    samples = sum(len(one) for one in seen)
    count = min(one.shape[1] for one in seen)
    kept = min(count, max(1, _ROWS // samples))
    chosen = torch.randperm(count, generator=generator)[:kept].sort().values
    return Rows(torch.cat([one[:, chosen.to(one.device)].cpu() for one in seen]), low, high)


__all__ = ["Rows", "rows_of"]
