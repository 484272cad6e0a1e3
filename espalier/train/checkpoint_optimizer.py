"""An optimizer as JSON and named tensors: its state by the names of parameters, and the options of its groups.

State may be any nesting of lists, tuples, dictionaries, numbers and tensors (LBFGS keeps lists of tensors). A tensor
stands in the JSON as a reference to the safetensors file; two entries that are one tensor are one again when loaded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from espalier.edit.tensors import memory_order
from espalier.errors import CheckpointError

Json = Any

_NOT_SAVED: Final = frozenset({"params", "param_names", "foreach", "fused", "capturable", "differentiable"})
"""The parameters of a group, and options that say how and not what to compute: the user's optimizer keeps its own."""


@dataclass(frozen=True)
class RestoredOptimizer:
    """What an optimizer has to hold to go on as the saved one would."""

    state: defaultdict[Tensor, dict[str, Any]]
    options: Sequence[Mapping[str, Any]]
    """Of every group."""


def described(optimizer: Optimizer, names: Mapping[int, str]) -> tuple[dict[str, Json], dict[str, Tensor]]:
    """The optimizer as JSON and tensors; `names` are those of the model's parameters, by id.

    Options of groups that JSON cannot hold (functions) are left out: the user's optimizer brings them.
    Raises CheckpointError for state that can be neither JSON nor tensors.
    """
    encoder = _Encoder()
    state: dict[str, Json] = {}
    groups: list[Json] = []
    for number, group in enumerate(optimizer.param_groups):
        members = _members(group, number, names)
        for name, parameter in members.items():
            if parameter in optimizer.state:
                entries = optimizer.state[parameter]
                try:
                    state[name] = {
                        str(key): encoder(entry, f"{name}:{key}", parameter) for key, entry in entries.items()
                    }
                except TypeError as error:
                    raise CheckpointError(
                        f"the {type(optimizer).__name__} state of {name} cannot be saved: {error}; expected numbers, "
                        "tensors, and lists, tuples and dictionaries of them."
                    ) from error
        options: dict[str, Json] = {}
        for key, option in group.items():
            if key not in _NOT_SAVED and _is_plain(option):
                options[key] = encoder(option, f"group {number}:{key}", None)
        groups.append({"params": list(members), "options": options})
    data = {
        "module": type(optimizer).__module__,
        "class": type(optimizer).__qualname__,
        "groups": groups,
        "state": state,
    }
    return data, encoder.tensors


def restored(
    optimizer: Optimizer, names: Mapping[int, str], data: Mapping[str, Json], tensors: Mapping[str, Tensor]
) -> RestoredOptimizer:
    """What `described` described, for the parameters of `optimizer`; changes nothing.

    Raises:
        CheckpointError: the optimizer is of another type or has other groups, or the description is damaged.
    """
    try:
        _check_type(optimizer, str(data["module"]), str(data["class"]))
        saved_groups = data["groups"]
        if len(saved_groups) != len(optimizer.param_groups):
            raise CheckpointError(
                f"the saved optimizer has {len(saved_groups)} parameter groups, this one has "
                f"{len(optimizer.param_groups)}; build it with the same groups."
            )
        decoder = _Decoder(tensors)
        state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        options: list[Mapping[str, Any]] = []
        for number, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
            members = _members(group, number, names)
            _check_members(number, list(members), saved["params"])
            on_device = bool(group.get("capturable") or group.get("fused"))
            for name, parameter in members.items():
                if name in data["state"]:
                    state[parameter] = {
                        key: decoder(entry, _home(key, entry, parameter, on_device))
                        for key, entry in data["state"][name].items()
                    }
            options.append(
                {
                    key: decoder(option, _device_of(group.get(key)))
                    for key, option in saved["options"].items()
                    if key not in _NOT_SAVED
                }
            )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"the saved optimizer is damaged: {type(error).__name__}: {error}.") from error
    return RestoredOptimizer(state, options)


class _Encoder:
    """Values to JSON; the tensors in them are collected."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[int, Json] = {}

    def __call__(self, value: Any, name: str, parameter: Tensor | None) -> Json:
        """Raises TypeError for what is neither plain data nor a tensor."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            if id(value) not in self._known:
                stays = parameter is not None and value.device != parameter.device
                self._known[id(value)] = {"tensor": name, "order": list(memory_order(value)), "on_host": stays}
                self.tensors[name] = value
            return self._known[id(value)]
        if isinstance(value, (list, tuple)):
            items = [self(item, f"{name}.{position}", parameter) for position, item in enumerate(value)]
            return {"tuple" if isinstance(value, tuple) else "list": items}
        if isinstance(value, Mapping):
            return {"dict": {_text(key): self(item, f"{name}.{key}", parameter) for key, item in value.items()}}
        raise TypeError(f"{name} is a {type(value).__name__}")


class _Decoder:
    """JSON back to values, every tensor on its own memory, in its layout, on the device asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._known: dict[str, Tensor] = {}

    def __call__(self, data: Json, device: torch.device) -> Any:
        """Raises KeyError, TypeError or ValueError for what no encoder wrote."""
        if data is None or isinstance(data, (bool, int, float, str)):
            return data
        if "tensor" in data:
            name = str(data["tensor"])
            if name not in self._known:
                self._known[name] = laid_out(self._tensors[name], data["order"], device)
            return self._known[name]
        if "dict" in data:
            return {key: self(item, device) for key, item in data["dict"].items()}
        items = [self(item, device) for item in data["tuple" if "tuple" in data else "list"]]
        return tuple(items) if "tuple" in data else items


def laid_out(value: Tensor, order: Sequence[int], device: torch.device) -> Tensor:
    """A copy of `value` on `device` with its dimensions in memory in the given order, outermost first.

    Raises ValueError if `order` does not order the dimensions of `value`.
    """
    if sorted(order) != list(range(value.dim())):
        raise ValueError(f"{list(order)} is no order of {value.dim()} dimensions")
    inverse = [list(order).index(dim) for dim in range(value.dim())]
    result = torch.empty([value.shape[dim] for dim in order], dtype=value.dtype, device=device).permute(inverse).data
    return result.copy_(value)


def _members(group: Mapping[str, Any], number: int, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The parameters of a group by name; those that are not the model's by their place."""
    return {
        names.get(id(parameter), f"group {number}, parameter {position}"): parameter
        for position, parameter in enumerate(group["params"])
    }


def _check_type(optimizer: Optimizer, module: str, name: str) -> None:
    found = type(optimizer)
    # a class of the user's own script moves when the script is imported
    same_place = module == found.__module__ or "__main__" in (module, found.__module__)
    if name != found.__qualname__ or not same_place:
        raise CheckpointError(
            f"the network was saved with the optimizer {module}.{name}, found {found.__module__}.{found.__qualname__}; "
            "build one of the saved type, or pass optimizer=None to load the network alone."
        )


def _check_members(number: int, found: Sequence[str], saved: Sequence[str]) -> None:
    different = sorted(set(found) ^ set(saved))
    if different:
        which = "only the saved optimizer" if different[0] in saved else "only this optimizer"
        raise CheckpointError(
            f"parameter group {number} of the optimizer should hold the same parameters as when it was saved, but "
            f"{which} has {different[0]!r} there; build the optimizer with the same groups."
        )


def _home(key: str, entry: Json, parameter: Tensor, on_device: bool) -> torch.device:
    """Where a state lives: with its parameter, unless it did not when saved, or is a step that only Python reads."""
    on_host = isinstance(entry, dict) and bool(entry.get("on_host"))
    return torch.device("cpu") if on_host or (key == "step" and not on_device) else parameter.device


def _device_of(option: object) -> torch.device:
    return option.device if isinstance(option, Tensor) else torch.device("cpu")


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _text(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"the key {key!r} is a {type(key).__name__}")
    return key


__all__ = ["RestoredOptimizer", "described", "laid_out", "restored"]
