"""Methods that mask single weights: scores against their formulas, selections, sessions, resume."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Run, loss_of, start
from method_setting import context_of, perceptron
from method_setting import loss as squared_error
from snapshots import differences, snapshot
from torch import Tensor, nn
from torch.optim import AdamW
from zoo_small import ZOO

import espalier as esp
from espalier.edit.plan import Resize, mask_plan
from espalier.errors import EspalierWarning, MethodError
from espalier.method import Entry, Method, methods
from espalier.parts.budget import Polynomial
from espalier.parts.goal import Cap, Direction, Goal, Scores, WeightTensor
from espalier.parts.timing.amount import Fading
from espalier.parts.units.inputs import ReadInput
from espalier.parts.units.refit import Refit
from espalier.parts.weights.densities import Density, filled, live_counts
from espalier.parts.weights.keep import NM, Blocks, Entries
from espalier.parts.weights.movement import Movement
from espalier.parts.weights.saliency import Size, Slope
from espalier.parts.weights.synflow import SynapticFlow
from espalier.parts.weights.wanda import WeightTimesInput
from espalier.parts.weights.weights import choose_weights, weight_dims, weight_tensors
from espalier.structure import Structure
from espalier.train.settings import build, sparse_training

OURS = [entry for entry in methods(level="weights") if entry.by_budget]
"""Methods whose gates decide are in tests/test_gate_contracts.py."""


def by_name(entry: Entry) -> str:
    return entry.method.name


def goal_for(live: Mapping[str, Tensor], total: int, direction: Direction = "prune") -> Goal:
    weights = {name: WeightTensor(one, 0, 1) for name, one in live.items()}
    return goal_of(weights, total, direction)


def goal_of(weights: Mapping[str, WeightTensor], total: int, direction: Direction = "prune") -> Goal:
    sizes = {name: int(one.live.sum()) for name, one in weights.items()}
    cap = Cap(Polynomial({(name,): 1 for name in sizes}), total)
    return Goal(direction, sizes, dict.fromkeys(sizes, 0), sizes, {}, cap, weights=weights)


def structure_goal(structure: Structure, fraction: float) -> Goal:
    weights = weight_tensors(structure, choose_weights(structure, None))
    return goal_of(weights, round(fraction * sum(one.live.numel() for one in weights.values())))


def all_live(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {str(number): torch.ones(shape, dtype=torch.bool) for number, shape in enumerate(shapes)}


def drawn(live: Mapping[str, Tensor], seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return Scores({name: torch.rand(one.shape, generator=generator) for name, one in live.items()})


# --- How many where --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.02, 0.1, 0.4, 0.8])
def test_erk_is_what_a_search_over_the_dense_layers_finds(density: float) -> None:
    """One constant for all layers but those that are dense by it; found here by bisection."""
    shapes = [(8, 3, 3, 3), (16, 8, 3, 3), (64, 400), (10, 64), (4, 4)]
    live = all_live(*shapes)
    total = round(density * sum(one.numel() for one in live.values()))

    def at(scale: float) -> list[float]:
        return [min(math.prod(shape), scale * sum(shape)) for shape in shapes]

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) < total else (low, middle)
    found = live_counts("erk", goal_for(live, total))
    assert sum(found.values()) == total
    for count, expected in zip(found.values(), at(low), strict=True):
        assert abs(count - expected) <= 1 + 1e-6
    if density == 0.02:
        assert found["4"] / 16 > found["2"] / 25600  # small layers are denser


def test_filling_meets_the_total_and_no_bound() -> None:
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        parts, most = (
            {str(at): int(one) for at, one in enumerate(torch.randint(0, 30, (5,), generator=generator))}
            for _ in range(2)
        )
        total = int(torch.randint(0, 160, (), generator=generator))
        found = filled(parts, most, total)
        assert sum(found.values()) == min(total, sum(most.values()))
        assert all(0 <= found[name] <= most[name] for name in most)


@pytest.mark.parametrize("density", ["uniform", "erk", "present", "global"])
def test_entries_keep_the_best_and_only_take_away(density: Density) -> None:
    live = all_live((5, 7), (9, 4))
    live["0"][0] = False
    scores = drawn(live)
    found = Entries(density)(scores, goal_for(live, 20))
    assert sum(int(one.sum()) for one in found.values()) == 20
    for name, mask in found.items():
        assert not bool((mask & ~live[name]).any())
        went = live[name] & ~mask
        if bool(mask.any()) and bool(went.any()):
            assert scores.values[name][mask].min() >= scores.values[name][went].max()
    if density == "global":
        kept, went = (torch.cat([scores.values[n][pick(n)] for n in live]) for pick in (
            lambda name: found[name], lambda name: live[name] & ~found[name]
        ))  # fmt: skip
        assert kept.min() >= went.max()


@pytest.mark.parametrize("density", ["uniform", "erk", "present", "global"])
def test_entries_grow_the_best_of_what_is_not_live(density: Density) -> None:
    live = {name: one > 0.7 for name, one in drawn(all_live((5, 7), (9, 4)), 3).values.items()}
    scores, present = drawn(live, 4), sum(int(one.sum()) for one in live.values())
    found = Entries(density)(scores, goal_for(live, present + 9, "grow"))
    assert sum(int(one.sum()) for one in found.values()) == present + 9
    for name, mask in found.items():
        assert bool(mask[live[name]].all())
        came = mask & ~live[name]
        if bool(came.any()) and not bool(mask.all()):
            assert scores.values[name][came].min() >= scores.values[name][~mask].max()


def test_rows_keep_as_many_each() -> None:
    live = all_live((6, 10))
    scores = drawn(live)
    (mask,) = Entries("uniform", "row")(scores, goal_for(live, 27)).values()
    counts = mask.sum(1).tolist()
    assert sorted(counts) == [4, 4, 4, 5, 5, 5]
    for row, kept in enumerate(mask):
        values = scores.values["0"][row]
        assert values[kept].min() > values[~kept].max()


@pytest.mark.parametrize(("rows", "columns", "shape"), [(0, 1, (6, 8)), (1, 0, (8, 6)), (0, 1, (4, 8, 3, 3))])
def test_patterns_of_n_in_m(rows: int, columns: int, shape: tuple[int, ...]) -> None:
    live = torch.ones(shape, dtype=torch.bool)
    scores = drawn({"0": live})
    for total, kept in ((0.5, 2), (0.6, 3), (1.0, 4)):
        goal = goal_of({"0": WeightTensor(live, rows, columns)}, round(total * live.numel()))
        mask = NM(2, 4)(scores, goal)["0"]
        groups = mask.movedim(columns, -1).reshape(-1, 4)
        values = scores.values["0"].movedim(columns, -1).reshape(-1, 4)
        assert set(groups.sum(1).tolist()) == {kept}
        for one, own in zip(groups, values, strict=True):
            assert kept == 4 or own[one].min() > own[~one].max()
    odd = torch.ones(6, 7, dtype=torch.bool)
    assert bool(NM(2, 4)(drawn({"0": odd}), goal_for({"0": odd}, 21))["0"].all())  # 7 is no multiple of 4


def test_blocks_are_whole_and_the_best() -> None:
    live = torch.ones(7, 10, dtype=torch.bool)
    scores = drawn({"0": live})
    mask = Blocks(2, 4)(scores, goal_for({"0": live}, 35))["0"]
    worth = {}
    for top, left in itertools.product(range(0, 7, 2), range(0, 10, 4)):
        part = mask[top : top + 2, left : left + 4]
        assert bool(part.all()) or not bool(part.any())
        worth[float(scores.values["0"][top : top + 2, left : left + 4].mean())] = part
    order = [bool(worth[one].any()) for one in sorted(worth, reverse=True)]
    assert order == sorted(order, reverse=True)
    size = int(mask.sum())
    assert size <= 35 < size + 8


# --- Which parameters, and their scores ------------------------------------------------------------------------------


def test_matrices_and_filters_are_found_by_what_they_do() -> None:
    model, example = ZOO["vit"]()
    structure = esp.attach(model, example)
    chosen = choose_weights(structure, None)
    assert "pos_embed" not in chosen
    assert "cls_token" not in chosen
    assert {"patch_embed.weight", "blocks.0.qkv.weight", "head.weight"} <= set(chosen)
    assert choose_weights(structure, ["blocks.0.*"]) == tuple(n for n in chosen if n.startswith("blocks.0."))
    with pytest.raises(MethodError, match="no parameter of weights fits 'norm\\*'"):
        choose_weights(structure, ["norm*"])
    transposed = esp.attach(*ZOO["hf_gpt2"]())  # weights are (inputs, outputs) there
    name = next(one for one in transposed.topology.tensors if one.endswith("mlp.c_fc.weight"))
    assert weight_dims(transposed.topology, name) == (1, 0)
    depthwise, images = ZOO["mobilenet"]()
    assert "blocks.0.conv.3.weight" in choose_weights(esp.attach(depthwise, images), None)


def test_scores_by_gradient_are_their_formulas() -> None:
    structure, batch = perceptron(nn.Tanh())
    goal = structure_goal(structure, 0.5)
    squared_error(structure.model, batch).backward()
    expected = {name: structure.model.get_parameter(name) for name in goal.weights}
    before = snapshot(structure.model)
    slopes = Slope()(context_of(structure, batch), goal).values
    products = Slope("gradient_times_weight")(context_of(structure, batch), goal).values
    assert differences(before, snapshot(structure.model)) == []
    for name, parameter in expected.items():
        assert parameter.grad is not None
        torch.testing.assert_close(slopes[name], parameter.grad.abs())
        torch.testing.assert_close(products[name], (parameter.grad * parameter).abs().detach())


def test_dense_gradients_are_seen_at_masked_weights() -> None:
    structure, batch = perceptron(nn.Tanh())
    structure.mask("2.weight", torch.eye(6, 5, dtype=torch.bool))
    found = Slope()(context_of(structure, batch), structure_goal(structure, 0.5)).values["2.weight"]
    assert bool((found[~structure.masks["2.weight"]] > 0).all())


def test_lamp_is_its_formula() -> None:
    structure, batch = perceptron(nn.Tanh())
    goal = structure_goal(structure, 0.5)
    found = Size(share=True)(context_of(structure, batch), goal).values
    for name, values in found.items():
        weights = structure.model.get_parameter(name).detach().flatten().double()
        for weight, value in zip(weights, values.flatten(), strict=True):
            larger = weights[weights.abs() >= weight.abs()]
            assert math.isclose(float(value), float(weight**2 / (larger**2).sum()), rel_tol=1e-9)


def test_wanda_is_its_formula_for_linear_and_grouped_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)).double()
    x, y = torch.randn(5, 4, 4, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    structure = esp.attach(model, x)
    before = snapshot(model)
    found = WeightTimesInput()(context_of(structure, (x, y)), structure_goal(structure, 0.5)).values
    assert differences(before, snapshot(model)) == []
    hidden = model[:3](x).detach()
    torch.testing.assert_close(found["3.weight"], model[3].weight.detach().abs() * hidden.norm(dim=0))
    for out, inner in itertools.product(range(6), range(2)):
        norm = x[:, inner + 2 * (out // 3)].norm()
        torch.testing.assert_close(found["0.weight"][out, inner], model[0].weight.detach()[out, inner].abs() * norm)


def test_units_by_wanda_are_sums_of_weights_by_wanda() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    structure = esp.attach(model, x)
    goal = Goal("prune", {"0": 4, "2": 5}, {"0": 1, "2": 1}, {"0": 4, "2": 5}, {}, Cap(Polynomial({}), 0))
    found = ReadInput()(context_of(structure, (x, y)), goal).values
    for axis, reader in (("0", 2), ("2", 4)):
        expected = (model[reader].weight.abs() * model[:reader](x).norm(dim=0)).detach()
        torch.testing.assert_close(found[axis], expected.sum(0) / expected.numel())


def test_wanda_refuses_what_it_does_not_know() -> None:
    model, example = ZOO["hf_gpt2"]()
    structure = esp.attach(model, example)
    with pytest.raises(MethodError, match=r"only what linear and convolutional modules read is known"):
        WeightTimesInput()(context_of(structure, example), structure_goal(structure, 0.5))


def test_synflow_is_its_formula_and_leaves_no_trace() -> None:
    structure, batch = perceptron(nn.ReLU())
    goal = structure_goal(structure, 1.0)
    before = snapshot(structure.model)
    found = SynapticFlow(1)(context_of(structure, batch), goal).values
    assert differences(before, snapshot(structure.model)) == []
    names = list(dict(structure.model.named_parameters()))
    positive = {name: structure.model.get_parameter(name).detach().abs().requires_grad_() for name in names}
    x = torch.ones_like(structure.example)
    for at in (0, 2, 4):
        x = x @ positive[f"{at}.weight"].T
        x = x.relu() if at == 0 else x.tanh() if at == 2 else x
    x.sum().backward()
    expected = {name: (positive[name] * positive[name].grad).detach() for name in goal.weights}
    largest = max(float(one.max()) for one in expected.values())
    for name, one in expected.items():
        torch.testing.assert_close(found[name], 1 + one / largest)


def test_synflow_keeps_a_network_connected_where_magnitude_cuts_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 3), nn.ReLU(), nn.Linear(3, 40))
    with torch.no_grad():
        model[2].weight.mul_(0.01)
    structure = esp.attach(model, torch.randn(4, 20))
    goal = structure_goal(structure, 0.02)
    context = context_of(structure, (torch.randn(4, 20), torch.randn(4, 40)))
    for score, connected in ((SynapticFlow(50), True), (Size(), False)):
        masks = Entries("global")(score(context, goal), goal)
        paths = masks["4.weight"].double() @ masks["2.weight"].double() @ masks["0.weight"].double()
        assert bool(paths.any()) is connected


def test_synflow_asks_for_numbers() -> None:
    structure = esp.attach(*ZOO["hf_bert"]())
    with pytest.raises(MethodError, match="inputs of ones"):
        SynapticFlow(1)(context_of(structure, None), structure_goal(structure, 0.5))


# --- Sessions --------------------------------------------------------------------------------------------------------


def often(entry: Entry) -> Method:
    """A method that acts every three steps; those that act once do so."""
    return entry.make(every=esp.steps(3), start=0.0, until=1.0)


def companions(entry: Entry) -> list[Method]:
    """The method, with one that prunes if it grows."""
    first = [esp.prune.WeightsRandom()] if entry.method.direction == "grow" else []
    return [*first, often(entry)]


def same_masks(one: Run, other: Run) -> bool:
    first, second = one.structure.masks, other.structure.masks
    return first.keys() == second.keys() and all(torch.equal(mask, second[name]) for name, mask in first.items())


@pytest.mark.parametrize("name", ["lenet", "vit"])
@pytest.mark.parametrize("entry", OURS, ids=by_name)
def test_methods_meet_their_budget_repeat_and_leave_nothing_behind(entry: Entry, name: str) -> None:
    run = start(name, companions(entry), 9).train(9)
    masks = run.structure.masks
    assert set(masks) == set(choose_weights(run.structure, None))
    entries = sum(one.numel() for one in masks.values())
    assert sum(int(one.sum()) for one in masks.values()) == round(0.1 * entries)
    for event in run.session.events:
        assert event.masks
        assert event.sizes == {}
    for tensor, mask in masks.items():
        assert not bool(run.structure.model.get_parameter(tensor).detach()[~mask].any())
    assert not any(module._forward_pre_hooks for module in run.structure.model.modules())
    again = start(name, companions(entry), 9).train(9)
    assert same_masks(run, again)
    assert run.events() == again.events()


@pytest.mark.parametrize("entry", OURS, ids=by_name)
def test_a_run_that_is_interrupted_goes_on_to_the_same_bits(entry: Entry, tmp_path: Path) -> None:
    make = [*companions(entry), esp.grow.Random(every=esp.steps(2), start=0.0, until=1.0)]
    through = start("lenet", make, 9).train(5)
    esp.save(through.structure, tmp_path)
    state, dropout = json.dumps(through.session.state_dict()), torch.get_rng_state()
    through.train(4)
    model, batch = ZOO["lenet"]()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    structure = esp.load(tmp_path, model, batch, optimizer=optimizer)
    session = esp.Session(structure, make, loss=loss_of, total_steps=9)
    session.load_state_dict(json.loads(state))
    torch.set_rng_state(dropout)
    rest = Run(structure, optimizer, batch, session).train(4)
    assert through.events() == rest.events()
    assert same_masks(through, rest)
    weights = rest.structure.model.state_dict()
    assert all(torch.equal(one, weights[name]) for name, one in through.structure.model.state_dict().items())


@pytest.mark.parametrize("entry", OURS, ids=by_name)
def test_methods_are_values_with_a_readable_form(entry: Entry) -> None:
    method = often(entry)
    assert method == often(entry)
    assert hash(method.schedule) == hash(often(entry).schedule)
    assert "level='weights'" in repr(method)
    assert entry.method.paper
    assert entry.method.description


def test_rigl_lets_the_largest_gradients_live_at_constant_density() -> None:
    every = esp.steps(4)
    grower = esp.grow.RigL(every=every, until=1.0, budget=esp.Sparsity(0.8))
    run = start("lenet", [esp.prune.WeightsRandom(budget=esp.Sparsity(0.8))], 100).train(3)
    session = esp.Session(run.structure, [
        esp.prune.WeightsMagnitude(amount=0.3, density="present", every=every, start=0.0, until=1.0), grower,
    ], loss=loss_of, total_steps=8)  # fmt: skip
    run.session = session
    run.train(3)
    counts = {name: int(mask.sum()) for name, mask in run.structure.masks.items()}
    before = run.structure.masks
    seen: dict[str, Tensor] = {}

    def spy(context: Any, goal: Goal) -> Scores:
        scores = Slope()(context, goal)
        seen.update(scores.values)
        return scores

    object.__setattr__(grower, "score", spy)
    run.train(1)
    assert [event.action for event in session.events] == ["prune", "grow"]
    after = run.structure.masks
    assert {name: int(mask.sum()) for name, mask in after.items()} == counts
    dropped = session.events[0].masks
    for name, mask in after.items():
        came = mask & ~before[name]
        kept_dead = ~mask
        assert bool(came.any()) or dropped[name][0] == dropped[name][1]
        if bool(came.any()):
            assert seen[name][came].min() >= seen[name][kept_dead].max()
            assert not bool(run.structure.model.get_parameter(name).detach()[came].any())
            state = run.optimizer.state[run.structure.model.get_parameter(name)]
            assert not bool(state["exp_avg"][came].any())


def test_sparse_training_keeps_its_budget_and_changes_less_and_less() -> None:
    for grow in ("rigl", "set"):
        run = start("lenet", sparse_training(grow, sparsity=0.8, every=esp.steps(2)), 24).train(24)
        assert run.session.events[0].method == "weights-random"
        moved = [
            sum(after - before for before, after in event.masks.values())
            for event in run.session.events
            if event.action == "grow"
        ]
        assert moved == sorted(moved, reverse=True)
        assert moved[0] > moved[-1]
        assert run.session.events[-1].step <= 18
        masks = run.structure.masks.values()
        total = sum(one.numel() for one in masks)
        assert sum(int(one.sum()) for one in masks) == round(0.2 * total)


def test_settings_know_methods_of_weights() -> None:
    (lamp,) = build("shrinking", None, "lamp", total_steps=64, size=0.2)
    assert lamp == esp.prune.LAMP(budget=esp.Sparsity(0.8))
    methods_of_rigl = build("constant", "rigl", "weights-magnitude", total_steps=64, size=0.2)
    assert methods_of_rigl == sparse_training(sparsity=0.8, every=esp.steps(4), until=0.6)


def test_movement_is_its_sum_and_follows_edits() -> None:
    run = start("mlp", [esp.prune.Movement(every=esp.steps(50), start=0.0, until=1.0)], 60)
    expected: dict[str, Tensor] = {}
    memory = run.session._controller.running[0].memory
    assert isinstance(memory, Movement)
    for _ in range(3):
        run.train(1)
        for name in choose_weights(run.structure, None):
            parameter = run.structure.model.get_parameter(name)
            assert parameter.grad is not None
            change = -(parameter.detach() * parameter.grad)
            expected[name] = expected[name] + change if name in expected else change
    for name, one in expected.items():
        torch.testing.assert_close(memory._sums[name], one)
    run.structure.apply(esp.scaled_plan(run.structure, esp.Parameters(0.7, of="initial")))
    edit = run.structure.history[-1]
    run.session.state_dict()
    memory.sums(run.session._context(run.session._controller.running[0]))
    for name, one in expected.items():
        for axis, units in edit.units.items():
            for slot in run.structure.axes[axis].slots:
                if slot.tensor == name:
                    one = one.index_select(slot.dim, torch.tensor(units))
        torch.testing.assert_close(memory._sums[name], one)
    again = Movement()
    again.restore(json.loads(json.dumps(memory.state())))
    assert all(torch.equal(one, memory._sums[name]) for name, one in again._sums.items())


def test_masks_and_units_are_pruned_and_grown_in_one_session() -> None:
    run = start("lenet", [
        esp.grow.Random(every=esp.steps(4), start=0.0, until=0.5),
        esp.prune.Magnitude(every=esp.steps(5), start=0.0, until=0.6),
        esp.prune.WeightsMagnitude(every=esp.steps(3), start=0.0, until=1.0),
    ], 24).train(24)  # fmt: skip
    assert {event.method for event in run.session.events} == {"random", "magnitude", "weights-magnitude"}
    masks = run.structure.masks
    assert sum(int(one.sum()) for one in masks.values()) == round(
        (1 - 0.9) * sum(one.numel() for one in masks.values())
    )


def test_growing_in_some_parameters_keeps_the_budget_of_all() -> None:
    half = esp.Sparsity(0.5)
    first = esp.prune.WeightsRandom(budget=half)
    more = esp.grow.SET(budget=esp.Sparsity(0.1), axes=["fc1.weight"], every=esp.steps(2))
    run = start("lenet", [first, more], 8).train(6)
    masks = run.structure.masks.values()
    assert sum(int(one.sum()) for one in masks) == round(0.5 * sum(one.numel() for one in masks))
    assert {event.method for event in run.session.events} == {"weights-random"}


def test_triggers_that_look_at_losses_hold_for_weights() -> None:
    method = esp.prune.WeightsMagnitude(every=esp.steps(2), start=0.0, until=1.0, when=~esp.Plateau("loss"))
    run = start("lenet", [method], 8).train(8)
    assert {event.action for event in run.session.events} == {"prune"}
    entries = sum(one.numel() for one in run.structure.masks.values())
    assert sum(int(one.sum()) for one in run.structure.masks.values()) == round((1 - 0.9) * entries)


def test_accept_undoes_masks() -> None:
    model_and_batch = ZOO["lenet"]()
    method = esp.prune.WeightsMagnitude(every=esp.steps(30), start=0.0, until=1.0, accept=esp.Accept(0.0))
    run = start("lenet", [method], 30, probe=[model_and_batch[1]])
    with pytest.warns(EspalierWarning, match="edits that were refused"):
        run.train(30)
    assert {event.action for event in run.session.events} == {"rejected"}
    assert run.structure.masks == {}


def test_fading_amounts_fall_to_nothing() -> None:
    fading = Fading(0.4)
    assert [fading.target(tau, 1000, 0, 0, -1) for tau in (0.0, 0.5, 1.0)] == [600, 800, 1000]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: esp.prune.WeightsMagnitude(budget=esp.Parameters(9)), "a budget of Sparsity"),
        (lambda: esp.prune.Magnitude(budget=esp.Sparsity(0.5)), "is for the level 'units', found Sparsity"),
        (lambda: esp.Sparsity(1.0), "a fraction from 0 to less than 1, found 1.0"),
        (lambda: esp.prune.WeightsMagnitude(pattern=esp.NM(2, 4), amount=0.1), "give it no other budget"),
        (lambda: esp.prune.WeightsMagnitude(fading=True), "fading=True is for an amount="),
        (lambda: esp.prune.WeightsMagnitude(amount=0.1, budget=esp.Sparsity(0.5)), "exclude each other"),
        (lambda: esp.prune.WeightsMagnitude(density="some"), "density: expected one of"),
        (lambda: esp.prune.LAMP(recovery=esp.Recovery(warm=esp.steps(3))), "are for the level 'units'"),
        (lambda: esp.prune.LAMP(when=esp.Plateau() & ~esp.EffectiveRank()), "looks at units of axes"),
        (lambda: esp.prune.LAMP(stop=esp.Stable()), "looks at units of axes"),
        (lambda: esp.prune.LAMP(stop=esp.Reached(esp.Units(3))), "looks at units of axes"),
        (lambda: esp.Reached(esp.Sparsity(0.5)), "masks are looked at by methods of weights only"),
        (lambda: replace(esp.prune.LAMP(), init=Refit()), "are for the level"),
        (lambda: Entries("global", "row"), "does not go with density='global'"),
        (
            lambda: build("constant", "random", "lamp", total_steps=9),
            "one changes units and the other one single weights",
        ),
        (lambda: build("constant", None, "lamp", total_steps=9), "needs a method to grow"),
        (lambda: build("shrinking", None, "lamp", total_steps=9, size=1.0), "less than 1"),
        (lambda: build("growing", "rigl", None, total_steps=9), "'shrinking' takes one that prunes"),
        (lambda: start("mlp", [esp.grow.RigL(budget=esp.Sparsity(0.0))], 9), "nothing prunes any"),
    ],
)
def test_wrong_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make()


def test_what_a_pattern_cannot_do_is_said() -> None:
    with pytest.warns(EspalierWarning, match="its pattern, .* keep more"):
        start("lenet", [esp.prune.WeightsMagnitude(pattern=esp.NM(2, 4), every=esp.steps(3))], 9).train(9)


def test_a_plan_of_a_method_mixes_with_edits_of_units() -> None:
    structure, _ = perceptron(nn.Tanh())
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[:, 1] = True
    plan = mask_plan({"2.weight": mask})
    structure.apply(replace(plan, edits=(Resize("0", (2,)),)))
    weight = structure.model.get_parameter("2.weight").detach()
    assert weight.shape == (6, 4)
    assert bool((weight[:, [0, 2, 3]] == 0).all())
    assert bool((weight[:, 1] != 0).all())
