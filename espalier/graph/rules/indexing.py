"""Lookups, selections by constants or tensors, and tensors made by code."""

from __future__ import annotations

from espalier.graph.rules.elementwise import broadcast
from espalier.graph.rules.registry import Dims, Reading, Result, Term, freeze_all, positive, rule, size
from espalier.graph.solver import is_plain
from espalier.graph.trace import Call, Ref

_UNIFORM = (
    "zeros ones full empty rand randn new_zeros new_ones new_full new_empty empty_strided new_empty_strided".split()
)
_ORDERED = "arange eye linspace logspace scalar_tensor randint randperm tril_indices triu_indices".split()


@rule("embedding")
def embedding(reading: Reading, call: Call) -> Result:
    """Rows of a table: the rows are an interface, the features an axis."""
    weight, indices = call.args[:2]
    rows, features = reading.of(weight)
    reading.tap("lookup", call, weight, 0)
    reading.tap("produce", call, weight, 1)
    reading.freeze(rows, "lookup", "its rows are looked up by index", call)
    return (*reading.of(indices), features)


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(reading: Reading, call: Call) -> Result:
    """Rows of a table, looked up and joined in bags: every feature on its own."""
    a = call.arguments()
    rows, features = reading.of(a["weight"])
    reading.tap("lookup", call, a["weight"], 0)
    reading.tap("produce", call, a["weight"], 1)
    reading.freeze(rows, "lookup", "its rows are looked up by index", call)
    first, *others = call.outputs
    assert first is not None
    bags = reading.of(a["offsets"])[0] if not a["include_last_offset"] else reading.shape(first)[0]
    dims = (bags, features)
    return [dims, *(None if out is None else _as(reading, out, dims) for out in others)]


def _as(reading: Reading, out: Ref, dims: Dims) -> Dims:
    """`dims` if the result has their sizes, or else its plain sizes."""
    shape = reading.shape(out)
    return dims if shape == tuple(size(term) for term in dims) else shape


@rule("select")
def select(reading: Reading, call: Call) -> Result:
    """One position of a dimension. Where nothing reads it, it was only taken for its shape."""
    dims = reading.of(call.args[0])
    dim = positive(call.args[1], len(dims))
    if reading.is_used(call.outputs[0]):
        reading.freeze(dims[dim], "index", "one of its units is read by a constant index", call)
    reading.expect(call, "index", call.args[2])
    return (*dims[:dim], *dims[dim + 1 :])


@rule("unbind")
def unbind(reading: Reading, call: Call) -> Result:
    """Every position of a dimension on its own."""
    a = call.arguments()
    dims = reading.of(a["self"])
    dim = positive(a["dim"], len(dims))
    reading.freeze(dims[dim], "index", "its units are taken apart one by one", call)
    return [(*dims[:dim], *dims[dim + 1 :]) for _ in call.outputs]


@rule("index_select")
def index_select(reading: Reading, call: Call) -> Result:
    """Positions of one dimension chosen by a tensor, the same everywhere."""
    ref, given, index = call.args
    dims = reading.of(ref)
    if not dims:
        return ()
    dim = positive(given, len(dims))
    reading.freeze(dims[dim], "index", "its units are chosen by an index tensor", call)
    picked = reading.of(index)[0] if reading.of(index) else 1
    if not is_plain(dims[dim]):
        picked = _picked(reading, call, picked)
    return (*dims[:dim], picked, *dims[dim + 1 :])


def _picked(reading: Reading, call: Call, place: Term) -> Term:
    """The dimension that an index tensor makes of one that may not change."""
    if not is_plain(place):
        return place
    return reading.moved(size(place), "index", "is what an index tensor chooses of another axis", call)


@rule("gather")
def gather(reading: Reading, call: Call) -> Result:
    """Positions of one dimension chosen by a tensor, elsewhere the same position as in that tensor."""
    ref, dim, index = call.args[:3]
    return _aligned(reading, call, ref, dim, index)


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(reading: Reading, call: Call) -> Result:
    """The reverse of `gather`: written to positions of one dimension chosen by a tensor."""
    ref, dim, index, source = call.args[:4]
    for one in (ref, source):
        if isinstance(one, Ref) and reading.of(one):
            _aligned(reading, call, one, dim, index)
    return reading.of(ref)


def _aligned(reading: Reading, call: Call, ref: Ref, dim: int, index: Ref) -> Dims:
    """Unify `ref` with an index tensor of the same rank except along `dim`; the dimensions of the index tensor."""
    dims, chosen = reading.of(ref), reading.of(index)
    if not dims or not chosen:
        return chosen
    for position, (term, other) in enumerate(zip(dims, chosen, strict=True)):
        if position == positive(dim, len(dims)):
            reading.freeze(term, "index", "its units are chosen by an index tensor", call)
            reading.freeze(other, "index", "is the order of an index tensor", call)
        elif size(term) == size(other):
            reading.unify(term, other, call)
        else:
            reading.freeze(term, "index", "part of its units is read by an index tensor", call)
            reading.freeze(other, "index", "is the size of an index tensor", call)
    return chosen


@rule("index_add", "index_copy")
def index_add(reading: Reading, call: Call) -> Result:
    """Slices of one dimension, chosen by a tensor, are written with those of another tensor."""
    ref, given, chosen, source = call.args[:4]
    dims, other = reading.of(ref), reading.of(source)
    dim = positive(given, len(dims)) if dims else 0
    for term in reading.of(chosen):
        reading.freeze(term, "index", "is the size of an index tensor", call)
    for position, (term, added) in enumerate(zip(dims, other, strict=True)):
        if position == dim:
            reading.freeze(term, "index", "its units are chosen by an index tensor", call)
            reading.freeze(added, "index", "its units are written in the order of an index tensor", call)
        else:
            reading.unify(term, added, call)
    return dims


@rule("index", "_unsafe_index")
def index(reading: Reading, call: Call) -> Result:
    """x[i, :, j]: the indexed dimensions are replaced by those of the index tensors; x[mask] by one of those chosen."""
    ref, indices = call.args[:2]
    masks = _masks(reading, indices)
    if not masks:
        return _indexed(reading, call, reading.of(ref), indices)
    if len(masks) < sum(one is not None for one in indices) or len(masks) > 1:
        return freeze_all(reading, call, "index", "is chosen by a mask together with other indices")
    front, rest = _around_mask(reading, call, reading.of(ref), indices)
    out = call.outputs[0]
    assert out is not None
    return (*front, reading.shape(out)[len(front)], *rest)


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(reading: Reading, call: Call) -> Result:
    """x[i, :, j] = values: what is addressed may not change, the other dimensions are those of the values."""
    ref, indices, values = call.args[:3]
    dims = reading.of(ref)
    masks = _masks(reading, indices)
    if masks:
        if len(masks) < sum(one is not None for one in indices) or len(masks) > 1:
            return freeze_all(reading, call, "index", "is written by a mask together with other indices")
        front, rest = _around_mask(reading, call, dims, indices)
        given = reading.of(values)
        chosen = given[-len(rest) - 1] if len(given) > len(rest) else 1
        reading.freeze(chosen, "index", "its units are written where a mask is set", call)
        written: Dims = (*front, chosen, *rest)
    else:
        for one in indices:
            for term in reading.of(one) if isinstance(one, Ref) else ():
                reading.freeze(term, "index", "is the size of an index tensor", call)
        written = _indexed(reading, call, dims, indices)
    for back, term in enumerate(reversed(reading.of(values)), 1):
        if size(term) == 1 and size(written[-back]) != 1:
            reading.freeze(term, "size", "its single unit is broadcast", call)
        else:
            reading.unify(term, written[-back], call)
    return dims


def _indexed(reading: Reading, call: Call, dims: Dims, indices: list[Ref | None]) -> Dims:
    positions = [(dim, one) for dim, one in enumerate(indices) if one is not None]
    for dim, _ in positions:
        reading.freeze(dims[dim], "index", "its units are chosen by an index tensor", call)
    numbers = [position for position, _ in positions]
    places = broadcast(reading, call, [one for _, one in positions])
    if not all(is_plain(dims[position]) for position in numbers):
        places = tuple(_picked(reading, call, place) for place in places)
    kept = [term for position, term in enumerate(dims) if position not in numbers]
    adjacent = numbers == list(range(numbers[0], numbers[-1] + 1))
    front = numbers[0] if adjacent else 0
    return (*kept[:front], *places, *kept[front:])


def _masks(reading: Reading, indices: list[Ref | None]) -> list[Ref]:
    return [one for one in indices if one is not None and _is_mask(reading, one)]


def _around_mask(reading: Reading, call: Call, dims: Dims, indices: list[Ref | None]) -> tuple[Dims, Dims]:
    """The dimensions before and after those that the one mask among the indices covers, which may not change."""
    start = next(dim for dim, one in enumerate(indices) if one is not None)
    mask = indices[start]
    assert mask is not None
    stop = start + len(reading.of(mask))
    for term in (*dims[start:stop], *reading.of(mask)):
        reading.freeze(term, "index", "its units are chosen by a mask", call)
    return dims[:start], dims[stop:]


def _is_mask(reading: Reading, ref: Ref) -> bool:
    return str(reading.trace.dtypes[ref.index]) in ("torch.bool", "torch.uint8")


@rule("masked_scatter", "slice_scatter", "select_scatter", "diagonal_scatter")
def write(reading: Reading, call: Call) -> Result:
    """Writes at chosen positions: the sizes stay, what is addressed may not change."""
    dims = reading.of(call.args[0])
    freeze_all(reading, call, "index", "its units are written by index")
    return dims


@rule("nll_loss_forward", "nll_loss2d_forward")
def nll_loss(reading: Reading, call: Call) -> Result:
    """The entries that class numbers choose, averaged or summed or one by one."""
    for term in (*reading.of(call.args[0]), *reading.of(call.args[1])):
        if not is_plain(term):
            reading.freeze(term, "index", "its units are chosen by class numbers", call)
    return [None if out is None else reading.shape(out) for out in call.outputs]


@rule(*_UNIFORM)
def uniform(reading: Reading, call: Call) -> Result:
    """Tensors of uniform content made by code: their sizes follow what they meet."""
    return [None if out is None else tuple(reading.loose(n) for n in reading.shape(out)) for out in call.outputs]


@rule(*_ORDERED)
def ordered(reading: Reading, call: Call) -> Result:
    """Tensors made by code whose positions differ: plain sizes."""
    return [None if out is None else reading.shape(out) for out in call.outputs]


@rule("_assert_async", "_assert_tensor_metadata", "_linalg_check_errors")
def assertion(reading: Reading, call: Call) -> Result:
    """Checks something and computes nothing."""
    return []
