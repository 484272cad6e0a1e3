"""Batches of several processes: put together, and compared."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from espalier.edit.plan import Plan
from espalier.errors import ParallelError

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def on_cpu(batch: Any) -> Any:
    """The batch with all of its tensors on the CPU, so that it can be sent."""
    return tree_map(lambda one: one.detach().cpu() if isinstance(one, Tensor) else one, batch)


def together(parts: Sequence[Any], like: Any) -> Any:
    """One batch of the batches of all processes: tensors one after the other along their first dimension.

    Args:
        parts: the batches, by rank, on the CPU.
        like: the batch of this process, on whose devices the result is.

    Raises:
        ParallelError: the batches are of different structure, or hold something besides tensors that differs; or
            tensors whose sizes differ in another dimension than the first one.
    """
    leaves, spec = tree_flatten(like)
    flattened = [tree_flatten(one) for one in parts]
    if any(other != spec for _, other in flattened):
        raise ParallelError(
            f"the batches of the ranks are of different structure: {', '.join(str(other) for _, other in flattened)}; "
            "give session.loss batches that are alike on every rank."
        )
    columns = zip(*(found for found, _ in flattened), strict=True)
    return tree_unflatten(
        [_column(number, column, leaf) for number, (column, leaf) in enumerate(zip(columns, leaves, strict=True))], spec
    )


def _column(number: int, parts: Sequence[Any], like: Any) -> Any:
    """One entry of the joined batch."""
    if not isinstance(like, Tensor):
        if any(digest(one) != digest(parts[0]) for one in parts):
            raise ParallelError(
                f"entry {number} of the batch is a {type(like).__name__} that differs among the ranks, so that their "
                "batches cannot be put together; give session.loss batches of tensors."
            )
        return like
    rest = {tuple(one.shape[1:]) for one in parts}
    if any(one.dim() == 0 for one in parts) or len(rest) != 1:
        shapes = ", ".join(str(tuple(one.shape)) for one in parts)
        raise ParallelError(
            f"entry {number} of the batch has the shapes {shapes} on the ranks; samples are expected along the first "
            "dimension, and all else alike. Pad to one size on all ranks, or put the batch dimension first."
        )
    return torch.cat(list(parts)).to(like.device)


def digest(value: Any) -> str:
    """A hash of a batch, a plan or any value that says by its `repr` what it is."""
    found = hashlib.sha256()
    if isinstance(value, Plan):
        starts = {f"{number}:{name}": one for number, each in value.starts.items() for name, one in each.items()}
        value = (value.to_json(), dict(value.values), dict(value.deltas), starts)
    leaves, spec = tree_flatten(value)
    found.update(str(spec).encode())
    for one in leaves:
        if isinstance(one, Tensor):
            found.update(f"{one.dtype}{tuple(one.shape)}".encode())
            plain = one.detach().cpu().contiguous()
            found.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(_ADDRESS.sub("", repr(one)).encode())
    return found.hexdigest()


__all__ = ["digest", "on_cpu", "together"]
