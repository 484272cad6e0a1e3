"""Checkpoints of networks that are shared out among processes, through `torch.distributed.checkpoint`.

What is sharded lies in a folder of its own inside of the checkpoint, with a new name at every save, and `shards.json`
names the one that holds; so an interrupted save leaves the earlier checkpoint whole. Everything else is as ever.
"""

from __future__ import annotations

import shutil
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import torch
import torch.distributed.tensor as dtensor
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from espalier.errors import CheckpointError
from espalier.graph.named_tensors import tensor_table
from espalier.parallel.fully_shard import FullyShard, fill_shards, shared_out
from espalier.peers import Peers
from espalier.train import checkpoint_files as files
from espalier.train import checkpoint_optimizer

_PREFIX = "shards-"
_PARAMETER, _STATE = "parameter:", "state:"
FILE = "shards.json"


def save_shards(
    fully: FullyShard, peers: Peers, optimizer: Optimizer | None, folder: Path, writers: dict[str, files.Writer]
) -> None:
    """Write a checkpoint; called by all ranks, of which the first one writes what is not sharded.

    Args:
        fully: the network.
        peers: the processes.
        optimizer: of the live model, or None.
        folder: of the checkpoint.
        writers: of the other files, to which those of the optimizer are added.

    Raises:
        CheckpointError: it could not be written; an earlier checkpoint still holds.
        ParallelError: some ranks could not write.
    """
    name = peers.agreed("the name of a checkpoint", _PREFIX + uuid4().hex[:12])
    live = tensor_table(fully.model).tensors
    sharded = {_PARAMETER + key: one.detach() for key, one in live.items() if isinstance(one, DTensor)}
    if optimizer is not None:
        names = {id(one): key for key, one in live.items()}
        described, tensors = checkpoint_optimizer.described(optimizer, names)
        sharded |= {_STATE + key: one for key, one in tensors.items() if isinstance(one, DTensor)}
        rest = {key: one for key, one in tensors.items() if not isinstance(one, DTensor)}
        writers["optimizer.json"] = files.json_writer(described)
        writers["optimizer.safetensors"] = files.tensors_writer(rest)
    writers[FILE] = files.json_writer({"folder": name})
    try:
        save(sharded, checkpoint_id=folder / name)
        if peers.leads:
            files.write(folder, writers)
            for other in folder.glob(f"{_PREFIX}*"):
                if other.name != name:
                    shutil.rmtree(other, ignore_errors=True)
    except Exception as error:
        peers.settle("saving a checkpoint", error)
        raise
    peers.settle("saving a checkpoint", None)


class Together(files.Stored):
    """What the files of a checkpoint hold, with what was saved as shards; each process reads for itself."""

    _KINDS: Final = {"network.safetensors": _PARAMETER, "optimizer.safetensors": _STATE}

    def __getitem__(self, name: str) -> Any:
        content = super().__getitem__(name)
        return content if name not in self._KINDS else {**content, **_put_together(self.paths, self._KINDS[name])}


def _put_together(paths: Mapping[str, Path], kind: str) -> dict[str, Tensor]:
    """The sharded tensors of a kind, ``parameter:`` or ``state:``, whole."""
    folder = _shards(paths)
    wanted = {
        key: torch.empty(one.size, dtype=one.properties.dtype)
        for key, one in _described(folder).items()
        if key.startswith(kind)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it reads in one process, which it was told to
        load(wanted, checkpoint_id=folder, no_dist=True)
    return {key.removeprefix(kind): one for key, one in wanted.items()}


def fill(paths: Mapping[str, Path], fully: FullyShard, optimizer: Optimizer | None) -> None:
    """Make a live model of the plain one, which has the saved sizes, with the values and the state that were saved.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another optimizer; live model and optimizer are as they were.
    """
    old, new = tensor_table(fully.model).tensors, fully.fresh()
    live = tensor_table(new).tensors
    parameters = {name: one for name, one in live.items() if isinstance(one, DTensor)}
    if FILE in paths:
        load({_PARAMETER + name: one.detach() for name, one in parameters.items()}, checkpoint_id=_shards(paths))
    else:
        values = files.read_tensors(paths["network.safetensors"])
        for name, one in parameters.items():
            fill_shards(one, values[name])
    state: dict[Tensor, Any] | None = None
    if optimizer is not None and "optimizer.json" in paths:
        state = _state(paths, optimizer, {id(old[name]): name for name in parameters}, parameters)
    fully.model = new
    if optimizer is not None:
        successors = {id(old[name]): one for name, one in parameters.items()}
        for group in optimizer.param_groups:
            group["params"][:] = [successors.get(id(one), one) for one in group["params"]]
        optimizer.state.clear()
        optimizer.state.update(state or {})


def _state(
    paths: Mapping[str, Path], optimizer: Optimizer, names: Mapping[int, str], parameters: Mapping[str, DTensor]
) -> dict[Tensor, Any]:
    """The saved state, by the parameters of the new live model; the options of the groups are set."""
    data, kept = files.read_json(paths["optimizer.json"]), files.read_tensors(paths["optimizer.safetensors"])
    described = _described(_shards(paths)) if FILE in paths else {}
    apart = {key.removeprefix(_STATE) for key in described if key.startswith(_STATE)}
    if FILE not in paths:
        apart = {key for key, one in kept.items() if one.dim() > 0}
    small: dict[str, dict[str, Any]] = {}
    large: dict[str, dict[str, str]] = {}
    for name, entries in data["state"].items():
        for key, entry in entries.items():
            tensor = entry.get("tensor") if isinstance(entry, dict) else None
            if tensor in apart and name in parameters:
                large.setdefault(name, {})[key] = tensor
            else:
                small.setdefault(name, {})[key] = entry
    restored = checkpoint_optimizer.restored(optimizer, names, {**data, "state": small}, kept)
    templates: dict[str, Tensor] = {}
    state: dict[Tensor, Any] = defaultdict(dict)
    for parameter, entries in restored.state.items():
        name = names.get(id(parameter))
        state[parameter if name is None else parameters[name]] = dict(entries)
    for name, found in large.items():
        parameter = parameters[name]
        for key, tensor in found.items():
            if FILE in paths:
                one = described[_STATE + tensor]
                templates[_STATE + tensor] = state[parameter][key] = _hollow(parameter, one.size, one.properties.dtype)
            else:
                state[parameter][key] = shared_out(kept[tensor].to(parameter.device), parameter)
    if templates:
        load(templates, checkpoint_id=_shards(paths))
    for group, options in zip(optimizer.param_groups, restored.options, strict=True):
        group.update(options)
    return dict(state)


def _hollow(parameter: DTensor, size: torch.Size, dtype: torch.dtype) -> DTensor:
    """A sharded tensor without values for a state of a parameter: sharded as this is, if it has as many dimensions."""
    mesh = parameter.device_mesh
    alike = len(size) == parameter.dim()
    placements = parameter.placements if alike else tuple(Replicate() for _ in range(mesh.ndim))
    return dtensor.empty(*size, dtype=dtype, device_mesh=mesh, placements=placements)


def _shards(paths: Mapping[str, Path]) -> Path:
    name = files.read_json(paths[FILE]).get("folder")
    folder = paths[FILE].parent / str(name)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing: {FILE} names it. Copy the whole folder.")
    return folder


def _described(folder: Path) -> dict[str, Any]:
    """Every sharded tensor, its size and type."""
    return dict(FileSystemReader(folder).read_metadata().state_dict_metadata)


__all__ = ["FILE", "Together", "fill", "save_shards"]
