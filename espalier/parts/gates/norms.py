"""Norms and means across a gated axis: they take their statistics over the units that gates leave.

With gates z on the units of h a LayerNorm has the mean sum z h / sum z and the variance sum z (h - mean)^2 / sum z, an
RMSNorm the mean square sum z h^2 / sum z, a group norm the same within each of its groups, and a mean is sum z h /
sum z. With z of 0 and 1 that is what they compute where the other units are gone.

What the network calls is told apart while it runs: a norm by its scale, which is the tensor that it is handed, and
what has none, or a mean that is part of a norm written by hand, by the module in whose own forward it runs and by the
sizes that it runs over. So hand-written code computes as ever, in its own types, but for its means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from espalier.edit.norms import NormSite, mean_dims
from espalier.errors import MethodError
from espalier.graph.capture import Call
from espalier.graph.dims import axes_of, labels, size_of
from espalier.graph.flow import operator_name
from espalier.graph.topology import Topology, TracePrediction

Form = tuple[object, ...]
"""What tells the norms of one module apart: their kind, and the sizes that they run over."""
Mark = tuple[str, Form]
"""The scale and an empty form, or the module and the form."""


@dataclass(frozen=True, eq=False)
class NormGate:
    """A norm or mean whose statistics leave out what gates shut."""

    mark: Mark
    units: tuple[Tensor, ...]
    """For every dimension over which it runs the unit of each position; -1 for none."""
    always: bool
    """Whether every pass of the network runs it."""
    over: frozenset[str] = frozenset()
    """The axes of the dimensions over which it runs."""

    def factor(self, values: Tensor) -> Tensor:
        """What the positions count under gates of the units: shape of the dimensions over which the norm runs."""
        found = values.new_ones(())
        for units in self.units:
            found = found[..., None] * torch.cat([values, values.new_ones(1)])[units.to(values.device)]
        return found


def norm_gates(
    topology: Topology, number: int, sites: Sequence[tuple[TracePrediction, NormSite]]
) -> tuple[NormGate, ...] | str:
    """How the norms and means across an axis are known when they run, or why one of them is not."""
    found: dict[Mark, NormGate] = {}
    own: dict[int, set[int]] = {id(one): set() for one in topology.predictions}
    for prediction, site in sites:
        own[id(prediction)] |= site.calls
    decided = any(one.decisions is not None for one in topology.predictions)
    for prediction, site in sites:
        (index,) = site.calls
        mark = _mark(topology, prediction, prediction.calls[index])
        units = tuple(torch.from_numpy(labels(dim, topology.sizes, number)) for dim in site.normal)
        passes = ({_mark(topology, one, one.calls[at]) for at in own[id(one)]} for one in topology.predictions)
        over = frozenset(topology.axes[axis].name for dim in site.normal for axis in axes_of(dim))
        gate = NormGate(mark, units, not decided and all(mark in marks for marks in passes), over)
        known = found.setdefault(mark, gate)
        other = _other(topology, own, mark)
        if other is not None or not _equal(known.units, units):
            return f"the norm {prediction.calls[index].where} cannot be told from another one there"
    return tuple(found.values())


def norm_modules(topology: Topology) -> frozenset[str]:
    """The modules in whose own forwards norms or means run."""
    return frozenset(call.module for one in topology.predictions for call in one.calls if operator_name(call) in _NORMS)


def _other(topology: Topology, own: Mapping[int, set[int]], mark: Mark) -> Call | None:
    """A call that looks like a norm across the axis, and is none."""
    for prediction in topology.predictions:
        for call in prediction.calls:
            is_norm = operator_name(call) in _NORMS and call.module == mark[0]
            if is_norm and call.index not in own[id(prediction)] and _form(topology, prediction, call) == mark[1]:
                return call
    return None


def _mark(topology: Topology, prediction: TracePrediction, call: Call) -> Mark:
    weight = call.arguments().get("weight")
    name = None if weight is None else prediction.flow.names.get(weight.index)
    return (call.module, _form(topology, prediction, call)) if name is None else (name, ())


def _form(topology: Topology, prediction: TracePrediction, call: Call) -> Form:
    name, a = operator_name(call), call.arguments()
    dims = prediction.dims[call.args[0].index]
    sizes = [size_of(one, topology.sizes) for one in dims]
    if name == "native_group_norm":
        groups = next((dim for key, dim in prediction.expectations.get(call.index, ()) if key == "group"), None)
        return "group", a["group"] if groups is None else size_of(groups, topology.sizes), sizes[1]
    if name == "native_layer_norm":
        return "layer", tuple(sizes[-len(a["normalized_shape"]) :])
    over = mean_dims(prediction, call) if name == "mean" else range(len(dims))[-len(a["normalized_shape"]) :]
    return "mean", len(dims), tuple(over), tuple(sizes[dim] for dim in over)


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


_NORMS = frozenset({"native_layer_norm", "native_group_norm", "_fused_rms_norm", "rms_norm", "mean"})


@contextmanager
def left_out(
    model: nn.Module,
    watched: Iterable[str],
    factors: Mapping[Mark, Tensor],
    scales: Mapping[int, Mark],
    always: Iterable[Mark],
) -> Iterator[None]:
    """Run the body with norms and means over what these factors leave.

    Args:
        model: the network.
        watched: the modules in whose own forwards norms or means run, by path.
        factors: for every norm, by its mark, what its positions count.
        scales: id of the tensors that are scales now -> mark.
        always: the marks of those that run whenever the network does.

    Raises:
        MethodError: the network ran, and one of those did not.
    """
    mode = _Statistics(factors, scales)
    held: list[tuple[nn.Module, Any]] = []
    try:
        for path in {"", *watched}:
            module = model.get_submodule(path)
            held.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = partial(mode.within, path, module.forward)
        with mode:
            yield
    finally:
        for module, before in held:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
    missing = [mark for mark in always if mark not in mode.seen]
    if mode.ran and missing:
        raise MethodError(
            f"{missing[0][0] or 'the model'}: a norm runs across gated units there and was not seen to run; gates need "
            "the network run as it was attached, not compiled."
        )


class _Statistics(TorchFunctionMode):
    """Replaces norms and means that are known by their marks."""

    def __init__(self, factors: Mapping[Mark, Tensor], scales: Mapping[int, Mark]) -> None:
        super().__init__()
        self._factors = factors
        self._scales = dict(scales)
        self._within: list[str | None] = [None]
        self._kept: list[Tensor] = []
        self.seen: set[Mark] = set()
        self.ran = False
        """Whether the network ran, to its end."""

    def within(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the forward of a module."""
        self._within.append(path)
        try:
            result = forward(*args, **kwargs)
            self.ran |= not path
            return result
        finally:
            self._within.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        handler = _HANDLERS.get(func)
        if handler is not None:
            found = handler(self, *args, **given)
            if found is not None:
                return found
        result = func(*args, **given)
        if func in _CASTS and id(args[0]) in self._scales and isinstance(result, Tensor):
            self._kept.append(result)  # as long as its id stands for it
            self._scales[id(result)] = self._scales[id(args[0])]
        return result

    def _factor(self, weight: Tensor | None, form: Form, x: Tensor) -> Tensor | None:
        """What the positions count, where the call is one of those that leave units out."""
        mark: Mark = self._scales.get(id(weight), (self._within[-1] or "", form))
        factor = self._factors.get(mark)
        if factor is None or self._within[-1] is None:
            return None
        self.seen.add(mark)
        return factor.to(x.device, torch.promote_types(x.dtype, torch.float32))

    def layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Tensor | None:
        factor = self._factor(weight, ("layer", tuple(normalized_shape)), input)
        if factor is None:
            return None
        return _affine(_normalised(input, factor, tuple(range(-factor.dim(), 0)), eps), weight, bias, input)

    def rms_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor | None:
        rank, count = input.dim(), len(normalized_shape)
        form = "mean", rank, tuple(range(rank - count, rank)), tuple(normalized_shape)
        factor = self._factor(weight, form, input)
        if factor is None:
            return None
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        x = input.to(factor.dtype)
        square = _mean(x.square(), factor, tuple(range(-count, 0)), keepdim=True)
        return _affine(x * (square + eps).rsqrt(), weight, None, input)

    def group_norm(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> Tensor | None:
        factor = self._factor(weight, ("group", num_groups, input.shape[1]), input)
        if factor is None:
            return None
        grouped = input.reshape(len(input), num_groups, input.shape[1] // num_groups, -1)
        within = factor.view(1, num_groups, -1, 1).expand(-1, -1, -1, grouped.shape[-1])
        normal = _normalised(grouped, within, (-2, -1), eps).view(input.shape)
        behind = [1] * (input.dim() - 2)
        scale, shift = (None if one is None else one.view(-1, *behind) for one in (weight, bias))
        return _affine(normal, scale, shift, input)

    def mean(
        self,
        input: Tensor,
        dim: int | Sequence[int] | None = None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
        axis: int | Sequence[int] | None = None,
        **others: Any,
    ) -> Tensor | None:
        rank = input.dim()
        dim = axis if dim is None else dim
        chosen = range(rank) if dim is None else [dim] if isinstance(dim, int) else dim
        dims = sorted(one % rank for one in chosen) if rank else []
        factor = self._factor(None, ("mean", rank, tuple(dims), tuple(input.shape[one] for one in dims)), input)
        if factor is None or others:
            return None
        shape = [input.shape[one] if one in dims else 1 for one in range(rank)]
        found = _mean(input.to(factor.dtype), factor.view(shape), tuple(dims), keepdim)
        return found.to(input.dtype if dtype is None else dtype)


def _mean(x: Tensor, factor: Tensor, dims: tuple[int, ...], keepdim: bool = False) -> Tensor:
    """The mean over some dimensions of what a factor leaves, which is as long as x along them and broadcasts."""
    count = factor.sum(dims, keepdim=keepdim).clamp_min(torch.finfo(factor.dtype).tiny)
    return (x * factor).sum(dims, keepdim=keepdim) / count


def _normalised(x: Tensor, factor: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    x = x.to(factor.dtype)
    centred = x - _mean(x, factor, dims, keepdim=True)
    return centred * (_mean(centred.square(), factor, dims, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor:
    """With scale and shift, in the type that the norm would give back."""
    x = x if weight is None else x * weight
    x = x if bias is None else x + bias
    return x if torch.is_autocast_enabled(like.device.type) else x.to(like.dtype)


_HANDLERS: Mapping[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _Statistics.layer_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _Statistics.rms_norm),
    **dict.fromkeys((F.group_norm, torch.group_norm), _Statistics.group_norm),
    **dict.fromkeys((Tensor.mean, torch.mean), _Statistics.mean),
}
_CASTS = frozenset({Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type, Tensor.type_as})


__all__ = ["Mark", "NormGate", "left_out", "norm_gates"]
