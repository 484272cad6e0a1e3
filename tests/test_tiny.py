"""TINY against dense formulas, against what new units do to the outputs, and against the loss after growth."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from method_setting import context_of, goal_of, grown, loss_now
from snapshots import differences, snapshot
from torch import Tensor, nn

from espalier import attach
from espalier.errors import MethodError
from espalier.parts.ghosts.bottleneck import largest, leading, new_units, singular_values, wanted
from espalier.parts.ghosts.ghosts import Ghosts
from espalier.parts.ghosts.line_search import best_amplitude
from espalier.parts.ghosts.products import Watched
from espalier.parts.ghosts.reach import between
from espalier.parts.ghosts.tiny import TinyInit, TinyScore, with_units
from espalier.parts.goal import Scores
from espalier.structure import Structure


class TwoReaders(nn.Module):
    """Units that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        units = self.maker(x)
        return self.left(units) + self.right(units)


class MeanOfTokens(nn.Module):
    """A mean over tokens between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.reader = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.maker(x).mean(1))


class Gated(nn.Module):
    """A gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Conv2d(4, 2, 3, stride=2, padding=2, dilation=2))


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.AvgPool2d(2), nn.Conv2d(4, 2, 3))


def flattened() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.AvgPool2d((2, 3)), nn.Flatten(), nn.Linear(16, 2))


def sequence() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 4, 3, bias=False), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2))


LINEAR: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (3,), "0"),
    "tokens": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)), (5, 3), "0"),
    "mean of tokens": (MeanOfTokens, (5, 3), "maker"),
    "two readers": (TwoReaders, (3,), "maker"),
    "convolutions": (convolutions, (2, 9, 8), "0"),
    "pooled": (pooled, (2, 8, 8), "0"),
    "flattened": (flattened, (2, 6, 8), "0"),
    "sequence": (sequence, (2, 7), "0"),
}


def network(name: str, count: int = 40) -> tuple[Structure, tuple[Tensor, Tensor], str]:
    """A network without activations, so that all that is said to the first order holds exactly."""
    make, shape, axis = LINEAR[name]
    torch.manual_seed(0)
    model = make().double()
    inputs = torch.randn(count, *shape, dtype=torch.float64)
    return attach(model, inputs), (inputs, torch.randn_like(model(inputs))), axis


def outputs_of(structure: Structure, readers: tuple[str, ...], run: Callable[[], object], tensors) -> list[Tensor]:
    weights = {name: tensors.get(name, structure.model.get_parameter(name)) for name in readers}
    with Watched(weights) as watched, torch.no_grad():
        run()
    return [watched.found[name][0].output for name in readers]


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_left_meets_what_new_units_do_to_the_outputs(name):
    """<N, incoming x outgoing> is the sum of v times what these units add to the outputs."""
    structure, batch, axis = network(name)
    context = context_of(structure, batch)
    around = between(structure.topology, axis)
    needs, updates = wanted(context, {axis: around}, [batch], 1e-13)
    ghosts = Ghosts(context, {axis: 2})
    sides = ghosts.sides[axis]
    incoming, outgoing = (
        torch.randn(side.read(ghosts.tensors).shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for side in (sides.incoming, sides.outgoing)
    )
    tensors = sides.outgoing.write(sides.incoming.write(ghosts.tensors, incoming), outgoing)
    cross = needs[axis].cross
    if sides.rest.parts:
        tensors = sides.rest.write(tensors, torch.zeros(2, 1, dtype=torch.float64))
        cross = cross[:, :-1]
    found = float((outgoing @ cross @ incoming.T).trace())

    before = outputs_of(structure, around.readers, lambda: structure.model(batch[0]), {})
    after = outputs_of(structure, around.readers, lambda: ghosts.loss(tensors, batch), tensors)
    expected = 0.0
    for reader, old, new in zip(around.readers, before, after, strict=True):
        z = old.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_at(structure, around.readers, before, reader, z, batch), z)
        with Watched({reader: structure.model.get_parameter(reader)}) as watched:
            structure.model(batch[0])
        product = watched.found[reader][0]
        h = product.rows()
        flat = product.units_last(gradient)
        best = torch.linalg.lstsq(h, -flat * len(batch[0])).solution  # dW*, by least squares
        if float(torch.linalg.cond(h)) < 1e3:  # else the best update is not unique
            torch.testing.assert_close(updates[reader], best.T, rtol=1e-4, atol=1e-5)
        left = -flat - h @ best / len(batch[0])
        expected += float((left * product.units_last(new - old)).sum())
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-10)


def loss_at(structure, readers, outputs, name, z, batch) -> Tensor:
    """The loss as it depends on what one reader puts out: they are the last layers, and are added up."""
    total = sum(z if reader == name else old for reader, old in zip(readers, outputs, strict=True))
    return (total - batch[1]).square().mean()


def narrow(count: int) -> tuple[Structure, tuple[Tensor, Tensor]]:
    """A linear network through which one direction less passes than is asked for."""
    torch.manual_seed(0)
    x = torch.randn(count, 3, dtype=torch.float64)
    return attach(nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2)).double(), x), (x, torch.randn_like(x[:, :2]))


def test_new_units_are_those_of_the_dense_formula():
    structure, batch = narrow(40)
    axis, context = "0", context_of(structure, batch)
    needs, _ = wanted(context, {axis: between(structure.topology, axis)}, [batch], 1e-13)
    incoming, outgoing, values = new_units(needs[axis], 2, 1e-6)
    x, target = batch
    ones = torch.ones(40, 1, dtype=torch.float64)
    x1 = torch.cat([x, ones], 1)
    h1 = torch.cat([structure.model[0](x), ones], 1).detach()
    wish = -(structure.model(x) - target).detach()
    left = wish - h1 @ torch.linalg.lstsq(h1, wish).solution
    values_, vectors = torch.linalg.eigh(x1.T @ x1 / 40)
    root = vectors @ (values_.rsqrt()[:, None] * vectors.T)  # S^-1/2, as in the paper
    u, s, v = torch.linalg.svd(root @ x1.T @ left / 40, full_matrices=False)
    torch.testing.assert_close(values, s.square())
    torch.testing.assert_close(incoming.T @ outgoing, root @ (u * s) @ v)
    torch.testing.assert_close(incoming.norm(dim=1), (root @ u * s.sqrt()).norm(dim=0))
    assert bool((incoming @ x1.mean(0) >= 0).all())


def test_leading_singular_vectors_of_a_large_matrix():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(90, 120, generator=generator, dtype=torch.float64)
    matrix = noise * 0.9 ** torch.arange(120.0)
    root = torch.linalg.cholesky(noise @ noise.T)
    left, values, right = leading(root, matrix, 8)
    assert left.shape[1] < 45, "the matrix is too small to be searched"
    whole = torch.linalg.svd(torch.linalg.solve(root, matrix))
    torch.testing.assert_close(values[:8], whole.S[:8], rtol=1e-3, atol=0)
    torch.testing.assert_close((left[:, :8] * whole.U[:, :8]).sum(0).abs(), torch.ones(8).double(), rtol=0.02, atol=0)
    torch.testing.assert_close((right[:8] * whole.Vh[:8]).sum(1).abs(), torch.ones(8).double(), rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (60, 90)])
def test_singular_values(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix[0] *= 20
    gram = torch.randn(shape[0], shape[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    root = torch.linalg.cholesky(gram @ gram.T + torch.eye(shape[0], dtype=torch.float64))
    expected = torch.linalg.svdvals(torch.linalg.solve(root, matrix))
    torch.testing.assert_close(singular_values(root, matrix), expected, rtol=1e-6, atol=1e-6)
    assert largest(root, matrix) == pytest.approx(float(expected[0]), rel=1e-3)


def test_the_loss_falls_by_what_is_predicted_on_a_quadratic():
    """After the best update the slope along the new units is the sum of their values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 2)).double()
    x = torch.randn(64, 6, dtype=torch.float64)
    batch = x, torch.randn(64, 2, dtype=torch.float64)
    structure = attach(model, x)
    context = context_of(structure, batch)
    scores = TinyScore(ridge=1e-12)(context, goal_of(structure, "0", by=2))
    assert len(scores.values["0"]) == 2
    one = scores.found["0"]
    with torch.no_grad():
        slope = -((model(x) - batch[1]) * ((x @ one.incoming.T + one.biases["0.bias"].T) @ one.outgoing)).sum() / 64
    ghosts = Ghosts(context, {"0": 2})
    chosen = {"0": (0, 1)}

    def loss_with(amplitude: float, updated: bool) -> float:
        tensors = with_units(ghosts, chosen, scores.found, amplitude)
        if updated:
            tensors["1.weight"] = tensors["1.weight"] + nn.functional.pad(one.updates["1.weight"], (0, 2))
            tensors["1.bias"] = model[1].bias.detach() + one.updates["1.bias"]
        return float(ghosts.loss(tensors, batch).detach())

    small = 1e-4
    assert loss_with(0.0, False) == pytest.approx(loss_now(structure, batch), rel=1e-13)
    fallen = loss_with(0.0, True) - loss_with(small, True)
    assert fallen == pytest.approx(small * float(scores.values["0"].sum()), rel=0.01)
    assert loss_with(0.0, False) - loss_with(small, False) == pytest.approx(small * float(slope), rel=0.01)
    # the whole step, new units and update, leads to the least loss of any linear map of this rank
    assert loss_with(1.0, True) == pytest.approx(least_squares_loss(x, batch[1]), rel=1e-9)


def least_squares_loss(x: Tensor, target: Tensor) -> float:
    x1 = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    return float((x1 @ torch.linalg.lstsq(x1, target).solution - target).square().mean())


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_the_training_loss_falls(norm, update):
    structure, batch = relu_network(norm)
    context, goal = context_of(structure, batch), goal_of(structure, "0", "3" if norm else "2", by=6)
    scores = TinyScore()(context, goal)
    chosen = {axis: tuple(range(3)) for axis in goal.sizes}
    before = loss_now(structure, batch)
    start = TinyInit(update)(context, chosen, scores)
    assert any(name.endswith("bias") for name in start.deltas) == update
    assert grown(structure, chosen, start).contract == "changing"
    assert loss_now(structure, batch) < before - 0.01


def relu_network(norm: bool) -> tuple[Structure, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 9), nn.ReLU(inplace=True), nn.Linear(9, 3)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(8))
    x = torch.randn(64, 6)
    return attach(nn.Sequential(*layers), x), (x, torch.randn(64, 3))


def test_small_gradients_do_not_make_directions_few():
    counts = []
    for scale in (1.0, 1e-4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 3), nn.Tanh(), nn.Linear(3, 8)).double()
        x = torch.randn(64, 10, dtype=torch.float64)
        with torch.no_grad():
            target = model(x) + scale * torch.randn(64, 8, dtype=torch.float64)
        structure = attach(model, x)
        scores = TinyScore()(context_of(structure, (x, target)), goal_of(structure, "0", by=8))
        counts.append(len(scores.values["0"]))
    assert counts == [8, 8]


def test_new_units_are_silent_where_no_amplitude_helps():
    structure, batch, _ = network("perceptron")
    context = context_of(structure, batch)
    scores = TinyScore()(context, goal_of(structure, "0", by=2))
    wrong = {"0": replace(scores.found["0"], outgoing=-scores.found["0"].outgoing)}
    chosen = {"0": (0, 1)}
    edit = grown(structure, chosen, TinyInit()(context, chosen, Scores(scores.values, wrong)))
    assert edit.contract == "exact", edit.why


@pytest.mark.parametrize("best", [2.0**-9, 0.25, 1.0, 16.0])
def test_the_best_amplitude_is_found_downhill(best):
    assert best_amplitude(lambda amplitude: (amplitude - best) ** 2) == best
    assert best_amplitude(lambda amplitude: amplitude) == 0.0


def test_axes_of_another_kind_are_refused_with_the_reason():
    torch.manual_seed(0)
    x, target = torch.randn(8, 4), torch.randn(8, 2)
    structure = attach(Gated(), x)
    with pytest.raises(MethodError, match="2 weights make its units together"):
        TinyScore()(context_of(structure, (x, target)), goal_of(structure, "gate"))


def test_scores_repeat_and_leave_nothing_behind():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 3)
    structure = attach(nn.Sequential(*layers), torch.randn(8, 2, 6, 6))
    batch = torch.randn(8, 2, 6, 6), torch.randn(8, 3)
    before = snapshot(structure.model)
    first, second = (TinyScore()(context_of(structure, batch), goal_of(structure, "0")) for _ in "ab")
    assert torch.equal(first.values["0"], second.values["0"])
    starts = [TinyInit()(context_of(structure, batch), {"0": (0, 2)}, one) for one in (first, second)]
    assert all(torch.equal(one, starts[1].values[name]) for name, one in starts[0].values.items())
    assert differences(before, snapshot(structure.model)) == []
