"""Tensors as JSON: their bytes in base64."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def packed(tensor: Tensor) -> dict[str, Any]:
    """A tensor of numbers or booleans, to the bit."""
    array = tensor.detach().cpu().contiguous().numpy()
    return {
        "shape": list(array.shape), "dtype": array.dtype.str, "data": base64.b64encode(array.tobytes()).decode()
    }  # fmt: skip


def unpacked(data: Mapping[str, Any]) -> Tensor:
    """What `packed` gave. Raises KeyError, TypeError or ValueError for anything else."""
    array = np.frombuffer(base64.b64decode(data["data"]), np.dtype(data["dtype"])).copy()
    return torch.from_numpy(array).reshape(tuple(data["shape"]))


__all__ = ["packed", "unpacked"]
