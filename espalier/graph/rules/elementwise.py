"""Operators that treat every element on its own, with broadcasting."""

from __future__ import annotations

from espalier.graph.rules.registry import Dims, Reading, Result, Term, refs_in, rule, size
from espalier.graph.solver import resolve
from espalier.graph.trace import Call, Ref

_UNARY = """
    _conj _conj_physical _to_copy abs acos acosh alias angle asin asinh atan atanh bernoulli bitwise_not cauchy ceil
    celu clamp clamp_max clamp_min clone cos cosh deg2rad detach digamma elu erf erfc erfinv exp exp2 expm1
    exponential fill floor frac gelu geometric hardshrink hardsigmoid hardswish hardtanh i0 isinf isnan leaky_relu
    lgamma lift_fresh log log10 log1p log2 log_normal log_sigmoid_forward logical_not logit masked_fill mish
    nan_to_num native_dropout neg normal poisson rad2deg random reciprocal relu round rrelu_with_noise rsqrt sgn
    sigmoid sign signbit silu sin sinc sinh softplus softshrink sqrt tan tanh threshold trunc uniform zero
""".split()
_MANY = """
    _prelu_kernel addcdiv addcmul atan2 bitwise_and bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor
    complex copy copysign eq floor_divide fmax fmin fmod ge gt heaviside hypot le lerp logaddexp logaddexp2 logical_and
    logical_or logical_xor lt maximum minimum ne nextafter polar pow remainder rsub where xlogy
""".split()
_LIKE = "empty_like ones_like zeros_like full_like rand_like randn_like".split()
_LOSSES = """
    binary_cross_entropy binary_cross_entropy_with_logits huber_loss mse_loss smooth_l1_loss soft_margin_loss
""".split()


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


@rule(*_LOSSES)
def loss(reading: Reading, call: Call) -> Result:
    """Elementwise, then averaged or summed over everything unless the caller wants every element."""
    operands = refs_in((call.args, call.kwargs))
    dims = broadcast(reading, call, operands)
    if call.outputs[0] is None or len(reading.shape(call.outputs[0])) == len(dims):
        return dims
    for position in range(len(reading.of(operands[0]))):
        reading.tap("reduce", call, operands[0], position)
    return ()


def _broadcast(reading: Reading, call: Call, role: str) -> Result:
    operands = refs_in((call.args, call.kwargs))
    dims = broadcast(reading, call, operands)
    for ref in operands:
        if len(operands) > 1 and reading.is_parameter(ref):
            for position in range(len(reading.of(ref))):
                reading.tap(role, call, ref, position)
    first, *others = call.outputs
    # A further output (the buffer of log_sigmoid) may be empty on some devices.
    return [dims, *(None if ref is None else _or_plain(reading, ref, dims) for ref in others)] if first else []


def _or_plain(reading: Reading, ref: Ref, dims: Dims) -> Dims:
    shape = reading.shape(ref)
    return dims if shape == tuple(size(term) for term in dims) else shape


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
