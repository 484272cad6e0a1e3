"""Layers that multiply with a weight and add a bias, read from modules and made into modules.

Only modules whose code is known are read: of exactly the class, not of one derived from it, without hooks and with
parameters that nothing computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from espalier.edit.recipes.placing import M
from espalier.edit.residual import CONVOLUTIONS
from espalier.errors import PlanError
from espalier.graph.forms import is_transposed

_CONVOLUTIONS = frozenset(CONVOLUTIONS.values())


@dataclass(frozen=True)
class Window:
    """How the kernels of a convolution meet its inputs."""

    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    mode: Literal["zeros", "reflect", "replicate", "circular"]
    """What is beyond the edge of the input."""


@dataclass(frozen=True)
class Affine:
    """y = W * x + b."""

    weight: Tensor
    """(out, in) of a linear layer, (out, in / groups, *kernel) of a convolution."""
    bias: Tensor | None
    window: Window | None
    """None for a linear layer."""

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel; empty for a linear layer."""
        return tuple(self.weight.shape[2:])

    @property
    def is_pointwise(self) -> bool:
        """Whether every output depends on one place of the input alone, and none on what is beyond the edge."""
        return all(size == 1 for size in self.kernel) and not self.pads

    @property
    def pads(self) -> bool:
        """Whether anything beyond the edge of the input is met."""
        padding = self.window.padding if self.window is not None else "valid"
        if isinstance(padding, str):
            return padding == "same" and any(size > 1 for size in self.kernel)
        return any(padding)


def check_plain(module: nn.Module, path: str) -> None:
    """Raises PlanError if more happens in a module than its class says, or its parameters are computed."""
    kind = type(module).__name__
    if is_parametrized(module):
        raise PlanError(
            f"{path} is parametrised, so that its weights are computed from others; fold the parametrisation in first "
            "(torch.nn.utils.parametrize.remove_parametrizations)."
        )
    if "forward" in vars(module):
        raise PlanError(f"{path} has a forward of its own in place of that of its class {kind}.")
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(hooks):
        raise PlanError(f"{path} has hooks (weight_norm and spectral_norm are some), which would be lost; remove them.")


def read(module: nn.Module, path: str) -> Affine:
    """The layer that a module is: `nn.Linear`, `nn.Conv1d` to `nn.Conv3d`, or `Conv1D` of Hugging Face.

    Raises:
        PlanError: it is something else, or not only that.
    """
    check_plain(module, path)
    if type(module) is nn.Linear:
        return Affine(module.weight, module.bias, None)
    if isinstance(module, _ConvNd) and type(module) in _CONVOLUTIONS:
        padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
        window = Window(tuple(module.stride), padding, tuple(module.dilation), module.groups, module.padding_mode)
        return Affine(module.weight, module.bias, window)
    if is_transposed(module):
        return Affine(module.get_parameter("weight").mT, module.get_parameter("bias"), None)
    raise PlanError(
        f"{path}: expected exactly nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d, found {_described(module)}, "
        "whose code may do something else."
    )


def _described(module: nn.Module) -> str:
    known = next((one.__name__ for one in (nn.Linear, *CONVOLUTIONS.values()) if isinstance(module, one)), None)
    return type(module).__name__ + (f", which is derived from {known}" if known else "")


def made(layer: Affine, like: nn.Module) -> nn.Module:
    """A module of a layer, with its own tensors, trained if those of a tensor's origin are, in the mode of a module.

    The weight may be of any type; the new one is of the type of the first parameter of `like`.
    """
    first = next(like.parameters())
    out, width = layer.weight.shape[:2]
    with torch.device("meta"):
        if layer.window is None:
            new: nn.Module = nn.Linear(width, out, bias=layer.bias is not None)
        else:
            window = layer.window
            new = CONVOLUTIONS[len(layer.kernel)](
                width * window.groups,
                out,
                layer.kernel,  # type: ignore[arg-type]
                window.stride,  # type: ignore[arg-type]
                window.padding,  # type: ignore[arg-type]
                window.dilation,  # type: ignore[arg-type]
                window.groups,
                layer.bias is not None,
                window.mode,
            )
    new.register_parameter("weight", _parameter(layer.weight, first))
    if layer.bias is not None:
        new.register_parameter("bias", _parameter(layer.bias, first))
    return in_mode(new, like)


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    own = values.detach().to(device=like.device, dtype=like.dtype, copy=True)
    return nn.Parameter(own.contiguous(memory_format=_memory_format(like, own)), values.requires_grad)


def _memory_format(like: Tensor, values: Tensor) -> torch.memory_format:
    for dim, last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if like.dim() == values.dim() == dim and not like.is_contiguous() and like.is_contiguous(memory_format=last):
            return last
    return torch.contiguous_format


def in_mode(new: M, like: nn.Module) -> M:
    """A new module in the mode, train or eval, of another."""
    new.train(like.training)
    return new


__all__ = ["Affine", "Window", "check_plain", "in_mode", "made", "read"]
