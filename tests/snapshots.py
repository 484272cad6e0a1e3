"""Everything that an edit may touch, written down bit by bit, so that two moments can be compared.

`snapshot(model, optimizer, structure)` is a plain mapping from a readable place to a value that compares with `==`;
`differences(before, after)` names the places that differ.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.structure import Structure

Snapshot = dict[str, Any]

_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})


def _bytes(tensor: Tensor) -> bytes:
    if type(tensor.detach()) is not Tensor:  # a fake tensor that a capture left behind, for one
        return type(tensor).__name__.encode()
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _frozen(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, memory layout, type, flags and every byte."""
    plain = tensor.detach()
    layout = (plain.dtype, plain.device, tuple(plain.shape), plain.stride(), plain.storage_offset())
    return (*layout, tensor.requires_grad, tensor.is_leaf, _bytes(plain))


def _value(value: Any) -> Any:
    """Tensors by their bytes, containers by their items, plain values as they are, other objects by identity."""
    if isinstance(value, Tensor):
        return ("tensor", _frozen(value))
    if isinstance(value, Mapping):
        return ("mapping", type(value), [(_key(key), _value(item)) for key, item in value.items()])
    if isinstance(value, (tuple, list)):
        return (type(value), [_value(item) for item in value])
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return (type(value), repr(value))
    return ("object", id(value))


def _key(key: Any) -> Any:
    return key if isinstance(key, (str, int)) else id(key)


def of_model(model: nn.Module) -> Snapshot:
    """Every tensor (which object, every byte, its gradient) and every attribute of every module."""
    found: Snapshot = {}
    for path, module in model.named_modules(remove_duplicate=False):
        place = path or "model"
        found[place] = id(module)
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                found[f"{place}.{key}"] = None if tensor is None else (id(tensor), type(tensor), _frozen(tensor))
                if tensor is not None:
                    found[f"{place}.{key} gradient"] = None if tensor.grad is None else _frozen(tensor.grad)
        found[f"{place} registries"] = tuple(tuple(module.__dict__[one]) for one in sorted(_REGISTRIES))
        for key, value in module.__dict__.items():
            if key not in _REGISTRIES:
                found[f"{place}.{key} attribute"] = _value(value)
                if key == "config":
                    found[f"{place}.config contents"] = _value(vars(value))
    return found


def of_optimizer(optimizer: Optimizer) -> Snapshot:
    """Groups with their options and parameters in order, and the state of every parameter, keys in order."""
    found: Snapshot = {"optimizer state": [id(parameter) for parameter in optimizer.state]}
    for number, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key != "params"}
        found[f"group {number}"] = (id(group), [id(parameter) for parameter in group["params"]], _value(options))
        for position, parameter in enumerate(group["params"]):
            entries = optimizer.state.get(parameter)
            found[f"state of parameter {position} of group {number}"] = None if entries is None else _value(entries)
    return found


def of_structure(structure: Structure) -> Snapshot:
    """What a structure says: shapes, limits, history, the example. What it learnt about ties may stay learnt."""
    topology = structure.topology
    return {
        "structure shapes": {name: topology.shape(name) for name in topology.tensors},
        "structure limits": dict(structure.limits),
        "structure history": tuple(id(edit) for edit in structure.history),
        "structure example": _value(structure.example),
        "structure model": (id(structure.model), id(structure.optimizer)),
    }


def snapshot(model: nn.Module, optimizer: Optimizer | None = None, structure: Structure | None = None) -> Snapshot:
    """All of it, the random state too."""
    found = {**of_model(model), "random state": _bytes(torch.get_rng_state())}
    if optimizer is not None:
        found |= of_optimizer(optimizer)
    if structure is not None:
        found |= of_structure(structure)
    return found


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """The places that are not as they were."""
    places = dict.fromkeys((*before, *after))
    return [place for place in places if before.get(place, "absent") != after.get(place, "absent")]
