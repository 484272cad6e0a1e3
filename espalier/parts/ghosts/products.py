"""The products with weights that a forward pass takes: what goes in, what comes out, as matrices.

Linear layers and convolutions are found where they run, by the weight that they are given, whether modules or plain
functions call them. A convolution is a product of its unfolded inputs with the weight as a matrix.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.overrides import TorchFunctionMode


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None: ...


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> None: ...


_ARGUMENTS: Mapping[Callable[..., Any], inspect.Signature] = {
    F.linear: inspect.signature(_linear),
    F.conv1d: inspect.signature(_convolution),
    F.conv2d: inspect.signature(_convolution),
    F.conv3d: inspect.signature(_convolution),
}
_WEIGHTS: Mapping[int, Callable[..., Tensor]] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}
"""Dimensions of a kernel -> gradient of the weight of such a convolution."""


@dataclass(frozen=True)
class Product:
    """One product: outputs of (samples, units, positions...) for a convolution, (samples, positions..., units) else."""

    function: Callable[..., Tensor]
    inputs: Tensor
    weight: Tensor
    bias: Tensor | None
    output: Tensor
    settings: Mapping[str, Any]
    """Stride, padding and dilation of a convolution, its groups among them."""

    @property
    def is_convolution(self) -> bool:
        """Whether units are dimension 1, or the last one."""
        return self.function is not F.linear

    @property
    def samples(self) -> int:
        """How many there are in the batch."""
        return len(self.inputs)

    @property
    def positions(self) -> tuple[int, ...]:
        """The dimensions of the outputs that are neither samples nor units."""
        shape = tuple(self.output.shape)
        return shape[2:] if self.is_convolution else shape[1:-1]

    def problem(self) -> str | None:
        """Why it cannot be written as a product of matrices with one row per sample and position."""
        if self.settings.get("groups", 1) != 1:
            return "is a convolution in groups"
        if self.is_convolution and self.inputs.dim() != self.weight.dim():
            return "is given inputs without a dimension for samples"
        return None

    def rows(self) -> Tensor:
        """The inputs as (samples * positions, entries of the weight per unit), with a column of ones for a bias."""
        inputs = self.inputs.detach()
        if self.is_convolution:
            inputs = self._windows(self._padded(inputs)).flatten(1 - self.weight.dim())
        rows = inputs.reshape(-1, inputs.shape[-1])
        return rows if self.bias is None else torch.cat([rows, torch.ones_like(rows[:, :1])], 1)

    def units_last(self, like_output: Tensor) -> Tensor:
        """A tensor of the shape of the outputs as (samples * positions, units)."""
        moved = like_output.movedim(1, -1) if self.is_convolution else like_output
        return moved.reshape(-1, moved.shape[-1])

    def crossed(self, like_output: Tensor, given: Tensor) -> Tensor:
        """Sum over samples and positions of a tensor of the shape of the outputs, times what each entry of the weight
        reads of one that is given in place of the inputs, with any units: (entries that read a unit, given units).

        Args:
            like_output: of the shape of the outputs.
            given: of the shape of the inputs, but for the units.
        """
        if not self.is_convolution:
            return like_output.flatten(0, -2).T @ given.flatten(0, -2)
        shape = (like_output.shape[1], given.shape[1], *self.weight.shape[2:])
        strides, dilations = self._each("stride", 1), self._each("dilation", 1)
        # as the gradient of a weight that reads what is given
        sums = _WEIGHTS[len(strides)](self._padded(given), shape, like_output, strides, 0, dilations)
        return sums.movedim(1, -1).flatten(0, -2)

    def _windows(self, padded: Tensor) -> Tensor:
        """All that the kernel covers: (samples, positions..., channels, kernel...)."""
        kernel, dilations, strides = self.weight.shape[2:], self._each("dilation", 1), self._each("stride", 1)
        for dim, (size, dilation, stride) in enumerate(zip(kernel, dilations, strides, strict=True)):
            padded = padded.unfold(2 + dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
        return padded.movedim(1, 1 + len(kernel))

    def _each(self, name: str, default: int) -> tuple[int, ...]:
        """A setting for every dimension of the kernel."""
        value = self.settings.get(name, default)
        count = self.weight.dim() - 2
        return (value,) * count if isinstance(value, int) else tuple(value) * (count if len(value) == 1 else 1)

    def _padded(self, like_input: Tensor) -> Tensor:
        return F.pad(like_input, [one for before, after in reversed(self._padding()) for one in (before, after)])

    def _padding(self) -> tuple[tuple[int, int], ...]:
        """Zeros before and after the inputs, for every dimension of the kernel."""
        if self.settings.get("padding") == "same":
            reach = [(size - 1) * by for size, by in zip(self.weight.shape[2:], self._each("dilation", 1), strict=True)]
            return tuple((one // 2, one - one // 2) for one in reach)
        if self.settings.get("padding") == "valid":
            return ((0, 0),) * (self.weight.dim() - 2)
        return tuple((one, one) for one in self._each("padding", 0))


class Watched(TorchFunctionMode):
    """While it is entered: every product with one of the given weights, by name, in `found`."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self.found: dict[str, list[Product]] = {name: [] for name in weights}

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        signature = _ARGUMENTS.get(func)
        if signature is None:
            return output
        given = signature.bind(*args, **(kwargs or {})).arguments
        name = self._names.get(id(given["weight"]))
        if name is None:
            return output
        settings = {key: value for key, value in given.items() if key not in ("input", "weight", "bias")}
        found = Product(func, given["input"], given["weight"], given.get("bias"), output, settings)
        self.found[name].append(found)
        return output.clone()  # what follows may change it in place, and its gradient would be another one

    def only(self, name: str) -> Product | str:
        """The one product with a weight, or why there is none that can be looked at."""
        found = self.found[name]
        if len(found) != 1:
            times = "never" if not found else f"{len(found)} times"
            return f"{name} is {times} the weight of a linear layer or a convolution"
        problem = found[0].problem()
        return found[0] if problem is None else f"{name} {problem}"


__all__ = ["Product", "Watched"]
