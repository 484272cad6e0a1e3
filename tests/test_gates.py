"""Gates on the units of a live network: a unit whose gate is 0 is a unit that is not there."""

import copy
from collections.abc import Iterable

import pytest
import torch
from snapshots import differences, snapshot
from torch import Tensor, nn
from zoo_small import ZOO

import espalier as esp
from espalier.graph.capture import flatten_tensors
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


@pytest.mark.parametrize("name", ZOO)
def test_masked_is_removed(name):
    model, example = in_double(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.eval()
    structure = esp.attach(model, example)
    axes = gated_axes(structure)
    chance = any("dropout" in call.name for one in structure.topology.predictions for call in one.calls)
    chance = chance or name.startswith("hf_")
    statistics = any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in model.modules())
    for axis in axes:
        size = structure.axes[axis].size
        gone = list(range(0, size, 2))
        z = torch.ones(size)
        z[gone] = 0
        small = copy.deepcopy(model)
        esp.attach(small, example).prune(axis, gone)
        for train in (False, True) if not chance else (False,):  # other random numbers where there are fewer units
            model.train(train)
            small.train(train)
            before = snapshot(model, None, structure)
            found = masked(structure, {axis: z}, example)
            if not (train and statistics):
                assert differences(before, snapshot(model, None, structure)) == []
            with torch.no_grad():
                torch.testing.assert_close(found, outputs(small, example), rtol=1e-10, atol=1e-10)
        model.eval()
    assert axes or name == "hard_coded_view", "no axis of the network can have gates"


def test_what_cannot_have_gates_says_why():
    refused = {
        ("attention_separate", "stem"): "normalised by a LayerNorm",
        ("llama_by_hand", "tok_embeddings"): "normalised by an RMSNorm",
        ("vit", "blocks.0.qkv:head_dim"): "summed over between two activations",
        ("group_norm_resnet", "1.conv1:1"): "normalised within groups",
        ("one_unit", "2"): "one unit",
        ("mlp", "4"): "output",
    }
    for (name, axis), why in refused.items():
        model, example = ZOO[name]()
        assert why in str(gate_problem(esp.attach(model, example), axis))
    lstm = nn.Sequential(nn.LSTM(3, 4, num_layers=2, batch_first=True))
    structure = esp.attach(lstm, torch.randn(2, 5, 3))
    assert all(gate_problem(structure, axis) is not None for axis in structure.axes)


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
