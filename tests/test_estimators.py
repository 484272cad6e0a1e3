"""Gate functions, and gradients of expected losses by their logits, against exact enumeration."""

import itertools

import pytest
import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.parts.gates.estimators import AR, ARM, DisARM, Estimator, antithetic, sampled
from espalier.parts.gates.functions import GateFunction, HardSigmoid, Sigmoid

SAMPLES = 60_000
ESTIMATORS = (AR(), ARM(), DisARM())
FUNCTIONS = (Sigmoid(), HardSigmoid())
UNEVEN = Sigmoid(rest=0.8)


def loss(gates: Tensor) -> Tensor:
    """A function of gates (..., J) with interactions of all of them."""
    weights = torch.linspace(-1, 2, gates.shape[-1], dtype=torch.float64)
    return (gates @ weights - 1.5).square() + 3 * gates.prod(-1) + 2 * gates[..., 0] * gates[..., -1]


def logits(count: int) -> Tensor:
    return torch.linspace(-0.9, 1.2, count, dtype=torch.float64)


def enumerated(function: GateFunction, phi: Tensor, k: float) -> Tensor:
    phi = phi.clone().requires_grad_()
    p = function.probability(phi, k)
    total = torch.zeros((), dtype=torch.float64)
    for one in itertools.product((0.0, 1.0), repeat=len(phi)):
        z = torch.tensor(one, dtype=torch.float64)
        total = total + loss(z) * torch.where(z > 0, p, 1 - p).prod()
    (gradient,) = torch.autograd.grad(total, phi)
    return gradient


def estimates(estimator: Estimator, function: GateFunction, phi: Tensor, k: float, shift: float = 0.0) -> Tensor:
    """One gradient for each of many uniforms: (samples, J)."""
    u = torch.rand(SAMPLES, len(phi), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, c = function.probability(phi, k), function.chain(phi, k)
    losses = tuple(loss(draw(u, p).double()) + shift for draw in (sampled, antithetic))

    def one(first: Tensor, second: Tensor, uniforms: Tensor) -> Tensor:
        return estimator((first, second), uniforms, p, c)

    return torch.vmap(one)(*losses, u)


def check_unbiased(estimator, function, k, count):
    phi = logits(count)
    exact, found = enumerated(function, phi, k), estimates(estimator, function, phi, k)
    error = found.std(0) / SAMPLES**0.5
    assert ((found.mean(0) - exact).abs() <= 5 * error + 1e-12).all()
    if count > 1:
        assert (exact.abs() > 10 * error).any()  # the test could tell a wrong gradient


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("k", [1.0, 3.0])
@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_estimators_are_unbiased(estimator, function, k, count):
    check_unbiased(estimator, function, k, count)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_estimators_are_unbiased_whatever_the_probability_at_rest(estimator):
    check_unbiased(estimator, UNEVEN, 2.0, 4)


def test_the_factor_k_alone_is_biased_for_the_hard_sigmoid():
    function, phi, k = HardSigmoid(), logits(4) / 2, 3.0
    found = estimates(DisARM(), function, phi, k) / function.chain(phi, k) * k
    error = found.std(0) / SAMPLES**0.5
    assert ((found.mean(0) - enumerated(function, phi, k)).abs() > 5 * error).sum() >= 3  # c = k at one g alone


@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
def test_variance_falls_from_ar_to_arm_to_disarm(function):
    ar, arm, disarm = (estimates(one, function, logits(6), 2.0).var(0) for one in ESTIMATORS)
    assert (arm < ar).all()
    assert (disarm <= arm).all()


@pytest.mark.parametrize("estimator", [ARM(), DisARM()], ids=repr)
def test_a_constant_changes_nothing(estimator):
    plain = estimates(estimator, Sigmoid(), logits(5), 2.0)
    torch.testing.assert_close(plain, estimates(estimator, Sigmoid(), logits(5), 2.0, shift=1000.0), atol=1e-9, rtol=0)


def test_a_constant_makes_ar_noisier():
    plain, shifted = (estimates(AR(), Sigmoid(), logits(5), 2.0, shift=by).var(0) for by in (0.0, 1000.0))
    assert (shifted > 1000 * plain).all()


@pytest.mark.parametrize("estimator", [ARM(), DisARM()], ids=repr)
def test_equal_samples_give_exactly_zero(estimator):
    phi = torch.tensor([3.0, -3.0, 5.0])
    p, c = Sigmoid().probability(phi, 5000.0), Sigmoid().chain(phi, 5000.0)
    u = torch.rand(3)
    assert torch.equal(sampled(u, p), antithetic(u, p))
    value = torch.tensor(0.7)
    assert torch.equal(estimator((value, value), u, p, c), torch.zeros(3))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_gates_of_every_sample_are_averaged_with_the_losses_of_every_sample(estimator):
    phi = logits(4)
    p, c = Sigmoid().probability(phi, 2.0), Sigmoid().chain(phi, 2.0)
    u = torch.rand(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = (loss(sampled(u, p).double()), loss(antithetic(u, p).double()))
    one_by_one = [estimator((losses[0][i], losses[1][i]), u[i], p, c) for i in range(10)]
    torch.testing.assert_close(estimator(losses, u, p, c), torch.stack(one_by_one).mean(0))
    with pytest.raises(MethodError, match="a loss of every sample"):
        estimator((losses[0].mean(), losses[1].mean()), u, p, c)


@pytest.mark.parametrize(
    ("function", "mirrored", "rest"),
    [(one, one, 0.5) for one in FUNCTIONS] + [(UNEVEN, Sigmoid(rest=0.2), 0.8)],
    ids=repr,
)
def test_gate_functions(function, mirrored, rest):
    phi = torch.linspace(-9, 9, 37, dtype=torch.float64).requires_grad_()
    for k in (0.5, 2.0):
        g = function.probability(phi, k)
        torch.testing.assert_close(g + mirrored.probability(-phi, k), torch.ones_like(g))
        (slope,) = torch.autograd.grad(g.sum(), phi)
        inside = (g > 0) & (g < 1)
        torch.testing.assert_close((function.chain(phi, k) * g * (1 - g))[inside], slope[inside])
        assert function.probability(torch.tensor(function.logit(0.95, k)), k) == pytest.approx(0.95)
    with torch.no_grad():
        torch.testing.assert_close(function.probability(phi, 0.0), torch.full_like(phi, rest))  # dropout
        assert (function.chain(phi, 0.0) == 0).all()
    with pytest.raises(MethodError, match="all gates are equally likely"):
        function.logit(0.95, 0.0)


def test_hard_gates_rest_in_the_tails():
    phi = torch.tensor([-10.0, 0.1, 10.0])
    assert HardSigmoid().probability(phi, 1.0)[[0, 2]].tolist() == [0.0, 1.0]
    chain = HardSigmoid().chain(phi, 1.0)
    assert chain[[0, 2]].tolist() == [0.0, 0.0]
    assert chain[1] > 0


def test_how_often_samples_agree():
    p = Sigmoid().probability(logits(4), 3.0)
    u = torch.rand(SAMPLES, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share = (sampled(u, p) == antithetic(u, p)).all(1).double().mean()
    expected = (2 * p - 1).abs().prod()
    assert abs(share - expected) < 5 * (expected * (1 - expected) / SAMPLES) ** 0.5
