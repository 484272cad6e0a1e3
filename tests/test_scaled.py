"""Every network comes to half and to twice its cost by one plan."""

from typing import Any

import pytest
import torch
from snapshots import differences, snapshot
from test_measure import _volume, counted
from torch import Tensor, nn
from zoo_small import ZOO

import espalier as esp
from espalier.errors import MethodError
from espalier.measure.cost import cost_of
from espalier.parts.budget import Budget
from espalier.parts.score import Chance, Context, GroupNorm, Scores
from espalier.parts.units.where import holds_head_size
from espalier.structure import Structure

CANNOT_HALVE = {name for name in ZOO if name.startswith("encoder_")}
"""Their residual stream is their own input and output, and with it all of the attention: what is left is a quarter."""
CANNOT_CHANGE = {"hard_coded_view"}
"""Code holds every width of it."""
BUDGETS: list[type[Budget]] = [esp.FLOPs, esp.Parameters]


def attached(name: str, **options: Any) -> Structure:
    model, example = ZOO[name]()
    return esp.attach(model, example, **options)


def cost(structure: Structure, kind: type[Budget], sizes: dict[str, int] | None = None) -> int:
    numbers = {structure.topology.by_name[name].number: size for name, size in (sizes or {}).items()}
    found = cost_of(structure.topology, numbers)
    return found.flops if kind is esp.FLOPs else found.parameters


def assert_no_unit_nearer(structure: Structure, kind: type[Budget], limit: int, initial: dict[str, int]) -> None:
    """Whole units allow no more: wherever one more would be allowed, it would cost too much."""
    for name in structure.axes:
        axis = structure.axes[name]
        shrunk = axis.size < initial[name]
        if axis.growable and (shrunk or cost(structure, kind) > 1.2 * limit / 2) and axis.size != initial[name]:
            assert cost(structure, kind, {name: axis.size + 1}) > limit, name


@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("name", ZOO)
def test_every_network_at_half_and_at_twice_its_cost(name: str, factor: float, kind: type[Budget]) -> None:
    structure = attached(name)
    before = snapshot(structure.model)
    first, sizes = cost(structure, kind), {one: structure.axes[one].size for one in structure.axes}
    budget = kind(factor, of="initial")
    if name in CANNOT_CHANGE or (name in CANNOT_HALVE and factor < 1):
        with pytest.raises(MethodError, match=r"scaled_plan: .* allows a cost of .* network that . axes within their"):
            esp.scaled_plan(structure, budget)
        return
    plan = esp.scaled_plan(structure, budget)
    assert differences(before, snapshot(structure.model)) == []
    structure.apply(plan)
    present, limit = cost(structure, kind), int(factor * first)
    assert present <= limit
    if present < 0.98 * limit:
        assert_no_unit_nearer(structure, kind, limit, sizes)
    assert all((structure.axes[edit.axis].size > sizes[edit.axis]) == (factor > 1) for edit in plan.edits)
    model, example = structure.model, structure.example
    outputs = model.train()(**example) if isinstance(example, dict) else model.train()(*example)
    assert outputs is not None
    assert structure.cost().parameters == sum(one.numel() for one in model.parameters())
    fused = "flash_attention_for_cpu"  # torch's counter does not know it
    prediction = structure.topology.predictions[0]
    known = sum(
        times * _volume(structure, dims)
        for call, times, dims in prediction.costs
        if fused not in prediction.calls[call].name
    )
    assert counted(model, example) in (structure.cost().flops, known)


def test_what_is_missing_is_less_than_a_unit_and_proportions_are_kept() -> None:
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10))
    structure = esp.attach(model, torch.zeros(1, 64))
    for factor in (0.5, 4.0, 1.0):
        structure.apply(esp.scaled_plan(structure, esp.Parameters(factor, of="initial")))
        first = 64 * 300 + 300 + 300 * 200 + 200 + 200 * 10 + 10
        missing = factor * first - structure.cost().parameters
        assert 0 <= missing < min(structure.axes[name].unit_cost.parameters for name in ("0", "2"))
        assert structure.axes["0"].size / structure.axes["2"].size == pytest.approx(1.5, rel=0.02)
    assert not esp.scaled_plan(structure, esp.Parameters(structure.cost().parameters))


def test_the_smallest_units_go() -> None:
    structure = attached("mlp")
    linear = structure.model[0]
    with torch.no_grad():
        for unit in (2, 5):
            linear.weight[unit] = 0
            linear.bias[unit] = 0
            structure.model[2].weight[:, unit] = 0
    size = structure.axes["0"].size - 2
    target = cost(structure, esp.Parameters, {"0": size})
    plan = esp.scaled_plan(structure, esp.Parameters(target), axes=["0"])
    assert {edit.axis: edit.remove for edit in plan.edits} == {"0": (2, 5)}
    by_chance = esp.scaled_plan(structure, esp.Parameters(target), axes=["0"], score=Chance(), seed=3)
    assert by_chance == esp.scaled_plan(structure, esp.Parameters(target), axes=["0"], score=Chance(), seed=3)
    assert by_chance != esp.scaled_plan(structure, esp.Parameters(target), axes=["0"], score=Chance(), seed=4)


def test_head_sizes_change_only_where_nothing_else_suffices() -> None:
    structure = attached("hf_llama")
    sizes = {edit.axis for edit in esp.scaled_plan(structure, esp.FLOPs(0.5, of="initial")).edits}
    head_sizes = {name for name, axis in structure.axes.items() if holds_head_size(structure, axis)}
    assert head_sizes
    assert not sizes & head_sizes
    least = {name: 1 for name, axis in structure.axes.items() if axis.prunable and name not in head_sizes}
    below = cost(structure, esp.FLOPs, least) - 1
    assert {edit.axis for edit in esp.scaled_plan(structure, esp.FLOPs(below)).edits} & head_sizes


def test_limits_and_chosen_axes_are_kept() -> None:
    structure = attached("vgg_batch_norm", limits={"features.0": (6, 9)})
    plan = esp.scaled_plan(structure, esp.FLOPs(0.3, of="initial"))
    removed = {edit.axis: len(edit.remove) for edit in plan.edits}
    assert structure.axes["features.0"].size - removed.get("features.0", 0) >= 6
    grown = {edit.axis: edit.add for edit in esp.scaled_plan(structure, esp.FLOPs(3.0, of="initial")).edits}
    assert structure.axes["features.0"].size + grown.get("features.0", 0) <= 9
    structure = attached("mlp")
    assert {edit.axis for edit in esp.scaled_plan(structure, esp.FLOPs(2.0, of="initial"), axes=["2"]).edits} == {"2"}


def test_what_cannot_be_reached_is_refused() -> None:
    structure = attached("mlp", limits={"0": (None, 14), "2": (None, 10)})
    with pytest.raises(MethodError, match=r"allows a cost of 10, but the smallest network .* give a larger budget"):
        esp.scaled_plan(structure, esp.Parameters(10))
    with pytest.raises(MethodError, match=r"but the largest network that 2 axes .* give a smaller budget"):
        esp.scaled_plan(structure, esp.Parameters(100_000))
    with pytest.raises(MethodError, match="no axis fits the pattern"):
        esp.scaled_plan(structure, esp.Parameters(200), axes=["nothing*"])
    with pytest.raises(MethodError, match="scope: expected 'axis' or 'global'"):
        esp.scaled_plan(structure, esp.Parameters(200), scope="all")  # type: ignore[arg-type]


def test_scores_of_data_and_of_nothing_are_refused() -> None:
    def by_loss(context: Context, goal: Any) -> Scores:
        return Scores({name: context.loss(context.batch).expand(size) for name, size in goal.sizes.items()})

    structure = attached("mlp")
    with pytest.raises(MethodError, match="this score needs a loss, which only a Session has"):
        esp.scaled_plan(structure, esp.Parameters(150), score=by_loss)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 2))
    structure = esp.attach(model, torch.zeros(1, 4, device="meta"))
    with pytest.raises(MethodError, match=r"0: 0\.weight is on the meta device, .* score by Chance"):
        esp.scaled_plan(structure, esp.Parameters(0.5, of="initial"), score=GroupNorm())
    structure.apply(esp.scaled_plan(structure, esp.Parameters(0.5, of="initial"), score=Chance()))
    assert model[0].weight.shape[0] == 9


class Auxiliary(nn.Module):
    """A head that runs in train mode only costs no FLOPs of inference."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 20), nn.Linear(20, 3)
        self.inner, self.outer = nn.Linear(20, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = torch.relu(self.first(x))
        return self.last(x), self.outer(torch.relu(self.inner(x))) if self.training else None


def test_an_axis_that_costs_nothing_grows_in_proportion_and_ends() -> None:
    structure = esp.attach(Auxiliary(), torch.zeros(2, 6))
    structure.apply(esp.scaled_plan(structure, esp.FLOPs(2.0, of="initial")))
    assert {name: axis.size for name, axis in structure.axes.items() if axis.growable} == {"first": 40, "inner": 20}
