"""Reductions, and operators along some dimensions that mix or move positions."""

from __future__ import annotations

from espalier.graph.rules.registry import Dims, Reading, Result, positive, refs_in, rule, size
from espalier.graph.solver import is_plain
from espalier.graph.trace import Call, Ref

_REDUCTIONS = """
    all amax amin aminmax any argmax argmin count_nonzero linalg_vector_norm logsumexp max mean median min nanmedian
    nansum norm prod std std_mean sum var var_mean
""".split()
_LENGTHS = frozenset({"aten::linalg_vector_norm", "aten::norm"})
_SUMS = frozenset({"aten::sum", "aten::nansum", *_LENGTHS})
_POSITIONS = frozenset({"aten::argmax", "aten::argmin"})
_WITH_POSITIONS = frozenset({"aten::max", "aten::min", "aten::median", "aten::nanmedian"})


@rule(*_REDUCTIONS)
def reduction(reading: Reading, call: Call) -> Result:
    """Removes dimensions, or leaves them with size one."""
    ref = _operand(call)
    dims = reading.of(ref)
    gone = _chosen(call, len(dims))
    gives_positions = call.name in _POSITIONS or (
        call.name in _WITH_POSITIONS and len(call.outputs) > 1 and reading.is_used(call.outputs[1])
    )
    role = "sum" if call.name in _SUMS else "reduce"
    if call.name in _LENGTHS and reading.is_parameter(ref):
        role = "norm"
    for position in gone:
        reading.tap(role, call, ref, position)
        if gives_positions:
            reading.freeze(dims[position], "index", "the numbers of its units are used", call)
    if call.arguments().get("keepdim"):
        kept: Dims = tuple(1 if position in gone else term for position, term in enumerate(dims))
    else:
        kept = tuple(term for position, term in enumerate(dims) if position not in gone)
    return [None if out is None else kept for out in call.outputs]


@rule("cummax", "cummin", "cumprod", "cumsum", "flip", "logcumsumexp", "sort", "topk", "kthvalue", "mode",
      "tril", "triu", "_fft_c2c", "_fft_r2c", "_fft_c2r")  # fmt: skip
def along(reading: Reading, call: Call) -> Result:
    """Operators that mix or move the positions along some dimensions: these may not change."""
    dims = reading.of(_operand(call))
    moved = [len(dims) - 2, len(dims) - 1] if call.name.startswith("aten::tri") else _chosen(call, len(dims))
    for position in moved:
        reading.freeze(dims[position], "operator", "its units are moved or mixed", call)
    return [None if out is None else _kept(reading, call, out, dims, moved) for out in call.outputs]


@rule("trace")
def trace(reading: Reading, call: Call) -> Result:
    """The sum of the diagonal: rows and columns are the same."""
    ref = _operand(call)
    rows, columns = reading.of(ref)
    if size(rows) == size(columns):
        reading.unify(rows, columns, call)
        reading.tap("sum", call, ref, 0)
    else:
        for term in (rows, columns):
            reading.freeze(term, "index", "the diagonal of part of its units is read", call)
    return ()


@rule("_linalg_det", "_linalg_eigh", "_linalg_solve_ex", "_linalg_svd", "linalg_cholesky_ex",
      "linalg_householder_product", "linalg_inv_ex", "linalg_matrix_exp", "linalg_qr",
      "linalg_solve_triangular")  # fmt: skip
def matrix_function(reading: Reading, call: Call) -> Result:
    """Decompositions, inverses and the like: every entry depends on all rows and columns."""
    batch = 0
    for ref in refs_in((call.args, call.kwargs)):
        batch = max(batch, len(reading.of(ref)) - 2)
        for term in reading.of(ref)[-2:]:
            reading.freeze(term, "operator", "is a side of a matrix that is decomposed or inverted", call)
    first = reading.of(refs_in(call.args)[0])
    results: list[Dims | None] = []
    for out in call.outputs:
        shape = () if out is None else reading.shape(out)
        sides = [reading.moved(n, "operator", "is a side of a matrix made", call) for n in shape[batch:]]
        results.append(None if out is None else (*first[:batch], *sides))
    return results


def _operand(call: Call) -> Ref:
    arguments = call.arguments()
    ref = arguments.get("self", arguments.get("input"))
    assert isinstance(ref, Ref)
    return ref


def _chosen(call: Call, rank: int) -> list[int]:
    """The dimensions that a call names; all of them if it names none."""
    arguments = call.arguments()
    chosen = arguments.get("dims", arguments.get("dim"))
    if chosen is None or chosen == []:
        return list(range(rank))
    return sorted({positive(dim, rank) for dim in ([chosen] if isinstance(chosen, int) else chosen)} & set(range(rank)))


def _kept(reading: Reading, call: Call, out: Ref, dims: Dims, moved: list[int]) -> Dims:
    """What is left in place keeps its dimension; where the result is shorter, what was moved is gone."""
    shape = reading.shape(out)
    if len(shape) < len(dims):
        return tuple(term for position, term in enumerate(dims) if position not in moved)
    return tuple(
        reading.moved(shape[position], "operator", "is another axis after its units were moved or mixed", call)
        if position in moved and not is_plain(term)
        else shape[position]
        if position in moved
        else term
        for position, term in enumerate(dims)
    )
