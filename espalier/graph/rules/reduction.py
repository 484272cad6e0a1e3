"""Reductions, and pooling over spatial dimensions."""

from __future__ import annotations

from espalier.graph.capture import Call, Ref
from espalier.graph.rules.registry import Dims, Reading, Result, Term, positive, rule
from espalier.graph.solver import is_plain

_REDUCTIONS = """
    all amax amin any argmax argmin linalg_vector_norm logsumexp max mean median min norm nansum prod std sum var
    std_mean var_mean
""".split()
_ZERO_SAFE = ("aten::sum", "aten::linalg_vector_norm", "aten::norm", "aten::nansum")


@rule(*_REDUCTIONS)
def reduction(reading: Reading, call: Call) -> Result:
    """Removes dimensions, or leaves them with size one."""
    a = call.arguments()
    ref = a.get("self", a.get("input"))
    dims = reading.of(ref)
    chosen = a.get("dim")
    if chosen is None or chosen == []:
        gone = set(range(len(dims)))
    else:
        gone = {positive(dim, len(dims)) for dim in ([chosen] if isinstance(chosen, int) else chosen)}
    for position in sorted(gone):
        reading.tap("sum" if call.name in _ZERO_SAFE else "reduce", call, ref, position)
    if a.get("keepdim"):
        kept: Dims = tuple(1 if position in gone else term for position, term in enumerate(dims))
    else:
        kept = tuple(term for position, term in enumerate(dims) if position not in gone)
    return [None if out is None else kept for out in call.outputs]


@rule("cumsum", "cumprod", "sort", "topk", "argsort", "flip", "roll", "tril", "triu")
def along(reading: Reading, call: Call) -> Result:
    """Operators that mix or move the positions along some dimensions: these may not change."""
    a = call.arguments()
    ref = a.get("self", a.get("input"))
    dims = reading.of(ref)
    if call.name.startswith(("aten::tri",)):
        moved = [len(dims) - 2, len(dims) - 1]
    else:
        chosen = a.get("dims", a.get("dim"))
        if chosen is None or chosen == []:
            moved = list(range(len(dims)))
        else:
            moved = [positive(dim, len(dims)) for dim in ([chosen] if isinstance(chosen, int) else chosen)]
    for position in moved:
        reading.freeze(dims[position], "operator", "its units are moved or mixed", call)
    return [None if out is None else _kept(reading, out, dims, moved) for out in call.outputs]


def _kept(reading: Reading, out: Ref, dims: Dims, moved: list[int]) -> Dims:
    shape = reading.shape(out)
    return tuple(shape[position] if position in moved else term for position, term in enumerate(dims))


def _pool_names() -> list[str]:
    names = ["max_pool1d", "avg_pool1d", "adaptive_avg_pool1d"]
    for rank in (2, 3):
        names += [f"max_pool{rank}d_with_indices", f"max_pool{rank}d", f"avg_pool{rank}d"]
        names += [f"_adaptive_avg_pool{rank}d", f"adaptive_avg_pool{rank}d", f"adaptive_max_pool{rank}d"]
    for mode in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d"):
        names += [f"upsample_{mode}"]
    for rank in (1, 2, 3):
        names += [f"reflection_pad{rank}d", f"replication_pad{rank}d"]
    return [*names, "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d"]


@rule(*_pool_names())
def spatial(reading: Reading, call: Call) -> Result:
    """Pooling, resampling and padding of the trailing spatial dimensions: batch and channels pass through."""
    ref = call.args[0]
    rank = int(next(letter for letter in call.name if letter.isdigit()))
    dims = reading.of(ref)
    for term in dims[-rank:]:
        if not is_plain(term):
            reading.freeze(term, "size", "it is a spatial size", call)
    results: list[tuple[Term, ...] | None] = []
    for out in call.outputs:
        results.append(None if out is None else (*dims[:-rank], *reading.shape(out)[-rank:]))
    return results
