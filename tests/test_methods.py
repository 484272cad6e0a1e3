"""What holds of every method in the registry, those of later files included, without a line of test for each."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any, get_type_hints

import pytest
import torch
from effort import in_turn
from loops import start

import espalier as esp
from espalier import method as registry
from espalier.errors import MethodError
from espalier.method import Entry, Method, find, methods, register
from espalier.methods import common
from espalier.parts import budget, clock, init, score
from espalier.parts.goal import Direction, Goal
from espalier.parts.score import Equal
from espalier.parts.timing import amount, recovery, schedule, trigger, trigger_losses, trigger_network
from espalier.parts.units import folded, penalty, select, taylor, threshold, unit_scale
from espalier.train.settings import build

PARTS = (
    amount, budget, clock, folded, init, penalty, recovery, schedule, score, select, taylor, threshold, trigger,
    trigger_losses, trigger_network, unit_scale,
)  # fmt: skip
NAMES = {"Method": Method} | {name: value for part in PARTS for name, value in vars(part).items()}
REFUSED = {("tiny", "llama_by_hand"): "weights make its units together"}
"""Methods that find nothing to do on a network, and why."""
NETWORKS = ["mlp", "lenet", "vgg_batch_norm", "resnet", "vit", "llama_by_hand"]


def every_entry(by_budget: bool = True) -> list[Any]:
    """Methods of units; those whose gates decide (tests/test_npn.py) only if asked for."""
    return [
        pytest.param(entry, id=f"{entry.method.direction}-{entry.method.name}")
        for entry in methods(level="units")
        if entry.by_budget or not by_budget
    ]


def names_of(direction: Direction) -> list[str]:
    return [entry.method.name for entry in methods(direction, "units") if entry.by_budget]


def quick(entry: Entry) -> Method:
    """The method with its defaults, acting every four steps from the start."""
    return entry.make(every=esp.steps(4), start=0.0, until=1.0)


@pytest.mark.parametrize("entry", every_entry())
def test_a_method_is_a_frozen_value_whose_text_evaluates_to_it(entry: Entry) -> None:
    method = quick(entry)
    own = [vars(import_module(type(part).__module__)) for part in (method.score, method.init)]
    assert eval(repr(method), {**own[0], **own[1], **NAMES}) == method
    assert method == quick(entry)
    assert method != entry.method
    hash(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("entry", every_entry(by_budget=False))
def test_a_method_says_where_it_comes_from(entry: Entry) -> None:
    method = entry.method
    assert method.paper
    assert method.description
    assert "\n" not in method.description
    assert (entry.make.__doc__ or "").strip()
    assert find(method.direction, method.name) is entry
    assert entry.make(**entry.defaults) == method
    assert entry.make in vars({"grow": esp.grow, "prune": esp.prune}[method.direction]).values()


@pytest.mark.filterwarnings("ignore:net2net adds fresh units")
@pytest.mark.parametrize(
    ("entry", "name"),
    [
        pytest.param(*one.values, name, id=f"{one.id}-{name}", marks=in_turn(row, column))
        for row, one in enumerate(every_entry())
        for column, name in enumerate(NETWORKS)
    ],
)
def test_a_method_works_on_every_kind_of_network(entry: Entry, name: str) -> None:
    """Valid plans in its direction, no surprises in training, nothing left behind."""
    run = start(name, [quick(entry)], total_steps=12)
    before, cost = run.sizes(), run.structure.cost()
    refused = REFUSED.get((entry.method.name, name))
    if refused is not None:
        with pytest.raises(MethodError, match=refused):
            run.train(12)
        return
    run.train(12)
    after, events = run.sizes(), run.session.events
    assert {event.action for event in events} == {entry.method.direction}
    sign = 1 if entry.method.direction == "grow" else -1
    assert all(sign * (after[axis] - before[axis]) >= 0 for axis in before)
    assert sign * (run.structure.cost().parameters - cost.parameters) > 0
    model = run.structure.model
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@pytest.mark.parametrize("entry", every_entry())
def test_a_method_repeats_with_its_seed(entry: Entry) -> None:
    first, second = (start("resnet", [quick(entry)], total_steps=8, seed=3).train(8) for _ in range(2))
    assert first.events() == second.events()
    for one, two in zip(first.structure.model.parameters(), second.structure.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("entry", every_entry())
def test_a_method_takes_the_shared_options(entry: Entry) -> None:
    """Budgets in parameters and FLOPs, amounts and axes, without which the command line could not use it."""
    target = {"grow": 1.5, "prune": 0.6}[entry.method.direction]
    run = start("mlp", [entry.make(budget=esp.Parameters(target, of="initial"), every=esp.steps(3))], total_steps=12)
    first = run.structure.cost().parameters
    run.train(12)
    assert 0.9 * target < run.structure.cost().parameters / first <= target
    some = start("mlp", [entry.make(amount=0.2, axes=["2"], every=esp.steps(3))], total_steps=12).train(12)
    assert {axis for event in some.session.events for axis in event.sizes} == {"2"}
    with pytest.raises(MethodError, match=r"exclude each other, so give one of them: budget=.* and amount=0\.2"):
        entry.make(budget=esp.FLOPs(100), amount=0.2)


@pytest.mark.parametrize(
    ("grow", "prune"),
    [
        pytest.param(grow, prune, marks=in_turn(row, column))
        for row, grow in enumerate(names_of("grow"))
        for column, prune in enumerate(names_of("prune"))
    ],
)
def test_methods_combine(grow: str, prune: str) -> None:
    run = start("lenet", build("constant", grow, prune, total_steps=24), total_steps=24)
    first = run.structure.cost().parameters
    run.train(24)
    assert {event.action for event in run.session.events} == {"grow", "prune"}
    assert run.structure.cost().parameters <= first


def test_shared_options_are_documented_and_complete() -> None:
    for build_method, options in ((common.pruning, common.Pruning), (common.growing, common.Growing)):
        own = {"name", "score", "paper", "description", "select", "penalty", "memory", "init"}
        arguments = set(build_method.__annotations__) - own - {"return"}
        assert arguments == set(get_type_hints(options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: esp.prune.Magnitude(axes="fc*"), r"write axes=\['fc\*'\]"),
        (lambda: esp.prune.Magnitude(min_fraction=2.0), "min_fraction from 0 to 1, found 2.0"),
        (lambda: esp.prune.Magnitude(scope="everywhere"), "scope: expected 'axis' or 'global', found 'everywhere'"),
        (lambda: esp.grow.Random(width=2, amount=0.5), "exclude each other"),
        (lambda: esp.grow.Random(width=-2), "Units: expected a number above 0, found -2"),
        (lambda: dataclasses.replace(esp.grow.Random(), direction="up"), "direction 'grow' or 'prune', found 'up'"),
    ],
)
def test_wrong_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make()


# --- Registry --------------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", registry._Registry())
    monkeypatch.setattr(registry, "entry_points", lambda group: ())


def mine(name: str = "mine") -> Method:
    """A method of one's own."""
    return common.growing(name, Equal(), paper="none", description="grows")


@pytest.mark.usefixtures("empty_registry")
def test_names_are_taken_once_per_direction() -> None:
    assert register(mine) is mine
    with pytest.raises(MethodError, match="there is a grow method 'mine' already, from test_methods"):
        register(mine)
    register(lambda: dataclasses.replace(mine(), direction="prune"))
    assert [(one.method.direction, one.method.name) for one in methods()] == [("grow", "mine"), ("prune", "mine")]
    assert len(methods("prune")) == 1
    with pytest.raises(MethodError, match="there is no grow method 'other'; expected one of: mine"):
        find("grow", "other")


@pytest.mark.usefixtures("empty_registry")
def test_what_is_no_method_is_refused() -> None:
    def needs_an_argument(width: float) -> Method:
        return esp.grow.Random(width=width)

    with pytest.raises(MethodError, match="needs_an_argument: every argument of a registered method needs a default"):
        register(needs_an_argument)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="expected a function that returns a Method, found 3"):
        register(lambda: 3)  # type: ignore[arg-type,return-value]


@pytest.mark.usefixtures("empty_registry")
def test_methods_of_other_packages_are_loaded_when_they_are_first_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    class Point(EntryPoint):
        def load(self) -> None:
            loaded.append(self.name)
            register(mine)

    monkeypatch.setattr(registry, "entry_points", lambda group: (Point("theirs", "their.module", group),))
    assert loaded == []
    assert [one.method.name for one in methods()] == ["mine"]
    assert find("grow", "mine").make is mine
    assert loaded == ["theirs"]


def test_goals_say_nothing_about_methods() -> None:
    """Parts know no method: the goal of an event is data."""
    assert {field.name for field in dataclasses.fields(Goal)} == {
        "direction", "sizes", "least", "most", "reference", "target", "caps", "multiples", "equal",
        "young", "weights", "layers", "spare",
    }  # fmt: skip
