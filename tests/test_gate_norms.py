"""Norms and means across gated units: their statistics are over the units that gates leave."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from loops import start
from test_gates import outputs
from torch import Tensor, nn
from torch.nn import functional

import espalier as esp
from espalier.edit.plan import Plan, Resize
from espalier.errors import MethodError
from espalier.parts.gates.places import Gates
from espalier.parts.gates.stages import Stages
from espalier.parts.gates.units import gate_problem, unit_place
from espalier.parts.gates.weighted import normalised
from espalier.structure import Structure

UNITS, GONE = 6, (1, 4)


class ByHand(nn.Module):
    """An RMSNorm, or a LayerNorm, written out."""

    def __init__(self, centred: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(UNITS) + 0.5)
        self.centred = centred

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(dim=-1, keepdim=True) if self.centred else x
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Unscaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:])


class Cast(nn.Module):
    """A norm that hands on its scale in another type."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(UNITS) + 0.5), nn.Parameter(torch.rand(UNITS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x.float(), (len(self.weight),), self.weight.float(), self.bias.float(), 1e-5).to(x)


class Reduced(nn.Module):
    """What is made of all units, and added to them."""

    def __init__(self, reduction: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, x: Tensor) -> Tensor:
        return x + 2 * self.reduction(x)


class Net(nn.Module):
    """A stream with two branches, each behind a norm."""

    def __init__(self, norm: Callable[[], nn.Module], channels: bool = False) -> None:
        super().__init__()
        layer = (lambda i, o: nn.Conv1d(i, o, 1)) if channels else nn.Linear
        self.first, self.last = layer(3, UNITS), layer(UNITS, 2)
        self.norms = nn.ModuleList([norm(), norm()])
        self.hidden = layer(UNITS, UNITS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + torch.tanh(self.hidden(self.norms[0](x)))
        return self.last(self.norms[1](x))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(UNITS),
    "rms": lambda: nn.RMSNorm(UNITS),
    "unscaled": Unscaled,
    "cast": Cast,
    "rms by hand": ByHand,
    "layer by hand": lambda: ByHand(centred=True),
    "group": lambda: nn.GroupNorm(2, UNITS),
    "one group": lambda: nn.GroupNorm(1, UNITS, affine=False),
    **{
        name: partial(Reduced, one)
        for name, one in {
            "var": lambda x: x.var(-1, keepdim=True),
            "biased var": lambda x: torch.var(x, -1, False, True),
            "std": lambda x: torch.std(x, dim=-1, correction=0, keepdim=True),
            "amax": lambda x: x.amax(-1, keepdim=True),
            "amin": lambda x: torch.amin(x, dim=(-1,), keepdim=True),
            "logsumexp": lambda x: torch.logsumexp(x, -1)[..., None],
            "softmax": lambda x: functional.softmax(x, dim=-1),
            "log_softmax": lambda x: x.log_softmax(-1),
            "mean of all": lambda x: x.mean(),
            "mean of positions": lambda x: x.mean((1, 2), keepdim=True),
        }.items()
    },
}


def made(name: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    channels = "group" in name
    model = Net(NORMS[name], channels).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model, torch.randn(4, 3, 5, dtype=torch.float64) if channels else torch.randn(4, 5, 3, dtype=torch.float64)


def stream(structure: Structure) -> str:
    """The axis that norms run across."""
    return next(one.name for one in structure.axes.values() if one.growable)


@pytest.mark.parametrize("name", NORMS)
def test_masked_is_removed(name):
    model, x = made(name)
    structure = esp.attach(model, x)
    axes = [one.name for one in structure.axes.values() if one.growable]
    for axis in axes:
        assert gate_problem(structure, axis) is None
        size, before = structure.axes[axis].size, model(x)
        gone = GONE if size == UNITS else (1,)
        z = torch.ones(size)
        z[list(gone)] = 0
        with Gates(structure, [unit_place(structure, axis)]).applied({axis: z}):
            found = model(x)
            if "mean" in name:  # other dimensions may be of any size
                longer, shut = torch.cat([x, x[:2]]), model(torch.cat([x, x[:2]]))
        assert not any("forward" in one.__dict__ for one in model.modules())
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
        small = copy.deepcopy(model)
        edit = esp.attach(small, x).apply(Plan((Resize(axis, gone),), hold_norms=False))
        assert edit.contract == "changing"
        tolerance = 1e-5 if name == "cast" else 1e-12
        torch.testing.assert_close(found, small(x), rtol=tolerance, atol=tolerance)
        if "mean" in name:
            torch.testing.assert_close(shut, small(longer), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(found, before, rtol=1e-2)


def test_units_that_say_nothing_are_not_compensated_for_gates():
    model, x = made("rms")
    structure = esp.attach(model, x)
    axis = stream(structure)
    with torch.no_grad():
        for tensor in (model.first.weight, model.first.bias, model.hidden.weight, model.hidden.bias):
            tensor[list(GONE)] = 0
    before = model(x)
    for hold, contract in ((True, "exact"), (False, "changing")):
        small = copy.deepcopy(model)
        edit = esp.attach(small, x).apply(Plan((Resize(axis, GONE),), hold_norms=hold))
        assert edit.contract == contract, edit.why
        assert torch.allclose(small(x), before) is hold
    z = torch.ones(UNITS)
    z[list(GONE)] = 0
    with Gates(structure, [unit_place(structure, axis)]).applied({axis: z}):
        torch.testing.assert_close(model(x), small(x), rtol=1e-12, atol=1e-12)
    plan = Plan((Resize(axis, GONE),), hold_norms=False)
    assert Plan.from_json(plan.to_json()) == plan


def test_gradients_pass_gates_of_norms():
    model, x = made("layer")
    structure = esp.attach(model, x)
    axis = stream(structure)
    gates = Gates(structure, [unit_place(structure, axis)])

    def value(z: Tensor) -> Tensor:
        with gates.applied({axis: z}):
            return model(x).square().sum()

    z = torch.linspace(0.2, 1, UNITS, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(value, (z,))


def test_the_normalisation_of_its_own_is_the_formula():
    torch.manual_seed(0)
    x = torch.randn(3, 2, UNITS, dtype=torch.float64, requires_grad=True)
    for weights in (torch.tensor([1, 0, 1, 1, 0, 1.0]), torch.rand(UNITS)):
        shares = weights.double() / weights.double().sum()
        mean = (x * shares).sum(-1, keepdim=True)
        expected = (x - mean) / ((shares * (x - mean).square()).sum(-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(normalised(x, shares, 1e-5), expected, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(partial(normalised, shares=shares, eps=1e-5), (x,))
        assert torch.autograd.gradgradcheck(partial(normalised, shares=shares, eps=1e-5), (x,))


@pytest.mark.parametrize("name", NORMS)
def test_results_are_finite_where_all_gates_are_shut(name):
    model, x = made(name)
    structure = esp.attach(model, x)
    axis = stream(structure)
    z = torch.zeros(structure.axes[axis].size, dtype=torch.float64).requires_grad_()
    with Gates(structure, [unit_place(structure, axis)]).applied({axis: z}):
        found = model(x)
    grads = torch.autograd.grad(found.sum(), [z, *model.parameters()], allow_unused=True)
    assert all(bool(torch.isfinite(one).all()) for one in (found, *grads) if one is not None)


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_low_precision_is_as_good_as_the_norm_itself(name):
    model, x = made(name)
    structure = esp.attach(model.float(), x.float())
    axis = stream(structure)
    z = torch.ones(UNITS)
    z[list(GONE)] = 0
    gates = Gates(structure, [unit_place(structure, axis)])
    with gates.applied({axis: z}):
        expected = model(x.float())
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x.float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


class Twice(nn.Module):
    """Two norms without scales over sizes that only happen to be equal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.last = nn.Linear(3, UNITS), nn.Linear(3, UNITS), nn.Linear(UNITS, 2)
        self.also = nn.Linear(UNITS, 2)

    def forward(self, x: Tensor) -> Tensor:
        some = functional.layer_norm(self.first(x), self.first.bias.shape)
        others = functional.layer_norm(self.other(x), self.other.bias.shape)
        return self.last(some) + self.also(others)


def test_norms_that_cannot_be_told_apart_are_refused():
    structure = esp.attach(Twice(), torch.randn(4, 3))
    for axis in ("first", "other"):
        assert "cannot be told from another" in str(gate_problem(structure, axis))


def test_means_outside_of_the_network_are_left_alone():
    model, x = made("rms by hand")
    structure = esp.attach(model, x)
    axis = stream(structure)
    other = torch.randn(4, 5, UNITS, dtype=torch.float64)
    z = torch.ones(UNITS)
    z[list(GONE)] = 0
    with Gates(structure, [unit_place(structure, axis)]).applied({axis: z}):
        assert torch.equal(other.mean(-1), other.sum(-1) / UNITS) or torch.allclose(
            other.mean(-1), other.sum(-1) / UNITS
        )
        ours = model.norms[0](other)
    assert not torch.allclose(ours, model.norms[0](other))


def test_a_norm_that_is_not_seen_is_an_error():
    model, x = made("layer")
    structure = esp.attach(model, x)
    axis = stream(structure)
    gates = Gates(structure, [unit_place(structure, axis)])
    z = torch.ones(UNITS)
    z[0] = 0
    model.norms[1].forward = torch.relu  # somebody else's norm
    expected = r"norms\.1\.weight: what runs across gated units there was not seen"
    with pytest.raises(MethodError, match=expected), gates.applied({axis: z}):
        model(x)
    assert model.norms[1].forward is torch.relu
    assert "forward" not in model.norms[0].__dict__


@pytest.mark.parametrize(("name", "axes"), [("vit", ["patch_embed", "blocks.0.qkv:head_dim"]), ("llama_by_hand", None)])
def test_units_leave_a_session_as_its_gates_were_decided(name, axes):
    run = start(name, [esp.prune.NPN(Stages(k=3.0, start=0.9, until=0.95), axes=axes)], 20)
    run.train(1)
    session, model = run.session, run.structure.model
    running = session._controller.running[0]
    for axis, logits in running.memory.logits.items():
        if axes is None or axis in axes:
            logits[::2] = -1.0
    model.eval()
    with torch.no_grad(), session.decided():
        expected = outputs(model, run.batch)
    context = session._context(running)
    plan = running.method.propose(context, session._controller.goal(running, session._clock(), context.axes))
    assert not plan.hold_norms
    assert {one.axis for one in plan.edits} == set(running.memory.logits)
    run.structure.apply(plan)
    with torch.no_grad():
        found = outputs(model, run.batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
