"""Operators that only rearrange: views, permutations, slices, concatenations."""

from __future__ import annotations

from collections.abc import Sequence

from espalier.graph.capture import Call, Ref
from espalier.graph.rules.elementwise import broadcast_dim
from espalier.graph.rules.registry import (
    Dims,
    Reading,
    Result,
    Term,
    dissolve,
    freeze_all,
    positive,
    refs_in,
    rule,
    size,
)
from espalier.graph.solver import concat, is_plain, product, variables


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy")
def view(reading: Reading, call: Call) -> Result:
    """Splits and merges dimensions, row-major.

    The sizes on both sides are cut into the shortest runs of equal product. A run in which nothing belongs to a
    parameter is just sizes.
    """
    ref, out = call.args[0], call.outputs[0]
    assert out is not None
    return regroup(reading, call, reading.of(ref), reading.shape(out))


def regroup(reading: Reading, call: Call, dims: Dims, shape: Sequence[int]) -> Dims:
    """`dims` seen in the sizes `shape`, whose product is the same."""
    before = [size(term) for term in dims]
    result: list[Term] = []
    i = j = 0
    while i < len(before) or j < len(shape):
        start_i, start_j = i, j
        m = n = 1
        if i < len(before):
            m, i = before[i], i + 1
        if j < len(shape):
            n, j = shape[j], j + 1
        while m != n:
            if m < n and i < len(before):
                m, i = m * before[i], i + 1
            elif j < len(shape):
                n, j = n * shape[j], j + 1
            else:
                m, i = m * before[i], i + 1
        if start_i == i and n == 1:
            result.extend([1] * (j - start_j))
            continue
        result.extend(_run(reading, call, dims[start_i:i], shape[start_j:j]))
    return tuple(result)


def _run(reading: Reading, call: Call, dims: Dims, shape: Sequence[int]) -> list[Term]:
    if len(dims) == len(shape) == 1:
        return [dims[0]]
    if all(_is_size(term) for term in dims):
        for term in dims:
            reading.plain(term)
        return list(shape)
    if not shape:
        for term in dims:
            reading.freeze(term, "size", "its single unit is squeezed away", call)
        return []
    # A size of one that stays on its own keeps its identity: a layer of one unit must be able to grow.
    if len([n for n in shape if n != 1]) == 0 and len(dims) == 1:
        return [dims[0], *([1] * (len(shape) - 1))]
    rest = product(*dims)
    result: list[Term] = []
    remaining = size(rest)
    for count in shape[:-1]:
        remaining //= count
        head, rest = reading.split(rest, count, remaining, call)
        result.append(head)
    return [*result, rest]


@rule("as_strided")
def as_strided(reading: Reading, call: Call) -> Result:
    """With sizes as before only the memory layout changes; anything else is not understood."""
    ref, out = call.args[0], call.outputs[0]
    assert out is not None
    if reading.shape(ref) == reading.shape(out):
        return reading.of(ref)
    return freeze_all(reading, call, "operator", "is seen with other sizes and strides")


def _is_size(term: Term) -> bool:
    """Whether a term is just a size: no parameter's, and not one that code made and that may meet a parameter's."""
    return all(not var.solid and var.reasons for var in variables(term))


@rule("squeeze")
def squeeze(reading: Reading, call: Call) -> Result:
    """Drops dimensions of size one."""
    dims = reading.of(call.args[0])
    chosen = call.arguments().get("dim")
    if chosen is None:
        gone = [position for position, term in enumerate(dims) if size(term) == 1]
    else:
        listed = [chosen] if isinstance(chosen, int) else chosen
        gone = [positive(dim, len(dims)) for dim in listed]
        gone = [dim for dim in gone if size(dims[dim]) == 1]
    for position in gone:
        reading.freeze(dims[position], "size", "its single unit is squeezed away", call)
    return tuple(term for position, term in enumerate(dims) if position not in gone)


@rule("unsqueeze")
def unsqueeze(reading: Reading, call: Call) -> Result:
    """Adds a dimension of size one, which broadcasts."""
    dims = reading.of(call.args[0])
    position = positive(call.args[1], len(dims) + 1)
    return (*dims[:position], 1, *dims[position:])


@rule("t", "numpy_T", "mT")
def transpose_matrix(reading: Reading, call: Call) -> Result:
    """The dimensions in reverse."""
    return tuple(reversed(reading.of(call.args[0])))


@rule("transpose", "swapaxes")
def transpose(reading: Reading, call: Call) -> Result:
    """Two dimensions exchanged."""
    dims = list(reading.of(call.args[0]))
    a, b = (positive(dim, len(dims)) for dim in call.args[1:3])
    dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


@rule("permute")
def permute(reading: Reading, call: Call) -> Result:
    """The dimensions in another order."""
    dims = reading.of(call.args[0])
    return tuple(dims[dim] for dim in call.args[1])


@rule("expand", "expand_copy")
def expand(reading: Reading, call: Call) -> Result:
    """Repeats dimensions of size one: the copies are a dimension of their own (query groups of shared keys)."""
    dims, out = reading.of(call.args[0]), call.outputs[0]
    assert out is not None
    shape = reading.shape(out)
    new = len(shape) - len(dims)
    any_solid = any(not is_plain(term) for term in dims)
    result: list[Term] = [reading.loose(count) if any_solid else count for count in shape[:new]]
    for term, count in zip(dims, shape[new:], strict=True):
        if size(term) == count:
            result.append(term)
            continue
        reading.freeze(term, "size", "its single unit is repeated", call)
        result.append(reading.loose(count) if any_solid else count)
    return tuple(result)


@rule("repeat")
def repeat(reading: Reading, call: Call) -> Result:
    """Tiles: n copies of a dimension side by side."""
    dims, counts = reading.of(call.args[0]), call.args[1]
    dims = (*([1] * (len(counts) - len(dims))), *dims)
    result: list[Term] = []
    for term, count in zip(dims, counts, strict=True):
        result.append(count * size(term) if is_plain(term) else product(count, term))
    return tuple(result)


@rule("slice")
def cut_slice(reading: Reading, call: Call) -> Result:
    """A contiguous piece of a dimension; a stride freezes it."""
    a = call.arguments()
    dims, out = reading.of(a["self"]), call.outputs[0]
    assert out is not None
    dim = positive(a["dim"], len(dims))
    whole, count = size(dims[dim]), reading.shape(out)[dim]
    if count == whole:
        return dims
    term = dissolve(reading, dims[dim])
    piece: Term = count
    if isinstance(term, int):
        piece = count
    elif a["step"] != 1:
        reading.freeze(term, "index", "it is read with a stride", call)
    else:
        start = min(max(positive(a["start"] or 0, whole), 0), whole)
        before, piece, _ = reading.cut(term, [start, count, whole - start - count], call)
        if (a["start"] or 0) >= 0:
            reading.expect(call, "start", before)
    return (*dims[:dim], piece, *dims[dim + 1 :])


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "tensor_split",
      "split_copy", "split_with_sizes_copy")  # fmt: skip
def split(reading: Reading, call: Call) -> Result:
    """Consecutive pieces of a dimension."""
    a = call.arguments()
    ref = a.get("self", a.get("input"))
    dims = reading.of(ref)
    dim = positive(a["dim"], len(dims))
    outputs = [out for out in call.outputs if out is not None]
    counts = [reading.shape(out)[dim] for out in outputs]
    term = dissolve(reading, dims[dim])
    pieces = counts if isinstance(term, int) else reading.cut(term, counts, call)
    return [(*dims[:dim], piece, *dims[dim + 1 :]) for piece in pieces]


@rule("glu")
def glu(reading: Reading, call: Call) -> Result:
    """The first half times the sigmoid of the second."""
    dims = reading.of(call.args[0])
    dim = positive(call.arguments()["dim"], len(dims))
    half = size(dims[dim]) // 2
    term = dissolve(reading, dims[dim])
    if isinstance(term, int):
        return (*dims[:dim], half, *dims[dim + 1 :])
    first, second = reading.cut(term, [half, half], call)
    reading.unify(first, second, call)
    return (*dims[:dim], first, *dims[dim + 1 :])


@rule("cat", "concat")
def cat(reading: Reading, call: Call) -> Result:
    """Pieces side by side; the legacy empty tensor is passed over."""
    a = call.arguments()
    operands = [ref for ref in refs_in(a["tensors"]) if reading.shape(ref) != (0,)]
    if not operands:
        return (0,)
    dim = positive(a["dim"], len(reading.of(operands[0])))
    result: list[Term] = []
    for position, terms in enumerate(zip(*(reading.of(ref) for ref in operands), strict=True)):
        if position == dim:
            result.append(sum(size(t) for t in terms) if all(is_plain(t) for t in terms) else concat(*terms))
        else:
            result.append(_same(reading, call, list(terms)))
    return tuple(result)


@rule("stack")
def stack(reading: Reading, call: Call) -> Result:
    """Tensors side by side along a new dimension."""
    a = call.arguments()
    operands = refs_in(a["tensors"])
    dims = [_same(reading, call, list(terms)) for terms in zip(*(reading.of(ref) for ref in operands), strict=True)]
    dim = positive(a["dim"], len(dims) + 1)
    return (*dims[:dim], len(operands), *dims[dim:])


def _same(reading: Reading, call: Call, terms: list[Term]) -> Term:
    for term in terms[1:]:
        reading.unify(terms[0], term, call)
    return terms[0]


@rule("constant_pad_nd")
def pad(reading: Reading, call: Call) -> Result:
    """Constants before and after; a padded dimension is a concatenation with plain pieces."""
    dims, padding = list(reading.of(call.args[0])), call.args[1]
    for back in range(len(padding) // 2):
        before, after = padding[2 * back], padding[2 * back + 1]
        position = len(dims) - 1 - back
        term = dims[position]
        if before == after == 0:
            continue
        if is_plain(term):
            dims[position] = size(term) + before + after
        elif before < 0 or after < 0:
            reading.freeze(term, "size", "it is cropped by padding with a negative size", call)
            dims[position] = size(term) + before + after
        else:
            dims[position] = concat(before, term, after)
    return tuple(dims)


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(reading: Reading, call: Call) -> Result:
    """Channels C x r x r become spatial, or the other way round."""
    dims, factor, out = reading.of(call.args[0]), call.args[1], call.outputs[0]
    assert out is not None
    shape = reading.shape(out)
    if call.name.endswith("pixel_shuffle"):
        channels, _ = reading.split(dims[-3], shape[-3], factor * factor, call)
    else:
        channels = product(dims[-3], factor * factor)
    return (*dims[:-3], channels, *shape[-2:])


@rule("broadcast_tensors")
def broadcast_tensors(reading: Reading, call: Call) -> Result:
    """All operands in their common sizes."""
    operands = refs_in(call.args)
    rank = max(len(reading.of(ref)) for ref in operands)
    dims = tuple(
        broadcast_dim(reading, call, [reading.of(ref)[-back] for ref in operands if len(reading.of(ref)) >= back])
        for back in range(rank, 0, -1)
    )
    return [dims for _ in operands]


__all__ = ["Ref", "regroup"]
