"""Sizes that obey a rule: by the algebra, by limits, and by the planner when asked for round or equal ones."""

from typing import Any

import pytest
import torch
from loops import start
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_small import ZOO

import espalier as esp
from espalier.edit.plan import Plan, Resize
from espalier.errors import MethodError, PlanError
from espalier.parts.budget import Polynomial
from espalier.parts.goal import Cap, Goal, Scores
from espalier.parts.units.rounding import multiples
from espalier.parts.units.select import Global, Uniform, proportional
from espalier.parts.units.where import alike
from espalier.structure import Structure


def run(structure: Structure) -> Any:
    with torch.no_grad():
        example = structure.example
        return structure.model(**example) if isinstance(example, dict) else structure.model(*example)


def axes_at(structure: Structure, tensor: str, dim: int) -> list[str]:
    """The axes at a dimension, outermost first."""
    record = structure.topology.axes
    return [one.name for one in record.values() if any(slot[:2] == (tensor, dim) for slot in one.slots)]


# --- By the algebra --------------------------------------------------------------------------------------------------


def grouped() -> Structure:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 24, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(24, 5, 1)
    )
    return esp.attach(model.eval(), (torch.randn(2, 3, 4, 4),))


def test_grouped_convolutions_stay_divisible_by_their_groups() -> None:
    """No unit of it is a single channel: its axes are groups, channels read per group and channels made per group."""
    structure = grouped()
    names = axes_at(structure, "2.weight", 0)
    assert sorted(structure.axes[name].size for name in names) == [4, 6]
    for name in [*names, *axes_at(structure, "2.weight", 1)]:
        for change in ("grow", "prune"):
            structure.grow(name, by=1) if change == "grow" else structure.prune(name, [0])
            conv = structure.model[2]
            assert conv.in_channels % conv.groups == conv.out_channels % conv.groups == 0
            assert conv.weight.shape[:2] == (conv.out_channels, conv.in_channels // conv.groups)
            run(structure)
            structure.undo()


class Rotary(nn.Module):
    """Attention whose queries and keys are rotated: the two halves of a head have to be alike."""

    def __init__(self, width: int = 16, heads: int = 2, head_dim: int = 8) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv, self.out = nn.Linear(width, 3 * heads * head_dim), nn.Linear(heads * head_dim, width)
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        half = self.head_dim // 2
        angles = torch.outer(torch.arange(t), 1.0 / 100 ** (torch.arange(half) / half))
        q, k = (self.rotated(one, angles) for one in (q, k))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))
        return self.head(x)

    def rotated(self, x: Tensor, angles: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        return torch.cat([one * angles.cos() - two * angles.sin(), one * angles.sin() + two * angles.cos()], -1)


def rotary() -> Structure:
    torch.manual_seed(0)
    return esp.attach(Rotary().eval(), (torch.randn(2, 5, 6),))


def test_rotary_heads_stay_even() -> None:
    structure = rotary()
    half = next(name for name in axes_at(structure, "qkv.weight", 0) if structure.axes[name].size == 4)
    for change in (1, -1):
        if structure.axes[half].reason is None:
            structure.grow(half, by=1) if change > 0 else structure.prune(half, [0])
            assert structure.model.head_dim == 8 + 2 * change
            assert structure.model.qkv.weight.shape[0] == 3 * 2 * structure.model.head_dim
            run(structure)
            structure.undo()


def test_query_heads_stay_divisible_by_key_value_heads() -> None:
    model, example = ZOO["hf_llama"]()
    structure = esp.attach(model.eval(), example)
    attention = model.model.layers[0].self_attn
    for name in axes_at(structure, "model.layers.0.self_attn.q_proj.weight", 0):
        for change in ("grow", "prune"):
            axis = structure.axes[name]
            if not (axis.growable if change == "grow" else axis.prunable):
                continue
            structure.grow(name, by=1) if change == "grow" else structure.prune(name, [0])
            head = attention.head_dim
            queries, keys = attention.q_proj.weight.shape[0] // head, attention.k_proj.weight.shape[0] // head
            assert head % 2 == 0
            assert queries % keys == 0
            assert queries // keys == attention.num_key_value_groups
            run(structure)
            structure.undo()


# --- Limits ----------------------------------------------------------------------------------------------------------


def limited(**limits: Any) -> Structure:
    model, example = ZOO["mlp"]()  # hidden widths of 12 and 9
    return esp.attach(model, example, limits={"0": esp.Limits(**limits)})


def test_a_plan_that_breaks_a_multiple_is_refused_and_one_that_keeps_it_is_not() -> None:
    structure = limited(multiple_of=4)
    shapes = [tuple(one.shape) for one in structure.model.parameters()]
    with pytest.raises(PlanError, match=r"0: 11 units would not be a multiple of 4, .*nearest .*: 8 and 12"):
        structure.prune("0", [3])
    with pytest.raises(PlanError, match=r"0: 14 units .* 12 and 16"):
        structure.apply(Plan((Resize("2", add=1), Resize("0", add=2))))
    assert [tuple(one.shape) for one in structure.model.parameters()] == shapes
    structure.prune("0", [0, 1, 2, 3])
    structure.grow("0", by=8)
    assert structure.axes["0"].size == 16
    structure.apply(Plan((Resize("0", remove=(1, 2), add=2),)))
    assert structure.axes["0"].size == 16


def test_an_axis_that_no_multiple_is_left_to_may_not_change() -> None:
    assert not limited(multiple_of=16).axes["0"].prunable
    assert limited(multiple_of=16).axes["0"].growable
    assert not limited(multiple_of=8, at_most=15).axes["0"].growable
    assert limited(multiple_of=8, at_most=15).axes["0"].prunable
    assert not limited(multiple_of=6, at_least=7).axes["0"].prunable


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"multiple_of": 0}, "multiple_of is a whole number of at least 1, found 0"),
        ({"multiple_of": 2.0}, "multiple_of is a whole number of at least 1, found 2.0"),
        ({"multiple_of": 8, "at_least": 9, "at_most": 15}, "no multiple of 8 is from 9 to 15"),
    ],
)
def test_limits_that_make_no_sense(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        esp.Limits(**limits)


@pytest.mark.parametrize("size", range(1, 30))
def test_neighbouring_sizes(size: int) -> None:
    limits = esp.Limits(5, 22, 4)
    allowed = [8, 12, 16, 20]
    assert limits.below(size) == max((one for one in allowed if one < size), default=None)
    assert limits.above(size) == min((one for one in allowed if one > size), default=None)


def test_limits_are_saved(tmp_path: Any) -> None:
    structure = limited(multiple_of=4, at_most=40)
    esp.save(structure, tmp_path)
    model, example = ZOO["mlp"]()
    assert esp.load(tmp_path, model, example).axes["0"].limits == esp.Limits(None, 40, 4)


def test_methods_keep_to_limits() -> None:
    limits = {"0": esp.Limits(multiple_of=5), "2": esp.Limits(multiple_of=4)}
    pruned = start("mlp", [esp.prune.Magnitude(every=esp.steps(3))], total_steps=12, limits=limits).train(12)
    assert pruned.sizes()["0"] in (5, 10)
    assert pruned.sizes()["2"] in (4, 8)
    grown = start("mlp", [esp.grow.Random(width=3.0, every=esp.steps(3))], total_steps=12, limits=limits).train(12)
    assert grown.sizes()["0"] % 5 == grown.sizes()["2"] % 4 == 0
    assert grown.sizes()["0"] > 12


# --- Round sizes -----------------------------------------------------------------------------------------------------


def test_what_an_axis_has_to_be_a_multiple_of() -> None:
    structure = rotary()
    heads = next(name for name in axes_at(structure, "qkv.weight", 0) if structure.axes[name].size == 2)
    half = next(name for name in axes_at(structure, "qkv.weight", 0) if structure.axes[name].size == 4)
    stream = structure.axis("stem.weight", 0).name
    assert multiples(structure, [heads, stream], 8) == {heads: 1, stream: 8}  # heads of 8
    assert multiples(structure, [half], 8) == {half: 2}  # 2 heads x 2 halves
    assert multiples(structure, [half], 3) == {half: 3}
    both = multiples(structure, [half, heads], 8)  # the halves first: they are more
    assert both == {half: 4, heads: 1}
    assert multiples(structure, [stream], 1) == {stream: 1}


def test_kernels_count_by_what_they_read_and_make() -> None:
    structure = grouped()
    groups = next(name for name in axes_at(structure, "2.weight", 0) if structure.axes[name].size == 4)
    made = next(name for name in axes_at(structure, "2.weight", 0) if structure.axes[name].size == 6)
    read = structure.axis("2.weight", 1).name
    assert multiples(structure, [made], 8) == {made: 2}  # 4 groups of them
    assert multiples(structure, [read], 8)[read] == 8  # the kernel reads so many
    assert multiples(structure, [groups], 8)[groups] == 8  # 6 made and 3 read per group
    assert multiples(structure, [groups, made, read], 8) == {made: 8, groups: 8, read: 8}


class WithTable(Rotary):
    """One number per head is added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, 1, 1))

    def rotated(self, x: Tensor, angles: Tensor) -> Tensor:
        return super().rotated(x, angles) + self.table


def test_matrices_count_and_tables_do_not() -> None:
    structure = esp.attach(WithTable().eval(), (torch.randn(2, 5, 6),))
    heads = structure.axis("table", 0).name
    assert any(slot.role == "contract" for slot in structure.axes[heads].slots)
    assert multiples(structure, [heads], 8) == {heads: 1}
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    assert multiples(esp.attach(model, torch.zeros(3, 4)), ["0"], 8) == {"0": 8}


def widths(structure: Structure) -> list[int]:
    """Sizes of all dimensions of matrices and kernels that are no interface."""
    found = []
    for name in structure.axes:
        axis = structure.axes[name]
        for slot in axis.slots:
            if axis.reason is None and slot.role in ("produce", "contract"):
                found.append(structure.topology.shape(slot.tensor)[slot.dim])
    return found


@pytest.mark.parametrize("scope", ["axis", "global"])
@pytest.mark.parametrize("size", [0.35, 0.6])
def test_pruning_ends_at_round_sizes(scope: Any, size: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 40, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(40 * 16, 64), nn.ReLU(), nn.Linear(64, 5),
    )  # fmt: skip
    structure = esp.attach(model, torch.randn(2, 3, 8, 8))
    cost = structure.cost().flops
    plan = esp.scaled_plan(structure, esp.FLOPs(size, of="initial"), scope=scope, round_to=8)
    structure.apply(plan)
    assert all(width % 8 == 0 for width in widths(structure))
    assert structure.cost().flops <= size * cost
    model.eval()(torch.randn(2, 3, 8, 8))


def test_methods_end_at_round_sizes() -> None:
    shrinking = esp.prune.Magnitude(every=esp.steps(3), round_to=4, budget=esp.Parameters(0.5, of="initial"))
    run_of = start("vgg_batch_norm", [shrinking], total_steps=15)
    first = run_of.sizes()
    run_of.train(15)
    changed = [name for name, size in run_of.sizes().items() if size != first[name]]
    assert changed
    assert all(run_of.sizes()[name] % 4 == 0 for name in changed)
    growing = start("lenet", [esp.grow.Random(every=esp.steps(3), round_to=4)], total_steps=15)
    first = growing.sizes()
    growing.train(15)
    changed = [name for name, size in growing.sizes().items() if size != first[name]]
    assert changed
    assert all(growing.sizes()[name] % 4 == 0 for name in changed)


def test_an_axis_that_is_smaller_than_its_multiple_stays() -> None:
    model, example = ZOO["mlp"]()  # 12 and 9
    structure = esp.attach(model, example)
    with pytest.raises(MethodError, match=r"smallest network that 2 axes within their limits allow costs 2[0-9]{2}"):
        esp.scaled_plan(structure, esp.Parameters(0.1, of="initial"), round_to=16)
    grown = esp.scaled_plan(structure, esp.Parameters(3.0, of="initial"), round_to=16)
    assert {edit.axis: structure.axes[edit.axis].size + edit.add for edit in grown.edits}["0"] % 16 == 0


@pytest.mark.parametrize("wrong", [0, -8, 2.0, True, None])
def test_what_sizes_cannot_be_rounded_to(wrong: Any) -> None:
    with pytest.raises(MethodError, match="round_to: expected a whole number of at least 1, found"):
        esp.prune.Magnitude(round_to=wrong)
    model, example = ZOO["mlp"]()
    with pytest.raises(MethodError, match="round_to: expected"):
        esp.scaled_plan(esp.attach(model, example), esp.Parameters(100), round_to=wrong)


# --- Equal sizes -----------------------------------------------------------------------------------------------------


def test_the_same_role_in_repeated_layers() -> None:
    model, example = ZOO["hf_llama"]()
    structure = esp.attach(model, example)
    groups = alike(structure, structure.axes)
    assert ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj") in groups
    assert all(len({structure.axes[name].size for name in group}) == 1 for group in groups)
    model, example = ZOO["mlp"]()
    assert alike(esp.attach(model, example), ["0", "2"]) == ()


@pytest.mark.parametrize("budget", [0.6, 1.7])
def test_layers_that_are_kept_alike_can_be_described_by_one_configuration(budget: float) -> None:
    model, example = ZOO["hf_llama"]()
    structure = esp.attach(model, example)
    cost = structure.cost().parameters
    structure.apply(esp.scaled_plan(structure, esp.Parameters(budget, of="initial"), uniform=True))
    assert structure.cost().parameters / cost == pytest.approx(budget, rel=0.05)
    shapes = [{name: one.shape for name, one in layer.named_parameters()} for layer in model.model.layers]
    assert shapes[0] == shapes[1]
    run(structure)


@pytest.mark.parametrize("scope", ["axis", "global"])
def test_methods_keep_layers_alike(scope: Any) -> None:
    method = esp.prune.Magnitude(every=esp.steps(3), uniform=True, scope=scope)
    trained = start("llama_by_hand", [method], total_steps=12)
    groups = alike(trained.structure, trained.sizes())
    before = trained.sizes()
    trained.train(12)
    after = trained.sizes()
    assert groups
    assert any(after[group[0]] < before[group[0]] for group in groups)
    assert all(len({after[name] for name in group}) == 1 for group in groups)


def test_equal_and_round_by_hand() -> None:
    cost = Polynomial({("a",): 10, ("b",): 10, ("c",): 1, ("a", "b"): 1})
    sizes = {"a": 12, "b": 12, "c": 9}
    goal = Goal(
        "prune", sizes, dict.fromkeys(sizes, 1), sizes, {name: float(size) for name, size in sizes.items()},
        Cap(cost, 240), multiples={"a": 4, "b": 2}, equal=(("a", "b"),),
    )  # fmt: skip
    assert goal.merged().target.cost.at({"a": 3, "c": 2}) == 30 + 30 + 2 + 9
    assert goal.smallest() == {"a": 4, "b": 4, "c": 1}
    found = proportional(goal)
    assert found["a"] == found["b"] == 8
    assert cost.at(found) <= 240
    scores = Scores({name: torch.arange(float(size)) for name, size in sizes.items()})
    for select in (Uniform(), Global()):
        chosen = select(scores, goal)
        assert chosen["a"] == chosen["b"] == (0, 1, 2, 3)
