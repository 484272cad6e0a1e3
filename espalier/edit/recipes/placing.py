"""Where new layers come: the devices, types and mode of the modules around them, and random numbers of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from espalier.edit.recipes.base import Lookup

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Setting:
    """What a new module has in common with those around it."""

    device: torch.device
    dtype: torch.dtype
    training: bool

    def put(self, new: M) -> M:
        """A new module, brought there."""
        new.to(self.device, self.dtype)
        new.train(self.training)
        return new


def setting(module: Lookup, at: str) -> Setting:
    """That of the module at a path; where it has no parameters, that of the last ones before it, or the next."""
    root, neighbour = module(""), None
    passed = False
    for path, one in root.named_modules():
        inside = path == at or path.startswith(f"{at}.")
        if passed and not inside and neighbour is not None:
            break
        passed = passed or inside
        for tensor in one.parameters(recurse=False):
            if _is_number(tensor):
                neighbour = tensor
    training = module(at).training
    if neighbour is None:
        return Setting(torch.device("cpu"), torch.get_default_dtype(), training)
    return Setting(neighbour.device, neighbour.dtype, training)


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Modules that are made in the body are on the CPU, the same for the same seed; nothing outside notices."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


__all__ = ["Setting", "drawing", "setting"]
