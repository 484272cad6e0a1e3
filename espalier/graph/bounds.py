"""Between which numbers every entry of a value lies, as far as operators alone tell: after a ReLU, not below zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from espalier.graph.flow import Flow, operator_name
from espalier.graph.trace import Call, Ref

Bounds = tuple[float, float]
ANY: Bounds = (-math.inf, math.inf)

_CHOOSING = frozenset(
    """
    _reshape_alias _unsafe_view alias chunk clone contiguous detach expand flatten flip gather index index_select
    max_pool2d_with_indices max_pool3d_with_indices narrow permute pixel_shuffle pixel_unshuffle repeat reshape roll
    select slice split split_with_sizes squeeze t transpose unbind unsafe_split unsqueeze view
    """.split()
)
"""The first result (all, of a view) holds nothing but entries of the first operand."""

_POSITIVE = frozenset(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d avg_pool1d avg_pool2d avg_pool3d cumsum mean
    native_dropout sqrt sum upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d
    """.split()
)
"""Sums and scaled entries of the first operand, with factors that are not negative. Rounding may pass upper bounds."""

_RANGES: dict[str, Bounds] = {
    "_softmax": (0.0, math.inf),
    "abs": (0.0, math.inf),
    "bernoulli": (0.0, 1.0),
    "exp": (0.0, math.inf),
    "hardsigmoid": (0.0, 1.0),
    "relu": (0.0, math.inf),
    "sigmoid": (0.0, 1.0),
    "softplus": (0.0, math.inf),
    "tanh": (-1.0, 1.0),
}
_CLAMPS = {
    "clamp": ("min", "max"),
    "clamp_min": ("min", ""),
    "clamp_max": ("", "max"),
    "hardtanh": ("min_val", "max_val"),
}

SETTLED: dict[str, Bounds] = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0)}
"""Activation functions that leave values between these bounds as they are, the widest first."""


class Ranges:
    """The bounds of all values of one pass."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._found: dict[tuple[int, int], Bounds] = {}
        for call in flow.calls:
            for out, bounds in _results(call, lambda ref, at=call.index: self.of(ref.index, at)):  # type: ignore[misc]
                self._found[out, flow.version(out, call.index + 1)] = bounds

    def of(self, value: int, before: int) -> Bounds:
        """The bounds of a value as a call finds it."""
        found = self._found.get((value, self._flow.version(value, before)), ANY)
        return ANY if found != ANY and self._flow.is_stale(value, before) else found

    def settled(self, value: int, before: int) -> Iterator[str]:
        """The activation functions that would leave a value as it is."""
        low, high = self.of(value, before)
        for name, (least, most) in SETTLED.items():
            if least <= low and high <= most:
                yield name


def activation(call: Call) -> str | None:
    """The name in `SETTLED` of what a call computes; None for anything else."""
    name = operator_name(call)
    if name == "hardtanh":
        given = call.arguments()
        bounds = given["min_val"], given["max_val"]
        return next((known for known, found in SETTLED.items() if found == bounds), None)
    return name if name == "relu" else None


def _results(call: Call, of: Callable[[Ref], Bounds]) -> Iterator[tuple[int, Bounds]]:
    name = operator_name(call)
    bounds = _bounds(call, name, of)
    if bounds != ANY:
        several = call.outputs if name in _CHOOSING and "max_pool" not in name else call.outputs[:1]
        for out in several:
            if out is not None:
                yield out.index, bounds


def _bounds(call: Call, name: str, of: Callable[[Ref], Bounds]) -> Bounds:
    first = call.args[0] if call.args else None
    if name == "relu" and isinstance(first, Ref):
        return _clamped(of(first), _RANGES[name])
    if name in _RANGES:
        return _RANGES[name]
    if name in ("cat", "stack"):
        parts = [of(one) for one in call.args[0]]
        return min(low for low, _ in parts), max(high for _, high in parts)
    if not isinstance(first, Ref):
        return ANY
    if name in _CHOOSING:
        return of(first)
    if name in _CLAMPS:
        given = call.arguments()
        low, high = (given.get(key) for key in _CLAMPS[name])
        return _clamped(of(first), (_number(low, -math.inf), _number(high, math.inf)))
    if name in _POSITIVE:
        return _not_negative(of(first))
    if name in ("add", "div", "mul") and call.arguments().get("alpha", 1) == 1:
        return _not_negative(of(first), _operand(call.args[1], of))
    return ANY


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, (int, float)) else otherwise


def _operand(value: Any, of: Callable[[Ref], Bounds]) -> Bounds:
    if isinstance(value, Ref):
        return of(value)
    return (float(value), float(value)) if isinstance(value, (int, float)) else ANY


def _clamped(bounds: Bounds, limits: Bounds) -> Bounds:
    return tuple(min(max(bound, limits[0]), limits[1]) for bound in bounds)  # type: ignore[return-value]


def _not_negative(*operands: Bounds) -> Bounds:
    return (0.0, math.inf) if all(low >= 0 for low, _ in operands) else ANY


__all__ = ["ANY", "SETTLED", "Bounds", "Ranges", "activation"]
