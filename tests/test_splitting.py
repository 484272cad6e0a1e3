"""Splitting steepest descent against the splitting matrix written out, and against the loss after the split."""

import pytest
import torch
from method_setting import context_of, goal_of, grown, loss_now, perceptron
from snapshots import differences, snapshot
from torch import Tensor, nn

from espalier import attach
from espalier.errors import MethodError
from espalier.parts.ghosts.ghosts import Ghosts
from espalier.parts.ghosts.halves import Copies, beginning
from espalier.parts.ghosts.splitting import Split, SplittingGain, curvature, lowest


def splitting_matrix(model: nn.Sequential, layer: int, unit: int, batch) -> Tensor:
    """E[dL/da sigma''(w x + b) x x'] of one unit, by autograd, with everything else held."""
    x, target = batch
    inputs = model[:layer](x).detach()
    activation = model[layer + 1]
    outputs = activation(model[layer](inputs)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad((model[layer + 2 :](outputs) - target).square().mean(), outputs)

    def alone(weight: Tensor) -> Tensor:
        return (gradient[:, unit] * activation(inputs @ weight + model[layer].bias[unit])).sum()

    return torch.autograd.functional.hessian(alone, model[layer].weight[unit].detach())


def test_the_product_with_the_splitting_matrix_is_that_of_the_matrix_written_out():
    structure, batch = perceptron(nn.Tanh())
    ghosts = Ghosts(context_of(structure, batch), {"0": 5, "2": 6})
    product = curvature(ghosts, {"0": 1e-4, "2": 1e-4}, [batch])
    generator = torch.Generator().manual_seed(0)
    rows = {
        "0": torch.randn(5, 4, generator=generator, dtype=torch.float64),
        "2": torch.randn(6, 5, generator=generator, dtype=torch.float64),
    }
    found = product(rows)
    for axis, layer in (("0", 0), ("2", 2)):
        for unit in range(len(rows[axis])):
            expected = splitting_matrix(structure.model, layer, unit, batch) @ rows[axis][unit]
            torch.testing.assert_close(found[axis][unit], expected, rtol=1e-5, atol=1e-7)


def test_a_full_krylov_space_gives_the_lowest_eigenvalue():
    structure, batch = perceptron(nn.Tanh())
    score = SplittingGain(step=1e-3, passes=5)
    goal = goal_of(structure, "0", "2")
    found = score(context_of(structure, batch), goal)
    for axis, layer in (("0", 0), ("2", 2)):
        length = 1e-3 * float(structure.model[layer].weight.detach().norm(dim=1).mean())
        for unit, value in enumerate(found.values[axis]):
            exact = torch.linalg.eigvalsh(splitting_matrix(structure.model, layer, unit, batch))[0]
            assert float(value) == pytest.approx(-0.5 * length**2 * float(exact), rel=1e-3)


def test_lowest_stops_where_the_space_is_full():
    generator = torch.Generator().manual_seed(0)
    halves = torch.randn(7, 3, 3, generator=generator, dtype=torch.float64)
    matrices = halves + halves.mT
    start = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    values, vectors = lowest(lambda rows: {"a": torch.einsum("uij,uj->ui", matrices, rows["a"])}, {"a": start}, 5)
    exact = torch.linalg.eigvalsh(matrices)[:, 0]
    torch.testing.assert_close(values["a"], exact)
    image = torch.einsum("uij,uj->ui", matrices, vectors["a"])
    torch.testing.assert_close(image, values["a"][:, None] * vectors["a"])


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.SiLU()])
def test_the_loss_falls_by_what_is_predicted(activation):
    structure, batch = perceptron(activation)
    context = context_of(structure, batch)
    scores = SplittingGain(step=0.02)(context, goal_of(structure, "0", "2"))
    best = {axis: (int(values.argmax()),) for axis, values in scores.values.items()}
    predicted = sum(float(scores.values[axis][units[0]]) for axis, units in best.items())
    assert predicted > 0
    before = loss_now(structure, batch)
    edit = grown(structure, best, Split()(context, best, scores))
    assert edit.contract == "changing"
    assert before - loss_now(structure, batch) == pytest.approx(predicted, rel=0.05)


def test_copies_that_do_not_move_are_exact_across_neighbouring_axes():
    structure, batch = perceptron(nn.ReLU())
    context = context_of(structure, batch)
    ghosts = Ghosts(context, {"0": 2, "2": 3})
    chosen = {"0": (4, 1), "2": (0, 2, 5)}
    before = structure.model(batch[0])
    edit = grown(structure, chosen, beginning(ghosts, Copies(ghosts, chosen).made(ghosts.tensors, {})))
    assert edit.contract == "exact", edit.why
    torch.testing.assert_close(structure.model(batch[0]), before, rtol=0, atol=1e-14)


def test_a_relu_network_is_split_where_it_helps():
    structure, batch = perceptron(nn.ReLU())
    context = context_of(structure, batch)
    scores = SplittingGain(step=0.3)(context, goal_of(structure, "0"))
    best = int(scores.values["0"].argmax())
    assert float(scores.values["0"][best]) > 0
    before = loss_now(structure, batch)
    grown(structure, {"0": (best,)}, Split()(context, {"0": (best,)}, scores))
    assert loss_now(structure, batch) < before


def test_what_a_layer_norm_reads_is_not_split():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    x, target = torch.randn(16, 4), torch.randn(16, 2)
    structure = attach(model, x)
    scores = SplittingGain()(context_of(structure, (x, target)), goal_of(structure, "0", "3"))
    assert len(scores.values["0"]) == 0
    assert len(scores.values["3"]) == 5
    with pytest.raises(MethodError, match=r"finds no axis whose units can be copied.*\(0 were tried"):
        SplittingGain()(context_of(structure, (x, target)), goal_of(structure, "0"))


def test_scores_repeat_and_leave_nothing_behind():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 3)
    model = nn.Sequential(*layers)
    x, target = torch.randn(8, 2, 6, 6), torch.randn(8, 3)
    structure = attach(model, x)
    before = snapshot(structure.model)
    first, second = (
        SplittingGain()(context_of(structure, (x, target)), goal_of(structure, "0")).values["0"] for _ in range(2)
    )
    assert torch.equal(first, second)
    assert len(first) == 4
    assert differences(before, snapshot(structure.model)) == []
