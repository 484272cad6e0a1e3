"""Normalisation layers."""

from __future__ import annotations

from espalier.graph.rules.registry import Dims, Reading, Result, rule, size
from espalier.graph.trace import Call, Ref


@rule(
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
)
def batch_norm(reading: Reading, call: Call) -> Result:
    """Normalises every channel on its own; running statistics, scale and shift have one entry per channel."""
    a = call.arguments()
    x = a["input"]
    dims = reading.of(x)
    for key, role in (("weight", "scale"), ("bias", "shift"), ("running_mean", "mean"), ("running_var", "variance")):
        ref = a.get(key)
        if isinstance(ref, Ref):
            reading.unify(dims[1], reading.of(ref)[0], call)
            reading.tap(role, call, ref, 0)
    reading.tap("batch_norm", call, x, 1)
    for position in (0, *range(2, len(dims))):
        # Statistics of a batch run over all that is not a channel.
        reading.tap("reduce", call, x, position)
    return [dims, *(_statistics(reading, ref, (dims[1],)) for ref in call.outputs[1:])]


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(reading: Reading, call: Call) -> Result:
    """Normalises across the last dimensions."""
    a = call.arguments()
    x, count = a["input"], len(a["normalized_shape"])
    dims = reading.of(x)
    role = "layer_norm" if "layer" in call.name else "rms_norm"
    for position in range(len(dims) - count, len(dims)):
        reading.tap(role, call, x, position)
    for key, kind in (("weight", "scale"), ("bias", "shift")):
        ref = a.get(key)
        if isinstance(ref, Ref):
            for back in range(1, count + 1):
                reading.unify(dims[-back], reading.of(ref)[-back], call)
                reading.tap(kind, call, ref, len(reading.of(ref)) - back)
    statistics = (*dims[: len(dims) - count], *([1] * count))
    return [dims, *(_statistics(reading, ref, statistics) for ref in call.outputs[1:])]


@rule("native_group_norm")
def group_norm(reading: Reading, call: Call) -> Result:
    """Normalises across the channels of each group: channels are groups x channels per group."""
    a = call.arguments()
    x, groups = a["input"], a["group"]
    dims = reading.of(x)
    group, within = reading.split(dims[1], groups, size(dims[1]) // groups, call)
    reading.solver.hint(group, "groups")
    reading.expect(call, "group", group)
    reading.expect(call, "C", dims[1])
    for term in (within, *dims[2:]):
        reading.tap_term("group_norm", call, x, term)
    for key, kind in (("weight", "scale"), ("bias", "shift")):
        ref = a.get(key)
        if isinstance(ref, Ref):
            reading.unify(dims[1], reading.of(ref)[0], call)
            reading.tap(kind, call, ref, 0)
    return [dims, *(_statistics(reading, ref, (dims[0], group)) for ref in call.outputs[1:])]


@rule("_weight_norm_interface")
def weight_norm(reading: Reading, call: Call) -> Result:
    """v * g / |v|, where |v| runs over all dimensions but one, or over all."""
    a = call.arguments()
    dims, g, dim = reading.of(a["v"]), a["g"], a["dim"]
    factors = reading.of(g)
    for position, term in enumerate(factors):
        if position == dim % len(dims):
            reading.unify(dims[position], term, call)
            reading.tap("scale", call, g, position)
            if reading.is_parameter(a["v"]):
                reading.tap("direction", call, a["v"], position)
        else:
            reading.freeze(term, "size", "its single unit is broadcast", call)
            reading.tap("norm" if reading.is_parameter(a["v"]) else "sum", call, a["v"], position)
    return [dims, *(_statistics(reading, ref, factors) for ref in call.outputs[1:])]


def _statistics(reading: Reading, ref: Ref | None, dims: Dims) -> Dims | None:
    if ref is None:
        return None
    fits = reading.shape(ref) == tuple(size(term) for term in dims)
    return dims if fits else reading.shape(ref)
