"""Norms, means and their like over the units that gates leave, while the network runs.

With gates z on the units of h and n = sum z, what runs across them is evaluated as

    mean         sum z h / n                      LayerNorm   (h - mean) / sqrt(sum z (h - mean)^2 / n + eps)
    variance     sum z (h - mean)^2 / (n - c)     RMSNorm     h / sqrt(sum z h^2 / n + eps)
    maximum      of all h with z > 0              group norm  as LayerNorm, within each of its groups
    softmax      z exp(h) / sum z exp(h)

With z of 0 and 1 that is what they compute where the other units are gone. Code computes as ever, in its own types, but
for these calls. In lower precision than single they are evaluated in single.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from espalier.errors import MethodError
from espalier.parts.gates.norms import Form, Mark, NormGate
from espalier.parts.gates.weighted import normalised

Dims = int | Sequence[int] | None


@contextmanager
def left_out(
    model: nn.Module,
    watched: Iterable[str],
    factors: Mapping[Mark, Tensor],
    scales: Mapping[int, Mark],
    gates: Iterable[NormGate],
) -> Iterator[None]:
    """Run the body with norms, means and their like over what these factors leave.

    Args:
        model: the network.
        watched: the modules in whose own forwards any of them run, by path.
        factors: for every one that leaves something out, by its mark, what its positions count.
        scales: id of the tensors that are scales now -> mark.
        gates: of these.

    Raises:
        MethodError: a module ran, and one that always runs in it was not seen.
    """
    mode = _Statistics(factors, scales)
    held: list[tuple[nn.Module, Any]] = []
    try:
        for path in watched:
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
    for one in gates:
        if one.always and one.module in mode.ran and one.mark not in mode.seen:
            raise MethodError(
                f"{one.mark.name or 'the model'}: what runs across gated units there was not seen to run; gates need "
                "the network run as it was attached, not compiled."
            )


class _Statistics(TorchFunctionMode):
    """Replaces calls that are known by their marks."""

    def __init__(self, factors: Mapping[Mark, Tensor], scales: Mapping[int, Mark]) -> None:
        super().__init__()
        self._factors = factors
        self._scales = dict(scales)
        self._marks: dict[str, list[tuple[Form, Mark]]] = {}
        for mark in factors:
            if mark.form is not None:
                self._marks.setdefault(mark.name, []).append((mark.form, mark))
        self._brought: dict[tuple[Mark, torch.device, torch.dtype], Tensor] = {}
        self._shares: dict[int, Tensor] = {}
        """id of a factor in `_brought` -> it, divided by its sum."""
        self._within: list[str] = []
        self._kept: list[Tensor] = []
        self.seen: set[Mark] = set()
        self.ran: set[str] = set()
        """The modules, of those that are watched, that ran to their end."""

    def within(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the forward of a module."""
        self._within.append(path)
        try:
            result = forward(*args, **kwargs)
        finally:
            self._within.pop()
        self.ran.add(path)
        return result

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        handler = _HANDLERS.get(func) if self._within else None
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
        mark = self._scales.get(id(weight))
        if mark is None:
            mark = next((mark for one, mark in self._marks.get(self._within[-1], ()) if one.fits(form)), None)
        if mark is None:
            return None
        self.seen.add(mark)
        at = mark, x.device, torch.promote_types(x.dtype, torch.float32)
        if at not in self._brought:
            self._brought[at] = self._factors[mark].to(at[1], at[2])
        return self._brought[at]

    # --- norms

    def layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Tensor | None:
        factor = self._factor(weight, Form("layer", tuple(normalized_shape)), input)
        if factor is None:
            return None
        if factor.dim() == 1 and not factor.requires_grad:
            normal = normalised(input.to(factor.dtype), self._share(factor), eps)
        else:
            normal = _normalised(input, factor, tuple(range(-factor.dim(), 0)), eps)
        return _affine(normal, weight, bias, input)

    def _share(self, factor: Tensor) -> Tensor:
        if id(factor) not in self._shares:
            self._shares[id(factor)] = factor / factor.sum().clamp_min(torch.finfo(factor.dtype).tiny)
        return self._shares[id(factor)]

    def rms_norm(
        self, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor | None:
        rank, count = input.dim(), len(normalized_shape)
        form = Form("mean", tuple(normalized_shape), rank, tuple(range(rank - count, rank)))
        factor = self._factor(weight, form, input)
        if factor is None:
            return None
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        x = input.to(factor.dtype)
        square = _mean(x.square(), factor, tuple(range(-count, 0)))
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
        factor = self._factor(weight, Form("group", (num_groups, input.shape[1])), input)
        if factor is None:
            return None
        grouped = input.reshape(len(input), num_groups, input.shape[1] // num_groups, -1)
        within = factor.view(1, num_groups, -1, 1).expand(-1, -1, -1, grouped.shape[-1])
        normal = _normalised(grouped, within, (-2, -1), eps).view(input.shape)
        behind = [1] * (input.dim() - 2)
        scale, shift = (None if one is None else one.view(-1, *behind) for one in (weight, bias))
        return _affine(normal, scale, shift, input)

    # --- means and their like

    def _reduced(self, kind: str, x: Tensor, dim: Dims) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
        """The values, what they count, of the same shape along the dimensions that go, and these."""
        rank = x.dim()
        chosen = range(rank) if dim is None or dim == () or dim == [] else [dim] if isinstance(dim, int) else dim
        dims = tuple(sorted(one % rank for one in chosen)) if rank else ()
        factor = self._factor(None, Form(kind, tuple(x.shape[one] for one in dims), rank, dims), x)
        if factor is None:
            return None
        shape = [factor.shape[dims.index(one)] if one in dims else 1 for one in range(rank)]
        whole = [x.shape[one] if one in dims else 1 for one in range(rank)]
        return x.to(factor.dtype), factor.view(shape).expand(whole), dims

    def mean(
        self, input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None,
        axis: Dims = None, **others: Any,
    ) -> Tensor | None:  # fmt: skip
        found = self._reduced("mean", input, axis if dim is None else dim)
        return None if found is None else _kept(_mean(*found), found[2], keepdim).to(dtype or input.dtype)

    def variance(self, kind: str, input: Tensor, *args: Any, **options: Any) -> Tensor | None:
        """``var(unbiased)``, ``var(dim, unbiased, keepdim)`` and ``var(dim, correction=, keepdim=)``."""
        if args and isinstance(args[0], bool):
            args = (None, *args)
        given = dict(zip(("dim", "unbiased", "keepdim"), args, strict=False)) | options
        found = self._reduced(kind, input, given.get("dim", given.get("axis")))
        if found is None:
            return None
        unbiased, correction = given.get("unbiased"), given.get("correction")
        less = correction if correction is not None else 1 if unbiased is None else int(unbiased)
        x, factor, dims = found
        squares = (factor * (x - _mean(x, factor, dims)).square()).sum(dims, keepdim=True)
        value = squares / (factor.sum(dims, keepdim=True) - less).clamp_min(torch.finfo(x.dtype).tiny)
        if kind == "std":
            value = torch.where(value > 0, torch.where(value > 0, value, 1.0).sqrt(), 0.0)  # no gradient at zero
        return _kept(value, dims, bool(given.get("keepdim"))).to(input.dtype)

    def extreme(self, kind: str, input: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor | None:
        found = self._reduced(kind, input, dim)
        if found is None:
            return None
        x, factor, dims = found
        ends = torch.finfo(x.dtype)
        if kind == "amax":
            value = torch.where(factor > 0, x, ends.min).amax(dims, keepdim=True)
        else:
            value = torch.where(factor > 0, x, ends.max).amin(dims, keepdim=True)
        return _kept(torch.where((factor > 0).any(), value, 0.0), dims, keepdim).to(input.dtype)

    def logsumexp(self, input: Tensor, dim: Dims, keepdim: bool = False) -> Tensor | None:
        found = self._reduced("logsumexp", input, dim)
        if found is None:
            return None
        x, factor, dims = found
        largest, shares = _shares(x, factor, dims)
        return _kept(largest + _log_of_sum(shares, dims), dims, keepdim).to(input.dtype)

    def softmax(self, kind: str, input: Tensor, dim: int | None = None, *others: Any, **options: Any) -> Tensor | None:
        """Behind the dimension comes a type, or of functions of `torch.nn.functional` a stack level and a type."""
        dtype = options.get("dtype") or next((one for one in others if isinstance(one, torch.dtype)), input.dtype)
        found = None if dim is None else self._reduced(kind, input, dim)
        if found is None:
            return None
        x, factor, dims = found
        largest, shares = _shares(x, factor, dims)
        if kind == "softmax":
            return (shares / shares.sum(dims, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)).to(dtype)
        return (x - largest - _log_of_sum(shares, dims)).to(dtype)


def _mean(x: Tensor, factor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The mean over some dimensions, which stay with size one, of what a factor leaves, as long as x along them."""
    count = factor.sum(dims, keepdim=True).clamp_min(torch.finfo(factor.dtype).tiny)
    return (x * factor).sum(dims, keepdim=True) / count


def _normalised(x: Tensor, factor: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    x = x.to(factor.dtype)
    centred = x - _mean(x, factor, dims)
    return centred * (_mean(centred.square(), factor, dims) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor:
    """With scale and shift, in the type that the norm would give back."""
    if weight is not None and bias is not None and x.dtype == weight.dtype == bias.dtype:
        x = torch.addcmul(bias, x, weight)
    else:
        x = x if weight is None else x * weight
        x = x if bias is None else x + bias
    return x if torch.is_autocast_enabled(like.device.type) else x.to(like.dtype)


def _kept(x: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    return x if keepdim or not dims else x.squeeze(dims)


def _shares(x: Tensor, factor: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The largest value that is left, 0 if none is, and z exp(x - largest)."""
    least = torch.finfo(x.dtype).min
    largest = torch.where(factor > 0, x, least).amax(dims, keepdim=True).detach()
    largest = torch.where((factor > 0).any(), largest, 0.0)
    return largest, factor * torch.where(factor > 0, x - largest, least).exp()


def _log_of_sum(shares: Tensor, dims: tuple[int, ...]) -> Tensor:
    return shares.sum(dims, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny).log()


def _of_kind(handler: Callable[..., Tensor | None], kind: str) -> Callable[..., Tensor | None]:
    def found(mode: _Statistics, *args: Any, **kwargs: Any) -> Tensor | None:
        return handler(mode, kind, *args, **kwargs)

    return found


_HANDLERS: Mapping[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _Statistics.layer_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _Statistics.rms_norm),
    **dict.fromkeys((F.group_norm, torch.group_norm), _Statistics.group_norm),
    **dict.fromkeys((Tensor.mean, torch.mean), _Statistics.mean),
    **dict.fromkeys((Tensor.var, torch.var), _of_kind(_Statistics.variance, "var")),
    **dict.fromkeys((Tensor.std, torch.std), _of_kind(_Statistics.variance, "std")),
    **dict.fromkeys((Tensor.amax, torch.amax), _of_kind(_Statistics.extreme, "amax")),
    **dict.fromkeys((Tensor.amin, torch.amin), _of_kind(_Statistics.extreme, "amin")),
    **dict.fromkeys((Tensor.logsumexp, torch.logsumexp), _Statistics.logsumexp),
    **dict.fromkeys((Tensor.softmax, torch.softmax, F.softmax), _of_kind(_Statistics.softmax, "softmax")),
    **dict.fromkeys(
        (Tensor.log_softmax, torch.log_softmax, F.log_softmax), _of_kind(_Statistics.softmax, "log_softmax")
    ),
}
_CASTS = frozenset({Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type, Tensor.type_as})


__all__ = ["left_out"]
