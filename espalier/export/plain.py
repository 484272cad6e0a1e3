"""What every exported file begins with: plain torch, which brings a freshly built model to what was exported.

The text of these functions is copied into the files as it stands. They use the tables of the file: `ATTRIBUTES`,
`BUILT`, `ORDER`, and the function `change_layers`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def children(module: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Give a module other children."""
    module._modules.clear()
    for key, child in new.items():
        module._modules[key] = child


def blank(kind: type[nn.Module], parameters: Sequence[str], attributes: Mapping[str, Any]) -> nn.Module:
    """A module of which everything is given."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    vars(module).update(attributes)
    for name in parameters:
        module.register_parameter(name, nn.Parameter(torch.empty(())))
    return module


def set_attribute(module: nn.Module, path: Sequence[str], value: Any) -> None:
    """Set a number that repeats a size; one in a configuration, which modules may share, in a copy of it."""
    if len(path) == 1:
        setattr(module, path[0], value)
        return
    configuration = copy.copy(vars(module)[path[0]])
    setattr(configuration, path[1], value)
    vars(module)[path[0]] = configuration


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once, by the first of its names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), (f"{path}.{name}" if path else name, tensor))
    return dict(found.values())


def fill(
    model: nn.Module,
    values: Mapping[str, Tensor],
    built: Mapping[str, tuple[int, ...]],
    order: Mapping[str, Sequence[int]],
) -> None:
    """Give all parameters and buffers the saved sizes and values, with their dimensions in that order in memory."""
    tensors = tensors_of(model)
    if tensors.keys() != values.keys():
        names = ", ".join(sorted(tensors.keys() ^ values.keys()))
        raise RuntimeError(f"the model is not the one that was exported; only one of the two has {names}.")
    for name, tensor in tensors.items():
        value = values[name]
        expected = tuple(built.get(name, value.shape))
        if tuple(tensor.shape) != expected:
            raise RuntimeError(f"{name}: expected shape {expected} as it is built, found {tuple(tensor.shape)}.")
        if name in order:
            back = [list(order[name]).index(dim) for dim in range(value.dim())]
            value = value.permute(*order[name]).contiguous().permute(*back)
        # in memory of its own: values in a file lie at any address, and kernels round by where tensors begin
        tensor.data = value.clone().to(tensor.device)


__all__ = ["blank", "children", "fill", "set_attribute", "tensors_of"]
