"""Matrix products and attention: operators that sum over a dimension."""

from __future__ import annotations

from espalier.graph.rules.elementwise import broadcast_dim
from espalier.graph.rules.registry import Dims, Reading, Result, Term, positive, rule, size
from espalier.graph.rules.spatial import freeze_spatial
from espalier.graph.solver import product
from espalier.graph.trace import Call, Ref


def contract(reading: Reading, call: Call, left: Ref, left_dim: int, right: Ref, right_dim: int) -> None:
    """Record that `call` sums over a dimension of both operands, and which operand is a parameter.

    A parameter's other dimensions are produced. With two activations the sum is bilinear: new units on both sides
    would contribute.
    """
    reading.unify(reading.of(left)[left_dim], reading.of(right)[right_dim], call)
    weights = [(ref, dim) for ref, dim in ((left, left_dim), (right, right_dim)) if reading.is_parameter(ref)]
    for ref, dim in weights[-1:]:
        reading.tap("contract", call, ref, dim)
        for other in range(len(reading.of(ref))):
            if other != dim:
                reading.tap("produce", call, ref, other)
    for ref, _ in weights[:-1]:
        for other in range(len(reading.of(ref))):
            reading.tap("produce", call, ref, other)
    for ref, dim in ((left, left_dim), (right, right_dim)):
        if not reading.is_weight(ref):
            reading.tap("contract" if weights else "bilinear", call, ref, dim)


@rule("mm", "bmm")
def matrix_product(reading: Reading, call: Call) -> Result:
    """(..., n, k) times (..., k, m)."""
    left, right = call.args[0], call.args[1]
    return _product(reading, call, left, right)


@rule("addmm", "baddbmm")
def add_matrix_product(reading: Reading, call: Call) -> Result:
    """A bias plus (..., n, k) times (..., k, m)."""
    bias, left, right = call.args[:3]
    result = _product(reading, call, left, right)
    _add_bias(reading, call, bias, result)
    return result


@rule("linear")
def linear(reading: Reading, call: Call) -> Result:
    """(..., k) times the transpose of (m, k), plus a bias."""
    arguments = call.arguments()
    x, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    contract(reading, call, x, len(reading.of(x)) - 1, weight, len(reading.of(weight)) - 1)
    result = (*reading.of(x)[:-1], *reading.of(weight)[:-1])
    reading.cost(call, 2, *reading.of(x), *reading.of(weight)[:-1])
    if bias is not None:
        _add_bias(reading, call, bias, result)
    return result


@rule("mv", "dot", "vdot")
def vector_product(reading: Reading, call: Call) -> Result:
    """(..., k) times (k)."""
    left, right = call.args[:2]
    contract(reading, call, left, len(reading.of(left)) - 1, right, 0)
    reading.cost(call, 2, *reading.of(left))
    return reading.of(left)[:-1]


@rule("_trilinear")
def trilinear(reading: Reading, call: Call) -> Result:
    """Three tensors, spread to common dimensions, are multiplied and summed over some (`nn.Bilinear`)."""
    a = call.arguments()
    spread: list[tuple[Ref, list[int | None]]] = []
    for ref, places in ((a["i1"], a["expand1"]), (a["i2"], a["expand2"]), (a["i3"], a["expand3"])):
        own: list[int | None] = list(range(len(reading.of(ref))))
        for place in sorted(places):
            own.insert(place, None)
        spread.append((ref, own))
    result: list[Term] = []
    for dim in range(len(spread[0][1])):
        held = [(ref, place) for ref, own in spread if (place := own[dim]) is not None]
        term = broadcast_dim(reading, call, [reading.of(ref)[place] for ref, place in held])
        if dim not in a["sumdim"]:
            result.append(term)
        weights = [(ref, place) for ref, place in held if reading.is_parameter(ref)]
        for ref, place in held:
            if reading.is_parameter(ref):
                reading.tap("contract" if dim in a["sumdim"] else "produce", call, ref, place)
            elif dim in a["sumdim"]:
                reading.tap("contract" if weights else "bilinear", call, ref, place)
    reading.cost(call, 3, *reading.of(a["i1"]), *reading.of(a["i2"]))
    return tuple(result)


@rule("_cdist_forward")
def distances(reading: Reading, call: Call) -> Result:
    """Distances between the rows of two matrices: (..., n, k) and (..., m, k) give (..., n, m)."""
    left, right = call.args[:2]
    *batch, rows, inner = reading.of(left)
    *others, columns, other = reading.of(right)
    reading.unify(inner, other, call)
    for ref, place in ((left, len(batch) + 1), (right, len(others) + 1)):
        reading.tap("bilinear", call, ref, place)
    reading.cost(call, 3, *reading.of(left), columns)
    rank = max(len(batch), len(others))
    padded = ([*([1] * (rank - len(one))), *one] for one in (batch, others))
    return (*(broadcast_dim(reading, call, list(terms)) for terms in zip(*padded, strict=True)), rows, columns)


def _product(reading: Reading, call: Call, left: Ref, right: Ref) -> Dims:
    rank = len(reading.of(left))
    batch = tuple(
        broadcast_dim(reading, call, [reading.of(left)[dim], reading.of(right)[dim]]) for dim in range(rank - 2)
    )
    contract(reading, call, left, rank - 1, right, rank - 2)
    reading.cost(call, 2, *batch, *reading.of(left)[-2:], reading.of(right)[-1])
    return (*batch, reading.of(left)[-2], reading.of(right)[-1])


def _add_bias(reading: Reading, call: Call, bias: Ref, result: Dims) -> None:
    terms = reading.of(bias)
    for back in range(1, len(terms) + 1):
        broadcast_dim(reading, call, [result[-back], terms[-back]])
        if reading.is_parameter(bias):
            reading.tap("shift", call, bias, len(terms) - back)


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
def attention(reading: Reading, call: Call) -> Result:
    """softmax(q k' * scale) v over (batch, heads, tokens, head_dim); key/value heads may serve several query heads."""
    q, k, v = call.args[:3]
    query, key, value = reading.of(q), reading.of(k), reading.of(v)
    batch = broadcast_dim(reading, call, [query[0], key[0], value[0]])
    reading.unify(query[-1], key[-1], call)
    heads = query[-3]
    if size(query[-3]) != size(key[-3]):
        heads, group = reading.split(query[-3], size(key[-3]), size(query[-3]) // size(key[-3]), call)
        reading.solver.hint(group, "group")
    reading.unify(heads, key[-3], call)
    reading.unify(key[-3], value[-3], call)
    reading.unify(key[-2], value[-2], call)
    for ref in (q, k):
        reading.tap("bilinear", call, ref, 3)
    for ref in (k, v):
        reading.tap("softmax", call, ref, 2)
    if "flash" in call.name:
        reading.unify(query[-1], value[-1], call)  # or another kernel would have been chosen
    for term, label in ((heads, "heads"), (query[-1], "head_dim"), (value[-1], "value_dim")):
        reading.solver.hint(term, label)
    if call.arguments().get("scale") is None:
        reading.tap("scale_of_size", call, q, 3)
    reading.cost(call, 2, *query, key[-2])
    reading.cost(call, 2, *query[:-1], key[-2], value[-1])
    mask = call.arguments().get("attn_mask", call.arguments().get("attn_bias"))
    if isinstance(mask, Ref):
        scores = (batch, query[-3], query[-2], key[-2])
        for back in range(1, len(reading.of(mask)) + 1):
            term = reading.of(mask)[-back]
            if size(term) == 1:  # what is added to the scores may not be larger than they are
                reading.freeze(term, "size", "its single unit is added to the scores", call)
            else:
                broadcast_dim(reading, call, [scores[-back], term])
    results: list[Dims | None] = [(batch, *query[1:-1], value[-1])]
    for ref in call.outputs[1:]:
        results.append(None if ref is None else _statistic(reading, ref, query))
    return results


def _statistic(reading: Reading, ref: Ref, query: Dims) -> Dims:
    """The log-sum-exp: (batch, heads, tokens), in this or another order by backend."""
    shape = reading.shape(ref)
    if shape == tuple(size(term) for term in query[:-1]):
        return query[:-1]
    if len(shape) == 3 and shape == (size(query[0]), size(query[2]), size(query[1])):
        return (query[0], query[2], query[1])
    return shape


@rule("_softmax", "_log_softmax", "_safe_softmax")
def softmax(reading: Reading, call: Call) -> Result:
    """Normalises over one dimension."""
    x = call.args[0]
    dims = reading.of(x)
    if dims:
        reading.tap("softmax", call, x, positive(call.args[1], len(dims)))
    return dims


@rule("convolution")
def convolution(reading: Reading, call: Call) -> Result:
    """Convolutions of any dimensionality: grouped, depthwise, transposed."""
    a = call.arguments()
    x, weight, bias, groups, transposed = a["input"], a["weight"], a["bias"], a["groups"], a["transposed"]
    dims, kernel = reading.of(x), reading.of(weight)
    for term in kernel[2:]:
        reading.plain(term)
    spatial = reading.shape(call.outputs[0])[2:] if call.outputs[0] else ()
    freeze_spatial(reading, call, dims[2:])
    into, out = (0, 1) if transposed else (1, 0)
    if groups == 1:
        contract(reading, call, x, 1, weight, into)
        channels = kernel[out]
    else:
        channels = _grouped(reading, call, x, weight, groups, transposed)
    if bias is not None:
        reading.unify(reading.of(bias)[0], channels, call)
        if reading.is_parameter(bias):
            reading.tap("shift", call, bias, 0)
    places = reading.shape(x)[2:] if transposed else spatial
    reading.cost(call, 2, dims[0], *places, *kernel)
    return (dims[0], channels, *spatial)


def _grouped(reading: Reading, call: Call, x: Ref, weight: Ref, groups: int, transposed: bool) -> Term:
    """A grouped convolution: channels are groups x channels per group on both sides.

    With one input channel per group (depthwise) the groups are the channels themselves.
    """
    channels, kernel = reading.of(x)[1], reading.of(weight)
    inner = size(channels) // groups
    first, rest = reading.split(kernel[0], groups, size(kernel[0]) // groups, call)
    group, within = reading.split(channels, groups, inner, call)
    reading.unify(group, first, call)
    if not transposed and inner == 1:
        reading.plain(kernel[1])
    else:
        reading.unify(within, rest if transposed else kernel[1], call)
    reading.expect(call, "groups", first)
    if reading.is_parameter(weight):
        reading.tap_term("filter" if inner == 1 else "group", call, weight, first)
        reading.tap_term("produce", call, weight, kernel[1] if transposed else rest)
        if inner > 1:
            reading.tap_term("contract", call, weight, rest if transposed else kernel[1])
    if inner > 1:
        reading.solver.hint(first, "groups")
        reading.tap_term("contract", call, x, within)
    return product(first, kernel[1]) if transposed else kernel[0]
