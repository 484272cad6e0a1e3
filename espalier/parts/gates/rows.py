"""The gates of all keys in one row: what is done to each of them alike is done once, and not once per key."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def joined(rows: Mapping[str, Tensor]) -> Tensor:
    """All of them, of whatever shape, one after the other: shape (all,)."""
    return torch.cat([one.flatten() for one in rows.values()])


def parted(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `joined` took apart again, in the shapes of `like`; shares the memory of the row.

    With several rows, shape (rows, all), every part has as many.
    """
    shapes = [one.shape for one in like.values()]
    parts = torch.split(flat, [math.prod(shape) for shape in shapes], dim=-1)
    return {
        key: part if len(shape) == 1 else part.view(*part.shape[:-1], *shape)
        for key, part, shape in zip(like, parts, shapes, strict=True)
    }


__all__ = ["joined", "parted"]
