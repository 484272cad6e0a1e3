"""Growing methods: outputs at the moment of growth, in train and eval mode, and what new units do afterwards."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from oracles import Comparison, disturb
from snapshots import differences, snapshot
from torch import Tensor, nn

import espalier as esp
from espalier import attach
from espalier.bench.models import build
from espalier.graph.dims import labels
from espalier.method import Method
from espalier.parts.budget import Polynomial
from espalier.parts.ghosts.ghosts import INCOMING, OUTGOING
from espalier.parts.goal import Cap, Goal
from espalier.parts.score import Context
from espalier.parts.units.where import choose_axes
from espalier.structure import Structure

EXACT = 1e-9
pytestmark = pytest.mark.filterwarnings("ignore:net2net adds fresh units")


class Residual(nn.Module):
    """A stem, a block whose stream is added to, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.block = nn.Sequential(
            nn.Conv2d(6, 5, 3, padding=1, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
        )
        self.down = nn.Sequential(nn.Conv2d(6, 7, 3, stride=2, padding=1), nn.BatchNorm2d(7), nn.ReLU())
        self.head = nn.Linear(7 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.block(x))
        return self.head(self.down(x).flatten(1))


class Transformer(nn.Module):
    """One pre-norm layer over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


def convolutional(norm: bool) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU()]
    layers += [nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 4))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4))


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "cnn": (partial(convolutional, False), (3, 8, 8)),
    "cnn_bn": (partial(convolutional, True), (3, 8, 8)),
    "resnet": (Residual, (3, 8, 8)),
    "transformer": (Transformer, (5, 6)),
}
METHODS: dict[str, Method] = {
    "random": esp.grow.Random(),
    "random_in": esp.grow.Random(side="in"),
    "random_orthogonal": esp.grow.Random(distribution="orthogonal"),
    "net2net": esp.grow.Net2Net(),
    "net2net_largest": esp.grow.Net2Net(originals="largest"),
    "variance_transfer": esp.grow.VarianceTransfer(),
    "gradmax": esp.grow.GradMax(),
    "gradmax_in": esp.grow.GradMax(side="in", pairs=False),
    "gradmax_out": esp.grow.GradMax(side="out", pairs=False),
    "gradmax_pairs": esp.grow.GradMax(pairs=True),
    "gradmax_opt": esp.grow.GradMaxOpt(),
}


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def made(name: str) -> tuple[Structure, tuple[Tensor, Tensor]]:
    """A disturbed network in double precision and a batch; the same ones every time."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().double().train()
    x = torch.randn(16, *shape, dtype=torch.float64)
    disturb(model, x, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return attach(model, x, optimizer=optimizer), (x, torch.randint(0, 4, (16,)))


def context_of(structure: Structure, batch: Any, axes: tuple[str, ...], seed: int = 1) -> Context:
    return Context(structure, axes, 0, 0, 0.0, seed, partial(loss_of, structure.model), batch, ())


def goal_of(structure: Structure, factor: float) -> Goal:
    """Grow all axes that may by a factor."""
    axes = [name for name, why in choose_axes(structure, "grow", None).items() if why is None]
    sizes = {axis: structure.axes[axis].size for axis in axes}
    wanted = {axis: int(size * factor) for axis, size in sizes.items()}
    reference = {axis: float(size) for axis, size in sizes.items()}
    target = Cap(Polynomial({(axis,): 1 for axis in axes}), sum(wanted.values()))
    return Goal("grow", sizes, least=sizes, most=wanted, reference=reference, target=target)


def proposed(method: Method, structure: Structure, batch: Any, factor: float = 1.6, seed: int = 1) -> Any:
    goal = goal_of(structure, factor)
    return method.propose(context_of(structure, batch, tuple(goal.sizes), seed), goal)


@pytest.mark.parametrize("factor", [1.4, pytest.param(3.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_growth_is_exact_in_train_and_eval_mode(method: str, name: str, factor: float) -> None:
    structure, batch = made(name)
    before = snapshot(structure.model)
    plan = proposed(METHODS[method], structure, batch, factor)
    assert differences(before, snapshot(structure.model)) == []
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in structure.model.modules())
    comparison = Comparison(structure.model, batch[0])
    edit = structure.apply(plan)
    assert len(edit.sizes) == len(goal_of(made(name)[0], factor).sizes)
    assert edit.contract == "exact", edit.why
    assert comparison.error() <= EXACT


def grown(method: Method, structure: Structure, batch: Any, steps: int) -> esp.Session:
    """A session that grows once, after the first step, and has then trained for some more."""
    method = replace(
        method, schedule=replace(method.schedule, start=esp.steps(1), until=esp.steps(1), every=esp.steps(1))
    )
    session = esp.Session(structure, [method], loss=loss_of, total_steps=1 + steps)
    assert structure.optimizer is not None
    for _ in range(1 + steps):
        structure.optimizer.zero_grad()
        session.loss(batch).backward()
        structure.optimizer.step()
        session.step()
    return session


@pytest.mark.parametrize("name", ["vgg11-bn", "resnet20"])
@pytest.mark.parametrize("method", METHODS)
def test_a_session_grows_deep_networks_without_a_jump(method: str, name: str) -> None:
    """With the statistics of new units calibrated, in single precision, in train and in eval mode."""
    model = build(name, (3, 16, 16), 10, width=0.25, seed=0)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(32, 3, 16, 16, generator=generator), torch.randint(0, 10, (32,), generator=generator)
    disturb(model, batch[0], seed=0)
    structure = attach(model, batch[0][:2], optimizer=torch.optim.SGD(model.parameters(), 0.0))
    session = esp.Session(structure, [METHODS[method]], loss=loss_of, total_steps=10)
    loss_of(model.train(), batch)
    session.loss(batch).backward()
    comparison = Comparison(model, batch[0])
    session.step()
    session.epoch_end()
    session.step()
    assert [event.contract for event in session.events] == ["exact"]
    assert comparison.error() < 1e-4


@pytest.mark.parametrize("name", ["mlp", "cnn", "cnn_bn", "resnet"])
@pytest.mark.parametrize("method", METHODS)
def test_new_units_learn(method: str, name: str) -> None:
    """One of their sides has a gradient at once, and both have moved a little later: no unit is dead."""
    structure, batch = made(name)
    axes = {axis: structure.axes[axis].size for axis in goal_of(structure, 1.4).sizes}
    session = grown(METHODS[method], structure, batch, 0)
    assert session.events[0].action == "grow"
    structure.model.zero_grad()
    session.loss(batch).backward()

    def sides(values: dict[str, Tensor], axis: str) -> list[Tensor]:
        """Incoming and outgoing entries of the new units."""
        record, found = structure.topology.by_name[axis], []
        for roles in (INCOMING, OUTGOING):
            entries = []
            for tensor, dim, role in record.slots:
                if role in roles:
                    labels_of = labels(structure.topology.tensors[tensor][dim], structure.topology.sizes, record.number)
                    new = torch.from_numpy(labels_of >= axes[axis])
                    entries.append(values[tensor][(slice(None),) * dim + (new,)].flatten())
            found.append(torch.cat(entries))
        return found

    parameters = dict(structure.model.named_parameters())
    assert structure.optimizer is not None
    before = {name: one.detach().clone() for name, one in parameters.items()}
    for axis in axes:
        gradients = sides({name: one.grad for name, one in parameters.items()}, axis)
        assert any(bool(one.any()) for one in gradients), axis
    for _ in range(20):
        structure.optimizer.zero_grad()
        session.loss(batch).backward()
        structure.optimizer.step()
    for axis in axes:
        for was, now in zip(sides(before, axis), sides(parameters, axis), strict=True):
            assert float((now - was).detach().abs().max()) > 1e-6, axis


def change_after_a_step(method: Method | None) -> float:
    """How far the outputs move in the first step after growth, relative to their size."""
    structure, batch = made("cnn_bn")
    if method is not None:
        structure.apply(proposed(method, structure, batch))
    structure.model.train()
    before = structure.model(batch[0]).detach()
    optimizer = torch.optim.SGD(structure.model.parameters(), 0.02)
    loss_of(structure.model, batch).backward()
    optimizer.step()
    return float((structure.model(batch[0]).detach() - before).norm() / before.norm())


def test_the_naive_baseline_is_invisible_and_fails_one_step_later() -> None:
    structure, batch = made("cnn_bn")
    comparison = Comparison(structure.model, batch[0])
    edit = structure.apply(proposed(esp.grow.NaiveZeroIn(), structure, batch))
    assert edit.contract == "changing"
    assert comparison.error() < 1e-4
    without = change_after_a_step(None)
    assert change_after_a_step(esp.grow.NaiveZeroIn()) > 3 * without
    for method in ("random", "net2net", "variance_transfer", "gradmax", "gradmax_out", "gradmax_opt"):
        assert change_after_a_step(METHODS[method]) < 2 * without, method


def test_rescaled_weights_change_the_outputs_and_it_is_said() -> None:
    structure, batch = made("mlp")
    before = structure.model[2].weight.detach().clone()
    edit = structure.apply(proposed(esp.grow.VarianceTransfer(rescale=True), structure, batch))
    assert edit.contract == "changing"
    ratio = (9 / structure.model[0].out_features) ** 0.5
    torch.testing.assert_close(structure.model[2].weight[:7, :9], before * ratio)
    head = made("mlp")[0].model[4].weight.detach()
    torch.testing.assert_close(structure.model[4].weight[:, :7], head * 7 / structure.model[2].out_features)


def test_dropout_takes_pairs_and_copies_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 4)).double()
    batch = torch.randn(16, 6, dtype=torch.float64), torch.randint(0, 4, (16,))
    for method in (esp.grow.GradMax(), esp.grow.VarianceTransfer()):
        structure = attach(model, batch[0])
        assert structure.check(proposed(method, structure, batch))[0].kind == "exact"
        assert not structure.preview(proposed(method, structure, batch)).tensors["4.weight"][:, 9:].any()
    with pytest.warns(
        esp.EspalierWarning, match=r"net2net adds fresh units.*0 has equal units, which chance tells apart"
    ):
        proposed(esp.grow.Net2Net(), structure, batch)


def test_axes_compete_by_gradient_per_cost() -> None:
    structure, batch = made("cnn_bn")
    method = esp.grow.GradMax(scope="global")
    plan = proposed(method, structure, batch)
    assert structure.check(plan)[0].kind == "exact"
    goal = goal_of(structure, 1.6)
    assert sum(one.add for one in plan.edits) == sum(goal.most[axis] - goal.sizes[axis] for axis in goal.sizes)
