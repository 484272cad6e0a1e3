"""Operators that values steer: their results are as large as values say, or come from where values point."""

from __future__ import annotations

from espalier.graph.rules.contraction import contract
from espalier.graph.rules.registry import Reading, Result, Term, freeze_all, refs_in, rule, size
from espalier.graph.rules.spatial import freeze_spatial
from espalier.graph.trace import Call


@rule(
    "nonzero", "masked_select", "repeat_interleave", "bincount", "histc", "unique_consecutive", "unique_dim", "_unique",
    "_unique2", "torchvision::nms",
)  # fmt: skip
def chosen(reading: Reading, call: Call) -> Result:
    """Results made of what values choose or count: nothing that they come from may change."""
    return freeze_all(reading, call, "index", "its units are chosen by their values")


@rule("_local_scalar_dense")
def number(reading: Reading, call: Call) -> Result:
    """A tensor of one element as a number of Python's."""
    for term in reading.of(call.args[0]):
        reading.freeze(term, "size", "its single unit is read as a number", call)
    return []


@rule("equal")
def equal(reading: Reading, call: Call) -> Result:
    """Whether two tensors hold the same values, as a bool of Python's."""
    for ref in refs_in(call.args):
        for dim in range(len(reading.of(ref))):
            reading.tap("reduce", call, ref, dim)
    return []


@rule("_grouped_mm")
def grouped_product(reading: Reading, call: Call) -> Result:
    """(rows, k) times (groups, k, m): the rows are in order of their groups, which begin where offsets say."""
    a = call.arguments()
    x, weight = a["self"], a["mat2"]
    if len(reading.of(x)) != 2 or len(reading.of(weight)) != 3 or a["bias"] is not None:
        return freeze_all(
            reading, call, "operator", "is multiplied in groups of another form than (rows, k) x (groups, k, m)"
        )
    groups, _, columns = reading.of(weight)
    for term in (reading.of(x)[0], groups, *reading.of(a["offs"])):
        reading.freeze(term, "index", "its units are matched by offsets", call)
    contract(reading, call, x, 1, weight, 1)
    for term in (reading.of(x)[1], columns):
        _in_blocks(reading, call, term, 16 // reading.trace.dtypes[x.index].itemsize)
    reading.cost(call, 2, *reading.of(x), columns)
    return (reading.of(x)[0], columns)


def _in_blocks(reading: Reading, call: Call, term: Term, block: int) -> None:
    """Kernels read rows of 16 bytes: sizes stay multiples of so many, which makes a block of them one unit."""
    if size(term) % block == 0 and size(term) > block:
        _, within = reading.split(term, size(term) // block, block, call)
        reading.plain(within)


@rule("torchvision::roi_align")
def regions(reading: Reading, call: Call) -> Result:
    """Boxes of (image, channel, y, x), resampled to one size: channels pass through."""
    dims, boxes, out = reading.of(call.args[0]), reading.of(call.args[1]), call.outputs[0]
    assert out is not None
    freeze_spatial(reading, call, dims[2:])
    for term in (dims[0], *boxes):
        reading.freeze(term, "index", "its units are boxes and images", call)
    return (boxes[0], dims[1], *reading.shape(out)[2:])
