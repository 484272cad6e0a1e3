"""Layers that can take another form: two thinner ones in place of one, or one in place of two."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import nn

from espalier.graph.regions import Refusal

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_AFFINE = (nn.Linear, *_CONVOLUTIONS)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is the `Conv1D` of transformers: a linear layer with a weight of (in, out)."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(module) is vars(library).get("Conv1D")


def factorisable(module: nn.Module) -> str:
    """Why a module cannot be two of lower rank, in words that follow its name; empty if it can."""
    if is_transposed(module):
        return "" if min(module.get_parameter("weight").shape) > 1 else "has rank 1 already"
    if type(module) not in _AFFINE or not isinstance(module, _AFFINE):
        return "is no linear layer and no convolution"
    if isinstance(module, _CONVOLUTIONS) and module.groups != 1:
        return f"is a convolution of {module.groups} groups, which is not one matrix"
    weight = module.weight
    if min(weight.shape[0], weight[0].numel()) < 2:
        return "has rank 1 already"
    return ""


def folding(modules: Mapping[str, nn.Module], path: str, before: str | None, after: str | None) -> str | Refusal:
    """The neighbour with which a layer can be one: for a batch norm the one before it, else first the one after it.

    `before` and `after` are the modules of its chain on either side, None where there is none: see `following`.
    """
    module = modules[path]
    if type(module) in _BATCH_NORMS:
        if before is None or type(modules[before]) not in _AFFINE:
            return Refusal("comes after no linear layer or convolution that hands its result to it alone")
        return before if getattr(module, "track_running_stats", False) else Refusal("keeps no running statistics")
    if type(module) not in _AFFINE:
        return Refusal("is no linear layer, no convolution and no batch norm")
    problem = "hands its result to no layer of its own kind alone, and gets that of none"
    for first, second in ((path, after), (before, path)):
        if first is not None and second is not None and type(modules[first]) is type(modules[second]):
            problem = _of_two(modules[first], modules[second])
            if not problem:
                return second if first == path else first
    return Refusal(problem)


def _of_two(first: nn.Module, second: nn.Module) -> str:
    """Why two layers of one kind cannot be one, in words that follow the name of either."""
    return "" if isinstance(first, nn.Linear) else _of_convolutions(first, second)


def _of_convolutions(first: nn.Module, second: nn.Module) -> str:
    assert isinstance(first, _CONVOLUTIONS)
    assert isinstance(second, _CONVOLUTIONS)
    if first.groups != 1 or second.groups != 1:
        return "is one of two convolutions of which one has groups"
    if _is_pointwise(second) and not _pads(second):
        return ""
    if not _is_pointwise(first) or _pads(first) or any(step != 1 for step in first.stride):
        return "is one of two convolutions of which neither is 1 x 1"
    if first.bias is not None and _pads(second):
        return "has a bias, which the padding of the next convolution does not get"
    return ""


def _is_pointwise(layer: nn.Module) -> bool:
    return isinstance(layer, _CONVOLUTIONS) and all(size == 1 for size in layer.kernel_size)


def _pads(layer: nn.Module) -> bool:
    assert isinstance(layer, _CONVOLUTIONS)
    if isinstance(layer.padding, str):
        return layer.padding != "valid" and not _is_pointwise(layer)
    return any(layer.padding)


__all__ = ["factorisable", "folding"]
