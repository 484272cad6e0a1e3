"""Gates on single columns of one reader: a column whose gate is 0 is a column that is masked."""

import numpy as np
import pytest
import torch
from test_gates import in_double, outputs
from zoo_small import ZOO

import espalier as esp
from espalier.edit.plan import Plan, Resize
from espalier.errors import PlanError
from espalier.parts.gates.columns import Columns, column_place
from espalier.parts.gates.masking import masked_too
from espalier.parts.gates.places import Gates
from espalier.parts.gates.units import unit_place
from espalier.structure import Structure

COLUMNS = Columns("fc1.weight", 1)


def shut_by(structure: Structure, gone: list[int]) -> dict[str, torch.Tensor]:
    return {"fc1.weight": COLUMNS.shut(structure.topology.shape("fc1.weight"), gone)}


def test_masked_is_masked():
    model, example = in_double("lenet")
    structure = esp.attach(model, example)
    place = column_place(structure, COLUMNS)
    assert place.key == "fc1.weight[1]"
    assert Columns.named(place.key) == COLUMNS
    assert Columns.named("fc1") is None
    assert place.count == structure.topology.shape("fc1.weight")[1]
    gone = list(range(0, place.count, 3))
    z = torch.ones(place.count)
    z[gone] = 0
    with Gates(structure, [place]).applied({place.key: z}), torch.no_grad():
        found = outputs(model, example)
    assert not torch.allclose(found[0], outputs(model, example)[0])
    structure.apply(Plan((), masks=masked_too(structure, Plan(()), shut_by(structure, gone))))
    assert int(structure.masks["fc1.weight"].sum()) == (place.count - len(gone)) * len(model.fc1.weight)
    torch.testing.assert_close(found, outputs(model, example), rtol=1e-12, atol=1e-12)
    assert masked_too(structure, Plan(()), shut_by(structure, gone)) == ()  # they are masked already


def test_columns_and_units_multiply_and_leave_in_one_plan():
    model, example = in_double("lenet")
    structure = esp.attach(model, example)
    column, unit = column_place(structure, COLUMNS), unit_place(structure, "conv2")
    z = {column.key: torch.ones(column.count), unit.key: torch.ones(unit.count)}
    gone = [0, 5, column.count - 2]
    z[column.key][gone] = 0
    z[unit.key][[1, 3]] = 0
    with Gates(structure, [column, unit]).applied(z), torch.no_grad():
        found = outputs(model, example)
    before = structure.topology
    plan = Plan((Resize("conv2", (1, 3)),))
    edit = structure.apply(Plan(plan.edits, masks=masked_too(structure, plan, shut_by(structure, gone))))
    torch.testing.assert_close(found, outputs(model, example), rtol=1e-12, atol=1e-12)
    old = COLUMNS.followed(before, {axis: np.array(units) for axis, units in edit.units.items()})
    assert old is not None
    assert len(old) == structure.topology.shape("fc1.weight")[1]
    live = structure.masks["fc1.weight"][0]
    assert [int(old[index]) for index in (~live).nonzero()] == [one for one in gone if one in old]
    assert COLUMNS.followed(before, {"fc1": np.arange(3)}) is None


def test_what_is_no_column_is_refused():
    structure = esp.attach(*ZOO["lenet"]())
    for columns, why in (
        (Columns("fc1.weight", 2), "dimension of fc1.weight from 0 to 1"),
        (Columns("nowhere.weight", 0), "expected a parameter"),
    ):
        with pytest.raises(PlanError, match=why):
            column_place(structure, columns)
