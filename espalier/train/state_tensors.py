"""Tensors in the state of a session: apart from what JSON holds, as safetensors in a checkpoint or as text in JSON.

Memories of methods may hold tensors in their states, such as the weights of units that sleep. `apart` takes them out,
equal ones once, and leaves their names; `together` puts them back.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from espalier.errors import CheckpointError

_MARK = "espalier.tensor"


def apart(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """A state with names in place of its tensors, and the tensors by name, on the CPU."""
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    known: dict[int, str] = {}

    def name_of(tensor: Tensor) -> str:
        if id(tensor) not in known:
            value = tensor.detach().cpu().contiguous()
            digest = hashlib.sha256(_bytes(value)).digest()
            name = names.setdefault((str(value.dtype), tuple(value.shape), digest), str(len(tensors)))
            tensors.setdefault(name, value)
            known[id(tensor)] = name
        return known[id(tensor)]

    def without(part: Any) -> Any:
        match part:
            case Tensor():
                return {_MARK: name_of(part)}
            case Mapping():
                return {key: without(one) for key, one in part.items()}
            case list() | tuple():
                return [without(one) for one in part]
        return part

    return without(state), tensors


def together(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `apart` was given. Raises CheckpointError if a tensor is missing."""
    match data:
        case Mapping() if set(data) == {_MARK}:
            name = data[_MARK]
            if name not in tensors:
                raise CheckpointError(f"the session's state lacks tensor {name} of its {len(tensors)}; it is damaged.")
            return tensors[name]
        case Mapping():
            return {key: together(one, tensors) for key, one in data.items()}
        case list() | tuple():
            return [together(one, tensors) for one in data]
    return data


def to_text(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors as what JSON can hold: bytes in base64."""
    return {
        name: {
            "dtype": str(one.dtype).removeprefix("torch."),
            "shape": list(one.shape),
            "base64": base64.b64encode(_bytes(one)).decode("ascii"),
        }
        for name, one in tensors.items()
    }


def from_text(data: object) -> dict[str, Tensor]:
    """What `to_text` was given. Raises CheckpointError for anything else."""
    if not isinstance(data, Mapping):
        raise CheckpointError(f"tensors of the session's state: expected a mapping, found {type(data).__name__}.")
    found = {}
    for name, one in data.items():
        try:
            dtype = getattr(torch, str(one["dtype"]))
            held = bytearray(base64.b64decode(one["base64"], validate=True))
            flat = torch.frombuffer(held, dtype=dtype) if held else torch.zeros(0, dtype=dtype)
            found[name] = flat.view([int(size) for size in one["shape"]])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"tensor {name} of the session's state is damaged: {error}.") from error
    return found


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


__all__ = ["apart", "from_text", "to_text", "together"]
