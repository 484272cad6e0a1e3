"""When an operator gives nothing but zeros: which of its operands have to be zero for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from espalier.graph.flow import operator_name
from espalier.graph.trace import Call, Ref

Sufficient = tuple[frozenset[int], ...]
"""Sets of values, by number: if all of one set are zero, so is the result. An empty set: it is zero anyway."""

_REARRANGING = frozenset(
    """
    _reshape_alias _to_copy _unsafe_view alias chunk clone contiguous detach expand flatten flip im2col movedim narrow
    permute pixel_shuffle pixel_unshuffle repeat reshape roll select slice split split_with_sizes squeeze t transpose
    unbind unfold unsafe_split unsqueeze view
    """.split()
)
"""All results, where there are several, hold nothing but entries of the first operand."""

_MAPPING = frozenset(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool3d abs adaptive_avg_pool1d asinh atan avg_pool1d avg_pool2d avg_pool3d
    celu elu erf expm1 gather gelu hardshrink hardswish index index_select leaky_relu log1p max_pool2d_with_indices
    max_pool3d_with_indices mean mish native_dropout neg relu selu sgn sign silu sin sinh softshrink sqrt sum tan tanh
    upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    """.split()
)
"""The first result is zero where the first operand is."""

_ZEROS = frozenset("new_zeros zero zeros zeros_like".split())
_PRODUCTS: dict[str, tuple[str | None, str, str]] = {
    "addmm": ("self", "mat1", "mat2"),
    "addmv": ("self", "mat", "vec"),
    "baddbmm": ("self", "batch1", "batch2"),
    "bmm": (None, "self", "mat2"),
    "convolution": ("bias", "input", "weight"),
    "dot": (None, "self", "tensor"),
    "linear": ("bias", "input", "weight"),
    "mm": (None, "self", "mat2"),
    "mv": (None, "self", "vec"),
}
"""Operator -> its arguments: what is added, and the two factors."""


def zero_given(call: Call) -> Sufficient:
    """The sets of operands each of which suffices for the first result (all, of a view) to be zero; none if unknown.

    Entries that are infinite or no numbers are not thought of.
    """
    name = operator_name(call)
    if name in _ZEROS:
        return (frozenset(),)
    if name in _REARRANGING or name in _MAPPING:
        return _all(call.args[0])
    if name in _PRODUCTS:
        added, left, right = _PRODUCTS[name]
        given = call.arguments()
        return _product(given[added] if added else None, given[left], given[right])
    special = _SPECIAL.get(name)
    return special(call) if special is not None else ()


def gives_all(call: Call) -> bool:
    """Whether what `zero_given` says holds for all results, not for the first alone."""
    return operator_name(call) in _REARRANGING


def _all(*operands: Any) -> Sufficient:
    """All of the operands are needed; numbers among them have to be zero as they are."""
    if any(not isinstance(one, Ref) and one != 0 for one in operands):
        return ()
    return (frozenset(one.index for one in operands if isinstance(one, Ref)),)


def _product(added: Any, left: Any, right: Any) -> Sufficient:
    rest = frozenset({added.index}) if isinstance(added, Ref) else frozenset()
    # The second factor comes first: it is the weight, where there is one.
    return tuple(rest | {one.index} for one in (right, left))


def _times(call: Call) -> Sufficient:
    return tuple(frozenset({one.index}) for one in call.args[:2] if isinstance(one, Ref))


def _divided(call: Call) -> Sufficient:
    above, below = call.args[:2]
    is_same = isinstance(above, Ref) and isinstance(below, Ref) and above.index == below.index
    return () if is_same else _all(above)


def _clamped(low: str, high: str) -> Callable[[Call], Sufficient]:
    def given(call: Call) -> Sufficient:
        bounds = call.arguments()
        least, most = bounds.get(low), bounds.get(high)
        if not all(one is None or isinstance(one, (int, float)) for one in (least, most)):
            return ()
        return _all(call.args[0]) if (least or 0) <= 0 <= (most or 0) else ()

    return given


def _normalised(call: Call) -> Sufficient:
    """Scale and shift, or, without a scale and with statistics of the values themselves, what is normalised."""
    given = call.arguments()
    scale, shift = given.get("weight"), given.get("bias")
    if scale is not None:
        return _all(*(one for one in (scale, shift) if one is not None))
    return () if "running_mean" in given or shift is not None else _all(call.args[0])


def _filled(call: Call) -> Sufficient:
    return _all(call.args[0]) if not isinstance(call.args[-1], Ref) and call.arguments()["value"] == 0 else ()


def _chosen(call: Call) -> Sufficient:
    return _all(*call.args[1:3])


def _full(call: Call) -> Sufficient:
    value = call.arguments().get("fill_value", call.arguments().get("value"))
    return (frozenset(),) if isinstance(value, (int, float)) and value == 0 else ()


_SPECIAL: dict[str, Callable[[Call], Sufficient]] = {
    "add": lambda call: _all(*call.args[:2]),
    "sub": lambda call: _all(*call.args[:2]),
    "cat": lambda call: _all(*call.args[0]),
    "stack": lambda call: _all(*call.args[0]),
    "clamp": _clamped("min", "max"),
    "clamp_max": _clamped("", "max"),
    "clamp_min": _clamped("min", ""),
    "hardtanh": _clamped("min_val", "max_val"),
    "constant_pad_nd": _filled,
    "masked_fill": _filled,
    "div": _divided,
    "fill": _full,
    "full": _full,
    "full_like": _full,
    "mul": _times,
    "where": _chosen,
    **dict.fromkeys(
        """
        _batch_norm_no_update _batch_norm_with_update _fused_rms_norm _native_batch_norm_legit
        _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm native_batch_norm native_group_norm
        native_layer_norm
        """.split(),
        _normalised,
    ),
}

__all__ = ["Sufficient", "gives_all", "zero_given"]
