"""What a checkpoint holds of a network: its description, and the tensors by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.errors import CheckpointError
from espalier.graph.named_tensors import TensorTable, tensor_table
from espalier.structure import Structure
from espalier.train import checkpoint_optimizer
from espalier.train.checkpoint_network import (
    SavedAxis,
    SavedNetwork,
    SavedTensor,
    found_since_attach,
    interface_of,
    saved_attributes,
)
from espalier.train.session import Session


def contents_of(structure: Structure, session: Session | None = None) -> dict[str, Any]:
    """What `save` writes: name of a file -> what JSON can hold, or tensors by name. Tensors are the live ones.

    Of a network that is sharded, without parameters and optimizer.

    Raises:
        CheckpointError, SurgeryError: as `save`.
    """
    model, optimizer = structure.model, structure.optimizer
    if session is not None and session.structure is not structure:
        raise CheckpointError("session: expected the session of this structure, found one of another.")
    table = tensor_table(model)
    structure.surgery.check_untouched(table)
    _check_extra_state(model)
    followers = [tensor_table(module).tensors for module in structure.surgery.follow]
    network, whole = _described(structure, table, followers), structure.peers.whole
    tensors = table.tensors if whole else _buffers(table)
    contents: dict[str, Any] = {"network.json": network.to_json(), "network.safetensors": tensors}
    if structure.masks:
        contents["masks.safetensors"] = {
            name: torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in structure.masks.items()
        }
    if followers:
        contents["followers.safetensors"] = {
            f"{number}:{name}": one for number, found in enumerate(followers) for name, one in found.items()
        }
    if optimizer is not None and whole:
        described = checkpoint_optimizer.described(optimizer, table.names)
        contents["optimizer.json"], contents["optimizer.safetensors"] = described
    if session is not None:
        contents["session.json"], contents["session.safetensors"] = session.state_parts()
    return contents


def described(structure: Structure) -> SavedNetwork:
    """All but the values that a checkpoint says of a network. Raises CheckpointError or SurgeryError, as `save`."""
    table = tensor_table(structure.model)
    structure.surgery.check_untouched(table)
    _check_extra_state(structure.model)
    return _described(structure, table, [])


def _described(structure: Structure, table: TensorTable, followers: Sequence[Mapping[str, Tensor]]) -> SavedNetwork:
    topology = structure.topology
    known, sizes = structure.surgery.known, {one.name: topology.sizes[n] for n, one in topology.axes.items()}
    return SavedNetwork(
        {name: SavedTensor.of(tensor, known.initial_shapes[name]) for name, tensor in table.tensors.items()},
        table.aliases,
        {name: SavedAxis(size, sizes[name]) for name, size in structure.initial_sizes.items()},
        found_since_attach(topology),
        saved_attributes(structure.model, known.attributes),
        structure.limits,
        [{name: SavedTensor.of(one, tuple(one.shape)) for name, one in tensors.items()} for tensors in followers],
        known.depth,
        interface_of(topology),
    )


def _check_extra_state(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"{path or 'the model'} ({type(module).__name__}) keeps extra state outside of parameters and buffers, "
                "which a checkpoint does not hold; register it as a buffer."
            )


def _buffers(table: TensorTable) -> dict[str, Tensor]:
    """What of a plain model has values, where its parameters are sharded."""
    return {name: one for name, one in table.tensors.items() if not isinstance(one, nn.Parameter)}


__all__ = ["contents_of", "described"]
