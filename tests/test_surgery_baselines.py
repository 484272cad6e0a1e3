"""What Neural Network Surgery's own edits do: removal by a rotation destroys, copies without noise stay twins."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import espalier as esp
from espalier.edit.plan import Plan, Resize
from espalier.errors import MethodError
from espalier.method import Method
from espalier.methods.rotated_svd import Rotated
from espalier.parts.clock import steps
from espalier.parts.goal import Scores
from espalier.parts.score import Context

ONCE = {"every": steps(1), "start": steps(1), "until": steps(1)}


def carried_out(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], method: Method) -> None:
    """Let the method act once."""
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    structure = esp.attach(model, batch[0][:2], optimizer=optimizer)
    loss = esp.Session(
        structure, [method], loss=lambda network, one: F.cross_entropy(network(one[0]), one[1]), probe=[batch],
        total_steps=2,
    )  # fmt: skip
    loss.loss(batch).backward()
    loss.step()
    assert structure.history


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(500):
        chosen = slice(step * 64 % 1216, step * 64 % 1216 + 64)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model, (x[:1280], y[:1280]), (x[1280:], y[1280:])


def accuracy(model, part):
    with torch.no_grad():
        return float((model(part[0]).argmax(1) == part[1]).float().mean())


def test_a_rotation_destroys_a_network_with_activations_where_refitting_keeps_it(digits):
    model, train, test = digits
    before = accuracy(model, test)
    assert before > 0.94
    found = {}
    for name, method in {
        "rotated": esp.prune.RotatedSVD(amount=0.5, **ONCE),
        "almost none": esp.prune.RotatedSVD(amount=0.02, **ONCE),
        "refitted": esp.prune.Taylor(amount=0.5, refit=True, **ONCE),
    }.items():
        other = copy.deepcopy(model)
        carried_out(other, train, method)
        found[name] = accuracy(other, test)
    assert found["refitted"] > before - 0.04
    assert found["rotated"] < 0.7
    assert found["almost none"] < 0.7  # it is the rotation, and not what is removed


def test_a_rotation_is_exact_between_linear_layers_with_its_bias_the_right_way_round():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight[3:] = 0.0  # of rank 3, bias and all
        model[0].bias[3:] = 0.0
        model[1].bias.zero_()
    x = torch.randn(9, 5, dtype=torch.float64)
    before = model(x).detach()
    structure = esp.attach(model, x)
    context = Context(structure, tuple(structure.axes), 0, 0, 0.0, 0, lambda batch: model(batch).sum(), None, [x])
    chosen = {"0": (0, 1, 2, 6), "1": (5,)}  # of the second layer, too, something goes: it reads 3 units then
    beginning = Rotated()(context, chosen, Scores({}))
    structure.apply(Plan(tuple(Resize(axis, remove=units) for axis, units in chosen.items()), deltas=beginning.deltas))
    assert [model[0].out_features, model[1].out_features] == [3, 5]
    torch.testing.assert_close(model(x).detach(), before)
    transposed = copy.deepcopy(model)
    with torch.no_grad():
        transposed[0].bias += 0.1
    assert not torch.allclose(transposed(x), before)


def test_a_rotation_has_nothing_to_refit():
    with pytest.raises(MethodError, match="leave refit out"):
        esp.prune.RotatedSVD(refit=True)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_copies_are_exact_for_every_activation_and_part_if_there_is_noise(activation, noise):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3)).double()
    x, y = torch.randn(64, 4, dtype=torch.float64), torch.randint(0, 3, (64,))
    before = model(x).detach()
    carried_out(model, (x, y), esp.grow.Net2Net(noise=noise, amount=0.5, **ONCE))
    torch.testing.assert_close(model(x).detach(), before)
    weight = model[0].weight
    assert len(weight) == 9
    twins = [(old, new) for new in range(6, 9) for old in range(6) if torch.equal(weight[old], weight[new])]
    assert len(twins) >= 3
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    distances = torch.stack([(weight[old] - weight[new]).norm() for old, new in twins])
    assert bool((distances < 1e-9).all()) if noise == 0 else bool((distances > 1e-3).all())
