"""Schedules in a running session: when events come, how much they change, where, and how all of it is resumed."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import Run, loss_of, start
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW
from zoo_small import ZOO

import espalier as esp
from espalier.bench import run as run_module
from espalier.bench.options import resolve
from espalier.bench.progress import Silent
from espalier.errors import CaptureError, EspalierWarning, MethodError
from espalier.method import Method
from espalier.parts.budget import Polynomial, Units
from espalier.parts.clock import Steps
from espalier.parts.goal import Cap, Goal, Scores
from espalier.parts.score import spared
from espalier.parts.timing.amount import Ramp, Shape
from espalier.parts.timing.trigger import Answer, State, Trigger, View

SHAPES = get_args(Shape)


@dataclass(frozen=True)
class At(Trigger):
    """Holds at some steps, in some axes or in all."""

    steps: tuple[int, ...]
    axes: tuple[str, ...] | None = None

    def look(self, view: View, state: State, /) -> Answer:
        here = view.axes if self.axes is None else view.axes & frozenset(self.axes)
        return here if view.clock.step in self.steps else frozenset(), state


def happened(run: Run) -> list[tuple[int, str]]:
    return [(event.step, event.action) for event in run.session.events]


# --- How much --------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(SHAPES),
    st.integers(1, 10**9),
    st.integers(1, 10**9),
    st.integers(1, 40),
)
def test_ramps_are_monotone_and_end_at_the_budget(shape: Any, start: int, limit: int, events: int) -> None:
    direction = 1 if limit >= start else -1
    ramp = Ramp(Units(1), shape)
    way = [ramp.target((at + 1) / events, 0, start, limit, direction) for at in range(events)]  # type: ignore[arg-type]
    assert way[-1] == limit
    turned = [direction * one for one in [start, *way]]
    slack = 1  # what lies between two events is rounded down
    assert all(one <= other + slack for one, other in pairwise(turned))
    assert all(min(start, limit) - slack <= one <= max(start, limit) for one in way)


def test_shapes_are_the_formulas_that_they_are_named_after() -> None:
    def way(shape: Any, start: int, limit: int) -> list[int]:
        return [Ramp(Units(1), shape).target(at / 4, 0, start, limit, 1) for at in (1, 2, 3, 4)]

    assert way("exponential", 100, 1600) == [200, 400, 800, 1600]
    assert way("exponential", 1600, 100) == [800, 400, 200, 100]
    assert way("linear", 0, 400) == [100, 200, 300, 400]
    assert way("cosine", 0, 1000) == [146, 500, 853, 1000]
    assert way("cubic", 0, 64) == [37, 56, 63, 64]
    assert way("constant", 0, 64) == [64] * 4


def test_widths_grow_by_the_same_factor_in_exponential_stages() -> None:
    method = esp.grow.Random(width=4.0, shape="exponential", every=esp.steps(4), start=0.0, until=1.0, max_events=4)
    run = start("vgg_batch_norm", [method], total_steps=30)
    widths = [sum(run.sizes()[name] for name in run.session.state_dict()["methods"][0]["axes"])]
    for event in run.train(30).session.events:
        widths.append(widths[-1] + sum(after - before for before, after in event.sizes.values()))
    assert len(widths) == 5
    assert widths[-1] == 4 * widths[0]
    assert all(other / one == pytest.approx(2**0.5, rel=0.03) for one, other in pairwise(widths))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scope", ["axis", "global"])
def test_growth_never_exceeds_its_budget_whatever_the_shape_and_scope(shape: Any, scope: Any) -> None:
    budget = esp.Parameters(1.6, of="initial")
    method = esp.grow.Random(budget=budget, shape=shape, scope=scope, every=esp.steps(3), start=0.0)
    run = start("lenet", [method], total_steps=20)
    limit = 1.6 * run.structure.cost().parameters
    run.train(20)
    costs = [event.cost_after.parameters for event in run.session.events]
    assert costs == sorted(costs)
    assert limit * 0.97 < costs[-1] <= limit


# --- When ------------------------------------------------------------------------------------------------------------


def test_events_come_when_the_trigger_holds_and_only_then() -> None:
    method = esp.grow.Random(amount=0.1, every=esp.steps(2), start=0.0, until=1.0, when=At((6, 7, 14)))
    assert happened(start("mlp", [method], total_steps=20).train(20)) == [(6, "grow"), (14, "grow")]


def test_a_trigger_is_asked_only_every_so_often_and_not_while_it_cools_down() -> None:
    asked: list[int] = []

    class Noted(At):
        def look(self, view: View, state: State, /) -> Answer:
            asked.append(view.clock.step)
            return super().look(view, state)

    method = esp.grow.Random(
        amount=0.1, every=esp.steps(2), start=esp.steps(4), until=1.0, when=Noted((6, 8, 15)), cooldown=esp.steps(7)
    )
    run = start("mlp", [method], total_steps=20).train(20)
    assert happened(run) == [(6, "grow"), (15, "grow")]
    assert asked == [4, 6, 13, 15]
    in_epochs = replace(method, schedule=replace(method.schedule, cooldown=esp.epochs(1), when=At(tuple(range(99)))))
    assert happened(start("mlp", [in_epochs], total_steps=32).train(32)) == [(step, "grow") for step in (4, 11, 21, 31)]


def test_a_schedule_ends_with_its_largest_number_of_events_and_at_its_budget() -> None:
    method = esp.grow.Random(width=1.5, every=esp.steps(2), start=0.0, until=1.0, max_events=3)
    run = start("vgg_batch_norm", [method], total_steps=40)
    before = run.sizes()
    run.train(40)
    assert happened(run) == [(2, "grow"), (4, "grow"), (6, "grow")]
    grown = {name for event in run.session.events for name in event.sizes}
    assert all(run.sizes()[name] == round(1.5 * before[name]) for name in grown)


def test_a_pruner_with_a_trigger_meets_its_budget_at_its_last_time_in_any_case() -> None:
    method = esp.prune.Random(
        budget=esp.Parameters(0.6, of="initial"), every=esp.steps(4), start=0.0, until=0.8, when=At((8,))
    )
    run = start("mlp", [method], total_steps=30)
    first = run.structure.cost().parameters
    run.train(30)
    assert happened(run) == [(8, "prune"), (24, "prune")]
    assert run.session.events[0].cost_after.parameters > 0.6 * first
    assert run.structure.cost().parameters <= 0.6 * first


def test_growth_stops_when_its_stop_holds() -> None:
    method = esp.grow.Random(
        amount=0.1, every=esp.steps(2), start=0.0, until=1.0, stop=esp.Reached(esp.Units(1.3, of="initial"))
    )
    run = start("mlp", [method], total_steps=40)
    first = sum(run.sizes()[name] for name in ("0", "2"))
    run.train(40)
    assert [action for _, action in happened(run)][-1] == "stopped"
    assert [action for _, action in happened(run)].count("grow") >= 2
    assert int(1.3 * first) <= sum(run.sizes()[name] for name in ("0", "2")) < 1.5 * first
    assert "Reached" in run.session.events[-1].why


def test_plateaus_of_the_training_loss_and_of_the_metric_start_events() -> None:
    losses = iter([*[1.0] * 7, *[0.5] * 30])

    def loss(model: Any, batch: Any) -> Any:
        return loss_of(model, batch) * 0 + (next(losses) if torch.is_grad_enabled() else 1.0)

    method = esp.grow.Random(amount=0.1, every=esp.steps(2), start=0.0, until=1.0, when=esp.Plateau("loss", patience=2))
    run = start("mlp", [method], total_steps=20, loss=loss).train(20)
    # means of two steps: 1 1 1, the second without improvement at step 6; then anew: .75 .5 .5 .5
    assert happened(run)[:2] == [(6, "grow"), (14, "grow")]
    by_metric = esp.grow.Random(amount=0.1, every=esp.epochs(1), start=0.0, until=1.0, when=esp.Plateau(patience=2))
    assert happened(start("mlp", [by_metric], total_steps=70).train(70)) == [(31, "grow"), (61, "grow")]


def test_only_losses_of_training_are_heard_and_as_they_were() -> None:
    method = esp.grow.Random(amount=0.1, every=esp.steps(9), start=0.0, when=esp.Plateau("loss"))
    run = start("mlp", [method], total_steps=20)
    loss = run.session.loss(run.batch)
    expected = loss.item()
    loss /= 4  # as for accumulated gradients
    with torch.no_grad():
        run.session.loss(run.batch)
    watch = run.session.state_dict()["methods"][0]["watch"]
    assert (watch["sum"], watch["count"]) == (expected, 1)


def test_a_trigger_that_names_axes_changes_only_these() -> None:
    method = esp.grow.Random(
        amount=0.25, every=esp.steps(2), start=0.0, until=1.0, when=At((2, 6), ("0",)) | At((4, 6), ("2",))
    )
    run = start("mlp", [method], total_steps=8).train(8)
    assert [event.sizes for event in run.session.events] == [
        {"0": (12, 15)},
        {"2": (9, 11)},
        {"0": (15, 18), "2": (11, 14)},
    ]


def test_axes_grow_by_their_own_effective_rank() -> None:
    method = esp.grow.Random(
        amount=0.1, every=esp.steps(3), start=0.0, until=1.0, when=esp.EffectiveRank(0.5), max_events=2
    )
    run = start("mlp", [method], total_steps=20).train(20)
    assert happened(run) == [(6, "grow"), (9, "grow")]  # the first look takes the reference


def test_masks_that_no_longer_change_start_pruning() -> None:
    early = esp.prune.Magnitude(
        budget=esp.Parameters(0.7, of="initial"), shape="constant", every=esp.steps(2), start=0.0, until=1.0,
        when=esp.Stable(looks=3, tolerance=1.0), max_events=1,
    )  # fmt: skip
    run = start("mlp", [early], total_steps=20).train(20)
    assert happened(run) == [(6, "prune")]
    growing = esp.grow.Random(amount=0.1, every=esp.steps(2), start=0.0, when=esp.Stable() | At((4,)))
    with pytest.raises(MethodError, match="give it a score="):
        start("mlp", [growing], total_steps=20)


def test_an_axis_without_readers_has_no_effective_rank() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).sum(1, keepdim=True)

    model = Summed()
    structure = esp.attach(model, torch.zeros(2, 4), optimizer=AdamW(model.parameters()))
    prune = esp.prune.Random(amount=0.1, when=esp.EffectiveRank().held(2) & At((4,)))
    with pytest.raises(CaptureError, match="first: no weights read its activations"):
        esp.Session(structure, [prune], loss=loss_of, total_steps=9)


def test_a_look_is_no_event() -> None:
    method = esp.prune.Magnitude(every=esp.steps(2), start=0.0, until=1.0, when=esp.Stable(looks=2) & At((10,)))
    run = start("mlp", [method], total_steps=20).train(7)
    state = run.session.state_dict()["methods"][0]
    assert (state["start"], state["reference"], state["fired"], state["passed"]) == (None, {}, 0, 3)
    cost = run.structure.grow("0", by=4).cost_after.flops
    run.train(3)  # the edit has the masks compared anew
    assert run.session.events[0].cost_before.flops == cost
    assert run.session.state_dict()["methods"][0]["start"] == cost


def test_what_a_schedule_asks_for_has_to_be_there() -> None:
    for wrong in (
        esp.grow.Random(when=esp.Gap(below=0.1)),
        esp.grow.Random(stop=esp.Futile("probe")),
        esp.grow.Random(accept=esp.Accept()),
    ):
        with pytest.raises(MethodError, match=r"random: .* asks for the held-out loss; give the session probe="):
            start("mlp", [wrong], total_steps=20)
    model, batch = ZOO["mlp"]()
    structure = esp.attach(model, batch, optimizer=AdamW(model.parameters()), undo_limit=0)
    with pytest.raises(MethodError, match="attach with undo_limit above 0"):
        esp.Session(structure, [esp.grow.Random(accept=esp.Accept())], loss=loss_of, probe=[batch], total_steps=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"when": 3}, "when: expected a trigger such as"),
        ({"stop": "plateau"}, "stop: expected a trigger"),
        ({"cooldown": esp.steps(3)}, "cooldown is for schedules with a trigger"),
        ({"cooldown": 3, "when": esp.Plateau()}, r"cooldown: expected steps\(n\), epochs\(n\) or None, found 3"),
        ({"max_events": 0}, "max_events: expected a whole number of at least 1, found 0"),
        ({"recovery": 3}, "random: recovery: found 3"),
        ({"accept": True}, "random: accept: found True"),
        ({"grace": 5}, "random: grace: found 5"),
        ({"shape": "round"}, "expected shape= one of constant, linear, cubic, cosine, exponential, found 'round'"),
    ],
)
def test_wrong_arguments_are_named(options: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        esp.prune.Random(**options)


def test_a_trigger_that_never_holds_is_reported() -> None:
    run = start("mlp", [esp.grow.Random(every=esp.steps(2), when=At(()))], total_steps=12)
    with pytest.warns(EspalierWarning, match="random never acted"):
        run.train(12)


# --- Young units -----------------------------------------------------------------------------------------------------


def test_young_units_are_not_pruned_before_their_time() -> None:
    grow = esp.grow.Random(amount=0.5, every=esp.steps(100), start=esp.steps(4), until=1.0)
    prune = esp.prune.Magnitude(amount=0.2, every=esp.steps(2), start=esp.steps(5), until=1.0, grace=esp.steps(5))
    run = start("mlp", [grow, prune], total_steps=12)
    new = {}
    for _ in range(12):
        run.train(1)
        new[run.session.steps_done] = {name: int((run.structure.births[name] == 4).sum()) for name in ("0", "2")}
    assert new[4] == new[8] == {"0": 6, "2": 4}  # four steps old
    assert sum(new[12].values()) < 10
    without = start("mlp", [grow, replace(prune, grace=None)], total_steps=12).train(8)
    assert sum(int((one == 4).sum()) for one in without.structure.births.values()) < 10


def test_an_axis_keeps_at_least_its_young_units() -> None:
    goal = Goal("prune", {"a": 4}, {"a": 2}, {"a": 4}, {"a": 4.0}, Cap(Polynomial({}), 0), young={"a": (1, 3)})
    values = spared(Scores({"a": torch.tensor([5.0, 1.0, 7.0, 2.0])}), goal).values["a"]
    assert values.tolist()[::2] == [5.0, 7.0]
    assert values[1] == values[3] > 7.0
    assert values[1] == pytest.approx(7.0)


# --- Interrupted and resumed -----------------------------------------------------------------------------------------


def everything(tolerance: float) -> list[Method]:
    """Methods that use all that a session has to remember."""
    grow = esp.grow.Random(
        amount=0.15,
        every=esp.steps(2),
        start=0.0,
        until=0.9,
        when=(esp.Plateau("loss", least=0.2, patience=2) | esp.EffectiveRank(0.9).held(2)).until(~At(tuple(range(99)))),
        cooldown=esp.steps(3),
        stop=esp.Futile("probe", events=4, least=0.0) & esp.Reached(esp.Units(3.0, of="initial")),
        recovery=esp.Recovery(warm=Steps(5), rates="norm", calibrate=2),
        accept=esp.Accept(0.5),
    )
    prune = esp.prune.Magnitude(
        amount=0.1,
        every=esp.steps(1),
        start=esp.steps(6),
        until=1.0,
        when=esp.Stable(looks=2, tolerance=0.4) & ~esp.Gap(above=100.0),
        max_events=4,
        recovery=esp.Recovery(calibrate=1),
        accept=esp.Accept(tolerance),
        grace=esp.steps(4),
    )
    return [grow, prune]


def probes(name: str) -> list[Any]:
    _, batch = ZOO[name]()
    return [tuple(one + 0.1 for one in batch), tuple(one * 1.2 for one in batch)]


@pytest.mark.parametrize(("name", "tolerance"), [("mlp", 0.0), ("mlp_batch_norm", 0.05)])
def test_a_run_interrupted_at_any_step_goes_on_to_the_same_bits(name: str, tolerance: float, tmp_path: Path) -> None:
    total, methods = 26, everything(tolerance)
    through = start(name, methods, total_steps=total, probe=probes(name))
    states, random = [], []
    for step in range(total):
        esp.save(through.structure, tmp_path / f"{step}")
        states.append(json.dumps(through.session.state_dict(), allow_nan=False))
        random.append(torch.get_rng_state())
        through.train(1)
    actions = {event.action for event in through.session.events}
    assert {one["normed"] != [] for one in json.loads(states[-1])["stages"]} == {True}
    assert {"grow", "prune", "rejected"} <= actions
    assert len(through.session.events) > 6
    for step in range(1, total, 1 if name == "mlp" else 4):
        model, batch = ZOO[name]()
        optimizer = AdamW(model.parameters(), lr=1e-2)
        structure = esp.load(tmp_path / f"{step}", model, batch, optimizer=optimizer)
        session = esp.Session(structure, methods, loss=loss_of, total_steps=total, probe=probes(name))
        session.load_state_dict(json.loads(states[step]))
        torch.set_rng_state(random[step])
        rest = Run(structure, optimizer, batch, session).train(total - step)
        assert rest.events() == through.events(), step
        for one, two in zip(structure.model.state_dict().values(), through.structure.model.state_dict().values(),
                            strict=True):  # fmt: skip
            assert torch.equal(one, two), step
        end, same = rest.session.state_dict(), through.session.state_dict()
        for key in end.keys() - {"events"}:
            assert json.dumps(end[key]) == json.dumps(same[key]), (step, key)


@pytest.mark.parametrize("steps", [[9], [12, 1, 10]], ids=str)
def test_a_run_of_the_command_line_resumes_with_all_of_it(
    steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through `espalier run --resume`, in which random numbers, data and learning rates go on as well."""
    monkeypatch.setattr(run_module, "build_methods", lambda *_, **__: everything(0.02))
    options = resolve({"task": "digits", "width": 0.125, "epochs": 3, "batch_size": 128, "lr": 2e-2, "static": False})
    run_module.start(options, tmp_path / "through", Silent())
    assert len(recorded(tmp_path / "through", "event")) > 4
    with pytest.raises(KeyboardInterrupt):
        run_module.start(options, tmp_path / "parts", InterruptAfter(steps[0]))
    for count in steps[1:]:
        with pytest.raises(KeyboardInterrupt):
            run_module.resume(tmp_path / "parts", {}, InterruptAfter(count))
    run_module.resume(tmp_path / "parts", {}, Silent())
    for kind in ("event", "epoch"):
        assert recorded(tmp_path / "parts", kind) == recorded(tmp_path / "through", kind)
    one, two = (load_file(tmp_path / name / "network" / "network.safetensors") for name in ("through", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


class InterruptAfter(Silent):
    """Presses Ctrl-C after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, step: int) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


def recorded(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{**one, "seconds": 0} for one in found if one["kind"] == kind]
