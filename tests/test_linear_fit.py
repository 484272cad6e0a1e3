"""Layers and cells replaced by the linear map nearest to them."""

import copy
import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import espalier as esp
from espalier.edit.depth_edits import Remove
from espalier.edit.plan import Plan
from espalier.edit.recipes.base import recipe_of
from espalier.edit.recipes.linear import LinearMap, linear_like
from espalier.errors import MethodError, PlanError
from espalier.graph.topology import infer
from espalier.parts.depth.linear_fit import linear_fit, linearise
from espalier.structure import Structure


class Block(nn.Module):
    """x plus what two layers make of it, with an activation between them or without."""

    def __init__(self, features: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1, self.activation, self.fc2 = nn.Linear(features, 9), activation, nn.Linear(9, features)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.activation(self.fc1(x)))


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def attached(model: nn.Module, x: Tensor) -> Structure:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return esp.attach(model, x, optimizer=optimizer)


@pytest.mark.parametrize("ridge", [0.0, 1e-9])
def test_what_is_linear_stays_as_it_is(ridge: float) -> None:
    model = nn.Sequential(nn.Linear(3, 5), Block(5, nn.Identity()), nn.Linear(5, 2)).double()
    batches = [torch.randn(20, 3, dtype=torch.float64) for _ in range(3)]
    structure = attached(model, batches[0])
    expected = [model(x) for x in batches]
    edit, fit = linearise(structure, "1", [lambda x=x: model(x) for x in batches], ridge=ridge)
    assert type(model[1]) is nn.Linear
    assert edit.contract == "changing"
    assert fit.error < 1e-6
    assert fit.without > 0.1
    for x, before in zip(batches, expected, strict=True):
        assert torch.allclose(model(x), before, rtol=1e-6, atol=1e-7)
    held = {id(one) for group in structure.optimizer.param_groups for one in group["params"]}
    assert held == {id(one) for one in model.parameters()}
    structure.undo()
    assert type(model[1]) is Block
    assert torch.equal(model(batches[0]), expected[0])


def test_convolutions_of_kernel_one_are_found_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ConvBlock(), nn.Conv2d(5, 2, 1)).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    structure = attached(model, x)
    expected = model(x)
    _, fit = linearise(structure, "1", [lambda: model(x)], ridge=0.0)
    assert fit.layer == LinearMap(4, 5, 2)
    assert type(model[1]) is nn.Conv2d
    assert torch.allclose(model(x), expected, rtol=1e-6, atol=1e-8)


def test_the_map_is_that_of_least_squares() -> None:
    model = nn.Sequential(nn.Linear(6, 5), Block(5, nn.Tanh()), nn.Dropout(0.5), nn.Linear(5, 2)).double()
    batches = [3 * torch.randn(8, 7, 6, dtype=torch.float64) for _ in range(4)]
    structure = attached(model, batches[0])
    state = torch.get_rng_state()
    fit = linear_fit(structure, "1", [lambda x=x: model(x) for x in batches], ridge=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model[1]._forward_hooks
    inputs = torch.cat([model[0](x).flatten(0, 1) for x in batches]).detach()
    outputs = model[1](inputs).detach().numpy()
    known = np.concatenate([inputs.numpy(), np.ones((len(inputs), 1))], axis=1)
    solution = np.linalg.lstsq(known, outputs, rcond=None)[0]
    assert np.allclose(fit.weight.numpy(), solution[:-1].T, rtol=1e-6, atol=1e-8)
    assert np.allclose(fit.bias.numpy(), solution[-1], rtol=1e-6, atol=1e-8)
    error = np.linalg.norm(known @ solution - outputs) / np.linalg.norm(outputs)
    assert fit.error == pytest.approx(error, rel=1e-6)
    assert fit.without == pytest.approx(np.linalg.norm(inputs.numpy() - outputs) / np.linalg.norm(outputs), rel=1e-9)
    assert fit.error < fit.without
    towards = linear_fit(structure, "1", [lambda: model(batches[0])], ridge=1e9)
    assert torch.allclose(towards.weight, torch.eye(5, dtype=torch.float64), atol=1e-6)


def test_new_maps_begin_as_what_is_left_of_a_block() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), Block(5, nn.ReLU()), nn.Linear(5, 2)), torch.randn(4, 3)
    recipe = linear_like(infer(model, x), "1")
    assert recipe == LinearMap(5, 5)
    assert recipe_of(json.loads(json.dumps(recipe.to_json()))) == recipe
    values = torch.randn(4, 5)
    assert torch.equal(recipe.build(model.get_submodule, "1")(values), values)
    narrow = LinearMap(5, 3, bias=False).build(model.get_submodule, "1")
    assert torch.equal(narrow(values), values[:, :3])


def trained_on_digits(seed: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network with four pre-norm blocks, training images, and held-out images with their classes."""
    digits = load_digits()
    images, classes = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(images))
    seen, held_out = order[:1347], order[1347:]
    model = nn.Sequential(nn.Linear(64, 48), *(PreNorm() for _ in range(4)), nn.LayerNorm(48), nn.Linear(48, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(30):
        shuffled = seen[torch.randperm(len(seen))]
        for batch in shuffled.split(64):
            loss = nn.functional.cross_entropy(model(images[batch]), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model, images[seen], images[held_out], classes[held_out]


class PreNorm(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(48), nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 48))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def test_trained_blocks_are_better_replaced_than_left_out() -> None:
    model, seen, images, classes = trained_on_digits(0)
    accuracies = []
    for replaced in (True, False):
        copied = copy.deepcopy(model)
        structure = esp.attach(copied, seen[:4])
        if replaced:
            for path in ("2", "3"):
                linearise(structure, path, [lambda copied=copied: copied(seen[:512])])
        else:
            structure.apply(Plan((), depth=(Remove("2"), Remove("3"))))
        accuracies.append(float((copied.eval()(images).argmax(1) == classes).double().mean()))
    assert accuracies[0] > 0.95
    assert accuracies[0] > accuracies[1] + 0.01


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.end = Mix(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.mix(x, x.sin()))


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x) * y


@pytest.mark.parametrize(
    ("model", "x", "path", "message"),
    [
        (Pair(), torch.randn(3, 4), "mix", "does not get one tensor alone"),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 5, 3, stride=2)), torch.randn(2, 3, 9), "1", "turns .* into"),
        (
            nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)),
            torch.zeros(2, 3, dtype=torch.int64),
            "0",
            "turns .* into",
        ),
    ],
)
def test_what_no_map_can_replace_is_refused(model: nn.Module, x: Tensor, path: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        linear_like(infer(model, x), path)


def test_other_sizes_and_missing_batches_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), torch.randn(4, 3)
    with pytest.raises(PlanError, match="its own sizes are others"):
        LinearMap(4, 5).promise(infer(model, x), model.get_submodule, "0", before=False)
    structure = attached(model, x)
    with pytest.raises(MethodError, match="0 did not run on these batches"):
        linear_fit(structure, "0", [])
    with pytest.raises(MethodError, match="ridge: expected"):
        linear_fit(structure, "0", [lambda: model(x)], ridge=-1.0)
    with pytest.raises(MethodError, match="not finite"):
        linear_fit(structure, "0", [lambda: model(torch.full((2, 3), torch.inf))])
