"""Two layers in one: what is linear after what is linear, and batch norms as they are in eval mode."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.edit.promise import Promise
from espalier.edit.recipes.affine import Affine, check_plain, made, read
from espalier.edit.recipes.base import Lookup, Recipe, recipe
from espalier.edit.recipes.wiring import check_connected, check_dimensions, check_own
from espalier.errors import PlanError
from espalier.graph.topology import Topology

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@recipe
@dataclass(frozen=True)
class Folded(Recipe):
    """A layer with the one before or after it folded in; the other one is to be removed in the same plan.

    W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2). A batch norm in eval mode multiplies with gamma / sqrt(var + eps)
    and adds beta - mean gamma / sqrt(var + eps). Of two convolutions one must be 1 x 1.
    """

    kind: ClassVar[str] = "folded"
    other: str = ""
    """Path of the other layer. Empty: the layer is an `nn.Sequential`, whose layers are folded together."""
    after: bool = False
    """Whether the other one comes after the layer."""

    def build(self, module: Lookup, at: str) -> nn.Module:
        """The new layer; it is trained if one of those in it is. Raises PlanError if they cannot be folded."""
        parts = self._parts(module, at)
        like = next((part for part in parts.values() if type(part) not in BATCH_NORMS), None)
        if like is None:
            raise PlanError(f"{at}: expected a linear layer or a convolution to fold into, found batch norms only.")
        return made(_fold(parts), like)

    def promise(self, topology: Topology, module: Lookup, at: str, *, before: bool) -> Promise:
        """Exact, but for batch norms: what they are folded into is the same in eval mode only.

        Raises PlanError if the layers cannot be folded, or are not alone with each other.
        """
        parts = self._parts(module, at)
        self.build(module, at)
        paths = list(parts)
        for path, part in parts.items():
            check_own(topology, part, path)
        for first, second in pairwise(paths):
            check_connected(topology, first, second)
        norms = [path for path, part in parts.items() if type(part) in BATCH_NORMS]
        for path in norms:
            kernel = next(read(part, name).kernel for name, part in parts.items() if name not in norms)
            check_dimensions(topology, path, len(kernel) + 2)
        if norms:
            why = f"in train mode {norms[0]} uses the batch's own statistics; in eval mode nothing changes"
            return Promise("changing", why)
        return Promise("exact", f"{' and '.join(paths)} are linear one after the other")

    def absorbed(self) -> tuple[str, ...]:
        """The other one."""
        return (self.other,) if self.other else ()

    def _parts(self, module: Lookup, at: str) -> dict[str, nn.Module]:
        """The layers that are folded, by path, in the order in which they run."""
        if self.other:
            paths = [at, self.other] if self.after else [self.other, at]
            return {path: module(path) for path in paths}
        whole = module(at)
        if type(whole) is not nn.Sequential:
            raise PlanError(f"{at}: expected an nn.Sequential whose layers become one, found {type(whole).__name__}.")
        check_plain(whole, at)
        parts = {f"{at}.{name}": part for name, part in whole.named_children() if type(part) is not nn.Identity}
        if len(parts) < 2:
            raise PlanError(f"{at}: expected at least two layers in it to fold together, found {len(parts)}.")
        return parts


@dataclass(frozen=True)
class _Scale:
    """y = s x + t for every feature."""

    scale: Tensor
    shift: Tensor


@torch.no_grad()
def _fold(parts: dict[str, nn.Module]) -> Affine:
    """The one layer that several are, in double precision."""
    named = [(path, _read(part, path)) for path, part in parts.items()]
    places = {layer.weight.device if isinstance(layer, Affine) else layer.scale.device for _, layer in named}
    if len(places) > 1:
        raise PlanError(f"{' and '.join(parts)} are on several devices: {', '.join(sorted(map(str, places)))}.")
    _, whole = reduce(_folded, named)
    assert isinstance(whole, Affine)  # of two norms none is folded into the other
    return whole


_Named = tuple[str, Affine | _Scale]


def _read(part: nn.Module, path: str) -> Affine | _Scale:
    if type(part) not in BATCH_NORMS:
        layer = read(part, path)
        bias = layer.bias
        return replace(layer, weight=_wide(layer.weight), bias=None if bias is None else _wide(bias))
    check_plain(part, path)
    assert isinstance(part, nn.modules.batchnorm._BatchNorm)
    if part.running_mean is None or part.running_var is None:
        raise PlanError(f"{path} keeps no running statistics, so that it is not linear in eval mode either.")
    deviation = (_wide(part.running_var) + part.eps).sqrt()
    scale = 1 / deviation if not part.affine else _marked(_wide(part.weight) / deviation, part.weight)
    shift = -_wide(part.running_mean) * scale
    return _Scale(scale, _marked(shift + _wide(part.bias), part.bias) if part.affine else shift)


def _folded(first: _Named, second: _Named) -> _Named:
    """Two layers as one, with a name for errors."""
    (path, before), (other, after) = first, second
    refused = f"{path} cannot be folded together with {other}: "
    if isinstance(before, _Scale) and isinstance(after, _Scale):
        raise PlanError(f"{refused}both are batch norms.")
    if isinstance(after, _Scale):
        assert isinstance(before, Affine)
        return path, _scaled(before, after, refused)
    if isinstance(before, _Scale):
        return other, _composed(_diagonal(before, after), after, refused)
    return other, _composed(before, after, refused)


def _scaled(layer: Affine, norm: _Scale, refused: str) -> Affine:
    """A layer, then a batch norm."""
    if len(norm.scale) != len(layer.weight):
        raise PlanError(f"{refused}it gives {len(layer.weight)} features, not {len(norm.scale)}.")
    weight = layer.weight * norm.scale.view(-1, *(1 for _ in layer.weight.shape[1:]))
    shift = norm.shift if layer.bias is None else layer.bias * norm.scale + norm.shift
    biases = (norm.shift,) if layer.bias is None else (layer.bias, norm.shift)
    return replace(layer, weight=_marked(weight, layer.weight, norm.scale), bias=_marked(shift, *biases))


def _diagonal(norm: _Scale, layer: Affine) -> Affine:
    """A batch norm as the layer that it is before another one."""
    weight = norm.scale.diag()
    window = layer.window
    if window is not None:
        ones = tuple(1 for _ in layer.kernel)
        weight = weight.view(*weight.shape, *ones)
        window = replace(window, stride=ones, padding="valid", dilation=ones, groups=1, mode="zeros")
    return Affine(_marked(weight, norm.scale), norm.shift, window)


def _composed(first: Affine, second: Affine, refused: str) -> Affine:
    """A layer, then another one."""
    if len(first.kernel) != len(second.kernel):
        raise PlanError(f"{refused}one is {_words(first)}, the other {_words(second)}.")
    if any(layer.window is not None and layer.window.groups != 1 for layer in (first, second)):
        raise PlanError(f"{refused}a convolution in groups does not become one with another.")
    if len(first.weight) != second.weight.shape[1]:
        raise PlanError(f"{refused}one gives {len(first.weight)} features, the other takes {second.weight.shape[1]}.")
    trained = first.weight, second.weight
    bias = _bias(first, second)
    if first.window is None or second.window is None:
        return Affine(_marked(second.weight @ first.weight, *trained), bias, None)
    if second.is_pointwise:
        window = first.window
        if any(step != 1 for step in second.window.stride):
            stride = tuple(a * b for a, b in zip(window.stride, second.window.stride, strict=True))
            padding = window.padding if first.pads else tuple(0 for _ in stride)
            if isinstance(padding, str):
                raise PlanError(f"{refused}padding={padding!r} does not go with the stride of the second one.")
            window = replace(window, stride=stride, padding=padding)
        weight = torch.einsum("om,mi...->oi...", second.weight.flatten(1), first.weight)
        return Affine(_marked(weight, *trained), bias, window)
    if not first.is_pointwise or any(step != 1 for step in first.window.stride):
        raise PlanError(f"{refused}one of two convolutions must be 1 x 1 without padding, the first with stride 1.")
    if first.bias is not None and second.pads and second.window.mode == "zeros":
        raise PlanError(
            f"{refused}the second one pads with zeros what the bias of the first one has been added to, which no bias "
            "of one layer can repeat."
        )
    weight = torch.einsum("om...,mi->oi...", second.weight, first.weight.flatten(1))
    return Affine(_marked(weight, *trained), bias, second.window)


def _bias(first: Affine, second: Affine) -> Tensor | None:
    if first.bias is None:
        return second.bias
    through = second.weight.flatten(2).sum(2) if second.kernel else second.weight
    brought = through @ first.bias
    return (
        _marked(brought, first.bias) if second.bias is None else _marked(brought + second.bias, first.bias, second.bias)
    )


def _words(layer: Affine) -> str:
    return f"a convolution in {len(layer.kernel)} dimensions" if layer.kernel else "a linear layer"


def _wide(tensor: Tensor) -> Tensor:
    """In double precision, marked as trained if the tensor is."""
    return _marked(tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64), tensor)


def _marked(values: Tensor, *origins: Tensor) -> Tensor:
    return values.detach().requires_grad_(any(one.requires_grad for one in origins))


__all__ = ["BATCH_NORMS", "Folded"]
