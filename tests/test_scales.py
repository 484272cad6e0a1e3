"""Scales of units: which parameters are scales of norms, and scales that are folded into weights."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from loops import loss_of, start
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_small import ZOO

import espalier as esp
from espalier.errors import MethodError
from espalier.graph.topology import Topology
from espalier.parts.score import Context
from espalier.parts.units.folded import Folded, FoldedScales
from espalier.parts.units.penalty import Polarization, ScalesL1
from espalier.parts.units.scales import Scales, holders, norm_scales
from espalier.structure import Structure


def context_of(structure: Structure, axes: tuple[str, ...] | None = None, memory: Any = None) -> Context:
    names = axes or tuple(name for name, axis in structure.axes.items() if axis.reason is None)
    return Context(structure, names, 0, 0, 0.0, 7, lambda batch: torch.zeros(()), None, (), 0, memory)


def attached(name: str) -> Structure:
    model, example = ZOO[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return esp.attach(model, example, optimizer=optimizer)


# --- Which parameters are scales of norms ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "axis", "expected"),
    [
        ("vgg_batch_norm", "features.4", {"features.5.weight"}),
        ("vgg_batch_norm", "classifier.0", set()),
        ("resnet", "conv1", {"bn1.weight", "layers.0.0.bn2.weight", "layers.0.1.bn2.weight"}),
        ("mlp", "0", set()),
        ("vit", "blocks.0.mlp.0", set()),
        # every norm that reads the stream, but not the layer scales, which are no norm's
        ("vit", "patch_embed", {*(f"blocks.{n}.norm{m}.weight" for n in (0, 1) for m in (1, 2)), "norm.weight"}),
        # written by hand
        (
            "llama_by_hand",
            "tok_embeddings",
            {*(f"layers.{n}.{m}_norm.weight" for n in (0, 1) for m in ("attention", "ffn")), "norm.weight"},
        ),
    ],
)
def test_the_scales_of_an_axis_are_those_of_all_its_norms(network: str, axis: str, expected: set[str]) -> None:
    found = norm_scales(attached(network).topology, [axis])[axis]
    assert {place.tensor for place in found} == expected
    assert all(place.offset == 0.0 for place in found)


def test_group_norm_scales_are_found_along_both_of_its_axes() -> None:
    structure = attached("group_norm_resnet")
    names = [name for name, axis in structure.axes.items() if axis.reason is None]
    found = norm_scales(structure.topology, names)
    assert any(place.tensor.endswith("norm2.weight") for places in found.values() for place in places)


class PlusOne(nn.Module):
    """An RMSNorm that scales by 1 + weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def test_a_norm_that_adds_one_to_its_weight_has_that_as_its_scale() -> None:
    model = nn.Sequential(nn.Linear(4, 6), PlusOne(6), nn.Linear(6, 2))
    structure = esp.attach(model, torch.randn(3, 4))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-1.0, 0.0, 1.0, -3.0, -0.5, 0.0]))
    (place,) = norm_scales(structure.topology, ["0"])["0"]
    assert (place.tensor, place.offset) == ("1.weight", 1.0)
    scales = Scales(structure, ["0"])
    assert scales.of_units("0", dict(model.named_parameters())).tolist() == [0.0, 1.0, 2.0, 2.0, 0.5, 1.0]
    scales.clamp_(1.0)
    assert model[1].weight.tolist() == [-1.0, 0.0, 0.0, -1.0, -0.5, 0.0]


def test_a_unit_of_a_stream_is_worth_the_mean_over_its_norms() -> None:
    structure = attached("resnet")
    model = structure.model
    norms = [model.bn1, model.layers[0][0].bn2, model.layers[0][1].bn2]
    for norm in norms:
        nn.init.uniform_(norm.weight, -1, 1)
    expected = torch.stack([norm.weight.detach().abs() for norm in norms]).mean(0)
    found = Scales(structure, ["conv1"]).of_units("conv1", dict(model.named_parameters()))
    torch.testing.assert_close(found.float(), expected)


def test_only_the_scales_along_the_axes_are_touched() -> None:
    """A norm over concatenated features has scales of several axes."""
    structure = attached("densenet")
    scales = Scales(structure, ["dense.1.conv"])
    before = [one.detach().clone() for one in scales.parameters()]
    flat = torch.cat(scales.values())
    gradients = scales.gradients(torch.ones_like(flat))
    scales.clamp_(0.5)
    for parameter, old, gradient in zip(scales.parameters(), before, gradients, strict=True):
        inside = gradient == 1
        assert 0 < inside.sum() < inside.numel()
        assert (parameter[inside] == 0.5).all()
        assert torch.equal(parameter[~inside], old[~inside])
        assert (gradient[~inside] == 0).all()


class Matching(nn.Module):
    """Queries and keys meet each other: no weight reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return (self.query(x) @ self.key(x).transpose(1, 2)).sigmoid() @ x


def test_units_are_held_by_what_reads_them_or_else_by_what_makes_them() -> None:
    def places(topology: Topology, axis: str) -> set[tuple[str, int]]:
        return {(one.tensor, one.dim) for one in holders(topology, axis)}

    assert places(attached("llama_by_hand").topology, "layers.0.w1") == {("layers.0.w2.weight", 1)}
    made = {(f"{name}.{kind}", 0) for name in ("query", "key") for kind in ("weight", "bias")}
    assert places(esp.attach(Matching(), torch.randn(2, 3, 4)).topology, "query") == made


# --- Folded scales ---------------------------------------------------------------------------------------------------


class Explicit(nn.Module):
    """The MLP of the zoo with an explicit scale for every unit, applied where the unit is read."""

    def __init__(self, plain: nn.Sequential, start: float) -> None:
        super().__init__()
        self.first, self.second, self.third = plain[0], plain[2], plain[4]
        self.scales = nn.ParameterList([torch.full((12,), start), torch.full((9,), start)])
        with torch.no_grad():
            self.second.weight /= start
            self.third.weight /= start

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.first(x))
        x = self.activation(F.linear(x, self.scales[0] * self.second.weight, self.second.bias))
        return F.linear(x, self.scales[1] * self.third.weight, self.third.bias)

    activation = staticmethod(F.relu)


def twins(start: float) -> tuple[nn.Sequential, Explicit, Tensor]:
    torch.manual_seed(0)
    batch = torch.randn(16, 10, dtype=torch.float64)

    def layers() -> nn.Sequential:
        torch.manual_seed(1)
        one = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
        return one.double()

    return layers(), Explicit(layers(), start).double(), batch


@pytest.mark.parametrize(("first", "strength"), [(1.0, 0.05), (0.5, 0.05)])
def test_folded_scales_train_as_explicit_ones_would(first: float, strength: float) -> None:
    """Weights and scales of the explicit model, step by step, under SGD whose rate is divided by start^2 for V."""
    plain, explicit, x = twins(first)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.02)
    structure = esp.attach(plain, x, optimizer=optimizer)
    memory = Folded(first, rate=0.02)()
    context, penalty = context_of(structure, ("0", "2"), memory), ScalesL1(strength)
    held = [explicit.second.weight, explicit.third.weight]
    others = [one for one in explicit.parameters() if all(one is not p for p in (*held, *explicit.scales))]
    other = torch.optim.SGD(
        [
            {"params": others},
            {"params": held, "lr": 0.02 / first**2},
            {"params": list(explicit.scales), "momentum": 0.9},
        ],
        lr=0.02,
    )
    for _ in range(30):
        optimizer.zero_grad()
        added = penalty(context)
        loss = loss_of(plain, (x,)) if added is None else loss_of(plain, (x,)) + added
        loss.backward()
        optimizer.step()
        memory.after_step(context)
        other.zero_grad()
        (loss_of(explicit, (x,)) + strength * sum(one.abs().sum() for one in explicit.scales)).backward()
        other.step()
    for axis, layer, folded in (("0", 2, 0), ("2", 4, 1)):
        scale = explicit.scales[folded].detach()
        assert (scale < 0.9 * first).any()
        assert (scale <= first).all()
        torch.testing.assert_close(memory.scale(axis).double(), scale, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plain[layer].weight.detach(), scale * held[folded].detach(), rtol=1e-4, atol=1e-5)


def test_the_slope_of_a_folded_scale_is_that_of_autograd() -> None:
    plain, explicit, x = twins(1.0)
    loss_of(explicit, (x,)).backward()
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    structure = esp.attach(plain, x, optimizer=optimizer)
    memory = Folded(1.0, rate=1e-3, momentum=0.0)()
    context = context_of(structure, ("0", "2"), memory)
    ScalesL1(1e-12)(context)
    loss_of(plain, (x,)).backward()
    optimizer.step()  # a large one: the slope is that at the weights before it
    memory.after_step(context)
    for axis, scales in zip(("0", "2"), explicit.scales, strict=True):
        slope = (1 - memory.scale(axis)) / 1e-3
        torch.testing.assert_close(slope, scales.grad.float(), rtol=1e-3, atol=1e-4)


def test_one_weight_may_hold_the_scales_of_two_axes() -> None:
    """Heads and the numbers within them are both read by the columns of one matrix."""
    structure = attached("vit")
    axes = ("blocks.0.qkv:heads", "blocks.0.qkv:head_dim")
    memory = Folded(1.0, rate=0.1, momentum=0.0)()
    context = context_of(structure, axes, memory)
    weight = structure.model.get_parameter("blocks.0.proj.weight")
    before = weight.detach().clone()
    memory.scales(context)
    ScalesL1(1.0)(context)
    weight.grad = torch.zeros_like(weight)
    memory.after_step(context)
    assert all(torch.allclose(memory.scale(axis), torch.tensor(0.9)) for axis in axes)
    torch.testing.assert_close(weight.detach(), 0.81 * before)


def test_scales_learn_at_the_rate_of_the_weights_that_hold_them() -> None:
    model, example = ZOO["mlp"]()
    groups = [{"params": model[2].parameters(), "lr": 0.01}, {"params": model[4].parameters(), "lr": 0.03}]
    structure = esp.attach(model, example, optimizer=torch.optim.SGD(groups, lr=0.5))
    memory = Folded(1.0, momentum=0.0)()
    context = context_of(structure, ("0", "2"), memory)
    for rate in (0.01, 0.02):
        ScalesL1(1.0)(context)
        memory.after_step(context)
        torch.testing.assert_close(1 - memory.scale("0"), torch.full((12,), rate))
        torch.testing.assert_close(1 - memory.scale("2"), torch.full((9,), 3 * rate))


def test_without_gradients_the_penalty_alone_moves_the_scales() -> None:
    structure = attached("mlp")
    memory = Folded(1.0, rate=0.1, momentum=0.0)()
    context = context_of(structure, ("0",), memory)
    before = structure.model[2].weight.detach().clone()
    ScalesL1(0.5)(context)
    memory.after_step(context)
    torch.testing.assert_close(memory.scale("0"), torch.full((12,), 0.95))
    torch.testing.assert_close(structure.model[2].weight.detach(), 0.95 * before)
    memory.after_step(context)  # no loss of the session in between
    torch.testing.assert_close(memory.scale("0"), torch.full((12,), 0.95))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_move_no_scale(value: float) -> None:
    structure = attached("mlp")
    model = structure.model
    memory = Folded(1.0)()
    context = context_of(structure, ("0",), memory)
    before = model[2].weight.detach().clone()
    ScalesL1(1e-9)(context)
    model[2].weight.grad = torch.full_like(before, value)
    memory.after_step(context)
    torch.testing.assert_close(memory.scale("0"), torch.ones(12))
    torch.testing.assert_close(model[2].weight.detach(), before)


@pytest.mark.parametrize("how", ["frozen", "not in the optimizer"])
def test_weights_that_are_not_trained_keep_their_scales(how: str) -> None:
    model, example = ZOO["mlp"]()
    trained = [one for name, one in model.named_parameters() if name != "2.weight"]
    optimizer = torch.optim.SGD(trained if how != "frozen" else model.parameters(), lr=0.1)
    structure = esp.attach(model, example, optimizer=optimizer)
    if how == "frozen":
        model[2].weight.requires_grad_(False)
    memory = Folded(1.0)()
    context = context_of(structure, ("0", "2"), memory)
    before = [model[layer].weight.detach().clone() for layer in (2, 4)]
    ScalesL1(0.5)(context)
    memory.after_step(context)
    assert (memory.scale("0") == 1).all()
    assert (memory.scale("2") < 1).all()
    assert torch.equal(model[2].weight, before[0])
    assert not torch.equal(model[4].weight, before[1])


def test_a_scale_stays_above_its_floor_and_may_come_back() -> None:
    structure = attached("mlp")
    model = structure.model
    memory = Folded(1.0, rate=1.0, momentum=0.0)()
    context = context_of(structure, ("0",), memory)
    before = model[2].weight.detach().clone()
    for _ in range(100):  # by a tenth at most
        ScalesL1(50.0)(context)
        model[2].weight.grad = torch.zeros_like(model[2].weight)
        memory.after_step(context)
    torch.testing.assert_close(memory.scale("0"), torch.full((12,), 1e-4))
    torch.testing.assert_close(model[2].weight.detach(), 1e-4 * before)
    with torch.no_grad():
        for _ in range(3):  # steps of the optimizer, which a unit that counts for nothing does not follow
            memory.expect(torch.zeros(12))
            model[2].weight += 1.0
            memory.after_step(context)
    torch.testing.assert_close(model[2].weight.detach(), 1e-4 * before, rtol=1e-3, atol=1e-7)
    for _ in range(100):
        memory.expect(torch.full((12,), -0.5 if memory.scale("0")[0] < 0.5 else 0.0))
        memory.after_step(context)
    assert 0.5 <= memory.scale("0")[0] < 0.6
    torch.testing.assert_close(model[2].weight.detach(), memory.scale("0") * before, rtol=1e-2, atol=1e-3)


def test_a_scale_changes_by_a_tenth_per_step_at_most() -> None:
    structure = attached("mlp")
    memory = Folded(1.0, rate=1.0, momentum=0.0)()
    context = context_of(structure, ("0",), memory)
    before = structure.model[2].weight.detach().clone()
    memory.scales(context)
    memory.expect(torch.tensor([5.0] * 6 + [-5.0] * 6))
    memory.after_step(context)
    torch.testing.assert_close(memory.scale("0"), torch.tensor([0.9] * 6 + [1 / 0.9] * 6))
    torch.testing.assert_close(structure.model[2].weight.detach(), memory.scale("0") * before)


def test_folded_scales_follow_edits_and_are_saved() -> None:
    memory = Folded(0.5, most=1.0)()
    structure = attached("mlp")
    memory.scales(context_of(structure, ("0", "2"), memory))
    memory.restore(
        {"scale": {"0": [0.1, 0.2, 0.3], "2": [0.4]}, "velocity": {"0": [1.0, 2.0, 3.0], "2": [4.0]}},
    )
    memory.follow({"0": np.array([2, 0, 0, -1]), "other": np.array([0])})
    state = json.loads(json.dumps(memory.state()))
    again = Folded(0.5, most=1.0)()
    again.restore(state)
    assert again.state() == memory.state() == state
    assert [round(one, 6) for one in state["scale"]["0"]] == [0.3, 0.1, 0.1, 0.5]
    assert state["velocity"] == {"0": [3.0, 1.0, 1.0, 0.0], "2": [4.0]}
    with pytest.raises(ValueError, match="do not fit"):
        again.restore({"scale": {"0": [1.0]}, "velocity": {}})
    with pytest.raises(KeyError):
        again.restore({})


def test_a_memory_that_missed_an_edit_refuses() -> None:
    structure = attached("mlp")
    memory = Folded(1.0)()
    memory.scales(context_of(structure, ("0",), memory))
    structure.prune("0", [1])
    with pytest.raises(MethodError, match="0 has 11 units and 12 folded scales"):
        memory.scales(context_of(structure, ("0",), memory))


def test_weights_of_half_precision_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).bfloat16()
    structure = esp.attach(model, torch.randn(3, 4, dtype=torch.bfloat16))
    memory = Folded(1.0)()
    with pytest.raises(MethodError, match=r"1\.weight is torch.bfloat16"):
        memory.scales(context_of(structure, ("0",), memory))


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_bounds_that_would_change_a_trained_network_are_refused(value: float) -> None:
    structure = attached("resnet")
    with torch.no_grad():
        structure.model.bn1.weight[3] = value
    context = context_of(structure, ("conv1",), Folded(0.5, most=1.0)())
    with pytest.raises(MethodError, match=r"bn1\.weight has scales from .*keeps scales in \[0, 1\.0\]"):
        Polarization(1e-3, 1.2)(context)
    assert ScalesL1(1e-3)(context_of(structure, ("conv1",), Folded()())) is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Folded(start=0.0), r"start: expected a number above 0\.0001 and at most inf, found 0\.0"),
        (lambda: Folded(start=2.0, most=1.0), r"start: .* and at most 1\.0, found 2\.0"),
        (lambda: Folded(most=0.0), r"most: expected a number above 0\.0001"),
        (lambda: Folded(rate=0.0), "rate: expected a number above 0, found 0"),
        (lambda: Folded(momentum=1.0), "momentum: expected a number from 0 to 1"),
        (lambda: Polarization(-1.0, 1.0), "strength: expected a number of at least 0, found -1"),
        (lambda: Polarization(1.0, -1.0), "t: expected a number of at least 0, found -1"),
        (lambda: Polarization(1.0, 1.0, (2.0, 1.0)), r"by_flops: expected \(smallest, largest\) weight"),
    ],
)
def test_wrong_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make()


# --- In a session ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [esp.prune.Slimming, esp.prune.Polarization])
def test_a_resumed_session_goes_on_with_the_same_scales(method: Any) -> None:
    def run() -> Any:
        return start("lenet", [method(strength=1e-2, every=esp.steps(5), start=0.3, until=0.9)], total_steps=20)

    whole = run().train(20)
    half = run().train(9)
    network = {name: one.clone() for name, one in half.structure.model.state_dict().items()}
    optimizer = half.optimizer.state_dict()
    state = json.loads(json.dumps(half.session.state_dict()))
    sizes = half.sizes()
    again = run()
    plan = {name: list(range(sizes[name], axis.size)) for name, axis in again.structure.axes.items()}
    again.structure.prune({name: units for name, units in plan.items() if units})
    again.structure.model.load_state_dict(network)
    again.optimizer.load_state_dict(optimizer)
    again.session.load_state_dict(state)
    again.train(11)
    for one, two in zip(whole.structure.model.parameters(), again.structure.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_an_edit_that_is_undone_is_undone_for_folded_scales_too() -> None:
    run = start("mlp", [esp.prune.Slimming(strength=1e-2, start=0.9, until=1.0, every=esp.steps(100))], total_steps=200)
    run.train(5)
    memory = run.session._controller.running[0].memory
    assert isinstance(memory, FoldedScales)
    before = memory.state()
    run.structure.prune("0", [3, 4])
    run.session.state_dict()
    assert len(memory.state()["scale"]["0"]) == 10
    run.structure.undo()
    run.session.state_dict()
    assert memory.state() == before
    run.train(3)
