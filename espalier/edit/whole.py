"""Tensors whose entries are shared out among processes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose module is slow to import; nothing is one before somebody has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards; a plain one as it is. All ranks ask for it."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        sharded: Any = tensor.detach()
        found: Tensor = sharded.full_tensor()
        return found


__all__ = ["is_sharded", "whole"]
