"""Values that a plan brings for the parameters of new layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import call
from snapshots import differences, snapshot
from test_depth import Stack, step
from torch import Tensor

import espalier as esp
from espalier.edit.depth_edits import DepthEdit, Insert, Remove, Replace, Starts
from espalier.edit.plan import Plan, grow_plan
from espalier.errors import PlanError
from espalier.evolve.proposals import joined
from espalier.layers import CopyOf, Factorised, Identity, Redrawn, ResidualLayer, Skip
from espalier.structure import Structure


def attached() -> tuple[Structure, torch.optim.Optimizer, Stack, torch.optim.swa_utils.AveragedModel]:
    torch.manual_seed(0)
    model, x = Stack().double(), torch.randn(4, 5, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, x)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    return esp.attach(model, x, optimizer=optimizer, follow=[averaged]), optimizer, model, averaged


def like(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(3))


def test_new_layers_start_from_the_values_of_the_plan_in_copies_too() -> None:
    structure, optimizer, model, averaged = attached()
    before, of_copy = snapshot(model, optimizer, structure), snapshot(averaged)
    plan = Plan(
        grow_plan({"blocks.0.inner": 2}).edits,
        depth=(Remove("blocks.1"), Insert("blocks.2", CopyOf("blocks.0")), Insert("stem", ResidualLayer(8, 6))),
        starts={2: {"out.weight": like(8, 6), "mid.bias": like(6)}, 1: {"inner.bias": like(14)}},
    )
    edit = structure.apply(plan)
    assert edit.contract == "changing"
    assert not edit.plan.starts  # the history holds no tensors
    for root in (model, averaged.module):
        assert torch.equal(root.get_parameter("blocks.2.inner.bias"), like(14).double())
        assert torch.equal(root.get_parameter("stem.inserted_after.0.out.weight"), like(8, 6).double())
        assert torch.equal(root.get_parameter("stem.inserted_after.0.mid.bias"), like(6).double())
        assert not root.get_parameter("stem.inserted_after.0.out.bias").any()
    structure.undo()
    assert not differences(before, snapshot(model, optimizer, structure))
    assert not differences(of_copy, snapshot(averaged))
    before.pop("optimizer state")
    structure.check(plan)
    after = snapshot(model, optimizer, structure)
    after.pop("optimizer state")
    assert not differences(before, after)


def test_a_network_with_such_layers_is_saved_and_loaded(tmp_path: Path) -> None:
    structure, optimizer, model, _ = attached()
    structure.apply(Plan((), depth=(Insert("stem", Identity(8)),), starts={0: {"weight": like(8, 8)}}))
    step(model, optimizer, structure.example)
    esp.save(structure, tmp_path)
    other = Stack().double()
    esp.load(tmp_path, other, structure.example, follow=[torch.optim.swa_utils.AveragedModel(Stack().double())])
    assert torch.equal(call(other, structure.example), call(model, structure.example))


def test_plans_keep_their_starts_in_a_file(tmp_path: Path) -> None:
    depth: tuple[DepthEdit, ...] = (Remove("blocks.1"), Insert("stem", ResidualLayer(8, 6)))
    plan = Plan((), depth=depth, starts={1: {"out.weight": like(8, 6), "out.bias": like(8)}}, values={"a": like(1)})
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.values.keys() == {"a"}
    assert again.starts.keys() == {1}
    assert again.starts[1].keys() == {"out.weight", "out.bias"}
    assert all(torch.equal(one, again.starts[1][name]) for name, one in plan.starts[1].items())
    one, other = attached()[0], attached()[0]
    one.apply(Plan((), depth=depth, starts=plan.starts))
    other.apply(Plan((), depth=again.depth, starts=again.starts))
    assert torch.equal(call(one.model, one.example), call(other.model, one.example))


SILENT = ("outer.weight", "outer.bias")


@pytest.mark.parametrize(
    ("edit", "starts", "contract"),
    [
        (Insert("stem", ResidualLayer(8, 6)), {}, "exact"),
        (Insert("stem", ResidualLayer(8, 6)), {"mid.weight": like(6, 8), "mid.bias": like(6)}, "exact"),
        (Insert("stem", ResidualLayer(8, 6)), {"out.weight": torch.zeros(8, 6)}, "exact"),
        (Insert("stem", ResidualLayer(8, 6)), {"out.bias": like(8)}, "changing"),
        (Insert("blocks.0", CopyOf("blocks.0", zero=SILENT)), {"inner.weight": like(12, 8)}, "exact"),
        (Insert("blocks.0", CopyOf("blocks.0", zero=SILENT)), {"outer.weight": like(8, 12)}, "changing"),
        (Insert("blocks.0", CopyOf("blocks.0")), {"outer.weight": torch.zeros(8, 12)}, "changing"),
        (Insert("blocks.0", Redrawn("blocks.0")), {"outer.weight": torch.zeros(8, 12)}, "changing"),
        (Insert("stem", Identity(8)), {"weight": torch.zeros(8, 8)}, "changing"),
        (Replace("blocks.0.norm", Skip()), {"gate": torch.ones(())}, "changing"),
        (Replace("head", Factorised(3)), {"0.weight": like(3, 8)}, "changing"),
    ],
)
def test_the_promise_is_what_the_outputs_do(edit: DepthEdit, starts: dict[str, Tensor], contract: str) -> None:
    structure, *_ = attached()
    model, x = structure.model, structure.example
    with torch.no_grad():
        before = call(model, x)
        found = structure.apply(Plan((), depth=(edit,), starts={0: starts} if starts else {}))
        change = float((call(model, x) - before).abs().max())
    assert found.contract == contract, found.why
    assert (change < 1e-12) == (contract == "exact")


@pytest.mark.parametrize(
    ("edit", "values", "message"),
    [
        (Insert("stem", ResidualLayer(8, 6)), {"weight": like(8, 8)}, r"no parameter 'weight' .* it has .*mid\.weight"),
        (Insert("stem", ResidualLayer(8, 6)), {"out.weight": like(6, 8)}, r"shape \(8, 6\), but is to start from \(6"),
        (Insert("stem", Identity(8)), {"bias": torch.full((8,), torch.nan)}, "not finite"),
        (Replace("blocks.0.norm", Skip()), {"inner.weight": like(8)}, r"no parameter 'inner\.weight' of its own"),
    ],
)
def test_what_does_not_fit_is_refused(edit: DepthEdit, values: dict[str, Tensor], message: str) -> None:
    structure, optimizer, model, averaged = attached()
    before, of_copy = snapshot(model, optimizer, structure), snapshot(averaged)
    with pytest.raises(PlanError, match=message):
        structure.apply(Plan((), depth=(edit,), starts={0: values}))
    assert not differences(before, snapshot(model, optimizer, structure))
    assert not differences(of_copy, snapshot(averaged))


@pytest.mark.parametrize("starts", [{1: {}}, {-1: {}}, {"0": {}}, {True: {}}])
def test_starts_are_numbered_by_edits_that_bring_a_layer(starts: Starts) -> None:
    with pytest.raises(PlanError, match="numbers of edits of layers"):
        Plan((), depth=(Insert("stem", Identity(8)),), starts=starts)
    with pytest.raises(PlanError, match="numbers of edits of layers"):
        Plan((), depth=(Remove("blocks.0"),), starts={0: {}})


def test_plans_that_are_joined_keep_their_starts() -> None:
    deep = Plan((), depth=(Insert("stem", Identity(8)),), starts={0: {"weight": like(8, 8)}})
    whole = joined([grow_plan({"blocks.0.inner": 2}), deep])
    assert whole is not None
    structure, *_ = attached()
    assert structure.apply(whole).contract == "changing"
    assert torch.equal(structure.model.get_parameter("stem.inserted_after.0.weight"), like(8, 8).double())
