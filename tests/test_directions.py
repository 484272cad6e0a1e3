"""Directions of largest gradient against explicit matrices, whatever lies between the weights."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from espalier import attach
from espalier.errors import MethodError
from espalier.parts.budget import Polynomial
from espalier.parts.ghosts.directions import directions
from espalier.parts.ghosts.ghosts import Ghosts
from espalier.parts.ghosts.metric import metrics
from espalier.parts.ghosts.passes import Passes
from espalier.parts.ghosts.steepest import Steepest
from espalier.parts.ghosts.wiring import rest_of
from espalier.parts.goal import Cap, Goal
from espalier.parts.score import Context
from espalier.structure import Structure

UNITS = 4
SPARE = 8


class Step(nn.Module):
    """A shortcut beside two convolutions, of which the second strides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(3, 8, 1, stride=2)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.shortcut(x) + self.second(torch.tanh(self.first(x)))).flatten(1))


def images(*between: nn.Module, stride: int = 1, positions: int) -> nn.Module:
    first = nn.Conv2d(3, 6, 3, stride=stride, padding=1)
    second = nn.Conv2d(6, 8, 3, stride=stride, padding=1)
    return nn.Sequential(first, nn.Tanh(), *between, second, nn.GELU(), nn.Flatten(), nn.Linear(8 * positions, 5))


def hidden(inputs: int) -> tuple[nn.Module, ...]:
    return nn.Linear(inputs, 40), nn.Tanh(), nn.Linear(40, 5)


CASES: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(30, 12), nn.SiLU(), *hidden(12)), (30,), "0"),
    "padding": (lambda: images(positions=64), (3, 8, 8), "0"),
    "stride": (lambda: images(stride=2, positions=4), (3, 8, 8), "0"),
    "average": (lambda: images(nn.AvgPool2d(2), positions=16), (3, 8, 8), "0"),
    "maximum": (lambda: images(nn.MaxPool2d(2), positions=16), (3, 8, 8), "0"),
    "flatten": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), *hidden(216)),
        (3, 8, 8),
        "0",
    ),
    "residual": (Step, (3, 8, 8), "first"),
}  # fmt: skip


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def context_of(model: nn.Module, x: Tensor, axis: str) -> Context:
    structure = attach(model, x)
    y = torch.randint(0, 5, (len(x),), generator=torch.Generator().manual_seed(2))
    return Context(structure, (axis,), 0, 0, 0.0, 1, partial(loss_of, model), (x, y), ())


def made(name: str, dtype: torch.dtype) -> tuple[Context, str]:
    make, shape, axis = CASES[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return context_of(model, x, axis), axis


def silent(context: Context, ghosts: Ghosts, axis: str, outgoing: Tensor) -> dict[str, Tensor]:
    """New units with incoming weights and biases of zero."""
    side = ghosts.sides[axis].incoming
    tensors = side.write(ghosts.tensors, torch.zeros_like(side.read(ghosts.tensors)))
    shifts = rest_of(context.structure, ghosts.sides[axis].rest, axis, "shift")
    tensors = shifts.write(tensors, torch.zeros_like(shifts.read(tensors)))
    return ghosts.sides[axis].outgoing.write(tensors, outgoing)


def gradient(context: Context, ghosts: Ghosts, axis: str, outgoing: Tensor) -> Tensor:
    side = ghosts.sides[axis].incoming
    return side.read(ghosts.gradients(silent(context, ghosts, axis, outgoing), context.batch, side.names))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_norm_is_that_of_the_best_directions(name: str, dtype: torch.dtype) -> None:
    context, axis = made(name, dtype)
    size = Ghosts(context, {axis: 1}).sides[axis].outgoing.read(Ghosts(context, {axis: 1}).tensors).shape[1]
    whole = gradient(context, Ghosts(context, {axis: size}), axis, torch.eye(size, dtype=dtype))
    best = torch.linalg.svdvals(whole.double())[:UNITS].square().sum().sqrt()

    ghosts = Ghosts(context, {axis: UNITS + SPARE})
    found = directions(context, ghosts, {axis: "in"}, Steepest().rounds)[axis]
    rows = found.outgoing[:UNITS]
    torch.testing.assert_close(rows @ rows.T, torch.eye(UNITS, dtype=dtype), atol=1e-5, rtol=0)
    norms = gradient(context, Ghosts(context, {axis: UNITS}), axis, rows).double().square().sum(1)
    assert float(norms.sum().sqrt() / best) >= 0.99
    torch.testing.assert_close(norms.float(), found.gains[:UNITS], rtol=1e-3, atol=0)


def test_max_pooling_is_noticed() -> None:
    """The gradient at zero goes to the first of several zeros there, and says little about the first step."""
    for name, straight in (("average", {"0"}), ("maximum", set())):
        context, axis = made(name, torch.float64)
        passes = Passes(context, Ghosts(context, {axis: 3}), silent=[axis])
        assert passes.alive([axis]) == {axis}
        assert passes.alive([axis], straight=True) == straight


def relu_network() -> tuple[Context, str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)).double()
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return context_of(model, x, "0"), "0"


def test_a_dead_gradient_is_noticed() -> None:
    context, axis = relu_network()
    assert Passes(context, Ghosts(context, {axis: 3}), silent=[axis]).alive([axis]) == set()


@pytest.mark.parametrize("climb", [None, 1e-2])
def test_the_objective_of_units_with_outgoing_zeros_rises(climb: float | None) -> None:
    context, axis = relu_network()
    ghosts = Ghosts(context, {axis: UNITS + 4})

    def reached(rounds: int) -> float:
        found = directions(context, ghosts, {axis: "out"}, rounds, climb=climb)[axis]
        sides = ghosts.sides[axis]
        tensors = sides.incoming.write(ghosts.tensors, found.incoming)
        tensors = sides.outgoing.write(tensors, torch.zeros_like(sides.outgoing.read(tensors)))
        named = ghosts.gradients(tensors, context.batch, sides.outgoing.names)
        gains = sides.outgoing.read(named).square().sum(1)
        torch.testing.assert_close(gains.float(), found.gains, rtol=1e-5, atol=0)
        return float(gains[:UNITS].sum().sqrt())

    first = reached(0)
    few, many = (1, 2) if climb is None else (5, 10)
    assert reached(few) > 1.05 * first
    assert reached(many) > reached(few) * (0.99 if climb is None else 1.05)


def test_behind_a_batch_norm_the_objective_rises_though_lengths_say_nothing() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 5))
    model = nn.Sequential(*layers).double()
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    context = context_of(model, x, "0")
    ghosts = Ghosts(context, {"0": UNITS + 4})
    gains = [directions(context, ghosts, {"0": "pairs"}, rounds)["0"].gains[:UNITS].sum() for rounds in (0, 1, 2)]
    assert gains[0] * 1.05 < gains[1] * 1.0
    assert gains[1] < gains[2] * 1.02


def goal_for(structure: Structure, axis: str, by: int) -> Goal:
    size = structure.axes[axis].size
    cap = Cap(Polynomial({(axis,): 1}), size + by)
    return Goal("grow", {axis: size}, {axis: size}, {axis: size + by}, {axis: float(size)}, cap)


def test_more_units_than_directions_are_all_different() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    context = context_of(model, torch.randn(16, 12, dtype=torch.float64), "0")
    context = replace(context, batch=(context.batch[0], context.batch[1] % 3))
    scores = Steepest()(context, goal_for(context.structure, "0", 20))
    wired = scores.found["0"]
    assert wired.wiring == "in"
    assert len(scores.values["0"]) == len(wired.outgoing) == 20
    assert bool((scores.values["0"].diff() <= 0).all())
    lengths = torch.linalg.vector_norm(wired.outgoing, dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, float(lengths[0])))
    similar = (wired.outgoing @ wired.outgoing.T / lengths[0] ** 2).abs() - torch.eye(20, dtype=torch.float64)
    assert float(similar.max()) < 0.9999


def test_no_batch_and_no_numbers_are_said() -> None:
    context, axis = relu_network()
    with pytest.raises(MethodError, match="there is no batch to take gradients of"):
        Steepest()(replace(context, batch=None), goal_for(context.structure, axis, 2))
    bad = context.batch[0] * float("nan"), context.batch[1]
    with pytest.raises(MethodError, match="0: the gradient by the weights of new units is not finite"):
        Steepest()(replace(context, batch=bad), goal_for(context.structure, axis, 2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"side": "both"}, "side: expected 'auto'"), ({"rounds": 0}, "rounds: expected"), ({"climb": -1.0}, "climb: ")],
)
def test_wrong_options_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        Steepest(**wrong)


@pytest.mark.parametrize("layer", [nn.Linear, nn.Conv2d])
def test_whitened_directions_have_unit_variance_and_are_not_correlated(layer: type) -> None:
    torch.manual_seed(0)
    linear = layer is nn.Linear
    first = nn.Linear(12, 10) if linear else nn.Conv2d(3, 10, 3, stride=2, padding=1)
    norm = nn.BatchNorm1d(10) if linear else nn.BatchNorm2d(10)
    model = nn.Sequential(first, norm, nn.Flatten(), nn.Linear(10 if linear else 160, 5)).double()
    x = torch.randn(256, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    x = x if linear else torch.randn(256, 3, 8, 8, dtype=torch.float64).cumsum(3)
    context = context_of(model, x, "0")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    ghosts = Ghosts(context, {"0": 3})
    metric = metrics(context, ghosts, context.batch, ["0"], ["0"])["0"]
    assert metric.factors[0] is not None
    rows = torch.eye(len(metric.factors[0]), dtype=torch.float64)
    weights = metric.weights(rows)
    torch.testing.assert_close(metric.coordinates(weights), rows)
    old = metric.coordinates(first.weight.detach().flatten(1))
    assert float(torch.linalg.vector_norm(old, dim=1).mean()) == pytest.approx(1)
    shaped = weights.reshape(len(weights), *first.weight.shape[1:])
    if linear:
        made_units = x @ shaped.T
    else:
        made_units = nn.functional.conv2d(x, shaped, stride=2, padding=1).transpose(0, 1).flatten(1).T
    correlations = torch.corrcoef(made_units.T) - torch.eye(len(weights), dtype=torch.float64)
    plain = x if linear else nn.functional.unfold(x, 3, 1, 1, 2).transpose(1, 2).flatten(0, 1)
    others = torch.corrcoef(plain.T) - torch.eye(len(weights), dtype=torch.float64)
    assert float(correlations.square().mean()) < 0.2 * float(others.square().mean())
    assert not model[0]._forward_pre_hooks
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())

    target = torch.randn_like(weights)
    rows.requires_grad_()
    (slope,) = torch.autograd.grad((metric.weights(rows) * target).sum(), rows)
    torch.testing.assert_close(slope, metric.uphill(target))
