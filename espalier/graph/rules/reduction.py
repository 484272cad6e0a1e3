"""Reductions, and operators along some dimensions that mix or move positions."""

from __future__ import annotations

from espalier.graph.capture import Call, Ref
from espalier.graph.rules.registry import Dims, Reading, Result, positive, rule

_REDUCTIONS = """
    all amax amin aminmax any argmax argmin count_nonzero linalg_vector_norm logsumexp max mean median min nanmedian
    nansum norm prod std std_mean sum var var_mean
""".split()
_ZERO_SAFE = frozenset({"aten::sum", "aten::linalg_vector_norm", "aten::norm", "aten::nansum"})
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
    for position in gone:
        reading.tap("sum" if call.name in _ZERO_SAFE else "reduce", call, ref, position)
        if gives_positions:
            reading.freeze(dims[position], "index", "the numbers of its units are used", call)
    if call.arguments().get("keepdim"):
        kept: Dims = tuple(1 if position in gone else term for position, term in enumerate(dims))
    else:
        kept = tuple(term for position, term in enumerate(dims) if position not in gone)
    return [None if out is None else kept for out in call.outputs]


@rule("cummax", "cummin", "cumprod", "cumsum", "flip", "logcumsumexp", "roll", "sort", "topk", "kthvalue", "mode",
      "tril", "triu", "_fft_c2c", "_fft_r2c", "_fft_c2r")  # fmt: skip
def along(reading: Reading, call: Call) -> Result:
    """Operators that mix or move the positions along some dimensions: these may not change."""
    dims = reading.of(_operand(call))
    moved = [len(dims) - 2, len(dims) - 1] if call.name.startswith("aten::tri") else _chosen(call, len(dims))
    for position in moved:
        reading.freeze(dims[position], "operator", "its units are moved or mixed", call)
    return [None if out is None else _kept(reading, out, dims, moved) for out in call.outputs]


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


def _kept(reading: Reading, out: Ref, dims: Dims, moved: list[int]) -> Dims:
    """What is left in place keeps its dimension; where the result is shorter, what was moved is gone."""
    shape = reading.shape(out)
    if len(shape) < len(dims):
        return tuple(term for position, term in enumerate(dims) if position not in moved)
    return tuple(shape[position] if position in moved else term for position, term in enumerate(dims))
