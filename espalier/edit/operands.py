"""What the operands of products are for: which dimension is summed over, and which is handed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from espalier.graph.dims import Dim, axes_of
from espalier.graph.flow import operator_name
from espalier.graph.topology import TracePrediction
from espalier.graph.trace import Call, Ref

Dims = Mapping[int, tuple[Dim, ...]]


@dataclass(frozen=True)
class Operand:
    """One dimension of an operand."""

    ref: Ref
    dim: int


@dataclass(frozen=True)
class Summed:
    """A call that sums over a dimension of two operands."""

    left: Operand
    right: Operand


def is_attention(call: Call) -> bool:
    """Whether a call is the fused attention operator."""
    return call.name.startswith("aten::_scaled_dot_product")


def summed(prediction: TracePrediction, call: Call) -> Summed | None:
    """What a matrix product, a convolution or the fused attention (query and key) sums over."""
    dims, name = prediction.dims, operator_name(call)
    if is_attention(call):
        return Summed(Operand(call.args[0], 3), Operand(call.args[1], 3))
    if name == "convolution":
        a = call.arguments()
        return Summed(Operand(a["input"], 1), Operand(a["weight"], 0 if a["transposed"] else 1))
    factors = _factors(call, name)
    if factors is None:
        return None
    left, right = factors
    rank = len(dims[right.index])
    return Summed(
        Operand(left, len(dims[left.index]) - 1), Operand(right, rank - 1 if name == "linear" else max(0, rank - 2))
    )


def _factors(call: Call, name: str) -> tuple[Ref, Ref] | None:
    if name in ("mm", "bmm", "mv", "dot", "vdot", "linear"):
        return call.args[0], call.args[1]
    if name in ("addmm", "baddbmm"):
        return call.args[1], call.args[2]
    return None


def summing_weights(prediction: TracePrediction, call: Call) -> tuple[Operand, ...]:
    """The weights of recurrent layers and `nn.Bilinear`, and the dimension over which their operators sum."""
    name = operator_name(call)
    if name == "mkldnn_rnn_layer":
        return tuple(Operand(ref, 1) for ref in call.args[1:3])
    if name == "_cudnn_rnn":
        return tuple(Operand(ref, 1) for ref in call.args[1] if len(prediction.dims[ref.index]) == 2)
    if name == "_trilinear":
        a = call.arguments()
        places: list[int | None] = list(range(len(prediction.dims[a["i2"].index])))
        for place in sorted(a["expand2"]):
            places.insert(place, None)
        return tuple(Operand(a["i2"], dim) for place in a["sumdim"] if (dim := places[place]) is not None)
    return ()


def sums_over(prediction: TracePrediction, call: Call, found: Summed, axis: int) -> bool:
    """Whether the sum of a product runs over an axis; the groups of a grouped convolution are not summed over."""
    dims = prediction.dims
    if operator_name(call) == "convolution" and call.arguments()["groups"] != 1:
        return axis in axes_of(dims[found.right.ref.index][found.right.dim]) and axis not in groups_of(prediction, call)
    return axis in axes_of(dims[found.left.ref.index][found.left.dim])


def groups_of(prediction: TracePrediction, call: Call) -> frozenset[int]:
    """The axes that are the groups of a grouped convolution or of a group norm."""
    return frozenset(
        axis
        for key, dim in prediction.expectations.get(call.index, ())
        if key in ("groups", "group")
        for axis in axes_of(dim)
    )


@dataclass(frozen=True)
class Origin:
    """Where the units along one dimension of a product come from: (value, its dimension) of each that may be zero."""

    either: tuple[Operand, ...]
    """Zero units in one of these make the product zero."""
    bias: Operand | None = None
    """What is added to the product along that dimension."""
    constant_bias: bool = False
    """Whether something is added that does not know the dimension."""
    others: tuple[Ref, ...] = ()
    """The other factor, where only one has the dimension."""


def origin(prediction: TracePrediction, call: Call, dim: int, axis: int) -> Origin | None:
    """Where an axis in dimension `dim` of the result of a product comes from; None for other operators."""
    dims, name = prediction.dims, operator_name(call)
    if is_attention(call):
        q, k, v = call.args[:3]
        if dim == 3:
            return Origin((Operand(v, 3),), others=(q, k))
        return Origin((Operand(v, dim),)) if axis in axes_of(dims[v.index][dim]) else None
    if name == "convolution":
        return _of_convolution(prediction, call, dim, axis)
    factors = _factors(call, name)
    if factors is None:
        return None
    left, right = factors
    rank, columns = len(dims[left.index]), len(dims[right.index])
    either: tuple[Operand, ...]
    if name == "linear":
        either = (Operand(right, 0),) if columns == 2 and dim == rank - 1 else (Operand(left, dim),)
    elif dim < rank - 2 and columns > 2:
        either = tuple(Operand(ref, dim) for ref in (left, right) if axis in axes_of(dims[ref.index][dim]))
    elif dim == rank - 1:
        either = (Operand(right, columns - 1),)
    else:
        either = (Operand(left, dim),)
    others = tuple(ref for ref in (left, right) if ref not in [one.ref for one in either])
    bias = call.arguments().get("bias") if name == "linear" else call.args[0] if "add" in name else None
    out = call.outputs[0]
    assert out is not None
    return _with_bias(dims, either, bias, dim - len(dims[out.index]), axis, others)


def _of_convolution(prediction: TracePrediction, call: Call, dim: int, axis: int) -> Origin | None:
    dims, a = prediction.dims, call.arguments()
    x, weight = a["input"], a["weight"]
    if dim != 1:
        return Origin((Operand(x, dim),), constant_bias=a["bias"] is not None, others=(weight,))
    out = 1 if a["transposed"] else 0
    if axis in groups_of(prediction, call):
        either = (Operand(x, 1), Operand(weight, 0))
        return _with_bias(dims, either, a["bias"], -1, axis, ())
    return _with_bias(dims, (Operand(weight, out),), a["bias"], -1, axis, (x,))


def _with_bias(
    dims: Dims, either: tuple[Operand, ...], bias: Ref | None, back: int, axis: int, others: tuple[Ref, ...]
) -> Origin:
    if bias is None:
        return Origin(either, None, False, others)
    rank = len(dims[bias.index])
    if rank + back < 0 or axis not in axes_of(dims[bias.index][rank + back]):
        return Origin(either, None, True, others)
    return Origin(either, Operand(bias, rank + back), False, others)


__all__ = [
    "Operand", "Origin", "Summed", "groups_of", "is_attention", "origin", "summed", "summing_weights", "sums_over",
]  # fmt: skip
