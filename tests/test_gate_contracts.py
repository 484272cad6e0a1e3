"""The contract of all methods whose gates decide, at every level: as `test_method_contracts`, apart from budgets."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from effort import in_turn
from snapshots import differences, snapshot
from test_method_contracts import (
    TOTAL,
    Training,
    _collector_sees_only_what_is_new,  # noqa: F401 - for all tests here as well
    known_tensors,
    living_tensors,
    other_random_states,
    same_tensors,
)
from torch import Tensor

import espalier as esp
from espalier.edit.plan import Plan
from espalier.method import Entry, Method, methods
from espalier.parts.gates.memory import GateMemory
from espalier.parts.gates.planning import GatingMemory
from espalier.parts.gates.sleepers import Sleepers
from espalier.parts.gates.stages import Stages
from espalier.parts.score import Context

pytestmark = pytest.mark.filterwarnings("ignore::espalier.errors.EspalierWarning")
NETWORKS: Mapping[str, tuple[str, ...]] = {
    "units": ("mlp", "lenet", "resnet", "vit"),
    "weights": ("mlp", "resnet", "vit"),
    "layers": ("blocks", "resnet", "vit"),
}
NEVER_LEAVE = {"dropout"}
"""Methods that remove nothing, whatever their gates say."""


def cases(direction: Any = None) -> list[Any]:
    return [
        pytest.param(
            (entry, name), id=f"{entry.method.direction}-{entry.method.name}-{name}", marks=in_turn(row, column)
        )
        for row, entry in enumerate(methods(direction))
        for column, name in enumerate(NETWORKS[entry.method.level])
        if not entry.by_budget
    ]


def acting(entry: Entry, after: int) -> Method:
    """The method in its search from the first step on, acting every so many steps."""
    at = esp.steps(after)
    timing: dict[str, Any] = {"every": at, "start": at}
    if entry.method.name not in NEVER_LEAVE:
        timing |= {"stages": Stages(k=1.0, start=0.0, until=0.95), "begin": 0.7, "rate": 0.2, "low": 0.3, "patience": 1}
    return entry.make(**timing)


def gates_of(run: Training) -> GatingMemory:
    memory = run.session._controller.running[0].memory
    assert isinstance(memory, GatingMemory)
    return memory


def asked(run: Training) -> tuple[Context, Any]:
    """What the method would be asked now."""
    session = run.session
    assert session._gated is not None
    context = session._context(session._gated)
    session._controller.refresh(session._gated)
    return context, session._controller.goal(session._gated, session._clock(), session._gated.axes)


def shut_some(run: Training) -> None:
    """Make one of three gates so low that what it is on leaves, or where units wake, have them wake."""
    memory = gates_of(run)
    for number, (key, logits) in enumerate(memory.table.logits.items()):
        low = torch.arange(len(logits)) % 3 == (1 if len(logits) > 1 else -number % 2)
        memory.table.logits[key] = torch.where(low, -40.0, logits)


def same_plan(one: Plan, other: Plan) -> bool:
    alike = one == other
    return alike and same_tensors(one.values, other.values) and same_tensors(one.deltas, other.deltas)


@pytest.mark.parametrize("case", cases())
def test_proposing_is_valid_repeats_and_leaves_nothing_behind(case: tuple[Entry, str]) -> None:
    entry, name = case
    method = acting(entry, 100)
    run = Training(name, method).train(2)
    shut_some(run)
    context, goal = asked(run)
    method.propose(context, goal)  # what is looked up once per network
    structure, memory = run.structure, gates_of(run)
    where = run.session.gates()
    assert where is not None
    assert where.probabilities.keys() == memory.table.logits.keys()
    assert where.stage == 1
    if isinstance(memory, GateMemory):
        memory.sleepers.forget()
    before, states = snapshot(structure.model, run.optimizer, structure), other_random_states()
    state = json.dumps(run.session.state_dict())
    gc.collect()
    living = len(living_tensors())
    plan = method.propose(context, goal)
    assert differences(before, snapshot(structure.model, run.optimizer, structure)) == []
    assert other_random_states() == states
    assert json.dumps(run.session.state_dict()) == state
    again = method.propose(context, goal)
    assert same_plan(plan, again)
    other = method.propose(dataclasses.replace(context, seed=context.seed + 1), goal)
    assert (plan.seed, other.seed) == (context.seed, context.seed + 1)
    assert bool(plan) == (entry.method.name not in NEVER_LEAVE)
    assert bool(plan.edits or not plan) == (entry.method.level == "units")
    assert bool(plan.masks) == (entry.method.level == "weights")
    assert bool(plan.depth) == (entry.method.level == "layers")
    if plan:
        structure.check(plan)
        if not plan.depth:
            assert plan == type(plan).from_json(plan.to_json())
    assert [one for one in (*plan.values.values(), *plan.deltas.values()) if one.requires_grad] == []
    if isinstance(memory, GateMemory):
        memory.sleepers.forget()
        assert isinstance(memory.sleepers, Sleepers)
    del plan, again, other, before
    assert len(living_tensors()) <= living


@pytest.mark.parametrize("case", cases())
def test_a_run_that_is_interrupted_goes_on_to_the_same_weights(case: tuple[Entry, str], tmp_path: Path) -> None:
    entry, name = case
    through = Training(name, acting(entry, 2), seed=3).train(3)
    shut_some(through)
    through.train(2)
    esp.save(through.structure, tmp_path)
    state, dropout = json.dumps(through.session.state_dict()), torch.get_rng_state()
    through.train(TOTAL - 5)
    rest = Training(name, acting(entry, 2), seed=3, kept=tmp_path)
    rest.session.load_state_dict(json.loads(state))
    torch.set_rng_state(dropout)
    rest.train(TOTAL - 5)
    recorded = [[{**event.to_json(), "seconds": 0.0} for event in run.session.events] for run in (through, rest)]
    assert recorded[0] == recorded[1]
    acted = {event.action for event in through.session.events}
    assert acted == (set() if entry.method.name in NEVER_LEAVE else {entry.method.direction})
    first, second = through.structure.model.state_dict(), rest.structure.model.state_dict()
    assert same_tensors(first, second)
    states = [{**run.session.state_dict(), "events": []} for run in (through, rest)]
    assert states[0] == states[1]


@pytest.mark.parametrize("case", cases())
def test_an_event_leaves_no_hooks_modes_gradients_or_graph(case: tuple[Entry, str]) -> None:
    entry, name = case
    earlier = living_tensors()  # held, so that no id is used again
    run = Training(name, acting(entry, 3)).train(2)
    shut_some(run)
    model = run.structure.model
    modes = [module.training for module in model.modules()]
    run.optimizer.zero_grad()
    run.session.loss(run.batches[2]).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    states = other_random_states(), torch.get_rng_state().tolist()
    run.session.step()
    assert len(run.session.events) == (entry.method.name not in NEVER_LEAVE)
    assert (other_random_states(), torch.get_rng_state().tolist()) == states
    if entry.method.level != "layers":
        assert [module.training for module in model.modules()] == modes
    assert [one for one in model.parameters() if one.grad is not None or one._backward_hooks] == []
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        assert not any(hooks)
    run.train(1)  # until here the edit can be undone
    run.optimizer.zero_grad()
    known = {id(one) for one in (*earlier, *known_tensors(run))}
    left = [one for one in living_tensors() if id(one) not in known]
    assert [one for one in left if one.grad_fn is not None] == []


@pytest.mark.parametrize("case", cases("prune"))
def test_an_event_takes_away_only_what_is_judged_as_not_there(case: tuple[Entry, str]) -> None:
    """In eval mode nothing changes, to rounding. Where units come, batch norms may be calibrated anew."""
    entry, name = case
    method = acting(entry, 3)
    if entry.method.name not in NEVER_LEAVE:  # the same step moves the logits, which some gates show
        method = entry.make(every=esp.steps(3), start=esp.steps(3), stages=Stages(1.0, 0.0, 0.95), rate=1e-15)
    run = Training(name, method, double=True).train(2)
    shut_some(run)
    run.optimizer.zero_grad()
    run.session.loss(run.batches[2]).backward()
    before = judged(run)
    run.session.step()
    assert len(run.session.events) == (entry.method.name not in NEVER_LEAVE)
    torch.testing.assert_close(judged(run), before, rtol=1e-9, atol=1e-9)


def judged(run: Training) -> Tensor:
    model = run.structure.model
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), run.session.decided():
            found: Tensor = model(*run.batches[-1])
            return found
    finally:
        for module, mode in modes.items():
            module.training = mode
