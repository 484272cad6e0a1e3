"""What a plan promises that brings values for new units or changes weights: compared with what the outputs do."""

from collections.abc import Mapping

import pytest
import torch
from oracles import Comparison, disturb
from small_cases import CASES
from torch import Tensor, nn

from espalier import attach
from espalier.edit.plan import Plan, Resize, grow_plan
from espalier.parts.ghosts.ghosts import Sides, sides_of
from espalier.structure import Structure

EXACT = 1e-9
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
BY = 2
DOUBTED = {"spectral_norm", "spectral_norm_old", "diagonal_weight", "cosine_head"}
"""Cases whose neutral values, given as such, are not seen to be neutral."""


def made(name: str) -> tuple[Structure, Tensor]:
    case = CASES[name]
    model, example = case.model(), case.example()
    disturb(model, example, seed=0)
    return attach(model, example), example


def grown(structure: Structure, axis: str) -> tuple[dict[str, Tensor], Sides]:
    preview = structure.preview(grow_plan({axis: BY}))
    return dict(preview.tensors), sides_of(preview, axis)


def noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(3), dtype=like.dtype)


def apply_with(structure: Structure, axis: str, tensors: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> str:
    comparison = Comparison(structure.model, structure.example)
    edit = structure.apply(Plan((Resize(axis, add=BY),), values=tensors, deltas=deltas))
    error = comparison.error()
    structure.undo()
    if edit.contract == "exact":
        assert error <= EXACT, (axis, edit.why, error)
    return edit.contract


@pytest.mark.parametrize("name", CASES)
def test_exact_is_said_only_where_the_outputs_stay(name):
    structure, _ = made(name)
    for axis in [one.name for one in structure.axes.values() if one.growable]:
        tensors, sides = grown(structure, axis)
        neutral = structure.check(grow_plan({axis: BY}))[0].kind
        if name not in DOUBTED:
            assert apply_with(structure, axis, tensors, {}) == neutral
        for side in (sides.incoming, sides.outgoing, sides.rest):
            if side.parts:
                apply_with(structure, axis, side.write(tensors, noise(side.read(tensors))), {})
        if not sides.outgoing.parts:
            continue
        paired = dict(tensors)
        for side in (sides.incoming, sides.rest):
            if side.parts:
                paired = side.write(paired, side.read(paired)[:1].expand(BY, -1))
        opposite = noise(sides.outgoing.read(paired))[:1] * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        apply_with(structure, axis, sides.outgoing.write(paired, opposite), {})


def mlp() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(16, 4, dtype=torch.float64)
    disturb(model, x, seed=0)
    return model, x


def test_pairs_cancel_behind_a_batch_norm():
    model, x = mlp()
    structure = attach(model, x)
    tensors, sides = grown(structure, "0")
    for side in (sides.incoming, sides.rest):
        tensors = side.write(tensors, side.read(tensors)[:1].expand(BY, -1))
    row = noise(sides.outgoing.read(tensors))[:1]
    paired = sides.outgoing.write(tensors, torch.cat([row, -row]))
    assert apply_with(structure, "0", paired, {}) == "exact"
    unequal = sides.outgoing.write(tensors, torch.cat([row, -row * 1.001]))
    assert apply_with(structure, "0", unequal, {}) == "changing"
    apart = dict(paired)
    apart["0.bias"] = paired["0.bias"] + torch.tensor([0.0] * 7 + [1e-3])
    assert apply_with(structure, "0", apart, {}) == "changing"


def copied(structure: Structure, share: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tensors, sides = grown(structure, "0")
    chosen = torch.tensor([1, 4])
    for side in (sides.incoming, sides.rest):
        tensors = side.write(tensors, side.read_old(tensors)[chosen])
    shared = share * sides.outgoing.read_old(tensors)[chosen]
    tensors = sides.outgoing.write(tensors, shared)
    delta = torch.zeros_like(tensors["3.weight"])
    delta[:, chosen] = -shared.T
    return tensors, {"3.weight": delta}


def test_a_unit_may_share_its_weights_with_a_copy_of_itself():
    model, x = mlp()
    structure = attach(model, x)
    for share in (0.5, 0.3):
        tensors, deltas = copied(structure, share)
        assert apply_with(structure, "0", tensors, deltas) == "exact"
        deltas["3.weight"] = deltas["3.weight"] * 1.001
        assert apply_with(structure, "0", tensors, deltas) == "changing"
    tensors, deltas = copied(structure, 0.5)
    assert apply_with(structure, "0", tensors, {**deltas, "0.weight": torch.full((), 1e-3)}) == "changing"
    assert apply_with(structure, "0", tensors, {**deltas, "3.bias": torch.full((), 1e-3)}) == "changing"


def test_dropout_tells_equal_units_apart():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    structure = attach(model, torch.randn(8, 4, dtype=torch.float64))
    tensors, deltas = copied(structure, 0.5)
    contract, _ = structure.check(Plan((Resize("0", add=BY),), values=tensors, deltas=deltas))
    assert contract.kind == "changing"
    assert "chance tells apart" in contract.why


def test_equal_units_behind_a_weight_norm_are_not_added_up():
    torch.manual_seed(0)
    reader = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), reader).double()
    structure = attach(model, torch.randn(8, 4, dtype=torch.float64))
    tensors, sides = grown(structure, "0")
    for side in (sides.incoming, sides.rest):
        tensors = side.write(tensors, side.read(tensors)[:1].expand(BY, -1))
    row = noise(sides.outgoing.read(tensors))[:1]
    assert apply_with(structure, "0", sides.outgoing.write(tensors, torch.cat([row, -row])), {}) == "changing"


def test_deltas_are_added_and_undone_and_saved(tmp_path):
    model, x = mlp()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    structure = attach(model, x, optimizer=optimizer, follow=[average])
    before = {name: one.clone() for name, one in {**model.state_dict(), **average.state_dict()}.items()}
    delta = torch.arange(15.0, dtype=torch.float64).reshape(3, 5)
    plan = Plan((Resize("0", remove=(2,)),), deltas={"3.weight": delta})
    plan.save(tmp_path / "plan.json")
    edit = structure.apply(Plan.load(tmp_path / "plan.json"))
    assert edit.contract == "changing"
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(model[3].weight, before["3.weight"][:, kept] + delta)
    assert torch.equal(average.module[3].weight, before["module.3.weight"][:, kept] + delta)
    structure.undo()
    after = {**model.state_dict(), **average.state_dict()}
    assert all(torch.equal(after[name], one) for name, one in before.items())
