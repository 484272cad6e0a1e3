"""Cells as in DARTS are recognised, removed and copied, also where the results of two go through the list."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from darts import Search
from oracles import relative_error
from snapshots import differences, snapshot
from torch import Tensor, nn

import espalier as esp
from espalier.edit.depth_edits import Remove
from espalier.edit.plan import Plan
from espalier.errors import PlanError, SurgeryError
from espalier.layers import CopyOf
from espalier.structure import Structure


def attached(cells: int = 2, inputs: int = 1) -> tuple[Structure, Search, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model, x = Search(cells, inputs).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return esp.attach(model, x, optimizer=optimizer), model, optimizer


def by_hand(model: Search, cells: list[nn.Module]) -> Search:
    """The network with these cells."""
    found = copy.deepcopy(model)
    found.cells = nn.ModuleList(copy.deepcopy(one) for one in cells)
    return found


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """In eval and in train mode, of a copy."""
    with torch.no_grad():
        return [copy.deepcopy(model).train(mode)(x) for mode in (False, True)]


def same(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    return all(relative_error(a, b) < 1e-10 for a, b in zip(outputs(one, x), outputs(other, x), strict=True))


def test_cells_mixtures_and_operations_are_recognised() -> None:
    structure, *_ = attached(cells=3)
    sites = {site.name: site for site in structure.sites()}
    normal = [f"cells.{number}" for number in (0, 1, 2, 4, 5, 6)]
    assert {sites[name].kind for name in (*normal, "cells.3")} == {"cell"}
    assert all(sites[name].removal == "entry" and sites[name].copyable for name in normal)
    assert sites["cells.2"].alike == ("cells.1",)  # the others get channels that are made up of other pieces
    assert sites["cells.3"].may == ("insert",)
    assert sites["cells.3"].why_not["removal"] == "turns 8 x 8 x 8 into 16 x 4 x 4: a boundary between stages"
    assert sites["cells.3.ops.0"].why_not["removal"].endswith("a boundary between stages")
    assert sites["cells.0.ops.1"].kind == "cell"
    operation = sites["cells.0.ops.1.ops.3"]
    assert (operation.kind, operation.removal) == ("cell", "zero")  # one of the terms of the mixture
    assert sites["cells.0"].why_not["silence"].startswith("adds nothing to its entry: its result is made anew")


def test_cells_come_and_go_with_the_code_that_weighs_them(tmp_path: Path) -> None:
    """The loop over the cells computes a softmax for each."""
    structure, model, optimizer = attached()
    x, before = structure.example, snapshot(model, optimizer, structure)
    zero, one, half, three, four = model.cells
    expected = by_hand(model, [zero, half, three, four])
    assert structure.remove_layer("cells.1").contract == "changing"
    assert [type(cell).__name__ for cell in model.cells] == ["Cell"] * 4
    assert same(model, expected, x)
    structure.undo()
    assert not differences(before, snapshot(model, optimizer, structure))

    expected = by_hand(model, [zero, one, one, half, three, four])
    edit = structure.add_cell("cells", position=2, of="cells.1", init="copy")
    assert edit.contract == "changing"
    assert same(model, expected, x)
    assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    model(x).square().mean().backward()
    optimizer.step()
    structure.prune("cells.2.before.0.1", units=[1])
    esp.save(structure, tmp_path)
    fresh = Search().double()
    esp.load(tmp_path, fresh, x)
    assert torch.equal(outputs(fresh, x)[0], outputs(model, x)[0])


def test_operations_of_a_mixture_go_and_layers_come_between_cells() -> None:
    structure, model, _ = attached()
    x = structure.example
    expected = copy.deepcopy(model)
    weighed = expected.cells[1].ops[0].ops
    with torch.no_grad():
        weighed[3] = nn.Sequential(nn.Identity(), Nothing())
    structure.remove_layer("cells.1.ops.0.ops.3")
    assert same(model, expected, x)
    before = outputs(model, x)
    assert structure.insert_layer(after="cells.1").contract == "exact"
    assert structure.insert_layer(after="cells.2").contract == "exact"
    for mode, known in zip((False, True), before, strict=True):
        with torch.no_grad():
            assert relative_error(copy.deepcopy(model).train(mode)(x), known) < 1e-10


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def two_states() -> tuple[Structure, Search, torch.optim.Optimizer]:
    """Three cells, a reduction cell and three cells, each of which gets the results of the two before."""
    return attached(cells=3, inputs=2)


def test_which_cells_of_two_states_may_come_and_go() -> None:
    structure, *_ = two_states()
    sites = {site.name: site for site in structure.sites()}
    for name in ("cells.1", "cells.2", "cells.5", "cells.6"):
        assert (sites[name].removal, sites[name].copyable, sites[name].silence) == ("inputs", True, None)
    # the first one gets the result of the stem twice, cells.4 one of the stage before: these are no two alike
    for name, after in (("cells.0", "cells.1"), ("cells.4", "cells.5")):
        assert sites[name].removal == "entry"
        reason = f"hands its input on to {after}, beside its result: a copy would shift both"
        assert sites[name].why_not["copyable"] == reason
    assert sites["cells.3"].why_not["removal"].startswith("turns 8 x 8 x 8 into 16 x 4 x 4")


@pytest.mark.slow
def test_cells_of_two_states_go_as_if_the_list_had_never_had_them(tmp_path: Path) -> None:
    structure, model, optimizer = two_states()
    x, before = structure.example, snapshot(model, optimizer, structure)
    for name in ("cells.1", "cells.2", "cells.6"):
        cells = [cell for number, cell in enumerate(model.cells) if name != f"cells.{number}"]
        expected = by_hand(model, cells)
        edit = structure.remove_layer(name)
        assert str(edit).startswith(f"remove {name}, which leaves its inputs")
        assert [id(cell) for cell in model.cells] == [id(cell) for cell in cells]
        assert same(model, expected, x)
        structure.undo()
        assert not differences(before, snapshot(model, optimizer, structure))
    structure.remove_layer("cells.2")
    structure.add_cell("cells", of="cells.5", init="copy")
    esp.save(structure, tmp_path)
    fresh = Search(3, 2).double()
    esp.load(tmp_path, fresh, x)
    assert torch.equal(outputs(fresh, x)[0], outputs(model, x)[0])


@pytest.mark.parametrize(("source", "position"), [("cells.6", 6), ("cells.6", 7), ("cells.2", 2), ("cells.1", 3)])
def test_copies_of_cells_of_two_states_get_the_results_of_the_two_before(source: str, position: int) -> None:
    structure, model, optimizer = two_states()
    x, before = structure.example, snapshot(model, optimizer, structure)
    cells = [*model.cells]
    cells.insert(position, model.get_submodule(source))
    expected = by_hand(model, cells)
    edit = structure.add_cell("cells", position, of=source, init="copy")
    assert edit.contract == "changing"
    assert same(model, expected, x)
    assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    structure.undo()
    assert not differences(before, snapshot(model, optimizer, structure))


def test_copies_that_do_not_fit_are_refused() -> None:
    structure, model, optimizer = two_states()
    before = snapshot(model, optimizer, structure)
    with pytest.raises(PlanError, match=r"cells\.4 cannot be copied: it hands its input on to cells\.5"):
        structure.add_cell("cells", of="cells.4", position=5, init="copy")
    with pytest.raises(PlanError, match="cannot begin as one that changes nothing"):
        structure.add_cell("cells")
    with pytest.raises(PlanError, match="no list that hands on the last results"):
        structure.remove_layer("cells.4", leaves="inputs")
    for source, after in (("cells.4", "cells.4"), ("cells.6", "cells.1"), ("cells.6", "cells.3")):
        with pytest.raises((PlanError, SurgeryError)):
            structure.insert_layer(CopyOf(source), after=after)
    assert not differences(before, snapshot(model, optimizer, structure))


def test_of_two_states_one_that_takes_the_place_may_be_named() -> None:
    structure, model, optimizer = two_states()
    x, before = structure.example, snapshot(model, optimizer, structure)
    with pytest.raises(PlanError, match=r"Say which takes its place: entry=\(0,\), or entry=\(1,\)"):
        structure.remove_layer("cells.2", leaves="entry")
    with pytest.raises(PlanError, match="its argument 2 has not the size of its result"):
        structure.remove_layer("cells.2", entry=(2,))
    for number in (0, 1):
        expected = copy.deepcopy(model)
        expected.cells[2] = Given(number)
        edit = structure.remove_layer("cells.2", entry=(number,))
        assert str(edit).startswith(f"remove cells.2, which leaves argument {number}")
        assert same(model, expected, x)
        structure.undo()
        assert not differences(before, snapshot(model, optimizer, structure))


class Given(nn.Module):
    """Gives back one of its arguments."""

    reduction = False

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, *given: Tensor) -> Tensor:
        return given[self.number]


@pytest.mark.parametrize("entry", [1, (), (1.0,), "x"])
def test_places_that_are_none_are_refused(entry: object) -> None:
    with pytest.raises(PlanError, match="expected a place among arguments"):
        Remove("cells.2", entry=entry)  # type: ignore[arg-type]
    plan = Plan((), depth=(Remove("cells.2", entry=(1,)), Remove("cells.3"), Remove("cells.4", "inputs")))
    assert Plan.from_json(plan.to_json()) == plan


class Prepared(nn.Module):
    """A loop that computes something for each layer, which also goes elsewhere if `shared`."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled() for _ in range(3))
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for layer in self.layers:
            scale = x.mean(-1, keepdim=True).sigmoid()
            x = layer(x, scale)
            if self.shared:
                total = total + scale
        return x + total


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + self.linear(x) * scale


@pytest.mark.parametrize("shared", [False, True])
def test_only_what_nothing_else_gets_goes_along(shared: bool) -> None:
    torch.manual_seed(0)
    model, x = Prepared(shared=shared), torch.randn(3, 4)
    structure = esp.attach(model, x)
    expected = copy.deepcopy(model)
    del expected.layers[1]
    structure.remove_layer("layers.1")
    if shared:  # what the loop adds up is read by others: it stays, and so does a place for the layer
        assert type(model.layers[1]).__name__ == "Bypass"
        with pytest.raises(SurgeryError, match="would not run as before"):
            structure.insert_layer(CopyOf("layers.0"), after="layers.0")
    else:
        assert len(model.layers) == 2
        assert torch.allclose(model(x), expected(x))
        edit = structure.add_cell("layers", position=1)
        assert edit.contract == "exact"
        assert torch.allclose(model(x), expected(x))
