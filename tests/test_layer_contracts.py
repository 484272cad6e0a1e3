"""The contract that every method of whole layers and cells keeps: as `test_method_contracts` for units."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from effort import in_turn
from snapshots import differences, snapshot
from test_method_contracts import (
    TOTAL,
    Known,
    Training,
    _collector_sees_only_what_is_new,  # noqa: F401 - for all tests here as well
    asking,
    drawn_plan,
    living_tensors,
    once,
    other_random_states,
    same_tensors,
)

import espalier as esp
from espalier.edit.depth_edits import Insert, Remove
from espalier.method import Entry, methods

pytestmark = pytest.mark.filterwarnings("ignore::espalier.errors.EspalierWarning")
NETWORKS = ["blocks", "resnet", "vit"]
EXACT = {"copy-blocks", "net2deeper", "sensli"}
"""Methods that say that what they insert changes nothing at first."""
MIXED = {"wider-or-deeper"}
"""Methods whose events may be of another level: `test_depth_levels` has their tests."""


def cases(direction: Any = None) -> list[Any]:
    return [
        pytest.param(
            (entry, name), id=f"{entry.method.direction}-{entry.method.name}-{name}", marks=in_turn(row, column)
        )
        for row, entry in enumerate(methods(direction, "layers"))
        for column, name in enumerate(NETWORKS)
        if entry.method.name not in MIXED and entry.by_budget  # the others are in tests/test_gate_contracts.py
    ]


@pytest.mark.parametrize("case", cases())
def test_proposing_is_valid_repeats_and_leaves_nothing_behind(case: tuple[Entry, str]) -> None:
    entry, name = case
    method = once(entry)
    run = Training(name, asking(method)).train(2)
    context, goal = run.asked()
    structure = run.structure
    before, states = snapshot(structure.model, run.optimizer, structure), other_random_states()
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in structure.model.modules()]
    names = [name for name, _ in structure.model.named_modules()]
    gc.collect()
    living = len(living_tensors())

    plan, drew = drawn_plan(method, context, goal)
    assert differences(before, snapshot(structure.model, run.optimizer, structure)) == []
    assert other_random_states() == states
    assert [name for name, _ in structure.model.named_modules()] == names
    assert [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in structure.model.modules()] == hooks
    assert plan.depth
    assert not plan.edits
    assert not plan.masks
    assert all(isinstance(edit, Insert if entry.method.direction == "grow" else Remove) for edit in plan.depth)
    structure.check(plan)
    checked = snapshot(structure.model, run.optimizer, structure)
    assert set(checked.pop("optimizer state")) == set(before.pop("optimizer state"))  # in whatever order
    assert differences(before, checked) == []

    assert plan == drawn_plan(method, context, goal)[0]
    assert type(plan).from_json(plan.to_json()) == plan
    other, _ = drawn_plan(method, dataclasses.replace(context, seed=context.seed + 1), goal)
    assert (plan.seed, other.seed) == (context.seed, context.seed + 1)
    if entry.method.direction == "prune":
        assert drew or plan.depth == other.depth
    del plan, other, before
    assert len(living_tensors()) <= living


@pytest.mark.parametrize("case", cases())
def test_budgets_are_kept_to_the_cheapest_layer(case: tuple[Entry, str]) -> None:
    """Growing never exceeds one, pruning reaches it, and the last layer could not have come, or stayed."""
    entry, name = case
    growing = entry.method.direction == "grow"
    for kind in (esp.Parameters, esp.FLOPs, esp.Units):
        budget = kind(1.8 if growing else 0.7, of="initial")
        method = once(entry, after=1, budget=budget, shape="constant", per_event=None)
        run = Training(name, asking(method))
        before = measured(run, budget)
        context, goal = run.asked()
        scores = method.score(context, goal)
        plan = dataclasses.replace(method, score=Known(scores)).propose(context, goal)
        gone = {one for one in goal.layers if any(edit in plan.depth for edit in goal.layers[one].edits)}
        if growing:
            gone = {one for one in goal.layers if any(edit.at == goal.layers[one].modules[-1] for edit in plan.depth)}
        run.structure.apply(plan)
        after = measured(run, budget)
        if after is not None and before is not None:
            limit = budget.limit(before, before)
            assert after <= limit, budget
            prices = {one: goal.target.cost.terms[(one,)] for one in goal.layers}
            assert abs(after - before) == sum(prices[one] for one in gone), budget  # costs add up
            for one in goal.layers:
                if growing and one not in gone:
                    assert after + prices[one] > limit, budget
                if not growing and one in gone:
                    assert after + prices[one] > limit, budget


def measured(run: Training, budget: esp.Parameters | esp.FLOPs | esp.Units) -> int | None:
    if isinstance(budget, esp.Units):
        return None
    return getattr(run.structure.cost(), "parameters" if isinstance(budget, esp.Parameters) else "flops")


@pytest.mark.parametrize("case", cases())
def test_a_run_that_is_interrupted_goes_on_to_the_same_weights(case: tuple[Entry, str], tmp_path: Path) -> None:
    entry, name = case
    method = entry.make(every=esp.steps(4), start=0.0, until=1.0, per_event=1)
    through = Training(name, method, seed=3).train(5)
    esp.save(through.structure, tmp_path)
    state, dropout = json.dumps(through.session.state_dict()), torch.get_rng_state()
    through.train(TOTAL - 5)
    rest = Training(name, method, seed=3, kept=tmp_path)
    rest.session.load_state_dict(json.loads(state))
    torch.set_rng_state(dropout)
    rest.train(TOTAL - 5)
    recorded = [[{**event.to_json(), "seconds": 0.0} for event in run.session.events] for run in (through, rest)]
    assert recorded[0] == recorded[1]
    assert {event.action for event in through.session.events} == {entry.method.direction}
    assert {event.step > 5 for event in through.session.events} <= {False, True}
    assert all(event.layers for event in through.session.events)
    assert same_tensors(through.structure.model.state_dict(), rest.structure.model.state_dict())


@pytest.mark.parametrize("case", cases("grow"))
def test_growth_keeps_its_contract_and_new_layers_learn(case: tuple[Entry, str]) -> None:
    entry, name = case
    run = Training(name, once(entry), double=True).train(2)
    session, structure = run.session, run.structure
    loss = session.loss(run.batches[2])
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    before, known = run.outputs(), {id(one) for one in structure.model.parameters()}
    session.step()
    after = run.outputs()
    (edit,) = structure.history
    largest = max(float((after[mode] - before[mode]).abs().max()) for mode in before)
    assert edit.contract == ("exact" if entry.method.name in EXACT else "changing")
    if edit.contract == "exact":
        assert largest < 1e-9, edit.why
    else:
        assert largest > 0
    new = {name: one.detach().clone() for name, one in structure.model.named_parameters() if id(one) not in known}
    assert new
    run.train(5)
    present = dict(structure.model.named_parameters())
    moved = [name for name, one in new.items() if not torch.equal(one, present[name])]
    assert len(moved) > len(new) / 2
    held = {id(one) for group in run.optimizer.param_groups for one in group["params"]}
    assert {id(present[name]) for name in new} <= held


@pytest.mark.parametrize("case", cases())
def test_an_event_that_is_not_accepted_leaves_no_trace(case: tuple[Entry, str]) -> None:
    """`accept=` undoes layers that came or went, and training goes on as if nothing had been tried."""
    entry, name = case

    class Never(esp.Accept):
        def allows(self, before: float, after: float) -> bool:
            return False

    run = Training(name, once(entry, accept=Never())).train(TOTAL)
    bare = Training(name, once(entry, after=TOTAL + 5)).train(TOTAL)
    assert [event.action for event in run.session.events] == ["rejected"]
    assert same_tensors(run.structure.model.state_dict(), bare.structure.model.state_dict())
