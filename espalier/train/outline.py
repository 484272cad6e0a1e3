"""The outline of a training: all of a checkpoint but the values that somebody else saves, and the order they are in.

Trainers save the model's and the optimizer's state themselves, and load them into a model of the sizes that they were
saved with, parameters by their position in the optimizer. An outline is what is missing: it gives a freshly built model
those sizes before, and puts the optimizer's state in order afterwards, for where layers came the positions are others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.attaching import LimitLike
from espalier.errors import CheckpointError
from espalier.graph.named_tensors import tensor_table
from espalier.parallel.wrapped import unwrapped
from espalier.peers import check_whole
from espalier.structure import Structure
from espalier.train import checkpoint_files as files
from espalier.train.checkpoint_contents import contents_of
from espalier.train.checkpoint_loading import loaded
from espalier.train.checkpoint_network import SavedNetwork
from espalier.train.session import Session

_OTHER = ""
"""In place of the names of parameters that are not the model's, whose order among each other stays."""
Outline: TypeAlias = Mapping[str, Any]
"""Name of a file of a checkpoint -> JSON as text, or tensors by name; so that any loader of tensors reads it."""


def outline_of(session: Session) -> dict[str, Any]:
    """The outline of a training, to be kept beside what a trainer saves of the model and the optimizer.

    Raises:
        CheckpointError, SurgeryError: as `espalier.save`; CheckpointError also where copies follow the model.
        ParallelError: the network is sharded.
    """
    structure = session.structure
    check_whole(structure.peers, "an outline")
    if structure.surgery.follow:
        raise CheckpointError("copies that follow the model are in no outline; save with espalier.save.")
    contents = contents_of(structure, session)
    groups = contents.pop("optimizer.json")["groups"]
    known = tensor_table(structure.model).tensors
    contents["optimizer.json"] = {
        "order": [[name if name in known else _OTHER for name in group["params"]] for group in groups]
    }
    contents["optimizer.safetensors"] = {}
    kept_by_trainers = structure.model.state_dict().keys()
    tensors = contents["network.safetensors"]
    contents["network.safetensors"] = {name: one for name, one in tensors.items() if name not in kept_by_trainers}
    return {name: json.dumps(one) if name.endswith(".json") else dict(one) for name, one in contents.items()}


def write_outline(session: Session, folder: str | Path) -> None:
    """Write an outline to a folder. Raises as `outline_of`, and CheckpointError where it cannot be written."""
    outline = outline_of(session)
    files.write(Path(folder), {name: files.writer(name, _parsed(name, one)) for name, one in outline.items()})


def read_outline(folder: str | Path) -> dict[str, Any]:
    """What `write_outline` wrote. Raises CheckpointError if there is none, or a damaged one."""
    stored = files.Stored(files.read(Path(folder)))
    return {name: json.dumps(one) if name.endswith(".json") else one for name, one in stored.items()}


def reshaped(
    outline: Outline,
    model: nn.Module,
    example_inputs: Any,
    *,
    optimizer: Optimizer | None = None,
    keep: Iterable[str] = (),
    limits: Mapping[str, LimitLike] | None = None,
) -> Structure:
    """Attach to a freshly built model and give it the sizes, layers and masks of an outline; then values can be loaded.

    Until they are, parameters hold no numbers, so that one that is forgotten is noticed.

    Args:
        outline: of the training that goes on.
        model: built by the same code, at the sizes that it had before all edits.
        example_inputs: as for `espalier.attach`.
        optimizer: if it is there already; it is given the same parameters in the same order.
        keep, limits: as for `espalier.load`.

    Raises:
        CheckpointError: as `espalier.load`.
    """
    contents = {name: _parsed(name, one) for name, one in outline.items()}
    del contents["optimizer.json"], contents["optimizer.safetensors"]
    network = SavedNetwork.parsed(contents["network.json"])
    unsaved = contents["network.safetensors"]
    contents["network.safetensors"] = {
        name: unsaved[name] if name in unsaved else _nothing(one.shape, one.dtype)
        for name, one in network.tensors.items()
    }
    inside = unwrapped(model, optimizer, ())
    return inside.bind(loaded(contents, inside, example_inputs, optimizer, keep, limits, ()))


def put_in_order(outline: Outline, model: nn.Module, optimizer: Optimizer) -> None:
    """Give each parameter its own state, after a trainer gave it out by position.

    Raises:
        CheckpointError: the optimizer holds other parameters than the saved one, or in other groups.
    """
    saved: Sequence[Sequence[str]] = _parsed("optimizer.json", outline["optimizer.json"])["order"]
    tensors = tensor_table(model).tensors
    names = {id(tensor): name for name, tensor in tensors.items()}
    present = [[names.get(id(one), _OTHER) for one in group["params"]] for group in optimizer.param_groups]
    if [sorted(group) for group in present] != [sorted(group) for group in saved]:
        raise CheckpointError(
            "the optimizer holds other parameters than the saved one, or in other groups; build it in the same way."
        )
    for group, then in zip(optimizer.param_groups, saved, strict=True):
        others = iter([one for one in group["params"] if id(one) not in names])
        states = [optimizer.state.pop(one, None) for one in group["params"]]
        for name, state in zip(then, states, strict=True):
            owner = next(others) if name == _OTHER else tensors[name]
            if state is not None:
                optimizer.state[owner] = state


def continued(outline: Outline, session: Session) -> None:
    """Have a new session go on where the one of the outline was. Raises CheckpointError as `Session.load`."""
    session.load_parts(_parsed("session.json", outline["session.json"]), outline["session.safetensors"])


def _parsed(name: str, content: Any) -> Any:
    try:
        return json.loads(content) if name.endswith(".json") else content
    except (ValueError, TypeError) as problem:
        raise CheckpointError(f"{name} of the outline is damaged: {problem}.") from problem


def _nothing(shape: Sequence[int], dtype: str) -> Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    return torch.full(shape, float("nan") if kind.is_floating_point else 0, dtype=kind)


__all__ = ["Outline", "continued", "outline_of", "put_in_order", "read_outline", "reshaped", "write_outline"]
