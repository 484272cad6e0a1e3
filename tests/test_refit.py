"""Refitting what reads pruned units: against direct least squares, and what it saves."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import loss_of, start
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_small import ZOO

import espalier as esp
from espalier.edit.plan import Plan, Resize
from espalier.errors import EspalierWarning, MethodError
from espalier.parts.goal import Scores
from espalier.parts.score import Context
from espalier.parts.units.refit import Refit
from espalier.structure import Structure

NOTHING = Scores({})


def context_of(structure: Structure, batches: list[Tensor]) -> Context:
    def loss(batch: Tensor) -> Tensor:
        return structure.model(batch).square().mean()

    return Context(structure, tuple(structure.axes), 0, 0, 0.0, 7, loss, None, batches)


def pruned(structure: Structure, chosen: dict[str, tuple[int, ...]], batches: list[Tensor], refit: Refit) -> None:
    beginning = refit(context_of(structure, batches), chosen, NOTHING)
    edits = tuple(Resize(axis, remove=units) for axis, units in chosen.items())
    structure.apply(Plan(edits, deltas=beginning.deltas))


def draws(*shape: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def least_squares(rows: Tensor, outputs: Tensor, old: Tensor, ridge: float, intercept: bool) -> tuple[Tensor, Tensor]:
    """min |rows W^T + b - outputs|^2 / n + rho |W - old|^2, solved directly as one system of equations."""
    n, d = rows.shape
    centred = rows - rows.mean(0) if intercept else rows
    rho = ridge * centred.square().mean(0).mean()
    left = torch.cat([rows, torch.ones(n, 1, dtype=rows.dtype)], 1) if intercept else rows
    below = torch.eye(d, left.shape[1], dtype=rows.dtype) * (n * rho).sqrt()
    right = torch.cat([outputs, old.T * (n * rho).sqrt()])
    found = torch.linalg.lstsq(torch.cat([left, below]), right).solution
    return found[:d].T, found[d] if intercept else torch.zeros(len(old), dtype=rows.dtype)


# --- Exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.3])
def test_a_linear_layer_against_least_squares(bias: bool, ridge: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=bias)).double()
    structure = esp.attach(model, torch.randn(2, 6, dtype=torch.float64))
    batches = draws(40, 6)
    with torch.no_grad():
        hidden = model[:2](torch.cat(batches))
        outputs, old = model[2](hidden), model[2].weight.detach().clone()
    keep = [0, 2, 3, 5, 7]
    expected, intercept = least_squares(hidden[:, keep], outputs, old[:, keep], ridge, bias)
    pruned(structure, {"0": (1, 4, 6)}, batches, Refit(ridge))
    torch.testing.assert_close(model[2].weight.detach(), expected)
    if bias:
        torch.testing.assert_close(model[2].bias.detach(), intercept)


def patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    found = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return found.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize(
    "geometry", [{}, {"padding": 1}, {"stride": 2, "padding": 2}, {"dilation": 2, "bias": False}, {"padding": (0, 1)}]
)
def test_a_convolution_against_least_squares(geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, (3, 2), **geometry)).double()
    structure = esp.attach(model, torch.randn(2, 3, 9, 8, dtype=torch.float64))
    batches = draws(12, 3, 9, 8)
    layer = model[2]
    with torch.no_grad():
        hidden = model[:2](torch.cat(batches))
        outputs, old = layer(hidden).movedim(1, -1).flatten(0, 2), layer.weight.detach().clone()
    keep = [0, 2, 3]
    rows = patches(layer, hidden).view(-1, 5, 6)[:, keep].flatten(1)
    expected, intercept = least_squares(rows, outputs, old[:, keep].flatten(1), 1e-3, layer.bias is not None)
    pruned(structure, {"0": (1, 4)}, batches, Refit(1e-3, rows=10**6))
    torch.testing.assert_close(layer.weight.detach().flatten(1), expected)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.detach(), intercept)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
@pytest.mark.parametrize("padding", [0, "same", 1])
def test_convolutions_of_other_ranks(kind: Any, padding: Any) -> None:
    """Where the units that go are copies of one that stays, nothing is lost; borders and padding included."""
    torch.manual_seed(0)
    rank = {nn.Conv1d: 1, nn.Conv3d: 3}[kind]
    model = nn.Sequential(kind(2, 4, 1), nn.Tanh(), kind(4, 3, 3, padding=padding)).double()
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter[3] = parameter[1]
    x = draws(6, 2, *[6] * rank, count=1)
    structure = esp.attach(model, x[0])
    before = model(x[0])
    pruned(structure, {"0": (3,)}, x, Refit(0.0, rows=10**6))
    torch.testing.assert_close(model(x[0]), before)


def test_a_flattened_map_is_read_unit_by_unit() -> None:
    """A linear layer behind flatten has a column for every position of a channel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 5)).double()
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter[0] = parameter[2]
    x = draws(64, 3, 4, 4, count=1)
    structure = esp.attach(model, x[0])
    before = model(x[0])
    pruned(structure, {"0": (2,)}, x, Refit(0.0))
    assert model[3].weight.shape == (5, 12)
    torch.testing.assert_close(model(x[0]), before)


def test_layers_that_lose_outputs_too_and_several_axes_at_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    structure = esp.attach(model, torch.randn(2, 6, dtype=torch.float64))
    batches = draws(50, 6)
    with torch.no_grad():
        x = torch.cat(batches)
        first, second = model[:2](x), model[:4](x)
        middle, last = model[2](first), model[4](second)
        weights = [model[2].weight.clone(), model[4].weight.clone()]
    keep, stay = [0, 1, 2, 4, 6, 7], [0, 2, 3, 4, 6]
    one, one_bias = least_squares(first[:, keep], middle, weights[0][:, keep], 1e-3, True)
    two, two_bias = least_squares(second[:, stay], last, weights[1][:, stay], 1e-3, True)
    pruned(structure, {"0": (3, 5), "2": (1, 5)}, batches, Refit())
    torch.testing.assert_close(model[2].weight.detach(), one[stay])
    torch.testing.assert_close(model[2].bias.detach(), one_bias[stay])
    torch.testing.assert_close(model[4].weight.detach(), two)
    torch.testing.assert_close(model[4].bias.detach(), two_bias)


def test_rows_are_a_sample_that_repeats() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).double()
    structure = esp.attach(model, torch.randn(2, 3, 12, 12, dtype=torch.float64))
    context, chosen = context_of(structure, draws(40, 3, 12, 12)), {"0": (1,)}
    one, two, whole = (Refit(rows=rows)(context, chosen, NOTHING).deltas["2.weight"] for rows in (1000, 1000, 10**6))
    assert torch.equal(one, two)
    assert not torch.equal(one, whole)
    assert (one - whole).norm() < 0.5 * whole.norm()


def test_units_that_add_nothing_need_no_refit() -> None:
    model, batch = ZOO["mlp"]()
    structure = esp.attach(model, batch)
    with torch.no_grad():
        model[2].weight[:, [2, 5]] = 0.0
    assert not Refit()(context_of(structure, list(batch)), {"0": (2, 5)}, NOTHING).deltas


def test_dead_inputs_do_no_harm() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, -1.0)
    structure = esp.attach(model, torch.randn(3, 4))
    pruned(structure, {"0": (0,)}, [torch.randn(20, 4)], Refit())
    assert all(bool(one.isfinite().all()) for one in model.parameters())


# --- What cannot be refitted -----------------------------------------------------------------------------------------


class Bare(nn.Module):
    """One layer is called as a module, one weight is a parameter of its own, one is used without its module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.own = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.second(h) + F.linear(h, self.own) + F.linear(h, self.third.weight)


@pytest.mark.parametrize(
    ("make", "axis", "named"),
    [
        (lambda: (Bare(), torch.randn(5, 4)), "first", ["own: it is not the weight", "third.weight: code outside"]),
        (
            lambda: (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=2)), torch.randn(2, 3, 5, 5)),
            "0:1",
            ["1.weight: it is a convolution in groups"],
        ),
        (
            lambda: (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 5, 2)), torch.randn(2, 3, 5, 5)),
            "0",
            ["1.weight: it is not the weight of a linear layer"],
        ),
        (ZOO["tied_embeddings"], "positions", ["embedding.weight: it is"]),
    ],
)
def test_what_cannot_be_refitted_is_named(make: Callable[[], Any], axis: str, named: list[str]) -> None:
    torch.manual_seed(0)
    model, example = make()
    structure = esp.attach(model, example)
    batches = list(example) if isinstance(example, tuple) else [example]
    with pytest.warns(EspalierWarning, match="not refitted after pruning") as caught:
        deltas = Refit()(context_of(structure, batches), {axis: (1,)}, NOTHING).deltas
    for text in named:
        assert text in str(caught[0].message)
        assert text.split(":")[0] not in deltas


def test_nothing_is_left_behind() -> None:
    run = start("vgg_batch_norm", [], total_steps=10).train(2)
    model = run.structure.model
    state = {name: one.clone() for name, one in model.state_dict().items()}
    context = Context(run.structure, (), 0, 0, 0.0, 7, lambda batch: loss_of(model, batch), run.batch, ())
    random = torch.get_rng_state()
    assert Refit()(context, {"features.4": (1, 2)}, NOTHING).deltas.keys() == {"features.7.weight", "features.7.bias"}
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Refit(ridge=-1.0), "ridge: expected a number of at least 0, found -1"),
        (lambda: Refit(batches=0), "batches: expected a whole number of at least 1, found 0"),
        (lambda: Refit(rows=True), "rows: expected a whole number of at least 1, found True"),
    ],
)
def test_wrong_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make()


# --- In methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "lenet", "vgg_batch_norm", "resnet", "vit", "llama_by_hand"])
@pytest.mark.parametrize("method", [esp.prune.Magnitude, esp.prune.Polarization])
def test_methods_refit_on_every_kind_of_network(name: str, method: Any) -> None:
    run = start(name, [method(refit=True, every=esp.steps(4), start=0.0, until=1.0)], total_steps=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "not refitted", EspalierWarning)
        run.train(8)
    events = run.session.events
    assert {event.action for event in events} == {"prune"}
    assert all(bool(one.isfinite().all()) for one in run.structure.model.parameters())
    assert method().init != method(refit=True).init


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def accuracy_after(refit: bool, seed: int) -> tuple[float, float]:
    """Accuracy of a trained MLP on held-out digits before and after a third of all units go, chosen at random."""
    train, held_out = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    structure = esp.attach(model, train[0][:2], optimizer=optimizer)
    method = esp.prune.Random(
        budget=esp.Units(2 / 3, of="initial"),
        shape="constant",
        refit=refit,
        every=esp.steps(1),
        start=esp.steps(150),
        until=esp.steps(151),
    )

    def objective(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    def accuracy() -> float:
        with torch.no_grad():
            return float((model(held_out[0]).argmax(1) == held_out[1]).float().mean())

    session = esp.Session(structure, [method], loss=objective, total_steps=1000, seed=seed)
    for step in range(150):
        optimizer.zero_grad()
        session.loss(train).backward()
        optimizer.step()
        before = accuracy() if step == 149 else 0.0
        session.step()
    assert [axis.size for axis in structure.axes.values() if axis.reason is None] == [32, 32]
    return before, accuracy()


def test_refitting_keeps_accuracy_where_dropping_units_loses_it() -> None:
    plain, refitted = (
        torch.tensor([accuracy_after(refit, seed) for seed in range(4)]).mean(0) for refit in (False, True)
    )
    assert plain[0] == refitted[0] > 0.93
    assert refitted[0] - refitted[1] < 0.03
    assert plain[0] - plain[1] > 0.1
