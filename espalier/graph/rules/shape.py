"""Operators that only rearrange: views, permutations, slices, concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

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
from espalier.graph.solver import concat, is_plain, product, resolve, variables
from espalier.graph.trace import Call


@rule("view", "_unsafe_view", "_reshape_alias")
def view(reading: Reading, call: Call) -> Result:
    """Splits and merges dimensions, row-major.

    The sizes on both sides are cut into the shortest runs of equal product. A run in which nothing belongs to a
    parameter is just sizes.
    """
    ref, out = call.args[0], call.outputs[0]
    assert out is not None
    before, after = reading.shape(ref), reading.shape(out)
    if before.count(0) == after.count(0) == 1:
        # As with any other number of rows: what is on either side of the empty dimension has to fit.
        here, there, dims = before.index(0), after.index(0), reading.of(ref)
        if prod(before[:here]) == prod(after[:there]) and prod(before[here + 1 :]) == prod(after[there + 1 :]):
            front = regroup(reading, call, dims[:here], after[:there])
            return (*front, 0, *regroup(reading, call, dims[here + 1 :], after[there + 1 :]))
    if prod(before) != prod(after) or prod(before) == 0:
        return freeze_all(reading, call, "shape", "is empty or seen as another type")
    return regroup(reading, call, reading.of(ref), after)


def regroup(reading: Reading, call: Call, dims: Dims, shape: Sequence[int]) -> Dims:
    """`dims` seen in the sizes `shape`, whose product is the same.

    Plain sizes of one come and go. An axis of one unit is paired with the first size of one at its place.
    """
    left = [term for term in dims if resolve(term) != 1]
    right = list(shape)
    result: list[Term] = []
    while left or right:
        terms, counts = left[:1], right[:1]
        del left[:1], right[:1]
        while (m := prod(size(term) for term in terms)) != (n := prod(counts)):
            if m < n:
                terms.append(left.pop(0))
            else:
                counts.append(right.pop(0))
        result.extend(_run(reading, call, terms, counts))
    return tuple(result)


def _run(reading: Reading, call: Call, dims: list[Term], shape: list[int]) -> list[Term]:
    if len(dims) == len(shape) == 1:
        return dims
    if all(_is_size(term) for term in dims):
        for term in dims:
            reading.plain(term)
        return [*shape]
    if not shape:
        reading.freeze(dims[0], "size", "its single unit is squeezed away", call)
        return []
    rest = product(*dims)
    result: list[Term] = []
    remaining = size(rest)
    for count in shape[:-1]:
        remaining //= count
        head, rest = reading.split(rest, count, remaining, call)
        result.append(head)
    return [*result, rest]


def _is_size(term: Term) -> bool:
    """Whether a term is just a size: no parameter's, and not one that code made and that may meet a parameter's."""
    return all(not var.solid and var.reasons for var in variables(term))


@rule("as_strided")
def as_strided(reading: Reading, call: Call) -> Result:
    """With sizes and strides as before nothing changes; anything else is not understood.

    The stride of a dimension of size one says nothing.
    """
    a = call.arguments()
    ref = a["self"]
    steps = zip(a["size"], a["stride"], reading.trace.strides[ref.index], strict=False)
    same = tuple(a["size"]) == reading.shape(ref) and all(new == old for n, new, old in steps if n > 1)
    if same and a["storage_offset"] in (None, 0):
        return reading.of(ref)
    return freeze_all(reading, call, "operator", "is seen with other sizes and strides")


@rule("view_as_real")
def view_as_real(reading: Reading, call: Call) -> Result:
    """A last dimension of the real and the imaginary part is added."""
    return (*reading.of(call.args[0]), 2)


@rule("view_as_complex")
def view_as_complex(reading: Reading, call: Call) -> Result:
    """The last dimension holds the real and the imaginary part."""
    *dims, parts = reading.of(call.args[0])
    reading.freeze(parts, "size", "its two units are the parts of a complex number", call)
    return tuple(dims)


@rule("unfold")
def sliding(reading: Reading, call: Call) -> Result:
    """Overlapping windows of one dimension; the positions within a window become the last dimension."""
    a, out = call.arguments(), call.outputs[0]
    assert out is not None
    dims, shape = reading.of(a["self"]), reading.shape(out)
    dim = positive(a["dimension"], len(dims))
    reading.freeze(dims[dim], "index", "it is read in windows", call)
    return (*dims[:dim], shape[dim], *dims[dim + 1 :], shape[-1])


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


@rule("t")
def transpose_matrix(reading: Reading, call: Call) -> Result:
    """The dimensions in reverse."""
    return tuple(reversed(reading.of(call.args[0])))


@rule("diagonal")
def diagonal(reading: Reading, call: Call) -> Result:
    """Rows and columns that are the same become the last dimension."""
    a, out = call.arguments(), call.outputs[0]
    assert out is not None
    dims = reading.of(a["self"])
    first, second = (positive(a[key], len(dims)) for key in ("dim1", "dim2"))
    kept = tuple(term for position, term in enumerate(dims) if position not in (first, second))
    if a["offset"] == 0 and size(dims[first]) == size(dims[second]):
        reading.unify(dims[first], dims[second], call)
        return (*kept, dims[first])
    for term in (dims[first], dims[second]):
        reading.freeze(term, "index", "a diagonal beside the main one, or of part of its units, is read", call)
    return (*kept, reading.moved(reading.shape(out)[-1], "index", "is a diagonal of other axes", call))


@rule("diag_embed")
def diag_embed(reading: Reading, call: Call) -> Result:
    """The last dimension becomes rows and columns."""
    a, out = call.arguments(), call.outputs[0]
    assert out is not None
    *others, last = reading.of(a["self"])
    places = sorted(positive(a[key], len(others) + 2) for key in ("dim1", "dim2"))
    if a["offset"] != 0:
        reading.freeze(last, "index", "it is written beside the main diagonal", call)
        last = reading.moved(reading.shape(out)[places[0]], "index", "holds a diagonal of another axis", call)
    for place in places:
        others.insert(place, last)
    return tuple(others)


@rule("roll")
def roll(reading: Reading, call: Call) -> Result:
    """The last positions of a dimension come first: two pieces in the other order.

    The size of one of them is a number in the code. Several dimensions at once may only be plain sizes.
    """
    a = call.arguments()
    dims = list(reading.of(a["self"]))
    chosen = [positive(dim, len(dims)) for dim in a["dims"]]
    if len(chosen) == len(a["shifts"]) == 1 and not is_plain(dims[chosen[0]]):
        (dim,), (shift,) = chosen, a["shifts"]
        whole = size(dims[dim])
        if 0 < abs(shift) < whole:
            first, last = reading.cut(dims[dim], [-shift if shift < 0 else whole - shift, abs(shift)], call)
            reading.expect(call, "shifts", first if shift < 0 else last)
            dims[dim] = concat(last, first)
            return tuple(dims)
    for dim in chosen or range(len(dims)):
        reading.freeze(dims[dim], "operator", "its units are moved around", call)
        if not is_plain(dims[dim]):
            dims[dim] = reading.moved(size(dims[dim]), "operator", "is another axis after it was moved around", call)
    return tuple(dims)


@rule("transpose")
def transpose(reading: Reading, call: Call) -> Result:
    """Two dimensions exchanged."""
    dims = list(reading.of(call.args[0]))
    if dims:
        a, b = (positive(dim, len(dims)) for dim in call.args[1:3])
        dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


@rule("permute")
def permute(reading: Reading, call: Call) -> Result:
    """The dimensions in another order."""
    dims = reading.of(call.args[0])
    return tuple(dims[dim] for dim in call.args[1])


@rule("expand")
def expand(reading: Reading, call: Call) -> Result:
    """Repeats dimensions of size one: the copies are a dimension of their own (query groups of shared keys)."""
    dims, out = reading.of(call.args[0]), call.outputs[0]
    assert out is not None
    shape = reading.shape(out)
    new = len(shape) - len(dims)
    result: list[Term] = [reading.loose(count) for count in shape[:new]]
    for term, count in zip(dims, shape[new:], strict=True):
        if size(term) == count:
            result.append(term)
        else:
            reading.freeze(term, "size", "its single unit is repeated", call)
            result.append(reading.loose(count))
    return tuple(result)


@rule("repeat")
def repeat(reading: Reading, call: Call) -> Result:
    """Tiles: n copies of a dimension side by side."""
    dims, counts = reading.of(call.args[0]), call.args[1]
    dims = (*([1] * (len(counts) - len(dims))), *dims)
    return tuple(product(count, dissolve(reading, term)) for term, count in zip(dims, counts, strict=True))


@rule("slice")
def cut_slice(reading: Reading, call: Call) -> Result:
    """A contiguous piece of a dimension, or every n-th position of one whose units are groups of n."""
    a = call.arguments()
    dims, out = reading.of(a["self"]), call.outputs[0]
    assert out is not None
    dim = positive(a["dim"], len(dims))
    whole, count = size(dims[dim]), reading.shape(out)[dim]
    if count == whole:
        return dims
    piece = _slice(reading, call, dissolve(reading, dims[dim]), a["start"] or 0, a["step"], count)
    return (*dims[:dim], piece, *dims[dim + 1 :])


def _slice(reading: Reading, call: Call, term: Term, start: int, step: int, count: int) -> Term:
    if isinstance(term, int):
        return count
    whole = size(term)
    if step != 1:
        if whole != count * step:
            reading.freeze(term, "index", "it is read with a stride", call)
            return reading.moved(count, "index", "is what a stride leaves of another axis", call)
        groups, places = reading.split(term, count, step, call)
        reading.freeze(places, "index", "it is read with a stride", call)
        return groups
    first = min(max(positive(start, whole), 0), whole)
    before, piece, after = reading.cut(term, [first, count, whole - first - count], call)
    if start >= 0:
        reading.expect(call, "start", before)
    else:
        # From the end: nothing else would notice if what follows changed while the code's numbers stayed.
        reading.freeze(after, "index", "is passed over by a constant number of units", call)
    return piece


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def split(reading: Reading, call: Call) -> Result:
    """Consecutive pieces of a dimension."""
    a = call.arguments()
    dims = reading.of(a["self"])
    dim = positive(a["dim"], len(dims))
    outputs = [out for out in call.outputs if out is not None]
    counts = [reading.shape(out)[dim] for out in outputs]
    term = dissolve(reading, dims[dim])
    pieces = counts if isinstance(term, int) else reading.cut(term, counts, call)
    if "split_size" in a:
        # One number, or the number of pieces, sets the size of all of them: they stay equal. The last may be shorter.
        for piece in pieces[1:]:
            if size(piece) == size(pieces[0]):
                reading.unify(pieces[0], piece, call)
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


@rule("cat")
def cat(reading: Reading, call: Call) -> Result:
    """Pieces side by side; the legacy empty tensor is passed over."""
    a = call.arguments()
    operands = [ref for ref in refs_in(a["tensors"]) if reading.shape(ref) != (0,)]
    if not operands:
        return (0,)
    dim = positive(a["dim"], len(reading.of(operands[0])))
    result: list[Term] = []
    for position, terms in enumerate(zip(*(reading.of(ref) for ref in operands), strict=True)):
        if position != dim:
            result.append(_same(reading, call, list(terms)))
        elif all(is_plain(term) for term in terms):
            result.append(sum(reading.plain(term) for term in terms))
        else:
            result.append(concat(*terms))
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
        term = dissolve(reading, dims[position])
        if before == after == 0:
            continue
        if isinstance(term, int):
            dims[position] = term + before + after
        elif before < 0 or after < 0:
            reading.freeze(term, "size", "it is cropped by padding with a negative size", call)
            dims[position] = size(term) + before + after
        else:
            dims[position] = concat(before, term, after)
    return tuple(dims)
