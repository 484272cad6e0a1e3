"""The contract that every method of the registry keeps, on every kind of network: a method is tested by existing."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blocks import BLOCKS
from effort import in_turn
from loops import loss_of
from snapshots import differences, snapshot
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from zoo_small import ZOO

import espalier as esp
from espalier.edit.plan import Plan
from espalier.measure.stats import without_a_trace
from espalier.method import Entry, Method, methods
from espalier.parts.budget import Budget
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context
from espalier.structure import Structure

# a method says where it has to do something else, such as no copies under dropout
pytestmark = pytest.mark.filterwarnings("ignore::espalier.errors.EspalierWarning")
NETWORKS = ["mlp", "lenet", "vgg_batch_norm", "resnet", "vit"]
SAMPLES = 24
TOTAL = 9
BUDGETS: Mapping[str, tuple[Budget, ...]] = {
    "grow": tuple(kind(1.6, of="initial") for kind in (esp.Parameters, esp.FLOPs, esp.Units)),
    "prune": tuple(kind(0.6, of="initial") for kind in (esp.Parameters, esp.FLOPs, esp.Units)),
}
Batch = tuple[Tensor, ...]


def cases(direction: Any = None) -> list[Any]:
    """Methods of one direction. Those whose gates decide are in tests/test_npn.py."""
    return [
        pytest.param(
            (entry, name), id=f"{entry.method.direction}-{entry.method.name}-{name}", marks=in_turn(row, column)
        )
        for row, entry in enumerate(methods(direction, "units"))
        for column, name in enumerate(NETWORKS)
        if entry.by_budget
    ]


@pytest.fixture(scope="module", autouse=True)
def _collector_sees_only_what_is_new() -> Iterator[None]:
    """What was imported and collected before is set aside, so that looking for tensors is fast."""
    Training("mlp", once(methods("prune")[0])).train(TOTAL)  # imports what is imported late
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Asked(Exception):
    """What a method was asked."""

    def __init__(self, context: Context, goal: Goal) -> None:
        self.context, self.goal = context, goal


class Asking:
    """A score that ends the event at which it is called."""

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        raise Asked(context, goal)


class Known:
    """Scores that were found before."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        return self._scores


class Training:
    """A network that is trained on other batches at every step."""

    def __init__(
        self, name: str, method: Method, *, double: bool = False, seed: int = 0, kept: Path | None = None
    ) -> None:
        torch.manual_seed(1)
        model, example = BLOCKS[name].make() if name in BLOCKS else ZOO[name]()
        assert isinstance(example, tuple)
        generator = torch.Generator().manual_seed(7)
        if double:
            model, example = model.double(), tuple(one.double() for one in example)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0  # its masks would be drawn for other sizes
        self.batches: list[Batch] = [
            tuple(torch.randn(SAMPLES, *one.shape[1:], generator=generator, dtype=one.dtype) for one in example)
            for _ in range(TOTAL + 12)
        ]
        # without weight decay what gets no gradient does not move
        optimizer: Optimizer = SGD(model.parameters(), 0.01, 0.9) if double else AdamW(model.parameters(), 1e-2)
        if kept is None:
            self.structure = esp.attach(model, example, optimizer=optimizer)
        else:
            self.structure = esp.load(kept, model, example, optimizer=optimizer)
        self.optimizer = optimizer
        self.session = self.start(method, seed)
        torch.manual_seed(0)

    def start(self, method: Method, seed: int = 0) -> esp.Session:
        return esp.Session(
            self.structure, [method], loss=loss_of, probe=self.batches[-3:], total_steps=TOTAL, seed=seed
        )

    def train(self, steps: int) -> Training:
        for _ in range(steps):
            loss = self.session.loss(self.batches[self.session.steps_done])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.session.step()
        return self

    def asked(self) -> tuple[Context, Goal]:
        """What the method is asked at the event of the next step, which does not happen."""
        with pytest.raises(Asked) as asked:
            self.train(1)
        return asked.value.context, asked.value.goal

    def outputs(self) -> dict[str, Tensor]:
        """In train and in eval mode."""
        model, found = self.structure.model, {}
        with without_a_trace(model):
            for mode in ("train", "eval"):
                model.train(mode == "train")
                found[mode] = model(*self.batches[-1])
        return found


def once(entry: Entry, after: int = 3, **options: Any) -> Method:
    """The method with its defaults, acting once, after so many steps."""
    at = esp.steps(after)
    return entry.make(every=at, start=at, until=at, **options)


def asking(method: Method) -> Method:
    """A method that is asked what the given one would be asked."""
    return dataclasses.replace(method, score=Asking())


def often(entry: Entry) -> Method:
    """The method with its defaults, acting twice."""
    return entry.make(every=esp.steps(4), start=0.0, until=1.0)


def drawn_plan(method: Method, context: Context, goal: Goal) -> tuple[Plan, bool]:
    """What a method proposes, and whether it drew random numbers of its own for it."""
    names: list[str] = []

    class Watched(Context):
        def generator(self, name: str) -> torch.Generator:
            names.append(name)
            return super().generator(name)

    fields = {one.name: getattr(context, one.name) for one in dataclasses.fields(context)}
    return method.propose(Watched(**fields), goal), bool(names)


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def same_plan(one: Plan, other: Plan) -> bool:
    """Bitwise, but for the seed."""
    alike = one.edits == other.edits and one.interface == other.interface
    return alike and same_tensors(one.values, other.values) and same_tensors(one.deltas, other.deltas)


def living_tensors() -> list[Tensor]:
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, Tensor)]


def other_random_states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, keys.tolist(), rest


# --- Proposing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases())
def test_proposing_is_valid_repeats_and_leaves_nothing_behind(case: tuple[Entry, str]) -> None:
    entry, name = case
    method = once(entry)
    run = Training(name, asking(method)).train(2)
    context, goal = run.asked()
    structure = run.structure
    before, states = snapshot(structure.model, run.optimizer, structure), other_random_states()
    living = len(living_tensors())

    plan, drew = drawn_plan(method, context, goal)
    after = snapshot(structure.model, run.optimizer, structure)
    assert differences(before, after) == []
    assert other_random_states() == states
    assert {edit.axis for edit in plan.edits} <= set(context.axes)
    assert all(bool(edit.remove) == (entry.method.direction == "prune") for edit in plan.edits)
    assert all(bool(edit.add) == (entry.method.direction == "grow") for edit in plan.edits)
    structure.check(plan)

    assert same_plan(plan, drawn_plan(method, context, goal)[0])
    other, _ = drawn_plan(method, dataclasses.replace(context, seed=context.seed + 1), goal)
    assert (plan.seed, other.seed) == (context.seed, context.seed + 1)
    # what surgery draws for ghosts, and masks of dropout while they are looked at, follow the seed as well
    assert drew or entry.method.direction == "grow" or same_plan(plan, other)
    if entry.method.name == "random":
        assert not same_tensors(structure.preview(plan).tensors, structure.preview(other).tensors)
    tensors = [*plan.values.values(), *plan.deltas.values()]
    assert [one for one in tensors if one.requires_grad] == []
    assert any(edit.remove or edit.add for edit in plan.edits)

    del plan, other, tensors, before, after, context, goal
    assert len(living_tensors()) <= living


@pytest.mark.parametrize("case", cases())
def test_budgets_are_kept_to_the_cheapest_unit(case: tuple[Entry, str]) -> None:
    """Growing never exceeds one, pruning reaches it, and the last unit could not have come, or stayed."""
    entry, name = case
    direction = entry.method.direction
    run = Training(name, once(entry)).train(1)
    for budget in BUDGETS[direction]:
        method = once(entry, after=1, budget=budget, shape="constant")
        run.session = run.start(asking(method))
        context, goal = run.asked()
        scores = method.score(context, goal)
        plan, candidates = dataclasses.replace(method, score=Known(scores)).propose(context, goal), scores.values
        sizes, able = dict(goal.sizes), set(goal.sizes)
        for edit in plan.edits:
            sizes[edit.axis] += edit.add - len(edit.remove)
            if edit.add == len(candidates[edit.axis]):
                able.remove(edit.axis)  # there was nothing left to add
        left = -goal.target.excess(sizes)
        changed = able & {edit.axis for edit in plan.edits}
        assert left >= 0, budget
        assert all(left < goal.target.cost.step(axis, sizes, 1) for axis in changed), budget
        assert all(goal.least[axis] <= size <= goal.most[axis] for axis, size in sizes.items())


# --- Events ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases())
def test_a_run_that_is_interrupted_goes_on_to_the_same_weights(case: tuple[Entry, str], tmp_path: Path) -> None:
    entry, name = case
    through = Training(name, often(entry), seed=3).train(5)
    esp.save(through.structure, tmp_path)
    state, dropout = json.dumps(through.session.state_dict()), torch.get_rng_state()
    through.train(TOTAL - 5)
    rest = Training(name, often(entry), seed=3, kept=tmp_path)
    rest.session.load_state_dict(json.loads(state))
    torch.set_rng_state(dropout)
    rest.train(TOTAL - 5)
    recorded = [[{**event.to_json(), "seconds": 0.0} for event in run.session.events] for run in (through, rest)]
    assert recorded[0] == recorded[1]
    assert {event.action for event in through.session.events} == {entry.method.direction}
    assert {event.step > 5 for event in through.session.events} == {False, True}
    first, second = through.structure.model.state_dict(), rest.structure.model.state_dict()
    assert same_tensors(first, second)


@pytest.mark.parametrize("case", cases())
def test_an_event_leaves_no_hooks_modes_gradients_or_graph(case: tuple[Entry, str]) -> None:
    entry, name = case
    earlier = living_tensors()  # held, so that no id is used again
    run = Training(name, once(entry)).train(2)
    model = run.structure.model
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms[:1]:
        norm.eval()  # as a user freezes one
    modes = [module.training for module in model.modules()]
    run.optimizer.zero_grad()
    run.session.loss(run.batches[2]).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    states = other_random_states(), torch.get_rng_state().tolist()
    run.session.step()
    assert [event.action for event in run.session.events] == [entry.method.direction]
    assert (other_random_states(), torch.get_rng_state().tolist()) == states
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
    assert entry.method.memory is not None or left == []


def known_tensors(run: Training) -> Iterable[Tensor]:
    structure = run.structure
    yield from (*structure.example, *structure.model.parameters(), *structure.model.buffers())
    for batch in run.batches:
        yield from batch
    for entries in run.optimizer.state.values():
        yield from (one for one in entries.values() if isinstance(one, Tensor))
    for edit in structure.history:
        yield from (*edit.plan.values.values(), *edit.plan.deltas.values())


@pytest.mark.parametrize("case", cases("grow"))
def test_growth_keeps_its_contract_and_new_units_learn(case: tuple[Entry, str]) -> None:
    entry, name = case
    run = Training(name, once(entry), double=True).train(2)
    session, structure = run.session, run.structure
    loss = session.loss(run.batches[2])
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    before = run.outputs()
    session.step()
    after = run.outputs()
    (edit,) = structure.history
    largest = max(float((after[mode] - before[mode]).abs().max()) for mode in before)
    if edit.contract == "exact":
        assert largest < 1e-9, edit.why
    else:
        assert largest > 0

    start = weights_of_new_units(structure)
    assert start
    gradients = weights_of_new_units(run.train(1).structure, gradients=True)
    end = weights_of_new_units(run.train(9).structure)
    assert all(bool(torch.isfinite(weights).all()) for weights in end.values())
    live = torch.cat([((end[axis] != start[axis]) & (gradients[axis] != 0)).any(dim=1) for axis in end])
    # a unit that no sample of the batch switches on has no gradient there
    assert float(live.double().mean()) > 0.5
    for axis, weights in end.items():
        assert not torch.equal(weights, start[axis]), axis
        assert bool(gradients[axis].any()), axis


def weights_of_new_units(structure: Structure, *, gradients: bool = False) -> dict[str, Tensor]:
    """Axis -> a row for each of its new units, with all weights that it has."""
    parameters, found = dict(structure.model.named_parameters()), {}
    for axis in structure.axes.values():
        new = [unit for unit, step in enumerate(structure.births[axis.name].tolist()) if step > 0]
        pieces = []
        for slot in axis.slots:
            tensor = parameters.get(slot.tensor)
            if new and tensor is not None:
                grad = tensor.grad
                assert not gradients or grad is not None
                values = (grad if gradients and grad is not None else tensor).detach()
                positions = torch.tensor([slot.positions[unit] for unit in new])
                picked = values.index_select(slot.dim, positions.flatten()).movedim(slot.dim, 0)
                pieces.append(copy.deepcopy(picked.reshape(len(new), -1)))
        if pieces:
            found[axis.name] = torch.cat(pieces, dim=1)
    return found
