"""The values of a checkpoint: checked against what it says of them, laid out as the live tensors are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.errors import CheckpointError
from espalier.graph.named_tensors import TensorTable, tensor_table
from espalier.parallel.fully_shard import empty
from espalier.train.checkpoint_network import (
    SavedNetwork,
    SavedTensor,
)
from espalier.train.checkpoint_optimizer import laid_out


@dataclass(frozen=True)
class Replacement:
    """A tensor of the user and the values that it will have."""

    name: str
    tensor: Tensor
    new: Tensor


def checked(values: Mapping[str, Tensor], saved: Mapping[str, SavedTensor], prefix: str = "") -> dict[str, Tensor]:
    """The values of the tensors in `saved`, whose file must hold just these shapes and types."""
    for name, one in saved.items():
        value = values.get(prefix + name)
        if value is None or tuple(value.shape) != one.shape or str(value.dtype) != f"torch.{one.dtype}":
            found = "nothing" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
            raise CheckpointError(f"{name}: the checkpoint lists {one.dtype} of shape {one.shape}, but holds {found}.")
    return {name: values[prefix + name] for name in saved}


def masks_of(packed: Mapping[str, Tensor], saved: Mapping[str, SavedTensor], table: TensorTable) -> dict[str, Tensor]:
    """The masks, which are saved as one bit per weight."""
    masks: dict[str, Tensor] = {}
    for name, bits in packed.items():
        one, count = saved.get(name), 0 if name not in saved else math.prod(saved[name].shape)
        if one is None or bits.dtype != torch.uint8 or tuple(bits.shape) != (-(-count // 8),):
            raise CheckpointError(
                f"{name}: the checkpoint holds a mask of {bits.numel()} bytes that fits no parameter."
            )
        mask = torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(np.bool_))
        masks[name] = mask.view(one.shape).to(table.tensors[name].device)
    return masks


def values_of(
    found: Mapping[str, Tensor], table: TensorTable, network: SavedNetwork, hollow: bool
) -> Mapping[str, Tensor]:
    """The saved tensors; without the values of parameters, for a model that is to have none."""
    if not hollow:
        return found
    known = {name: one for name, one in table.tensors.items() if name in network.tensors}
    return {
        name: empty(one, network.tensors[name].shape) if isinstance(one, nn.Parameter) else found[name]
        for name, one in known.items()
    }


def replacements_of(
    tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], saved: Mapping[str, SavedTensor]
) -> list[Replacement]:
    try:
        return [
            Replacement(name, tensor, _laid_out(values[name], saved[name].order, tensor.device))
            for name, tensor in tensors.items()
        ]
    except ValueError as error:
        raise CheckpointError(f"network.json is damaged: {error}.") from error


def _laid_out(value: Tensor, order: Sequence[int], device: torch.device) -> Tensor:
    """See `laid_out`; what holds no values takes no memory either."""
    return value if 0 in value.stride() else laid_out(value, order, device)


def follower_replacements(
    number: int,
    module: nn.Module,
    network: SavedNetwork,
    values: Mapping[str, Tensor],
    contents: Mapping[str, Any],
) -> list[Replacement]:
    """What a copy of the model will hold: what it held when it was saved, or else the values of the model."""
    tensors, prefix = tensor_table(module).tensors, prefix_of(module, network)
    if not network.followers:
        return [
            Replacement(name, one, laid_out(values[name].to(one.dtype), network.tensors[name].order, one.device))
            for name in network.tensors
            for one in (tensors[prefix + name],)
        ]
    saved = network.followers[number]
    different = sorted(set(saved) ^ set(tensors))
    if different:
        raise CheckpointError(f"follow: copy {number} and the saved one are not alike: only one has {different[0]}.")
    for name, one in tensors.items():
        of_model = network.tensors.get(name.removeprefix(prefix))
        fresh, then = (of_model.original, of_model.shape) if of_model else (saved[name].shape, tuple(one.shape))
        if (tuple(one.shape), str(one.dtype)) != (fresh, f"torch.{saved[name].dtype}") or saved[name].shape != then:
            raise CheckpointError(
                f"follow: {name} of copy {number}: expected {saved[name].dtype} of shape {fresh}, found {one.dtype} of "
                f"shape {tuple(one.shape)}; pass a copy of the freshly built model."
            )
    found = checked(contents["followers.safetensors"], saved, f"{number}:")
    return replacements_of(tensors, found, saved)


def prefix_of(module: nn.Module, network: SavedNetwork) -> str:
    """What a wrapper puts before the model's own names; `attach` has checked that it is one of two."""
    names = tensor_table(module).tensors
    return "" if all(name in names for name in network.tensors) else "module."


__all__ = ["Replacement", "checked", "follower_replacements", "masks_of", "prefix_of", "replacements_of", "values_of"]
