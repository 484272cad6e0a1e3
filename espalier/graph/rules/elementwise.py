"""Operators that treat every element on its own, with broadcasting."""

from __future__ import annotations

from espalier.graph.capture import Call, Ref
from espalier.graph.rules.registry import Dims, Reading, Result, Term, refs_in, rule, size
from espalier.graph.solver import resolve

_UNARY = """
    abs acos acosh alias asin asinh atan atanh bernoulli bitwise_not ceil celu clamp clamp_max clamp_min clone cos cosh
    detach elu erf erfc exp exp2 expm1 fill floor frac gelu hardshrink hardsigmoid hardswish hardtanh isfinite isinf
    isnan leaky_relu lift lift_fresh log log10 log1p log2 log_sigmoid_forward logical_not logit masked_fill mish
    nan_to_num native_dropout neg normal positive reciprocal relu relu6 round rsqrt selu sgn sigmoid sign silu sin sinh
    softplus softshrink sqrt square tan tanh threshold trunc uniform zero _to_copy rrelu_with_noise
""".split()
_MANY = """
    addcdiv addcmul atan2 bitwise_and bitwise_or bitwise_xor copy eq floor_divide fmod ge gt le lerp logical_and
    logical_or logical_xor lt maximum minimum ne pow remainder rsub where _prelu_kernel
""".split()
_LIKE = "empty_like ones_like zeros_like full_like rand_like randn_like".split()


@rule(*_UNARY, *_MANY, *_LIKE)
def elementwise(reading: Reading, call: Call) -> Result:
    """Sizes broadcast from the right; dimensions that are not broadcast are the same."""
    return _broadcast(reading, call, "elementwise")


@rule("add", "sub")
def shift(reading: Reading, call: Call) -> Result:
    """As elementwise; a parameter in it shifts its partner."""
    return _broadcast(reading, call, "shift")


@rule("mul", "div")
def scale(reading: Reading, call: Call) -> Result:
    """As elementwise; a parameter in it scales its partner."""
    return _broadcast(reading, call, "scale")


def _broadcast(reading: Reading, call: Call, role: str) -> Result:
    operands = refs_in((call.args, call.kwargs))
    dims = broadcast(reading, call, operands)
    for ref in operands:
        if len(operands) > 1 and reading.is_parameter(ref):
            for position in range(len(reading.of(ref))):
                reading.tap(role, call, ref, position)
    return [
        None if ref is None else dims[-len(reading.shape(ref)) :] if reading.shape(ref) else () for ref in call.outputs
    ]


def broadcast(reading: Reading, call: Call, operands: list[Ref]) -> Dims:
    """The common dimensions of `operands`, unified from the right."""
    rank = max((len(reading.of(ref)) for ref in operands), default=0)
    result: list[Term] = []
    for back in range(rank, 0, -1):
        terms = [reading.of(ref)[-back] for ref in operands if len(reading.of(ref)) >= back]
        result.append(broadcast_dim(reading, call, terms))
    return tuple(result)


def broadcast_dim(reading: Reading, call: Call, terms: list[Term]) -> Term:
    """One dimension of a broadcast.

    A plain size of one broadcasts. An axis that happens to have size one is not a broadcast, unless it meets a larger
    size: then it has to stay one.
    """
    large = max(size(term) for term in terms)
    kept: Term | None = None
    for term in terms:
        resolved = resolve(term)
        if size(resolved) == 1 and large > 1:
            reading.freeze(resolved, "size", "its single unit is broadcast", call)
        elif isinstance(resolved, int) and resolved == 1:
            continue
        elif kept is None:
            kept = term
        else:
            reading.unify(kept, term, call)
    return 1 if kept is None else kept
