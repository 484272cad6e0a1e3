"""Lookups, selections by constants or tensors, and tensors made by code."""

from __future__ import annotations

from espalier.graph.capture import Call, Ref
from espalier.graph.rules.elementwise import broadcast
from espalier.graph.rules.registry import Dims, Reading, Result, Term, freeze_all, positive, rule, size
from espalier.graph.solver import is_plain

_UNIFORM = (
    "zeros ones full empty rand randn new_zeros new_ones new_full new_empty empty_strided new_empty_strided".split()
)
_ORDERED = "arange eye linspace logspace scalar_tensor randint randperm tril_indices triu_indices one_hot".split()


@rule("embedding")
def embedding(reading: Reading, call: Call) -> Result:
    """Rows of a table: the rows are an interface, the features an axis."""
    weight, indices = call.args[:2]
    rows, features = reading.of(weight)
    reading.tap("lookup", call, weight, 0)
    reading.tap("produce", call, weight, 1)
    reading.freeze(rows, "lookup", "its rows are looked up by index", call)
    return (*reading.of(indices), features)


@rule("select")
def select(reading: Reading, call: Call) -> Result:
    """One position of a dimension."""
    dims = reading.of(call.args[0])
    dim = positive(call.args[1], len(dims))
    reading.freeze(dims[dim], "index", "one of its units is read by a constant index", call)
    return (*dims[:dim], *dims[dim + 1 :])


@rule("unbind")
def unbind(reading: Reading, call: Call) -> Result:
    """Every position of a dimension on its own."""
    a = call.arguments()
    dims = reading.of(a["self"])
    dim = positive(a["dim"], len(dims))
    reading.freeze(dims[dim], "index", "its units are taken apart one by one", call)
    return [(*dims[:dim], *dims[dim + 1 :]) for _ in call.outputs]


@rule("index_select", "gather", "take_along_dim")
def index_along(reading: Reading, call: Call) -> Result:
    """Positions of one dimension chosen by a tensor."""
    dims, out = reading.of(call.args[0]), call.outputs[0]
    assert out is not None
    dim = positive(call.args[1], len(dims)) if dims else 0
    shape = reading.shape(out)
    result: list[Term] = []
    for position, term in enumerate(dims):
        if position == dim:
            reading.freeze(term, "index", "its units are chosen by an index tensor", call)
            result.append(shape[position])
        elif size(term) == shape[position]:
            result.append(term)
        else:
            reading.freeze(term, "index", "part of its units is read by an index tensor", call)
            result.append(shape[position])
    return tuple(result)


@rule("index", "_unsafe_index")
def index(reading: Reading, call: Call) -> Result:
    """x[i, :, j]: the indexed dimensions are replaced by the sizes of the index tensors."""
    dims, indices, out = reading.of(call.args[0]), call.args[1], call.outputs[0]
    assert out is not None
    indexed = [position for position, one in enumerate(indices) if isinstance(one, Ref)]
    if any(reading.trace.dtypes[indices[position].index].is_floating_point for position in indexed):
        return freeze_all(reading, call, "index", "it is indexed")
    for position in indexed:
        reading.freeze(dims[position], "index", "its units are chosen by an index tensor", call)
    places = broadcast(reading, call, [indices[position] for position in indexed])
    kept = [term for position, term in enumerate(dims) if position not in indexed]
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    front = indexed[0] if adjacent else 0
    result: Dims = (*kept[:front], *places, *kept[front:])
    shape = reading.shape(out)
    if tuple(size(term) for term in result) != shape:  # a boolean mask: how many is a matter of values
        return freeze_all(reading, call, "index", "it is indexed by a mask")
    return result


@rule("index_put", "_index_put_impl", "scatter", "scatter_add", "index_add", "index_copy", "masked_scatter",
      "slice_scatter", "select_scatter")  # fmt: skip
def write(reading: Reading, call: Call) -> Result:
    """Writes at chosen positions: the sizes stay, what is addressed may not change."""
    dims = reading.of(call.args[0])
    freeze_all(reading, call, "index", "its units are written by index")
    return dims


@rule(*_UNIFORM)
def uniform(reading: Reading, call: Call) -> Result:
    """Tensors of uniform content made by code: their sizes follow what they meet."""
    return [None if out is None else tuple(reading.loose(n) for n in reading.shape(out)) for out in call.outputs]


@rule(*_ORDERED)
def ordered(reading: Reading, call: Call) -> Result:
    """Tensors made by code whose positions differ: plain sizes."""
    for ref in (ref for ref in call.args if isinstance(ref, Ref)):
        for term in reading.of(ref):
            if not is_plain(term):
                reading.freeze(term, "index", "its values become positions", call)
    return [None if out is None else reading.shape(out) for out in call.outputs]
