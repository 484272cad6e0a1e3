"""Neural Plasticity Networks: gates in training, stages, sleep and wake."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Run, start
from snapshots import differences, snapshot
from torch import Tensor, nn
from zoo_small import ZOO

import espalier as esp
from espalier.errors import CheckpointError, MethodError
from espalier.method import Method
from espalier.parts import clock, init
from espalier.parts.gates import (
    estimators,
    expected,
    functions,
    kinds,
    memory,
    planning,
    plastic,
    settings,
    stages,
    waking,
)
from espalier.parts.gates.dormant import give_state_back, kept
from espalier.parts.gates.estimators import AR, ARM, DisARM
from espalier.parts.gates.expected import ExpectedCost, PerUnit
from espalier.parts.gates.functions import HardSigmoid, Sigmoid
from espalier.parts.gates.layer_memory import LayerGates
from espalier.parts.gates.memory import GateMemory
from espalier.parts.gates.settings import GateSettings
from espalier.parts.gates.stages import Stages
from espalier.parts.gates.weight_memory import WeightGates
from espalier.parts.timing import amount, recovery, schedule
from espalier.parts.units import select

ALWAYS = Stages(k=3.0, start=0.0, until=1.0)
HARD = Stages(k=3.0, start=0.9, until=0.95)


def memory_of(session: esp.Session) -> Any:
    """The gates of a session that has taken a step."""
    found = session._controller.running[0].memory
    assert isinstance(found, GateMemory | WeightGates | LayerGates)
    return found


def batch_of(count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 4, generator=generator), torch.randn(count, 2, generator=generator)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


class Plain:
    """A user's loop on a small perceptron, with a session or without."""

    def __init__(
        self, method: Method | None, total: int = 40, per_epoch: int = 4, model: nn.Module | None = None
    ) -> None:
        self.model = network() if model is None else model
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.batch, self.calls = batch_of(), 0
        self.structure = esp.attach(self.model, self.batch[0], optimizer=self.optimizer)
        self.session = None
        if method is not None:
            self.session = esp.Session(
                self.structure, [method], loss=self.loss, probe=[batch_of(16)], total_steps=total, seed=5
            )

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        return (model(batch[0]) - batch[1]).square().mean()

    def train(self, steps: int) -> "Plain":
        self.model.train()
        for _ in range(steps):
            loss = self.loss(self.model, self.batch) if self.session is None else self.session.loss(self.batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.session is not None:
                self.session.step()
                if self.session.steps_done % 4 == 0:
                    self.session.epoch_end()
        return self

    @property
    def memory(self) -> Any:
        assert self.session is not None
        return memory_of(self.session)

    def sizes(self) -> list[int]:
        return [self.structure.axes[axis].size for axis in ("0", "2")]


# --- Limits of k -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [AR(), ARM(), DisARM()], ids=repr)
def test_decided_gates_are_plain_training_to_the_bit_and_rest(estimator):
    run = Plain(esp.prune.NPN(HARD, ExpectedCost(10.0), estimator=estimator)).train(1)
    before = copy.deepcopy(run.memory.logits)
    calls = run.calls
    run.train(20)
    plain = Plain(None).train(21)
    for one, other in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(one, before[axis]) for axis, one in run.memory.logits.items())
    assert run.calls - calls <= 20 + 5  # no second pass; one more per event would be allowed


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_k_of_zero_is_dropout_of_any_rate(rate):
    search, function = Stages(k=0.0, start=0.0, until=1.0), Sigmoid(rest=1 - rate)
    run = Plain(esp.prune.NPN(search, ExpectedCost(10.0), function=function), total=4000)
    seen = {axis: [] for axis in ("0", "2")}
    weight = run.model[2].weight

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        here = module.weight if isinstance(module.weight, Tensor) else weight
        seen["0"].append((here == 0).all(0))

    run.session.loss(run.batch)
    run.session.step()
    run.model[2].register_forward_pre_hook(watch)
    before = copy.deepcopy(run.memory.logits)
    for _ in range(150):
        run.session.loss(run.batch)
        run.session.step()
    off = torch.stack(seen["0"]).double()
    # twins are not independent
    assert abs(float(off.mean()) - rate) < 5 * (rate * (1 - rate) / off.numel()) ** 0.5 * 2**0.5
    assert all(torch.equal(one, before[axis]) for axis, one in run.memory.logits.items())


# --- The estimate in a network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [None, HardSigmoid()], ids=repr)
def test_the_gradient_of_the_logits_is_that_of_enumeration(function):
    options: dict[str, Any] = {} if function is None else {"function": function}
    run = Plain(
        esp.prune.NPN(replace(ALWAYS, k=1.0), PerUnit({"*": 0.1}), axes=["2"], begin=0.6, **options), total=10**6
    )
    run.session.loss(run.batch)
    memory = run.memory
    phi = memory.logits["2"].clone().requires_grad_()
    p = memory.table.settings.kind.probability(phi, 1.0)
    total = 0.1 * p.sum()
    with torch.no_grad():
        losses = []
        for number in range(2**5):
            z = torch.tensor([number >> bit & 1 for bit in range(5)]).double()
            context = run.session._context(run.session._gated)
            with memory.gates(context).applied({"2": z}):
                losses.append((z, float(run.loss(run.model, run.batch))))
    for z, value in losses:
        total = total + value * torch.where(z > 0, p, 1 - p).prod()
    (exact,) = torch.autograd.grad(total, phi)
    found = []
    for _ in range(3000):
        run.session.loss(run.batch)
        found.append(memory.table._slope)
        run.session._step += 1  # other random numbers, and nothing moves
    rows = torch.stack(found)
    assert ((rows.mean(0) - exact).abs() < 5 * rows.std(0) / len(rows) ** 0.5).all()
    assert (exact.abs() > rows.std(0) / len(rows) ** 0.5).all()


def test_the_twin_leaves_statistics_and_random_numbers_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2))
    run = Plain(esp.prune.NPN(replace(ALWAYS, k=0.5)), model=model)
    run.model.train()
    run.session.loss(run.batch)
    assert int(model[1].num_batches_tracked) == 1
    assert run.calls == 2
    states = []
    for calls in (run.session, None):
        torch.manual_seed(1)
        if calls is None:
            run.loss(run.model, run.batch)
        else:
            calls.loss(run.batch)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_twin_is_left_out_where_it_is_the_same():
    run = Plain(esp.prune.NPN(replace(ALWAYS, k=0.5), begin=0.999, axes=["0"])).train(5)
    assert 0.98 < float(run.memory.table.probabilities(0.1)["0"].min()) < 1
    assert run.calls < 10  # two per step at most; six gates of 0.999 agree in 99% of all draws


def test_judging_is_without_chance_and_as_decided():
    run = Plain(esp.prune.NPN(replace(ALWAYS, k=1.0), None)).train(1)
    run.memory.logits["0"][1] = -3.0
    run.model.eval()
    with torch.no_grad():
        values = {float(run.session.loss(run.batch)) for _ in range(5)}
        with run.session.decided():
            assert run.loss(run.model, run.batch).item() in values
        assert len(values) == 1
        plain = run.loss(run.model, run.batch).item()
        run.model[2].weight[:, 1] = 0
        assert run.loss(run.model, run.batch).item() in values
    assert plain not in values
    assert Plain(None).structure.topology is not None
    session = esp.Session(run.structure, [esp.prune.Random()], loss=run.loss, total_steps=40)
    with session.decided():
        assert run.model[2].weight.requires_grad


# --- Pruning ---------------------------------------------------------------------------------------------------------


def test_what_is_shut_when_the_search_ends_is_removed_and_nothing_changes():
    run = Plain(esp.prune.NPN(Stages(k=2.0, start=0.0, until=0.2), None), total=40).train(5)
    run.memory.logits["0"][[1, 4]] = -0.6
    run.train(3)  # in the search, where 0.23 is not low
    assert run.sizes() == [6, 5]
    run.model.eval()
    with torch.no_grad(), run.session.decided():
        before = run.model(run.batch[0])
    run.session.step()
    assert run.sizes() == [4, 5]
    with torch.no_grad():
        torch.testing.assert_close(run.model(run.batch[0]), before)


def test_the_unit_that_has_to_stay_is_trained_as_it_is_judged():
    run = Plain(esp.prune.NPN(Stages(k=2.0, start=0.0, until=0.2), None, rate=1e-9), total=40).train(5)
    run.memory.logits["0"][:] = torch.tensor([-5.0, -5, -5, -4, -5, -5])
    run.train(8)
    assert run.sizes() == [1, 5]
    plain = run.loss(run.model, run.batch)
    torch.testing.assert_close(run.session.loss(run.batch), plain)
    torch.testing.assert_close(run.session._as_decided(run.batch), plain)


def test_low_units_go_to_sleep_during_the_search_but_never_all():
    run = Plain(esp.prune.NPN(ALWAYS, None, patience=2, rate=1e-9)).train(1)
    run.memory.logits["0"][:] = -5.0
    run.memory.logits["2"][0] = -5.0
    run.train(7)
    assert run.sizes() == [6, 5]
    run.train(2)
    assert run.sizes() == [1, 4]
    assert {axis: len(one) for axis, one in run.memory.sleepers.asleep.items()} == {"0": 5, "2": 1}
    assert len(run.memory.logits["2"]) == 4
    run.train(4)
    assert float(run.session.gates().probabilities["0"]) == 1, "the last unit is trained as one that stays"
    logit = run.memory.logits["0"].clone()
    run.train(4)
    assert torch.equal(run.memory.logits["0"], logit)


def test_a_strong_penalty_prunes_and_training_goes_on():
    run = Plain(esp.prune.NPN(Stages(k=2.0, start=0.0, until=0.8), ExpectedCost(30.0), rate=0.05), total=200).train(200)
    assert run.sizes() < [6, 5]
    assert run.structure.cost().parameters < 71
    assert all(bool(one.isfinite().all()) for one in run.model.parameters())


def test_edits_of_others_are_followed_and_undone():
    run = Plain(esp.prune.NPN(replace(ALWAYS, k=1.0), None)).train(2)
    before = json.dumps(run.session.state_dict())
    numbers = list(run.memory.sleepers.numbers["0"])
    run.structure.prune("0", [1, 2])
    run.session.state_dict()
    assert run.memory.sleepers.numbers["0"] == [numbers[unit] for unit in (0, 3, 4, 5)]
    run.structure.undo()
    run.session.state_dict()
    assert json.dumps(run.session.state_dict()) == before
    run.structure.grow("2", by=2)
    run.train(2)
    assert len(run.memory.logits["2"]) == 7
    assert not any(run.memory.sleepers.asleep.values())


@pytest.mark.parametrize("trying", [esp.grow.GradMax, esp.grow.Firefly])
def test_methods_that_try_units_out_work_beside_open_gates_and_are_refused_beside_shut_ones(trying):
    for shut in (0, 2):
        run = Plain(None)
        methods = [esp.prune.NPN(ALWAYS, None, patience=99), trying(every=esp.steps(2), start=0.0, until=0.1)]
        run.session = esp.Session(run.structure, methods, loss=run.loss, total_steps=40)
        run.train(1)
        run.memory.logits["0"][:shut] = -5.0
        if shut:
            with pytest.raises(MethodError, match=r"should have shape .* gates act: another method tries new units"):
                run.train(2)
            assert run.sizes() == [6, 5]
        else:
            assert sum(run.train(2).sizes()) > 11


# --- Expansion -------------------------------------------------------------------------------------------------------


def test_growing_begins_with_few_and_wakes_them_with_their_own_weights():
    whole = copy.deepcopy(network().state_dict())
    method = esp.grow.NPN(
        Stages(k=1.0, start=0.2, until=0.9), None, awake={"0": 2, "2": 3}, rate=1e-9, fill=0.5, fresh=False
    )
    run = Plain(method, total=80)
    with torch.no_grad(), run.session.decided():
        run.model.eval()
        first = run.model(run.batch[0])
    run.train(5)
    assert run.sizes() == [2, 3]
    assert first.shape == (32, 2)
    asleep = {axis: [one.number for one in found] for axis, found in run.memory.sleepers.asleep.items()}
    run.train(75)
    assert run.sizes()[0] > 2
    assert run.sizes()[1] > 3
    woken = run.memory.sleepers.numbers["0"][2:]
    assert woken == asleep["0"][: len(woken)]  # in their order
    last = run.model[0].weight[-1].detach() if run.sizes()[0] < 6 else None
    assert last is None or not torch.equal(last, torch.zeros(4))
    assert whole["0.weight"].shape == (6, 4)
    assert all(event.action == "grow" for event in run.session.events)


def test_nothing_wakes_unless_the_held_out_loss_has_fallen_and_all_are_active():
    method = esp.grow.NPN(Stages(k=1.0, start=0.0, until=1.0), None, awake={"0": 2, "2": 3}, rate=1e-9, fill=2.0)
    run = Plain(method, total=200).train(4)
    memory = run.memory
    assert run.sizes() == [2, 3]
    memory.remembered = {**memory.remembered, "best": 0.0, "improved": False}  # nothing is below
    run.train(21)
    assert run.sizes() == [2, 3]
    memory.remembered = {**memory.remembered, "best": None, "improved": False}
    memory.logits["0"][0] = -0.5  # 0.38: likely not there
    run.train(4)
    assert run.sizes() == [2, 4]
    memory.remembered = {**memory.remembered, "best": None, "improved": False}
    memory.sleepers.fallen = {"2": 1}
    memory.logits["0"][0] = 3.0
    run.train(4)
    assert run.sizes() == [3, 4]


def test_new_units_come_where_none_sleep():
    method = esp.grow.NPN(Stages(k=1.0, start=0.0, until=1.0), None, rate=1e-9, fill=2.0)
    run = Plain(method, total=200).train(5)
    assert run.sizes() == [7, 6]
    assert run.session.events[0].contract == "exact"
    strict = replace(method, memory=replace(method.memory, fresh=False))
    assert Plain(strict, total=200).train(5).sizes() == [6, 5]


def test_growing_asks_for_held_out_batches():
    run = Plain(None)
    session = esp.Session(run.structure, [esp.grow.NPN()], loss=run.loss, total_steps=10)
    with pytest.raises(MethodError, match="held-out loss; give the session probe"):
        session.loss(run.batch)


# --- Sleep -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "axis", "unit"), [("mlp", "0", 3), ("lenet", "conv2", 2), ("resnet", "conv1", 4)])
def test_sleep_and_wake_is_a_round_trip_to_the_bit(name, axis, unit):
    from espalier.edit.plan import grow_plan
    from espalier.parts.gates.dormant import Sleeper, values_of

    torch.manual_seed(0)
    model, example = ZOO[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    structure = esp.attach(model, example, optimizer=optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(*example).square().mean().backward()
        optimizer.step()
    ids = {one: list(range(100 * at, 100 * at + structure.axes[one].size)) for at, one in enumerate(structure.axes)}
    size = structure.axes[axis].size
    before = copy.deepcopy(model.state_dict())
    moments = {key: copy.deepcopy(state) for key, one in model.named_parameters() for state in [optimizer.state[one]]}
    slots = structure.axes[axis].slots
    sleeper = Sleeper.from_state(kept(structure, axis, [unit], ids)[unit].to_state())
    structure.prune(axis, [unit])
    order = [one for one in range(size) if one != unit] + [unit]
    ids[axis] = [ids[axis][one] for one in order]
    preview = structure.preview(grow_plan({axis: 1}))
    structure.grow(axis, by=1, values=values_of([sleeper], preview.after, ids, preview.tensors))
    give_state_back(structure, [sleeper], ids)

    def reordered(key: str, tensor: Tensor) -> Tensor:
        for slot in slots:
            if slot.tensor == key:
                at = [place for one in order for place in slot.index([one])]
                fixed = [place for place in range(tensor.shape[slot.dim]) if place not in at]
                assert not fixed
                source = torch.empty(len(at), dtype=torch.int64)
                now = structure.axes[axis].slots[slots.index(slot)]
                source[[place for one in range(size) for place in now.index([one])]] = torch.tensor(at)
                tensor = tensor.index_select(slot.dim, source)
        return tensor

    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, reordered(key, before[key])), key
    for key, one in model.named_parameters():
        for what, value in optimizer.state[one].items():
            assert torch.equal(value, reordered(key, moments[key][what]) if value.dim() else moments[key][what]), key


def test_what_came_meanwhile_starts_as_surgery_starts_it():
    from espalier.edit.plan import grow_plan
    from espalier.parts.gates.dormant import values_of

    model = network()
    structure = esp.attach(model, batch_of()[0])
    ids = {"0": list(range(6)), "2": list(range(10, 15)), "4": [20, 21], "0:input": [30]}
    ids = {axis: ids.get(axis, [100 + at]) for at, axis in enumerate(structure.axes)}
    for axis in structure.axes:
        ids[axis] = [*ids[axis], *range(1000, 1000 + structure.axes[axis].size - len(ids[axis]))]
    weight = model[2].weight.detach().clone()
    sleeper = kept(structure, "0", [1], ids)[1]
    structure.prune("0", [1])
    structure.prune("2", [0])
    structure.grow("2", by=1)
    ids = {**ids, "0": [0, 2, 3, 4, 5, 1], "2": [11, 12, 13, 14, 99]}
    preview = structure.preview(grow_plan({"0": 1}))
    found = values_of([sleeper], preview.after, ids, preview.tensors)["2.weight"]
    assert torch.equal(found[:4, 5], weight[1:, 1])
    assert found[4, 5] == 0  # what reads it in a unit that did not know it


# --- States ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grows", [False, True])
def test_a_run_that_is_interrupted_goes_on_to_the_same_bits(grows, tmp_path: Path):
    def method() -> Method:
        stages = Stages(k=1.0, start=0.1, until=0.7, rise=5.0)
        if grows:
            return esp.grow.NPN(stages, ExpectedCost(0.1), awake={"0": 2, "2": 2}, rate=0.02)
        return esp.prune.NPN(stages, ExpectedCost(1.0), rate=0.05, low=0.3, patience=2, begin=0.6)

    through = Plain(method(), total=60).train(26)
    esp.save(through.structure, tmp_path)
    state = json.dumps(through.session.state_dict())
    through.train(34)
    rest = Plain(None)
    rest.model = network()
    rest.optimizer = torch.optim.Adam(rest.model.parameters(), lr=1e-2)
    rest.structure = esp.load(tmp_path, rest.model, rest.batch[0], optimizer=rest.optimizer)
    rest.session = esp.Session(rest.structure, [method()], loss=rest.loss, probe=[batch_of(16)], total_steps=60, seed=5)
    rest.session.load_state_dict(json.loads(state))
    rest.train(34)
    assert rest.sizes() == through.sizes()
    assert len(through.session.events) > 0
    for one, other in zip(rest.model.parameters(), through.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert rest.session.state_dict()["methods"] == through.session.state_dict()["methods"]
    damaged = json.loads(json.dumps(rest.session.state_dict()))
    table = damaged["methods"][0]["memory"]["table"]
    table["low"]["0"] = table["logits"]["0"] = [1.0]
    with pytest.raises(CheckpointError, match="no state of a session"):
        rest.session.load_state_dict(damaged)


@pytest.mark.parametrize(
    "method",
    [esp.prune.NPN(), esp.grow.NPN(Stages(), PerUnit({"fc*": 0.1}), awake={"fc1": 3}, function=HardSigmoid())],
    ids=["prune", "grow"],
)
def test_the_method_is_a_frozen_value_whose_text_evaluates_to_it(method):
    parts = (
        amount,
        clock,
        estimators,
        expected,
        functions,
        memory,
        init,
        kinds,
        planning,
        plastic,
        recovery,
        schedule,
        select,
        settings,
        stages,
        waking,
    )
    names = {name: value for part in parts for name, value in vars(part).items()}
    assert eval(repr(method), {**names, "Method": Method}) == method
    assert hash(method) == hash(replace(method))


class Spread(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.prod(-1, keepdim=True)


def test_wrong_settings_say_so():
    model, example = nn.Sequential(nn.Linear(3, 6), Spread(), nn.Linear(6, 2)), (torch.randn(4, 3),)
    structure = esp.attach(model, example, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    session = esp.Session(structure, [esp.prune.NPN(axes=["0"])], loss=lambda m, b: m(*b).sum(), total_steps=5)
    with pytest.raises(MethodError, match=r"0 cannot have gates: is reduced"):
        session.loss(example)
    with pytest.raises(MethodError, match="judged"):
        esp.prune.NPN(judged="soft")
    with pytest.raises(MethodError, match="rate"):
        esp.prune.NPN(rate=0.0)
    with pytest.raises(MethodError, match="low"):
        esp.prune.NPN(low=0.7)
    with pytest.raises(MethodError, match="begin: expected a higher probability than gates have at k=0"):
        esp.prune.NPN(function=Sigmoid(rest=0.96))
    with pytest.raises(MethodError, match="rest: expected a probability between 0 and 1, found 1"):
        Sigmoid(rest=1)
    with pytest.raises(MethodError, match="patience"):
        GateSettings(patience=0)
    run = Plain(None)
    with pytest.raises(MethodError, match="both evaluate the loss"):
        esp.Session(run.structure, [esp.prune.NPN(), esp.grow.NPN()], loss=run.loss, total_steps=9)


@pytest.mark.parametrize("name", ["lenet", "resnet", "vit", "hf_llama", "densenet"])
def test_networks_of_every_kind_train_under_gates(name):
    method = esp.prune.NPN(
        Stages(k=1.0, start=0.0, until=0.7), ExpectedCost(20.0), rate=0.2, low=0.3, patience=1, begin=0.6
    )
    run: Run = start(name, [method], 20)
    before = run.structure.cost().parameters
    run.train(20, epoch=2)
    assert run.structure.cost().parameters < before
    assert all(bool(one.isfinite().all()) for one in run.structure.model.parameters())
    assert {event.action for event in run.session.events} == {"prune"}


def test_proposing_changes_nothing():
    run = Plain(esp.prune.NPN(ALWAYS, None, patience=1)).train(3)
    run.memory.logits["0"][:3] = -5.0
    run.train(1)
    run.memory.table.end_epoch(0.1)
    before, state = snapshot(run.model, run.optimizer, run.structure), json.dumps(run.session.state_dict())
    context = run.session._context(run.session._gated)
    goal = run.session._controller.goal(run.session._gated, run.session._clock(), context.axes)
    plan = run.session._gated.method.propose(context, goal)
    assert [(one.axis, one.remove, one.add) for one in plan.edits] == [("0", (0, 1, 2), 0)]
    assert differences(before, snapshot(run.model, run.optimizer, run.structure)) == []
    assert json.dumps(run.session.state_dict()) == state
