"""Attention keeps its function when heads, numbers per head and key/value groups grow, or lose silent units.

The oracle is the outputs in float64, in eval and in train mode; and for gradients and optimizer state those that the
edited network itself gives.
"""

import pytest
import torch
from attention_forms import FORMS, Cosine, Dropped, FusedView, QueryKeyLayerNorm, QueryKeyRMSNorm
from oracles import disturb, outputs, relative_error
from torch import Tensor, nn

from espalier.attaching import attach
from espalier.edit import contract, new_tensors
from espalier.structure import Structure

BOUND = 1e-9


def network(form: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), form(), nn.Linear(6, 2)).double()
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    disturb(model, x, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "logit" not in name:
                parameter.mul_(2.5)  # far from uniform attention, so that a temperature shows
    return model, x


def head_dim(structure: Structure) -> str:
    """The axis that is summed over between query and key."""
    (name,) = [axis.name for axis in structure.axes.values() if any(tap.role == "bilinear" for tap in axis.taps)]
    return name


def both(model: nn.Module, x: Tensor) -> list[Tensor]:
    modes = (False,) if isinstance(model[1], Dropped) else (False, True)
    return [outputs(model, x, train, 0) for train in modes]


def error(after: list[Tensor], before: list[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by", [2, 6])
def test_every_axis_grows_exactly(form, by):
    model, x = network(form)
    structure = attach(model, x)
    before = both(model, x)
    for axis in [one for one in structure.axes.values() if one.growable]:
        edit = structure.grow(axis.name, by=by, seed=3)
        assert edit.contract == "exact", edit.why
        assert error(both(model, x), before) <= BOUND, axis.name
        structure.undo()
    assert error(both(model, x), before) == 0


@pytest.mark.parametrize("form", FORMS)
def test_growing_again_and_again_stays_exact(form):
    model, x = network(form)
    structure = attach(model, x)
    before = both(model, x)
    for by in (2, 4, 2):
        edit = structure.grow(head_dim(structure), by=by, seed=by)
        assert edit.contract == "exact", edit.why
    assert error(both(model, x), before) <= BOUND


@pytest.mark.parametrize("form", FORMS)
def test_growing_and_going_back_is_exact(form):
    """What was grown and not yet trained contributes nothing; the scale comes back to what was recorded at first."""
    if form in (QueryKeyLayerNorm, QueryKeyRMSNorm, Cosine):
        pytest.skip("its new units are at the mean of the others, or faint, not zero")
    model, x = network(form)
    structure = attach(model, x)
    before = both(model, x)
    axis = structure.axes[head_dim(structure)]
    structure.grow(axis.name, by=2)
    silence_query(structure, axis.name, [axis.size, axis.size + 1])
    edit = structure.prune(axis.name, [axis.size, axis.size + 1])
    assert edit.contract == "exact", edit.why
    assert error(both(model, x), before) <= BOUND


@pytest.mark.parametrize("form", FORMS)
def test_new_numbers_of_a_head_learn(form):
    model, x = network(form)
    structure = attach(model, x)
    axis = structure.axes[head_dim(structure)]
    structure.grow(axis.name, by=2, seed=1)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    torch.manual_seed(0)
    target = torch.randn(4, 7, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    moved = 0.0
    for slot in structure.axes[axis.name].slots:
        now = dict(model.named_parameters())[slot.tensor]
        index = torch.tensor(slot.index([axis.size, axis.size + 1]))
        if slot.tensor.split(".")[1] in ("q", "k", "q_norm", "k_norm", "qkv"):
            change = (now.detach() - before[slot.tensor]).index_select(slot.dim, index)
            moved = max(moved, float(change.abs().max()))
    assert moved > 0


def silence_query(structure: Structure, name: str, units: list[int]) -> None:
    """Make the query zero in some units of head_dim."""
    tensors = dict(structure.model.named_parameters())
    with torch.no_grad():
        for slot in structure.axes[name].slots:
            positions = torch.tensor(slot.index(units))
            if slot.tensor.startswith("1.qkv"):
                positions = positions[positions < tensors[slot.tensor].shape[0] // 3]
                readers = [one for one in structure.axes[name].slots if one.tensor == "1.o.weight"]
                for reader in readers:
                    tensors["1.o.weight"].index_fill_(reader.dim, torch.tensor(reader.index(units)), 0.0)
            elif not slot.tensor.startswith("1.q."):
                continue
            tensors[slot.tensor].index_fill_(slot.dim, positions, 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_numbers_that_the_query_leaves_at_zero_go_exactly(form):
    if form is QueryKeyLayerNorm:
        pytest.skip("zero is not neutral for a LayerNorm")
    model, x = network(form)
    structure = attach(model, x)
    name = head_dim(structure)
    units = [1, 3] if structure.axes[name].size == 4 else [0]
    silence_query(structure, name, units)
    if form in (QueryKeyRMSNorm, Cosine):  # the norm of the key counts its units too
        with torch.no_grad():
            for slot in structure.axes[name].slots:
                if slot.tensor.startswith("1.k."):
                    tensor = dict(model.named_parameters())[slot.tensor]
                    tensor.index_fill_(slot.dim, torch.tensor(slot.index(units)), 0.0)
    before = both(model, x)
    edit = structure.prune(name, units)
    assert edit.contract == "exact", edit.why
    assert error(both(model, x), before) <= BOUND


@pytest.mark.parametrize("form", FORMS)
def test_numbers_that_count_are_not_said_to_go_exactly(form):
    model, x = network(form)
    structure = attach(model, x)
    before = both(model, x)
    name = head_dim(structure)
    edit = structure.prune(name, [0, 1] if structure.axes[name].size == 4 else [0])
    assert edit.contract == "changing"
    assert error(both(model, x), before) > 1e-4


def test_the_temperature_is_held_where_units_that_count_go():
    """The scores of what stays are those that they were."""
    torch.manual_seed(0)
    model, x = network(FORMS[0])
    attention = model[1]
    structure = attach(model, x)

    def scores(kept: list[int]) -> Tensor:
        h = model[0](x)
        q, k = (one(h).view(4, 7, 2, -1).transpose(1, 2) for one in (attention.q, attention.k))
        return q[..., kept] @ k[..., kept].transpose(-2, -1)

    expected = scores([0, 2, 3]) / 4**0.5
    structure.prune(head_dim(structure), [1])
    assert relative_error(scores([0, 1, 2]) / 3**0.5, expected) <= BOUND


def test_the_key_bias_of_a_fused_projection_stays():
    """Only the query's part of a fused weight is multiplied."""
    model, x = network(FusedView)
    before = model[1].qkv.weight.detach().clone().view(3, 2, 4, 6)
    structure = attach(model, x)
    structure.grow(head_dim(structure), by=2)
    after = model[1].qkv.weight.detach().view(3, 2, 6, 6)[:, :, :4]
    assert relative_error(after[0], before[0] * 1.5**0.5) <= 1e-12
    assert torch.equal(after[1:], before[1:])


class SharedQueryKey(nn.Module):
    """One projection is query and key: no side of the product can be scaled, or be zero, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v = nn.Linear(6, 4), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q = self.qk(x)
        return (q @ q.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ self.v(x)


def test_a_query_that_is_the_key_is_changing():
    model, x = network(SharedQueryKey)
    structure = attach(model, x)
    before = both(model, x)
    edit = structure.grow(head_dim(structure), by=2)
    assert edit.contract == "changing"
    assert "follows the size" in edit.why
    structure.undo()
    assert error(both(model, x), before) == 0


class KeyIsValue(nn.Module):
    """The query is read elsewhere too, so that only the key can take the factor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.extra = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        scores = q @ self.k(x).transpose(-2, -1) / q.shape[-1] ** 0.5
        return scores.softmax(-1) @ self.v(x) + self.extra(q).sigmoid()


def test_the_key_takes_the_factor_where_the_query_cannot():
    model, x = network(KeyIsValue)
    structure = attach(model, x)
    before = both(model, x)
    query = model[1].q.weight.detach().clone()
    edit = structure.grow(head_dim(structure), by=3)
    assert edit.contract == "exact", edit.why
    assert error(both(model, x), before) <= BOUND
    assert torch.equal(model[1].q.weight[:4], query)


# --- Gradients, optimizer state, copies ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [FORMS[0], FusedView, QueryKeyRMSNorm, Cosine])
def test_gradients_and_state_of_scaled_weights_are_those_of_the_edited_network(form):
    model, x = network(form)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    target = torch.randn(4, 7, 2, dtype=torch.float64)

    def gradients() -> None:
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()

    gradients()
    optimizer.step()
    structure = attach(model, x, optimizer=optimizer)
    axis = structure.axes[head_dim(structure)]
    structure.grow(axis.name, by=2)
    kept = {name: (one.grad.clone(), dict(optimizer.state[one])) for name, one in model.named_parameters()}
    gradients()
    new = [axis.size, axis.size + 1]
    scale = max(float(one.grad.abs().max()) for one in model.parameters())
    for name, parameter in model.named_parameters():
        old = torch.ones_like(parameter, dtype=torch.bool)
        for slot in structure.axes[axis.name].slots:
            if slot.tensor == name:
                old.index_fill_(slot.dim, torch.tensor(slot.index(new)), False)
        grad, state = kept[name]
        true = parameter.grad[old]
        assert float((grad[old] - true).abs().max()) <= BOUND * scale, name
        assert float((state["exp_avg"][old] - 0.1 * true).abs().max()) <= BOUND * scale, name
        assert float((state["exp_avg_sq"][old] - 0.001 * true**2).abs().max()) <= BOUND * scale**2, name


def test_copies_follow_the_factor():
    model, x = network(FORMS[0])
    average = torch.optim.swa_utils.AveragedModel(model)
    structure = attach(model, x, follow=[average])
    before = outputs(average, x, False, 0)
    structure.grow(head_dim(structure), by=2)
    assert relative_error(outputs(average, x, False, 0), before) <= BOUND


# --- The comparison can fail -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [one for one in FORMS if one.__name__ not in ("StoredScale", "Cosine")])
def test_without_the_factor_the_outputs_differ(form, monkeypatch):
    monkeypatch.setattr(contract, "held", lambda *_: ())
    model, x = network(form)
    structure = attach(model, x)
    before = both(model, x)
    edit = structure.grow(head_dim(structure), by=2)
    assert edit.contract == "exact"
    assert error(both(model, x), before) > 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_with_random_new_units_the_outputs_differ(form, monkeypatch):
    right = new_tensors.fill

    def wrong(name, tensor, *rest):
        filled = right(name, tensor, *rest)
        if isinstance(filled, Tensor) and name.startswith(("1.q", "1.k")):
            return torch.randn(filled.shape, generator=torch.Generator().manual_seed(1)).to(filled)
        return torch.ones((), dtype=tensor.dtype) if name.startswith(("1.q", "1.k")) else filled

    monkeypatch.setattr(new_tensors, "fill", wrong)
    model, x = network(form)
    structure = attach(model, x)
    before = both(model, x)
    structure.grow(head_dim(structure), by=2)
    assert error(both(model, x), before) > 1e-5
