"""Gates on the units of a live network: a unit whose gate is 0 is a unit that is not there."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from effort import in_turn
from snapshots import differences, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo_small import ZOO

import espalier as esp
from espalier.edit.plan import Plan, Resize
from espalier.errors import MethodError, PlanError
from espalier.graph.trees import flatten_tensors
from espalier.parts.gates.places import Gates
from espalier.parts.gates.units import gate_problem, unit_place
from espalier.structure import Structure


def in_double(name: str) -> tuple[nn.Module, object]:
    model, example = ZOO[name]()

    def cast(one):
        return one.double() if isinstance(one, Tensor) and one.is_floating_point() else one

    example = {k: cast(v) for k, v in example.items()} if isinstance(example, dict) else tuple(map(cast, example))
    return model.double(), example


def outputs(model: nn.Module, example) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = model(**example) if isinstance(example, dict) else model(*example)
    return [one for _, one in flatten_tensors(found, "output") if one.is_floating_point()]


def gated_axes(structure: Structure) -> list[str]:
    return [one.name for one in structure.axes.values() if one.growable and gate_problem(structure, one.name) is None]


def gates_of(structure: Structure, axes: Iterable[str]) -> Gates:
    return Gates(structure, [unit_place(structure, axis) for axis in axes])


def masked(structure: Structure, gates: dict[str, Tensor], example) -> list[Tensor]:
    with gates_of(structure, gates).applied(gates), torch.no_grad():
        return outputs(structure.model, example)


def check_masked_is_removed(model: nn.Module, example, axes: list[str], *, trains: bool = True) -> None:
    """Masking half of the units of each axis is removing them, in eval mode and, where no chance is in it, in train."""
    structure = esp.attach(model, example)
    statistics = any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in model.modules())
    single = any(torch.float32 in one.dtypes for one in structure.topology.predictions)  # norms that cast
    tolerance = 1e-5 if single else 1e-10
    for axis in axes:
        size = structure.axes[axis].size
        gone = list(range(0, size, 2))
        z = torch.ones(size, dtype=torch.float64)
        z[gone] = 0
        small = copy.deepcopy(model)
        esp.attach(small, example).apply(Plan((Resize(axis, tuple(gone)),), hold_norms=False))
        for train in (False, True) if trains else (False,):
            model.train(train)
            small.train(train)
            before = snapshot(model, None, structure)
            found = masked(structure, {axis: z}, example)
            if not (train and statistics):
                assert differences(before, snapshot(model, None, structure)) == []
            with torch.no_grad():
                expected = outputs(small, example)
            torch.testing.assert_close(
                found, expected, rtol=tolerance, atol=tolerance, msg=lambda m, a=axis: f"{a}: {m}"
            )
        model.eval()


@pytest.mark.parametrize("name", [pytest.param(name, marks=in_turn(row)) for row, name in enumerate(ZOO)])
def test_masked_is_removed(name):
    model, example = in_double(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.eval()
    structure = esp.attach(model, example)
    axes = gated_axes(structure)
    assert axes or name == "hard_coded_view", "no axis of the network can have gates"
    assert axes == [one.name for one in structure.axes.values() if one.growable], "an axis that may change is refused"
    for axis in axes:
        if structure.axes[axis].size == 1:
            structure.grow(axis, 2)
    chance = any("dropout" in call.name for one in structure.topology.predictions for call in one.calls)
    # other random numbers where there are fewer units
    check_masked_is_removed(model, example, axes, trains=not chance and not name.startswith("hf_"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=in_turn(row)) for row, name in enumerate(ZOO)])
def test_masked_is_removed_on_all_axes_at_once(name):
    model, example = in_double(name)
    model.eval()
    structure = esp.attach(model, example)
    axes = [one for one in gated_axes(structure) if structure.axes[one].size > 1]
    gone = {axis: tuple(range(structure.axes[axis].size // 2)) for axis in axes}
    z = {axis: torch.ones(structure.axes[axis].size, dtype=torch.float64) for axis in axes}
    for axis in axes:
        z[axis][list(gone[axis])] = 0
    small = copy.deepcopy(model)
    edits = tuple(Resize(axis, units) for axis, units in gone.items())
    if edits:
        esp.attach(small, example).apply(Plan(edits, hold_norms=False))
    found = masked(structure, z, example)
    tolerance = 1e-5 if any(torch.float32 in one.dtypes for one in structure.topology.predictions) else 1e-9
    with torch.no_grad():
        torch.testing.assert_close(found, outputs(small, example), rtol=tolerance, atol=tolerance)


class Odd(nn.Module):
    """A layer whose units are combined in a way that `combine` says."""

    def __init__(self, combine: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.combine(self.norm(self.first(x))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.rnn = kind(6, 5, batch_first=True, **options)
        self.last = nn.Linear(2 * 5 if options.get("bidirectional") else options.get("proj_size", 5), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(self.first(x))[0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.RNN, {}), (nn.GRU, {"num_layers": 2, "bidirectional": True}), (nn.LSTM, {"num_layers": 2}),
     (nn.LSTM, {"proj_size": 4})],
)  # fmt: skip
def test_masked_is_removed_in_recurrent_layers(kind, options):
    torch.manual_seed(0)
    model, x = Recurrent(kind, **options).double(), torch.randn(4, 7, 3, dtype=torch.float64)
    structure = esp.attach(model, x)
    axes = gated_axes(structure)
    assert "first" in axes
    assert any(axis.startswith("rnn") for axis in axes)
    check_masked_is_removed(model, (x,), axes)
    assert model.rnn._flat_weights[0] is model.rnn.weight_ih_l0


def test_what_cannot_have_gates_says_why():
    for combine, why in (
        (lambda x: x - x.median(-1, keepdim=True).values, "is reduced"),
        (lambda x: x * x.prod(-1, keepdim=True), "is reduced"),
        (lambda x: x.sort(-1).values, "sort"),
    ):
        model = Odd(combine)
        assert why in str(gate_problem(esp.attach(model, torch.randn(4, 3)), "first")), why
    model, example = ZOO["mlp"]()
    structure = esp.attach(model, example)
    assert "output" in str(gate_problem(structure, "4"))
    with pytest.raises(PlanError, match="there is no axis"):
        gate_problem(structure, "nothing")
    odd = esp.attach(Odd(lambda x: x * x.prod(-1, keepdim=True)), torch.randn(4, 3))
    with pytest.raises(MethodError, match="first cannot have gates: is reduced"):
        unit_place(odd, "first")


def test_gates_take_part_in_the_gradient():
    model, example = in_double("lenet")
    structure = esp.attach(model, example)
    axes = gated_axes(structure)
    generator = torch.Generator().manual_seed(0)
    z = {axis: torch.rand(structure.axes[axis].size, dtype=torch.float64, generator=generator) for axis in axes}
    weight = model.get_parameter("fc1.weight")

    def value(gates: dict[str, Tensor]) -> Tensor:
        with gates_of(structure, axes).applied(gates):
            return outputs(model, example)[0].square().mean()

    leaves = {axis: one.clone().requires_grad_() for axis, one in z.items()}
    grads = torch.autograd.grad(value(leaves), [*leaves.values(), weight])
    for axis, grad in zip(axes, grads, strict=False):
        step = {**z, axis: z[axis] + 1e-6 * torch.eye(len(z[axis]), dtype=torch.float64)[0]}
        assert float((value(step) - value(z)).detach() / 1e-6) == pytest.approx(float(grad[0]), rel=1e-3, abs=1e-6)
    zero = {axis: torch.zeros_like(one) if axis == "fc1" else one for axis, one in z.items()}
    value(zero).backward()
    assert not weight.grad.any()  # nothing reads what it makes


def test_gates_of_one_leave_the_very_tensors_in_place():
    model, example = ZOO["resnet"]()
    structure = esp.attach(model, example)
    gates = {axis: torch.ones(structure.axes[axis].size) for axis in gated_axes(structure)}
    before = dict(model.named_parameters())
    with gates_of(structure, gates).applied(gates):
        assert all(one is before[name] for name, one in model.named_parameters())
    with gates_of(structure, gates).applied({"conv1": torch.zeros(8)}):
        assert not model.get_submodule("layers.0.0.conv1").weight.any()

    def failing() -> None:
        with gates_of(structure, gates).applied({"conv1": torch.zeros(8)}):
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        failing()
    assert all(one is before[name] for name, one in model.named_parameters())


def test_what_stands_in_the_modules_is_multiplied():
    model, example = ZOO["mlp"]()
    structure = esp.attach(model, example)
    gates, z = gates_of(structure, ["0"]), torch.zeros(structure.axes["0"].size)
    reader = model.get_submodule("2")
    weight = reader.weight
    leaf = weight.detach().clone().mul_(3).requires_grad_()
    z[1] = 1
    reader._parameters["weight"] = leaf
    with gates.applied({"0": z}):
        torch.testing.assert_close(reader.weight[:, 1], 3 * weight[:, 1])
        assert int((reader.weight != 0).any(0).sum()) == 1
        (grad,) = torch.autograd.grad(outputs(model, example)[0].sum(), [leaf])
    assert bool(grad.any())
    assert reader.weight is leaf
    reader._parameters["weight"] = torch.zeros(len(weight), weight.shape[1] + 1)
    with pytest.raises(MethodError, match=r"2\.weight should have shape .* another method tries new units out"):
        gates.applied({"0": z}).__enter__()
    reader._parameters["weight"] = weight


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_activations_are_refused(reentrant):
    class Checkpointed(Odd):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return super().forward(x)
            return self.last(checkpoint(lambda one: self.norm(self.first(one)), x, use_reentrant=reentrant))

    model, x = Checkpointed(nn.Identity()).eval(), torch.randn(4, 3, requires_grad=True)
    gates = gates_of(esp.attach(model, x.detach()), ["first"])
    z = torch.ones(6)
    z[0] = 0
    model.train()
    with pytest.raises(MethodError, match="a LayerNorm runs again in backward"), gates.applied({"first": z}):
        model(x)
    model.eval()
    with gates.applied({"first": z}):
        model(x).sum().backward()
    assert not any(module._forward_pre_hooks for module in model.modules())
