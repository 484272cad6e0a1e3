"""Firefly's new layers: what each is worth against finite differences, and what becomes of those that are chosen."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blocks import Blocks
from loops import loss_of
from snapshots import differences, snapshot
from test_depth_parts import asked
from torch import Tensor

import espalier as esp
from espalier.edit.depth_edits import Insert
from espalier.edit.plan import Plan
from espalier.errors import MethodError
from espalier.layers import ResidualLayer
from espalier.measure.stats import without_a_trace
from espalier.parts.candidate import Candidate, seeded
from espalier.parts.depth.firefly import FireflyLayers
from espalier.parts.depth.places import virtual_layers
from espalier.parts.depth.trial import gains
from espalier.parts.goal import Goal
from espalier.parts.score import Context, derived_seed
from espalier.structure import Structure


def blocks(new: str = "residual") -> tuple[Structure, tuple[Tensor, ...], Context, Goal]:
    torch.manual_seed(4)
    model, batch = Blocks().double(), (torch.randn(32, 6, dtype=torch.float64),)
    structure = esp.attach(model, batch, follow=[copy.deepcopy(model)])
    return structure, batch, *asked(structure, virtual_layers(new), batch)  # type: ignore[arg-type]


def begin(context: Context, goal: Goal) -> dict[str, dict[str, Tensor]]:
    """The parameters of every candidate as surgery makes them."""
    structure, found = context.structure, {}
    for name, one in goal.layers.items():
        (edit,) = seeded(one, derived_seed(context.seed, name))
        assert isinstance(edit, Insert)
        new = edit.layer.build(structure.model.get_submodule, edit.at)
        found[name] = {key: value.detach().clone() for key, value in new.named_parameters()}
    return found


def loss_at(context: Context, goal: Goal, ends: dict[str, dict[str, Tensor]], parts: dict[str, float]) -> float:
    """The loss with every candidate at a part of its way."""
    starts = {
        number: {key: first + parts[name] * (ends[name][key] - first) for key, first in values.items()}
        for number, (name, values) in enumerate(begin(context, goal).items())
    }
    plan = Plan((), depth=tuple(one.edits[0] for one in goal.layers.values()), starts=starts)
    with context.structure.tried(plan), without_a_trace(context.structure.model):
        return float(context.loss(context.batch))


@pytest.mark.parametrize("new", ["residual", "copy"])
def test_what_a_layer_is_worth_is_the_slope_of_the_loss_in_its_magnitude(new: str) -> None:
    _, _, context, goal = blocks(new)
    scores = FireflyLayers(points=1)(context, goal)
    half = dict.fromkeys(goal.layers, 0.5)
    for name in goal.layers:
        up, down = (loss_at(context, goal, scores.found, {**half, name: 0.5 + h}) for h in (1e-5, -1e-5))
        assert float(scores.values[name]) == pytest.approx((down - up) / 2e-5, rel=1e-5)


def test_values_add_up_to_what_the_loss_falls_by() -> None:
    _, _, context, goal = blocks()
    scores = FireflyLayers(points=20)(context, goal)
    before, after = (loss_at(context, goal, scores.found, dict.fromkeys(goal.layers, part)) for part in (0.0, 1.0))
    total = sum(float(one) for one in scores.values.values())
    assert total > 0
    assert total == pytest.approx(before - after, rel=1e-3)


def test_layers_do_not_go_beyond_their_length() -> None:
    _, _, context, goal = blocks()
    for steps, reached in ((1, 0.3), (12, 1.0)):
        ends, first = FireflyLayers(0.2, steps)(context, goal).found, begin(context, goal)
        for name, values in ends.items():
            length = math.sqrt(sum(float((one - first[name][key]).square().sum()) for key, one in values.items()))
            rows = sum(one.shape[0] for one in values.values() if one.dim() > 1)
            longest = 0.2 * math.sqrt(rows / 3)
            assert length <= longest * (1 + 1e-9)
            assert length >= 0.99 * reached * longest if steps == 1 else length > 0.5 * longest


def test_what_was_trained_is_what_comes(tmp_path: Path) -> None:
    structure, batch, context, goal = blocks()
    model, (follower,) = structure.model, structure.surgery.follow
    before = snapshot(model, None, structure)
    plan = esp.grow.FireflyDeeper().propose(context, goal)
    assert not differences(before, snapshot(model, None, structure))
    plan.save(tmp_path / "plan.json")
    total = sum(float(one) for one in FireflyLayers()(context, goal).values.values())
    with torch.no_grad():
        loss = float(loss_of(model, batch))
    edit = structure.apply(Plan.load(tmp_path / "plan.json"))
    assert edit.contract == "changing"
    with torch.no_grad():
        assert loss - float(loss_of(model, batch)) == pytest.approx(total, rel=0.05)
    assert torch.equal(model(*batch), follower(*batch))
    esp.save(structure, tmp_path / "saved")
    again = esp.load(tmp_path / "saved", Blocks().double(), batch, follow=[Blocks().double()])
    assert torch.equal(again.model(*batch), model(*batch))
    structure.undo()
    assert differences(before, snapshot(model, None, structure)) == ["random state"]  # of the networks built above


def test_only_what_is_chosen_brings_its_values() -> None:
    _, _, context, goal = blocks()
    method = esp.grow.FireflyDeeper(per_event=1)
    plan = method.propose(context, goal)
    values = FireflyLayers()(context, goal).values
    best = max(values, key=lambda name: float(values[name]))
    assert [one.at for one in plan.depth if isinstance(one, Insert)] == [goal.layers[best].modules[-1]]
    assert plan.starts.keys() == {0}


def test_what_surgery_refuses_never_comes() -> None:
    _, _, context, goal = blocks()
    wrong = Candidate((Insert("stem", ResidualLayer(5, 5)),), 1, 1, "layers", ("stem",))
    goal = replace(goal, layers={"stem + residual": wrong, **goal.layers})
    context = replace(context, probe=())
    scores = FireflyLayers()(context, goal)
    assert float(scores.values["stem + residual"]) == -math.inf
    assert all(math.isfinite(float(scores.values[name])) for name in goal.layers if name != "stem + residual")
    assert gains(context, goal.layers)["stem + residual"] == -math.inf
    assert gains(context, {"stem + residual": wrong}) == {"stem + residual": -math.inf}


def test_copies_of_blocks_that_do_not_train_are_worth_nothing() -> None:
    _, _, context, goal = blocks("copy")
    for parameter in context.structure.model.get_submodule("layers").parameters():
        parameter.requires_grad_(False)
    assert set(gains(context, goal.layers).values()) == {0.0}
    scores = FireflyLayers()(context, goal)
    assert {float(one) for one in scores.values.values()} == {0.0}
    assert all(not one for one in scores.found.values())


def test_an_event_lowers_the_loss() -> None:
    torch.manual_seed(4)
    model, batch = Blocks(), (torch.randn(32, 6),)
    structure = esp.attach(model, batch, optimizer=torch.optim.SGD(model.parameters(), 1e-2))
    at = esp.steps(1)
    method = esp.grow.FireflyDeeper(every=at, start=at, until=at, step=0.3)
    session = esp.Session(structure, [method], loss=loss_of, total_steps=2)
    session.loss(batch).backward()
    session.step()
    (event,) = session.events
    assert event.loss_before is not None
    assert event.loss_after is not None
    assert event.loss_after < 0.9 * event.loss_before


def test_arguments_are_checked() -> None:
    with pytest.raises(MethodError, match="new: expected one of residual, identity, suited, copy"):
        esp.grow.FireflyDeeper(new="other")  # type: ignore[arg-type]
    for option in ({"step": 0.0}, {"steps": 0}, {"points": 0}, {"batches": 0}):
        with pytest.raises(MethodError):
            esp.grow.FireflyDeeper(**option)  # type: ignore[arg-type]
    _, _, context, goal = blocks()
    with pytest.raises(MethodError, match="no batch"):
        FireflyLayers()(replace(context, batch=None, probe=()), goal)
