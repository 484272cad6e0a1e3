"""Sessions in a user's training loop: what they change, what they record, and what they leave alone."""

from __future__ import annotations

import copy
import gc
import json
import math
import random
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from loops import Batch, Run, loss_of, start
from torch import Tensor, nn
from zoo_small import ZOO

import espalier as esp
from espalier.edit.plan import Plan
from espalier.errors import CheckpointError, EspalierWarning, MethodError, SurgeryError
from espalier.measure.stats import calibrate, eval_loss, new_statistics
from espalier.method import Method
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context, Equal
from espalier.record import Edit
from espalier.structure import Structure
from espalier.train.events import Event
from espalier.train.settings import build


def grow_and_prune() -> list[Method]:
    return [
        esp.grow.Random(amount=0.3, every=esp.steps(8), start=esp.steps(4), until=0.6),
        esp.prune.Magnitude(
            budget=esp.Parameters(0.8, of="initial"), every=esp.steps(8), start=esp.steps(8), until=0.8
        ),
    ]


# --- Budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["axis", "global"])
@pytest.mark.parametrize("budget", [esp.Parameters(0.55, of="initial"), esp.FLOPs(0.55, of="initial")])
@pytest.mark.parametrize("name", ["mlp", "vgg_batch_norm", "resnet", "vit"])
def test_pruning_ends_at_its_budget(name: str, budget: Any, scope: Any) -> None:
    method = esp.prune.Magnitude(budget=budget, scope=scope, every=esp.steps(3), start=0.0, until=1.0)
    run = start(name, [method], total_steps=12)
    limit = budget.limit(*2 * (measured(run.structure, budget),))
    run.train(12)
    cost = measured(run.structure, budget)
    assert cost <= limit
    assert cost > 0.85 * limit  # one channel of the transformer is a tenth of all
    cut = run.session.events[-1].sizes
    prices = [getattr(run.structure.axes[axis].unit_cost, counted(budget)) for axis in cut]
    assert limit - cost < min(prices)  # not one unit of those that went could have stayed


def counted(budget: Any) -> str:
    return "parameters" if isinstance(budget, esp.Parameters) else "flops"


def measured(structure: Structure, budget: Any) -> int:
    return int(getattr(structure.cost(), counted(budget)))


def test_pruning_follows_its_ramp() -> None:
    budget = esp.Parameters(0.5, of="initial")
    method = esp.prune.Magnitude(budget=budget, shape="cubic", every=esp.steps(2), start=0.0, until=1.0)
    run = start("vgg_batch_norm", [method], total_steps=10)
    first = run.structure.cost().parameters
    run.train(10)
    assert len(run.session.events) >= 4  # one that the last units of an earlier one have met already is none
    for event in run.session.events:
        target = math.floor(first * (0.5 + 0.5 * (1 - event.step / 10) ** 3))
        assert target - 100 < event.cost_after.parameters <= target


@pytest.mark.parametrize("shape", ["linear", "constant"])
def test_growing_never_exceeds_its_budget(shape: Any) -> None:
    method = esp.grow.Random(budget=esp.FLOPs(1.7, of="initial"), shape=shape, every=esp.steps(2), start=0.0)
    run = start("resnet", [method], total_steps=20)
    limit = 1.7 * run.structure.cost().flops
    run.train(20)
    events = run.session.events
    assert all(event.cost_after.flops <= limit for event in events)
    prices = [run.structure.axes[name].unit_cost.flops for name in events[-1].sizes]
    assert limit - run.structure.cost().flops < min(prices)


def test_a_width_is_reached_in_every_axis() -> None:
    run = start("vgg_batch_norm", [esp.grow.Random(width=1.5, every=esp.steps(3))], total_steps=20)
    before = run.sizes()
    run.train(20)
    after = run.sizes()
    grown = [name for name in before if after[name] != before[name]]
    assert len(grown) == 5
    assert all(after[name] == round(1.5 * before[name]) for name in grown)


def test_a_grower_and_a_pruner_share_a_budget() -> None:
    run = start("mlp", grow_and_prune(), total_steps=40)
    limit = 0.8 * run.structure.cost().parameters
    run.train(40)
    actions = [event.action for event in run.session.events]
    assert {"grow", "prune"} == set(actions)
    assert run.structure.cost().parameters <= limit


def test_a_fraction_of_the_largest_network_counts_from_its_peak() -> None:
    methods = [
        esp.grow.Random(width=2.0, every=esp.steps(2), start=0.0, until=0.5),
        esp.prune.Random(budget=esp.Parameters(0.6, of="largest"), every=esp.steps(2), start=0.6, until=0.9),
    ]
    run = start("mlp", methods, total_steps=40).train(40)
    peak = max(event.cost_after.parameters for event in run.session.events)
    assert peak > 2 * run.session.events[0].cost_before.parameters
    assert 0.55 * peak < run.structure.cost().parameters <= 0.6 * peak


def test_nothing_grows_past_the_budget_of_a_pruner_whose_last_event_is_over() -> None:
    methods = [
        esp.grow.Random(amount=0.2, every=esp.steps(2), start=0.0, until=1.0),
        esp.prune.Random(budget=esp.Parameters(0.6, of="initial"), every=esp.steps(5), until=0.5),
    ]
    run = start("mlp", methods, total_steps=40)
    limit = 0.6 * run.structure.cost().parameters
    run.train(40)
    assert run.structure.cost().parameters <= limit
    last = max(event.step for event in run.session.events if event.action == "prune")
    assert all(event.cost_after.parameters <= limit for event in run.session.events if event.step >= last)


def test_limits_and_smallest_fractions_are_kept() -> None:
    limits: dict[str, tuple[int | None, int | None]] = {"0": (10, 13), "2": (None, 9)}
    method = esp.prune.Magnitude(amount=0.3, every=esp.steps(2), min_fraction=0.5)
    run = start("mlp", [method], total_steps=30, limits=limits).train(30)
    assert run.sizes()["0"] == 10
    assert run.sizes()["2"] == 5  # half of nine, rounded up
    grown = start("mlp", [esp.grow.Random(width=3.0, every=esp.steps(2))], total_steps=30, limits=limits).train(30)
    assert (grown.sizes()["0"], grown.sizes()["2"]) == (13, 9)


def test_proportions_follow_what_other_methods_do() -> None:
    """Pruning one axis by half must not make a grower refill it."""
    once = {"every": esp.steps(4), "start": esp.steps(5), "until": esp.steps(6)}
    methods = [
        esp.grow.Random(amount=0.1, every=esp.steps(4), start=0.0, until=1.0),
        esp.prune.Random(amount=0.5, axes=["features.11"], **once),
    ]
    run = start("vgg_batch_norm", methods, total_steps=40).train(40)
    sizes = run.sizes()
    assert sizes["features.11"] / sizes["features.4"] == pytest.approx(8 / 12, abs=0.08)


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "size"), [("growing", 2.0), ("shrinking", 0.5), ("constant", 1.0)])
@pytest.mark.parametrize("measure", ["parameters", "flops"])
def test_settings_end_at_their_size(setting: str, size: float, measure: Any) -> None:
    methods = build(setting, "random", "magnitude", total_steps=48, measure=measure)
    run = start("vgg_batch_norm", methods, total_steps=48)
    first = getattr(run.structure.cost(), measure)
    run.train(48)
    assert {event.action for event in run.session.events} == {"grow", "prune"}
    assert run.session.events[-1].action == "prune"
    assert 0.96 * size <= getattr(run.structure.cost(), measure) / first <= size


@pytest.mark.parametrize("steps", [4, 10, 33])
def test_settings_suit_short_trainings(steps: int) -> None:
    run = start("mlp", build("constant", "random", "random", total_steps=steps), total_steps=steps)
    first = run.structure.cost().parameters
    run.train(steps)
    assert run.structure.cost().parameters <= first
    assert len(run.session.events) >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sideways", "random", "random"), "unknown setting 'sideways': expected one of growing, shrinking, constant"),
        (("constant", None, "random"), "the setting 'constant' needs a method to grow"),
        (("growing", "random", "nobody"), "there is no prune method 'nobody'; expected one of: "),
    ],
)
def test_wrong_settings_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        build(*arguments, total_steps=100)
    with pytest.raises(MethodError, match=r"cannot end at 0\.5 times"):
        build("growing", "random", None, total_steps=100, size=0.5)


# --- Events ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "vgg_batch_norm", "resnet", "vit", "mlp_batch_norm"])
def test_growing_leaves_the_loss_as_it_was(name: str) -> None:
    run = start(name, [esp.grow.Random(width=1.6, every=esp.steps(5))], total_steps=30).train(30)
    grown = [event for event in run.session.events if event.action == "grow"]
    assert len(grown) >= 3
    for event in grown:
        assert event.contract == "exact"
        assert event.loss_before is not None
        assert event.loss_after == pytest.approx(event.loss_before, abs=1e-5)


def test_events_record_what_happened() -> None:
    heard: list[Event] = []
    run = start("mlp", grow_and_prune(), total_steps=40, on_event=heard.append)
    cost, sizes = run.structure.cost(), run.sizes()
    run.train(40)
    assert tuple(heard) == run.session.events
    for event in heard:
        assert event.cost_before == cost
        for axis, (before, after) in event.sizes.items():
            assert sizes[axis] == before
            sizes[axis] = after
        cost = event.cost_after
        assert event.epoch == (event.step - 1) // 10
        assert event.seconds > 0
        assert Event.from_json(json.loads(json.dumps(event.to_json()))) == event
        assert (event.contract == "exact") == (event.action == "grow")
    assert cost == run.structure.cost()
    assert sizes == run.sizes()
    with pytest.raises(CheckpointError, match="no event"):
        Event.from_json({"step": 1})


def test_epoch_schedules_act_after_the_first_step_of_an_epoch() -> None:
    run = start("mlp", [esp.grow.Random(amount=0.1, every=esp.epochs(2), start=0.0, until=1.0)], total_steps=60)
    run.train(60)
    assert [(event.step, event.epoch) for event in run.session.events] == [(21, 2), (41, 4)]


def test_events_measure_on_the_last_batch_in_eval_mode_before_and_after() -> None:
    method = esp.grow.Random(amount=0.2, every=esp.steps(3), start=0.0, until=1.0)
    run = start("vgg_batch_norm", [method], total_steps=4)
    run.train(2)
    expected: list[float] = []
    step = run.session.step

    def measured_step() -> None:
        run.structure.model.eval()
        with torch.no_grad():
            expected.append(float(loss_of(run.structure.model, run.batch)))
        run.structure.model.train()
        step()

    run.session.step = measured_step  # type: ignore[method-assign]
    run.train(1)
    assert run.session.events[0].loss_before == pytest.approx(expected[0], abs=1e-7)


def test_an_event_disturbs_nothing_but_what_it_edits() -> None:
    """Random states, modes, statistics, gradients' identity and hooks are as they would be without the session."""
    run = start("mlp_batch_norm", [esp.grow.Random(amount=0.2, every=esp.steps(3), start=0.0)], total_steps=9)
    run.train(2)
    model = run.structure.model
    model[1].eval()  # a batch norm that the user has frozen
    run.optimizer.zero_grad()
    run.session.loss(run.batch).backward()
    run.optimizer.step()
    statistics = {name: tensor.clone() for name, tensor in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    run.session.step()
    assert len(run.session.events) == 1
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.named_buffers():
        old = statistics[name]
        assert torch.equal(tensor[: len(old)] if old.dim() else tensor, old)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_events_keep_no_graph_and_no_old_tensor_alive() -> None:
    earlier = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]  # held, so that no id is reused
    before = {id(one) for one in earlier}
    run = start("resnet", grow_and_prune(), total_steps=40).train(39)
    run.optimizer.zero_grad()
    gc.collect()
    alive = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter) and id(one) not in before]
    assert [one for one in alive if one.grad_fn is not None] == []
    model, state = run.structure.model, run.optimizer.state.values()
    known = [*model.parameters(), *model.buffers(), *run.batch, *(one for entries in state for one in entries.values())]
    assert {id(one) for one in alive} - {id(one) for one in known} == set()


# --- Statistics of new units -----------------------------------------------------------------------------------------


def test_new_units_get_the_statistics_of_their_own_inputs() -> None:
    model, batch = ZOO["vgg_batch_norm"]()
    model = model.double()
    batch = tuple(one.double() for one in batch)
    structure = esp.attach(model, batch)
    for _ in range(20):
        model(*batch)
    structure.grow({"features.0": 5, "features.4": 3})
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    outputs = model.eval()(*batch)
    model.train()
    places = new_statistics(model, structure.topology, {"features.0": 5, "features.4": 3})
    calibrate(model, places, [lambda: model(*batch)])
    torch.testing.assert_close(model.eval()(*batch), outputs, rtol=0, atol=1e-12)
    first = model.features[0](*batch).detach()
    torch.testing.assert_close(model.features[1].running_mean[8:], first.mean((0, 2, 3))[8:])
    torch.testing.assert_close(model.features[1].running_var[8:], first.var((0, 2, 3))[8:])
    for name, tensor in model.named_buffers():
        kept = {"features.1": 8, "features.5": 12}.get(name.rpartition(".")[0])
        assert torch.equal(tensor.view(-1)[:kept], before[name].view(-1)[:kept])
    assert model.features[1].momentum == 0.1


@pytest.mark.parametrize("with_probe", [False, True])
def test_sessions_calibrate_new_units_on_the_probe_or_the_last_batch(with_probe: bool) -> None:
    _, (batch,) = ZOO["mlp_batch_norm"]()
    probe = [(batch + 1.0,), (batch * 2.0,)] if with_probe else None
    method = esp.grow.Random(amount=0.5, every=esp.steps(3), start=0.0, until=1.0)
    run = start("mlp_batch_norm", [method], total_steps=3, probe=probe).train(3)
    linear, norm = run.structure.model[0], run.structure.model[1]
    inputs = [linear(one).detach() for (one,) in probe or [(batch,)]]
    mean = torch.stack([one.mean(0) for one in inputs]).mean(0)
    variance = torch.stack([one.var(0) for one in inputs]).mean(0)
    torch.testing.assert_close(norm.running_mean[16:], mean[16:])
    torch.testing.assert_close(norm.running_var[16:], variance[16:])
    assert not torch.allclose(norm.running_mean[:16], mean[:16])


def test_statistics_that_are_no_numbers_are_not_taken_over() -> None:
    model, batch = ZOO["mlp_batch_norm"]()
    structure = esp.attach(model, batch)
    structure.grow("0", by=4)
    before = model[1].running_var.clone()
    calibrate(
        model, new_statistics(model, structure.topology, {"0": 4}), [lambda: model(torch.full((8, 10), math.inf))]
    )
    assert torch.equal(model[1].running_var, before)


def test_undisturbed_restores_what_a_module_does_to_its_buffers() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("last", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            self.last = x[0]
            return x.sum()

    model = Counter()
    last = model.last
    assert eval_loss(model, lambda: model(torch.ones(2, 3))) == 6.0
    assert model.count == 0
    assert model.last is last

    def fail() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        eval_loss(model, fail)
    assert model.training


# --- Repeating and resuming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "vgg_batch_norm"])
def test_the_seed_decides(name: str) -> None:
    def trained(seed: int) -> Run:
        methods = [*build("constant", "random", "random", total_steps=32)]
        return start(name, methods, total_steps=32, seed=seed).train(32)

    first, again, other = trained(1), trained(1), trained(2)
    assert first.events() == again.events()
    for one, two in zip(first.structure.model.parameters(), again.structure.model.parameters(), strict=True):
        assert torch.equal(one, two)
    different = zip(first.structure.model.parameters(), other.structure.model.parameters(), strict=True)
    assert any(one.shape != two.shape or not torch.equal(one, two) for one, two in different)


def resumed(run: Run, name: str, methods: list[Method], total_steps: int) -> Run:
    """A fresh network brought to the sizes of `run`, with its tensors, optimizer state and session state put in."""
    other = start(name, [], total_steps)
    for edit in run.structure.history:
        other.structure.apply(edit.plan)
    other.structure.model.load_state_dict(run.structure.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    other.session = esp.Session(other.structure, methods, loss=loss_of, total_steps=total_steps)
    other.session.load_state_dict(json.loads(json.dumps(run.session.state_dict())))
    return other


@pytest.mark.parametrize(("name", "stop"), [("mlp", 7), ("mlp", 20), ("mlp", 21), ("vgg_batch_norm", 24)])
def test_a_resumed_session_goes_on_to_the_same_result(name: str, stop: int) -> None:
    methods = [
        esp.grow.Random(width=1.5, every=esp.epochs(1), until=0.8),
        esp.prune.Random(budget=esp.Parameters(0.9, of="initial"), every=esp.steps(6), until=1.0, scope="global"),
    ]
    through = start(name, methods, total_steps=50).train(50)
    half = start(name, methods, total_steps=50).train(stop)
    dropout = torch.get_rng_state()
    rest = resumed(half, name, methods, 50)
    torch.set_rng_state(dropout)
    rest.train(50 - stop)
    assert len(through.session.events) > 6
    assert rest.events() == through.events()
    assert rest.session.epochs_done == through.session.epochs_done == 5
    for one, two in zip(rest.structure.model.parameters(), through.structure.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    methods = grow_and_prune()
    run = start("mlp", methods, total_steps=40).train(20)
    state = run.session.state_dict()
    fresh = start("mlp", methods, total_steps=40)
    with pytest.raises(CheckpointError, match="units in 0, and the network has 12; load the network"):
        fresh.session.load_state_dict(state)
    with pytest.raises(CheckpointError, match="saved with 2 methods, and this session has 1"):
        start("mlp", methods[:1], total_steps=40).session.load_state_dict({**state, "sizes": fresh.sizes()})
    other = start("mlp", methods[::-1], total_steps=40)
    with pytest.raises(CheckpointError, match="this session has Method"):
        other.session.load_state_dict({**state, "sizes": fresh.sizes()})
    with pytest.raises(CheckpointError, match="format 99"):
        fresh.session.load_state_dict({**state, "format": 99})
    for key in state:
        with pytest.raises(CheckpointError, match="no state of a session"):
            run.session.load_state_dict({name: value for name, value in state.items() if name != key})
    assert run.session.state_dict() == state
    assert fresh.session.events == ()


# --- What goes wrong -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_skips_the_event() -> None:
    def broken(model: nn.Module, batch: Batch) -> Tensor:
        return loss_of(model, batch) * (math.nan if not model.training else 1.0)

    run = start("mlp", [esp.grow.Random(amount=0.2, every=esp.steps(3), start=0.0)], total_steps=5, loss=broken)
    sizes = run.sizes()
    with pytest.warns(EspalierWarning, match="random skipped its event at step 3: the loss is nan"):
        run.train(8)
    assert run.sizes() == sizes
    assert {event.action for event in run.session.events} == {"skipped"}
    assert json.dumps(run.session.state_dict(), allow_nan=False)


def test_a_skipped_event_is_made_up_for() -> None:
    broken = True

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return loss_of(model, batch) * (math.nan if broken and not model.training else 1.0)

    method = esp.prune.Random(budget=esp.Parameters(0.5, of="initial"), every=esp.steps(3), start=0.0, until=1.0)
    run = start("mlp", [method], total_steps=9, loss=loss)
    first = run.structure.cost().parameters
    with pytest.warns(EspalierWarning, match="skipped"):
        run.train(3)
    broken = False
    run.train(6)
    assert [event.action for event in run.session.events] == ["skipped", "prune", "prune"]
    assert run.structure.cost().parameters <= 0.5 * first


class Refusing:
    """Surgery that cannot change one axis, as code with a hidden size would make it."""

    def __init__(self, structure: Structure, axis: str) -> None:
        self._apply, self._check, self._axis = structure.apply, structure.check, axis

    def _refuse(self, plan: Plan) -> None:
        if any(edit.axis == self._axis for edit in plan.edits):
            raise SurgeryError(f"the edit of {self._axis} was refused and nothing was changed: a hidden size")

    def apply(self, plan: Plan) -> Edit:
        self._refuse(plan)
        return self._apply(plan)

    def check(self, plan: Plan) -> Any:
        self._refuse(plan)
        return self._check(plan)


def test_an_axis_that_surgery_refuses_is_left_out_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = esp.Parameters(0.6, of="initial")
    method = esp.prune.Magnitude(budget=budget, every=esp.steps(4), start=0.0, until=1.0)
    run = start("vgg_batch_norm", [method], total_steps=12)
    first, sizes = run.structure.cost().parameters, run.sizes()
    refusing = Refusing(run.structure, "features.4")
    monkeypatch.setattr(run.structure, "apply", refusing.apply)
    monkeypatch.setattr(run.structure, "check", refusing.check)
    with pytest.warns(EspalierWarning, match=r"goes on without features\.4 from step 4 on: .*a hidden size"):
        run.train(4)
    run.train(8)
    assert [event.action for event in run.session.events] == ["failed", "prune", "prune", "prune"]
    assert "a hidden size" in run.session.events[0].why
    assert run.sizes()["features.4"] == sizes["features.4"]
    assert run.structure.cost().parameters <= 0.6 * first


def test_a_failure_of_the_whole_edit_is_recorded_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("mlp", [esp.grow.Random(amount=0.2, every=esp.steps(3), start=0.0, until=1.0)], total_steps=6)
    sizes, apply = run.sizes(), run.structure.apply

    def out_of_memory(plan: Plan) -> Edit:
        raise SurgeryError("the edit failed half-way and was rolled back: out of memory")

    monkeypatch.setattr(run.structure, "apply", out_of_memory)
    with pytest.warns(EspalierWarning, match="goes on without this event from step 3 on: .*out of memory"):
        run.train(3)
    assert run.sizes() == sizes
    monkeypatch.setattr(run.structure, "apply", apply)
    run.train(3)
    assert [event.action for event in run.session.events] == ["failed", "grow"]


def test_a_budget_that_growth_puts_out_of_reach_is_reported() -> None:
    methods = [
        esp.grow.Random(width=3.0, every=esp.steps(2), start=0.0, until=0.4, axes=["2"]),
        esp.prune.Random(budget=esp.Parameters(1.0, of="initial"), every=esp.steps(2), axes=["0"], min_fraction=0.9),
    ]
    run = start("mlp", methods, total_steps=20)
    with pytest.warns(EspalierWarning, match=r"random ended at .* where Parameters\(value=1.0, of='initial'\) allows"):
        run.train(20)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([esp.prune.Magnitude(budget=esp.Parameters(10))], "allows a cost of 10, but the smallest network .* costs"),
        ([esp.grow.Random(budget=esp.Parameters(100))], "the network costs 279 already, so nothing could grow"),
        ([esp.grow.Random(width=1.0)], "so nothing could grow"),
        ([esp.grow.Random(axes=["nowhere*"])], "no axis fits the pattern"),
        ([esp.prune.Magnitude(axes=["4"])], "4 cannot shrink: it is dimension 1 of the model's output"),
        ([esp.prune.Magnitude(axes=["[4]"])], r"magnitude: no axis can shrink \(4: it is dimension 1"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(methods: list[Method], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        start("mlp", methods, total_steps=10)


def test_wrong_arguments_of_a_session_are_named() -> None:
    model, batch = ZOO["mlp"]()
    with pytest.raises(MethodError, match="attach with optimizer="):
        esp.Session(esp.attach(model, batch), [], loss=loss_of, total_steps=10)
    with pytest.raises(MethodError, match="total_steps: expected a whole number of at least 1, found 0"):
        start("mlp", [], total_steps=0)
    with pytest.raises(MethodError, match="mode: expected 'min' or 'max', found 'best'"):
        start("mlp", [], total_steps=1).session.epoch_end(0.5, mode="best")  # type: ignore[arg-type]


def test_a_method_that_never_acts_is_reported() -> None:
    run = start("mlp", [esp.grow.Random(every=esp.epochs(5))], total_steps=12)
    with pytest.warns(EspalierWarning, match=r"random never acted: .* no event in 12 steps and 1 epochs"):
        run.train(12)


# --- Penalties and what methods see ----------------------------------------------------------------------------------


class Weight:
    """A penalty of 3 from the second half of the training on."""

    def __call__(self, context: Context, /) -> Tensor | None:
        return torch.tensor(3.0) if context.progress >= 0.5 else None


def test_penalties_are_part_of_the_loss_but_not_of_what_events_measure() -> None:
    base = esp.grow.Random(amount=0.1, every=esp.steps(8), start=0.0, until=1.0)
    penalised = Method(base.name, "grow", base.score, base.select, base.schedule, penalty=Weight())
    run = start("mlp", [penalised], total_steps=10)
    plain = loss_of(run.structure.model, run.batch).item()
    assert run.session.loss(run.batch).item() == pytest.approx(plain)
    run.train(9)
    assert run.session.loss(run.batch).item() > 3.0
    assert (run.session.events[0].loss_before or 0) < 3.0


def test_a_penalty_that_nobody_asks_for_is_reported() -> None:
    base = esp.grow.Random(amount=0.1, every=esp.steps(2), start=0.0, until=1.0)
    run = start("mlp", [Method("weighty", "grow", base.score, base.select, base.schedule, penalty=Weight())], 4)
    run.session.step()
    with pytest.warns(EspalierWarning, match=r"weighty: the loss of training was never taken from session\.loss"):
        run.session.step()


class Looking(Equal):
    """Growth that checks what methods can see."""

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        assert len(context.probe) == 2
        assert context.batch is not None
        loss = context.loss(context.probe[0])
        gradients = torch.autograd.grad(loss, list(context.structure.model.parameters()))
        assert all(bool(torch.isfinite(one).all()) for one in gradients)
        assert context.structure.model.training
        return super().__call__(context, goal)


def test_methods_see_batches_and_the_loss_with_gradients() -> None:
    base = esp.grow.Random(amount=0.2, every=esp.steps(2), start=0.0)
    _, batch = ZOO["mlp"]()
    run = start(
        "mlp", [Method("looking", "grow", Looking(), base.select, base.schedule)], total_steps=4, probe=[batch, batch]
    ).train(4)
    assert [event.method for event in run.session.events] == ["looking"]


# --- Cost ------------------------------------------------------------------------------------------------------------


def test_a_step_without_an_event_costs_next_to_nothing() -> None:
    """Less than 3 microseconds; a training step of the smallest network takes some 300."""
    never = esp.steps(1_000_000)
    run = start("mlp", [esp.grow.Random(every=never), esp.prune.Magnitude(every=never)], total_steps=10_000_000)
    took = math.inf
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(10_000):
            run.session.step()
        took = min(took, (time.perf_counter() - began) / 10_000)
    assert run.session.events == ()
    assert took < 3e-6


def test_no_warnings_in_an_ordinary_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start("resnet", build("constant", "random", "magnitude", total_steps=32), total_steps=32).train(32)
