"""The loss without the units whose gates are 0 is the loss with them multiplied by 0, gradients included."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from snapshots import differences, snapshot
from test_gates import gated_axes, gates_of, in_double, outputs
from torch import Tensor, nn
from zoo_small import ZOO

import espalier as esp
from espalier.parts.gates.places import Gates
from espalier.parts.gates.stages import Stages
from espalier.parts.gates.subnetwork import SubNetwork, Worth
from espalier.structure import Structure

ALWAYS = Worth(multiple=1, per_tensor=-1e18)
FOURS = Worth(multiple=4, per_tensor=-1e18)

Found = tuple[Tensor, dict[str, Tensor]]


def loss_of(model: nn.Module, example: object) -> Tensor:
    return torch.stack([one.square().mean() for one in outputs(model, example)]).sum()


def drawn(structure: Structure, axes: list[str], seed: int = 0) -> dict[str, Tensor]:
    """Gates of which about half are open, and at least two of every axis."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for axis in axes:
        size = structure.axes[axis].size
        found[axis] = torch.zeros(size)
        found[axis][torch.randperm(size, generator=generator)[: max(2, size // 2)]] = 1
    return found


def evaluated(model: nn.Module, loss: Callable[[], Tensor]) -> Found:
    """The loss and its gradient by all parameters."""
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    value = loss()
    grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return value.detach(), {
        name: torch.zeros_like(one) if grad is None else grad
        for (name, one), grad in zip(parameters.items(), grads, strict=True)
    }


def multiplied(gates: Gates, z: Mapping[str, Tensor], forward: Callable[[], Tensor]) -> Tensor:
    with gates.applied(z):
        return forward()


class Watched:
    """A forward that counts its calls and remembers the sizes of all parameters at the last."""

    def __init__(self, model: nn.Module, example: object) -> None:
        self.model, self.example, self.calls, self.entries = model, example, 0, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        stores = [store for module in self.model.modules() for store in (module._parameters, module._buffers)]
        self.entries = sum(one.numel() for store in stores for one in store.values() if one is not None)
        return loss_of(self.model, self.example)


@pytest.mark.parametrize(
    ("name", "worth"), [*((name, ALWAYS) for name in ZOO), ("lenet", FOURS), ("resnet", FOURS), ("hf_llama", FOURS)]
)
def test_left_out_is_multiplied_by_zero(name, worth):
    model, example = in_double(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    structure = esp.attach(model, example)
    axes = gated_axes(structure)
    if not axes:
        assert name == "hard_coded_view"
        return
    for train in (False, True):
        model.train(train)
        compare(model, structure, example, gates_of(structure, axes), drawn(structure, axes), worth)


def compare(model, structure, example, gates: Gates, z: Mapping[str, Tensor], worth: Worth) -> None:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    sub, forward, whole = SubNetwork(structure, gates, worth), Watched(model, example), Watched(model, example)
    found = evaluated(model, lambda: sub.loss(forward, z, example))
    assert sub.problem is None
    after = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    expected = evaluated(model, lambda: multiplied(gates, z, whole))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert (forward.entries < whole.entries) is bool(gates.plain)
    for key, value in model.state_dict().items():  # statistics: as by multiplying, or left alone
        alike = torch.isclose(after[key], value, rtol=1e-9, atol=1e-12)
        assert bool((alike | (after[key] == state[key])).all()), key
        assert bool(alike.any()), key
    model.load_state_dict(state)


def in_one(
    make: Callable[[], nn.Module], example: Tensor, axes: list[str], worth: Worth | None = ALWAYS
) -> tuple[nn.Module, Structure, Gates, SubNetwork]:
    torch.manual_seed(0)
    model = make()
    structure = esp.attach(model, example)
    gates = gates_of(structure, axes)
    return model, structure, gates, SubNetwork(structure, gates, worth)


def test_statistics_of_units_that_are_left_out_rest():
    model, example = ZOO["resnet"]()
    structure = esp.attach(model, example)
    sub = SubNetwork(structure, gates_of(structure, ["conv1"]), ALWAYS)
    z = torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 0])
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    sub.loss(lambda: loss_of(model, example), {"conv1": z}, example)
    changed = norm.running_mean != before
    assert torch.equal(changed, z.bool())
    assert int(norm.num_batches_tracked) == 1


def test_nothing_stays_behind_whatever_happens():
    model, example = ZOO["resnet"]()
    structure = esp.attach(model, example)
    axes = gated_axes(structure)
    sub = SubNetwork(structure, gates_of(structure, axes), ALWAYS)
    z = drawn(structure, axes)
    with torch.no_grad():
        model.eval()
        before = snapshot(model, None, structure)
        sub.loss(lambda: loss_of(model, example), z, example)
        assert sub.problem is None
        assert differences(before, snapshot(model, None, structure)) == []

        def failing() -> Tensor:
            loss_of(model, example)
            raise ValueError("stop")

        with pytest.raises(ValueError, match="stop"):
            sub.loss(failing, z, example)
        assert differences(before, snapshot(model, None, structure)) == []


def test_gates_that_are_numbers_multiply_and_take_part_in_the_gradient():
    model, example = in_double("lenet")
    structure = esp.attach(model, example)
    axes = gated_axes(structure)
    gates, z = gates_of(structure, axes), drawn(structure, axes)
    z = {axis: one.double() * torch.rand(len(one), dtype=torch.float64) for axis, one in z.items()}
    leaves = {axis: one.clone().requires_grad_() for axis, one in z.items()}
    sub, forward = SubNetwork(structure, gates, ALWAYS), Watched(model, example)
    found = torch.autograd.grad(sub.loss(forward, leaves, example), list(leaves.values()))
    expected = torch.autograd.grad(multiplied(gates, leaves, forward), list(leaves.values()))
    for axis, one, other in zip(axes, found, expected, strict=True):
        torch.testing.assert_close(one[z[axis] != 0], other[z[axis] != 0])
    assert sub.problem is None


def test_one_unit_at_least_two_are_kept():
    worth = Worth(multiple=8)
    assert [worth.rounded(count, 64) for count in (0, 1, 16, 17, 63, 64)] == [16, 16, 16, 32, 64, 64]
    assert [worth.rounded(count, 20) for count in (0, 8, 9, 17)] == [8, 8, 16, 20]
    assert [ALWAYS.rounded(count, 20) for count in (0, 1, 2, 3, 20)] == [2, 2, 2, 3, 20]
    model, example = in_double("mlp")
    structure = esp.attach(model, example)
    axes = gated_axes(structure)
    gates = gates_of(structure, axes)
    z = {axis: torch.zeros(structure.axes[axis].size) for axis in axes}
    sub, forward = SubNetwork(structure, gates, ALWAYS), Watched(model, example)
    found = evaluated(model, lambda: sub.loss(forward, z, example))
    torch.testing.assert_close(found, evaluated(model, lambda: multiplied(gates, z, forward)))


# --- What is multiplied as ever --------------------------------------------------------------------------------------


class Listening(nn.Module):
    """A perceptron whose loss looks at weights that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def test_a_loss_that_looks_at_all_weights_is_found_out():
    example = torch.randn(5, 6)
    model, _, gates, sub = in_one(Listening, example, ["fc1"])

    def loss() -> Tensor:
        return model(example).square().mean() + model.fc1.weight.square().sum()

    z = {"fc1": torch.tensor([1.0, 0] * 5)}
    expected = evaluated(model, lambda: multiplied(gates, z, loss))
    torch.testing.assert_close(evaluated(model, lambda: sub.loss(loss, z, example)), expected, rtol=0, atol=0)
    assert "the loss is" in str(sub.problem)


def test_code_that_holds_a_size_is_found_out():
    class Holding(Listening):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.fc1(x))
            return self.fc2(h) * (1.0 if h.shape[1] == self.fc1.out_features else 2.0)

    example = torch.randn(5, 6)
    model, _, gates, sub = in_one(Holding, example, ["fc1"])
    z = {"fc1": torch.tensor([1.0, 0] * 5)}

    def loss() -> Tensor:
        return model(example).square().mean()

    expected = evaluated(model, lambda: multiplied(gates, z, loss))
    torch.testing.assert_close(evaluated(model, lambda: sub.loss(loss, z, example)), expected, rtol=0, atol=0)
    assert sub.problem is not None


def test_dropout_of_units_draws_as_without_gates():
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Dropout(0.5), nn.Linear(10, 3))

    example = torch.randn(5, 6)
    model, _, gates, sub = in_one(make, example, ["0"])
    z = {"0": torch.tensor([1.0, 0] * 5)}
    forward = Watched(model, (example,))
    found = []
    for loss in (lambda: sub.loss(forward, z, example), lambda: multiplied(gates, z, forward)):
        torch.manual_seed(1)
        found.append(loss())
    assert torch.equal(*found)
    assert forward.calls == 2
    model.eval()
    sub.loss(forward, z, example)
    assert forward.entries == 3 * 5 + 3 + 5 * 6 + 5  # five units


def test_dropout_of_what_is_not_gated_does_not_matter():
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4), nn.Dropout(0.5), nn.Linear(4, 3))

    example = torch.randn(5, 6)
    model, _, gates, sub = in_one(make, example, ["0"])
    z = {"0": torch.tensor([1.0, 0] * 5)}
    found = []
    for loss in (lambda one: sub.loss(one, z, example), lambda one: multiplied(gates, z, one)):
        torch.manual_seed(1)
        found.append(loss(lambda: loss_of(model, (example,))))
    torch.testing.assert_close(*found)
    assert sub.problem is None


def test_it_is_done_where_it_pays():
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))

    z = {"0": torch.ones(512)}
    z["0"][128:] = 0
    model, _, _, sub = in_one(make, torch.randn(2, 512), ["0"], None)
    for count, pays in ((2, False), (512, True), (2, False)):  # whatever came before
        batch = (torch.randn(count, 512),)
        forward = Watched(model, batch)
        sub.loss(forward, z, (*batch, torch.zeros(count, dtype=torch.int64)))
        assert (forward.entries < 300_000) is pays
        assert sub.problem is None
        calls = forward.calls
        sub.loss(forward, z, batch)
        assert forward.calls == calls + 1  # tried out once
        sub.loss(forward, {"0": torch.ones(512)}, batch)
        assert forward.entries == 2 * 512 * 513


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_network_is_left_alone():
    example = torch.randn(5, 6)
    model, structure, gates, _ = in_one(Listening, example, ["fc1"])
    model.compile()
    assert "compiled" in str(SubNetwork(structure, gates, ALWAYS).problem)


def test_training_is_the_same_with_fewer_units_in_both_passes():
    drawn_sizes = []
    losses = {}
    for worth in (ALWAYS, Worth(per_tensor=math.inf)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3)).double()
        batch, optimizer = torch.randn(20, 6).double(), torch.optim.SGD(model.parameters(), 0.1)
        structure = esp.attach(model, batch[:2], optimizer=optimizer)
        method = esp.prune.NPN(Stages(k=1.0, start=0.0, until=1.0), begin=0.6)
        method = replace(method, memory=replace(method.memory, worth=worth))

        def loss(net: nn.Sequential, x: Tensor) -> Tensor:
            drawn_sizes.append(net[0].weight.shape[0])
            return net(x).square().mean()

        session = esp.Session(structure, [method], loss=loss, total_steps=20)
        for _ in range(3):
            value = session.loss(batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            session.step()
            losses.setdefault(worth, []).append(value.detach())
    torch.testing.assert_close(*map(torch.stack, losses.values()))
    assert drawn_sizes[-6:] == [40] * 6
    assert len({*drawn_sizes[:-6]} - {40}) > 1
