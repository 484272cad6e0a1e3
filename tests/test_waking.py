"""Which units wake, and when: by Algorithm 1, by predicted gain, with a stop and hysteresis."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from loops import start
from torch import Tensor, nn
from zoo_small import ZOO

import espalier as esp
from espalier.edit.plan import Plan, Resize
from espalier.errors import MethodError
from espalier.method import Method
from espalier.parts.gates.dormant import Sleeper, values_of
from espalier.parts.gates.expected import ExpectedCost
from espalier.parts.gates.memory import GateMemory
from espalier.parts.gates.sleepers import Newcomer, Sleepers
from espalier.parts.gates.stages import Stages
from espalier.parts.gates.waking import Algorithm1, Seen, WhileFalling
from espalier.parts.gates.waking_gain import ByGain, _valued

SEARCH = Stages(k=1.0, start=0.0, until=1.0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch_of(count: int = 64, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.stack([(inputs[:, 0] * inputs[:, 1]).tanh(), inputs[:, 2].abs()], 1)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


class Run:
    """A loop whose epochs are 4 steps long."""

    def __init__(self, method: Method, total: int = 400, model: nn.Module | None = None) -> None:
        self.model = network() if model is None else model
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.batch = batch_of()
        self.structure = esp.attach(self.model, self.batch[0], optimizer=self.optimizer)
        self.session = esp.Session(
            self.structure, [method], loss=loss_of, probe=[batch_of(32, 5)], total_steps=total, seed=5
        )

    def train(self, steps: int) -> "Run":
        self.model.train()
        for _ in range(steps):
            loss = self.session.loss(self.batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.session.step()
            if self.session.steps_done % 4 == 0:
                self.session.epoch_end()
        return self

    @property
    def memory(self) -> GateMemory:
        found = self.session._controller.running[0].memory
        assert isinstance(found, GateMemory)
        return found

    def sizes(self) -> list[int]:
        return [self.structure.axes[axis].size for axis in ("0", "2")]

    def seen(self, **changes: Any) -> Seen:
        context = self.session._context(self.session._controller.running[0])
        self.memory.gates(context)
        room = dict.fromkeys(self.memory.logits, 100)
        return replace(self.memory._seen(context, room), **changes)


def growing(waking: Algorithm1 | ByGain, **options: Any) -> Method:
    return esp.grow.NPN(SEARCH, None, {"0": 2, "2": 2}, waking, rate=1e-9, fill=2.0, **options)


# --- The rule --------------------------------------------------------------------------------------------------------


def looked(rule: WhileFalling, run: Run, losses: list[float], monkeypatch: Any) -> list[Mapping[str, Any]]:
    """What is remembered after epochs with these held-out losses."""
    found, remembered = [], rule.begin()
    for value in losses:
        monkeypatch.setattr("espalier.parts.gates.waking.probe_loss", lambda context, value=value: value)
        remembered = rule.look(run.seen(cost=1.0), remembered)
        found.append(json.loads(json.dumps(remembered)))
    return found


def test_a_loss_has_to_be_lower_than_ever_by_enough_to_count(monkeypatch):
    run = Run(growing(Algorithm1())).train(1)
    losses = [3.0, 2.9, 2.95, 2.5, float("nan"), 2.5]
    assert [one["improved"] for one in looked(WhileFalling(), run, losses, monkeypatch)] == [1, 1, 0, 1, 0, 0]
    found = looked(WhileFalling(least=0.1), run, losses, monkeypatch)
    assert [one["improved"] for one in found] == [1, 0, 0, 1, 0, 0]
    assert [one["best"] for one in found] == [4.0] * 3 + [3.5] * 3  # with the penalty


def test_after_a_plateau_nothing_wakes_any_more(monkeypatch):
    run, rule = Run(growing(Algorithm1())).train(1), WhileFalling(patience=2)
    found = looked(rule, run, [3.0, 4.0, 2.0, 2.0, 2.5, 1.0, 0.5], monkeypatch)
    assert [rule.over(one) for one in found] == [False, False, False, False, True, True, True]
    in_use = {axis: torch.ones(2) for axis in ("0", "2")}
    seen = run.seen(probabilities=in_use)
    assert rule.axes(seen, found[2]) == ["0", "2"]
    assert rule.axes(seen, found[-1]) == []
    assert WhileFalling().axes(seen, found[-1]) == ["0", "2"]


def test_axes_with_units_that_are_not_in_use_or_fell_asleep_again_wait():
    run = Run(growing(Algorithm1())).train(1)
    remembered = {**WhileFalling().begin(), "improved": True}
    undecided = {"0": torch.tensor([0.9, 0.6]), "2": torch.tensor([0.9, 0.4])}
    assert WhileFalling().axes(run.seen(probabilities=undecided), remembered) == ["0"]
    assert WhileFalling(in_use=0.3).axes(run.seen(probabilities=undecided), remembered) == ["0", "2"]
    assert WhileFalling(in_use=0.7).axes(run.seen(probabilities=undecided), remembered) == []
    assert WhileFalling(in_use=0.3).axes(run.seen(probabilities=undecided, room={"2": 1}), remembered) == ["2"]
    units = Sleepers()
    units.fallen = {"2": 1}
    found = {
        fallen: WhileFalling(in_use=0.3, fallen=fallen).axes(run.seen(probabilities=undecided, units=units), remembered)
        for fallen in ("axis", "all", "never")
    }
    assert found == {"axis": ["0"], "all": [], "never": ["0", "2"]}


def test_units_wake_above_the_probability_at_which_they_fall_asleep():
    with pytest.raises(MethodError, match="higher probability"):
        esp.grow.NPN(waking=Algorithm1(WhileFalling(in_use=0.1)), low=0.1)
    with pytest.raises(MethodError, match="fallen"):
        WhileFalling(fallen="sometimes")
    with pytest.raises(MethodError, match="patience"):
        WhileFalling(patience=0)
    with pytest.raises(MethodError, match="least"):
        WhileFalling(least=1.0)
    with pytest.raises(MethodError, match="units"):
        ByGain(units=0)
    run = Run(growing(ByGain()))
    without = esp.Session(run.structure, [growing(ByGain())], loss=loss_of, total_steps=9)
    with pytest.raises(MethodError, match="held-out"):
        without.loss(run.batch)


# --- Predicted gain --------------------------------------------------------------------------------------------------


def test_the_value_of_a_candidate_is_the_squared_gradient_of_the_network_with_it():
    run = Run(growing(ByGain())).train(4)
    assert run.sizes() == [2, 2]
    seen = run.seen()
    asleep = {axis: run.memory.sleepers.asleep[axis] for axis in ("0", "2")}
    rows = {"0": torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}
    counts = {"0": len(asleep["0"]) + 3, "2": len(asleep["2"])}
    before = {name: one.clone() for name, one in run.model.state_dict().items()}
    with seen.all_there():
        valued = _valued(seen, counts, asleep, rows)
    assert all(torch.equal(one, before[name]) for name, one in run.model.state_dict().items())

    first, second, third = run.model[0], run.model[2], run.model[4]
    hidden = torch.tanh(first(run.batch[0])).detach()
    at = second(hidden).detach()
    error = 2 * (third(torch.tanh(at)).detach() - run.batch[1]) / run.batch[1].numel()
    back = (error @ third.weight.detach()) * (1 - torch.tanh(at).square())
    for (value, comer), weights in zip(valued["0"][-3:], rows["0"], strict=True):
        assert isinstance(comer, Newcomer)
        bias = run.structure.preview(Plan((Resize("0", add=counts["0"]),))).tensors["0.bias"][-1]
        slope = back.T @ torch.tanh(run.batch[0] @ weights + bias)
        assert value == pytest.approx(float(slope.square().sum()), rel=1e-9)
    for value, sleeper in valued["2"]:
        assert isinstance(sleeper, Sleeper)
        held = {one.tensor: one.values.values for one in sleeper.slices}
        slope = error.T @ torch.tanh(hidden @ held["2.weight"][0, :2] + held["2.bias"])  # of units 0 and 1, awake
        assert value == pytest.approx(float(slope.square().sum()), rel=1e-9)


def test_a_unit_wakes_with_its_own_readers_only_if_these_lower_the_loss():
    run = Run(growing(ByGain())).train(4)
    seen, asleep = run.seen(), run.memory.sleepers.asleep
    with seen.all_there():
        valued = _valued(seen, {"2": len(asleep["2"])}, {"2": asleep["2"]}, {})["2"]
    kinds = set()
    for (_, comer), sleeper in zip(valued, asleep["2"], strict=True):
        assert isinstance(comer, Sleeper)
        own = comer is sleeper
        kinds.add(own)
        preview = run.structure.preview(Plan((Resize("2", add=1),)))
        numbers = run.memory.sleepers.after({}, {"2": [sleeper]})
        readers = values_of([sleeper], preview.after, numbers, preview.tensors)["4.weight"][:, 2]
        assert bool(readers.any())
        slope = torch.zeros(2, dtype=torch.float64)
        weight = run.model[4].weight.detach()
        for entry in range(2):  # the derivative by a weight that reads the unit, by differences
            for sign in (1, -1):
                made = values_of([comer.without({("4.weight", 1)})], preview.after, numbers, preview.tensors)
                hidden = torch.tanh(run.model[0](run.batch[0]).detach())
                second = torch.tanh(hidden @ made["2.weight"].T + made["2.bias"])
                reading = torch.cat([weight, torch.zeros(2, 1, dtype=torch.float64)], 1)
                reading[entry, 2] = sign * 1e-5
                outputs = second @ reading.T + run.model[4].bias.detach()
                slope[entry] += sign * (outputs - run.batch[1]).square().mean() / 2e-5
        assert own == (float(slope @ readers) < 0)
        assert {one.tensor for one in comer.slices} == {"2.weight", "2.bias"} | ({"4.weight"} if own else set())
    assert kinds == {True, False}


@pytest.mark.parametrize("fresh", [True, False])
def test_several_units_wake_where_they_promise_most(fresh):
    run = Run(growing(ByGain(units=3, rest=0), fresh=fresh)).train(4)
    assert run.sizes() == [2, 2]
    run.train(1)  # after an epoch with the lowest loss so far
    assert sum(run.sizes()) == 2 + 2 + 3
    assert all(bool(one.isfinite().all()) for one in run.model.parameters())
    run.train(40)
    assert sum(run.sizes()) > 7
    if not fresh:
        assert run.sizes()[0] <= 6
        assert run.sizes()[1] <= 5


def test_new_units_begin_in_the_direction_that_was_found_and_change_nothing(monkeypatch):
    model = network()
    run = Run(esp.grow.NPN(SEARCH, None, {}, ByGain(units=2), rate=1e-9, fill=30.0), model=model).train(4)
    before, output = run.sizes(), run.model(run.batch[0]).detach()
    hidden = [one.weight.detach().clone() for one in (model[0], model[2])]
    choose, found = ByGain.chosen, {}

    def chosen(policy: ByGain, seen: Seen, remembered: Mapping[str, Any]) -> Any:
        found.update(choose(policy, seen, remembered))
        return found

    monkeypatch.setattr(ByGain, "chosen", chosen)
    run.session.loss(run.batch)
    run.session.step()
    newcomers = {axis: [one for one in ones if isinstance(one, Newcomer)] for axis, ones in found.items()}
    assert sum(map(len, newcomers.values())) == 2
    assert [now - then for now, then in zip(run.sizes(), before, strict=True)] == [
        len(newcomers.get(axis, ())) for axis in ("0", "2")
    ]
    with run.session.decided():
        assert torch.allclose(run.model(run.batch[0]), output, atol=1e-12)
    for axis, layer, then in (("0", model[0], hidden[0]), ("2", model[2], hidden[1])):
        for row, one in zip(layer.weight.detach()[len(then) :], newcomers.get(axis, ()), strict=True):
            assert torch.allclose(row[: then.shape[1]], one.incoming, atol=1e-12)


@pytest.mark.parametrize("name", ["lenet", "resnet", "vgg_batch_norm"])
def test_units_of_convolutions_wake_by_gain(name):
    method = esp.grow.NPN(SEARCH, None, {"*": 2}, ByGain(units=3, rest=0), rate=1e-9, fill=30.0)
    model, batch = ZOO[name]()
    run = start(name, [method], 100, probe=[batch])
    run.train(3, epoch=2)
    small = sum(run.sizes().values())
    assert small < sum(axis.size for axis in esp.attach(model, batch).axes.values())
    run.train(6, epoch=2)
    assert sum(run.sizes().values()) > small
    assert all(bool(one.isfinite().all()) for one in run.structure.model.parameters())
    assert {event.action for event in run.session.events} == {"grow"}


def test_units_that_begin_asleep_leave_after_the_first_step_with_moments_of_zero():
    run = Run(growing(Algorithm1()))
    assert run.sizes() == [6, 5]
    run.train(1)
    assert run.sizes() == [2, 2]
    assert [(event.step, event.action) for event in run.session.events] == [(1, "grow")]
    for sleeper in run.memory.sleepers.asleep["2"]:
        assert {"exp_avg", "exp_avg_sq"} <= sleeper.slices[0].state.keys()
        assert not any(bool(one.values.any()) for each in sleeper.slices for one in each.state.values())
    assert run.memory.sleepers.fallen == {"0": 0, "2": 0}
    state = json.loads(json.dumps(run.session.state_dict()))
    run.session.load_state_dict(state)
    run.train(40)
    assert sum(run.sizes()) > 4
    assert all(event.step % 4 == 1 for event in run.session.events[1:])


def test_without_sleepers_nothing_happens_after_the_first_step():
    run = Run(esp.grow.NPN(SEARCH, None, waking=Algorithm1())).train(2)
    assert not run.session.events


def test_what_fell_asleep_rests():
    run, policy = Run(growing(ByGain(rest=3))).train(4), ByGain(rest=3)
    remembered = policy.look(run.seen(), policy.begin())
    epoch = run.seen().context.epoch
    asleep = run.memory.sleepers.asleep["0"]
    assert policy._sleepers(run.seen(), "0", remembered) == asleep  # they slept before the search began
    late = {**remembered, "since": {**remembered["since"], str(asleep[0].number): epoch}}
    assert policy._sleepers(run.seen(), "0", late) == asleep[1:]
    context = replace(run.seen().context, epoch=epoch + 3)
    assert policy._sleepers(run.seen(context=context), "0", late) == asleep
    units = Sleepers()
    units.asleep = {"0": asleep[1:]}
    assert str(asleep[0].number) not in policy.look(run.seen(units=units), late)["since"]


def test_nothing_wakes_while_others_fall_asleep():
    run = Run(growing(ByGain(rest=0))).train(4)
    remembered = {**ByGain().begin(), "improved": True}
    in_use = {"0": torch.ones(2), "2": torch.ones(2)}
    policy = ByGain(rest=0)
    assert policy.chosen(run.seen(probabilities=in_use), policy.look(run.seen(), remembered))
    assert policy.chosen(run.seen(probabilities=in_use, leaving={"2"}), {**remembered, "since": {}}) == {}


def test_an_interrupted_run_by_gain_goes_on_to_the_same_bits(tmp_path):
    def method() -> Method:
        return esp.grow.NPN(SEARCH, ExpectedCost(0.05), {"0": 2, "2": 2}, ByGain(units=2, rest=1), rate=0.02)

    def loop(run: Run, steps: int) -> list[Any]:
        run.train(steps)
        return [one.detach().clone() for one in run.model.parameters()]

    through = Run(method(), 80)
    through.train(26)
    esp.save(through.structure, tmp_path, session=through.session)
    expected = loop(through, 30)
    rest = Run.__new__(Run)
    rest.model, rest.batch = network(), batch_of()
    rest.optimizer = torch.optim.Adam(rest.model.parameters(), lr=1e-2)
    rest.structure = esp.load(tmp_path, rest.model, rest.batch[0], optimizer=rest.optimizer)
    rest.session = esp.Session(
        rest.structure, [method()], loss=loss_of, probe=[batch_of(32, 5)], total_steps=80, seed=5
    )
    rest.session.load(tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(loop(rest, 30), expected, strict=True))
    assert rest.sizes() == through.sizes()
    assert sum(rest.sizes()) > 4
