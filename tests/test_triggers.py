"""Triggers against small histories made by hand, and the laws by which they combine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo_small import ZOO

import espalier as esp
from espalier.errors import CaptureError, MethodError
from espalier.measure.activations import effective_rank, grams
from espalier.parts import score
from espalier.parts.clock import Clock, Last
from espalier.parts.goal import Scores
from espalier.parts.score import Context, GroupNorm
from espalier.parts.timing import trigger, trigger_losses, trigger_network
from espalier.parts.timing.trigger import Answer, Metric, State, Trigger, View
from espalier.parts.timing.trigger_losses import Futile, Gap, Plateau
from espalier.parts.timing.trigger_network import EffectiveRank, Reached, Stable
from espalier.structure import Structure

AXES = ("0", "2")


def attached() -> Structure:
    model, example = ZOO["mlp"]()
    return esp.attach(model, example)


def context_of(structure: Structure, axes: tuple[str, ...] = AXES, batch: object = None) -> Context:
    return Context(structure, axes, 0, 0, 0.0, 7, lambda _: torch.zeros(()), batch, ())


@dataclass
class History:
    """Looks at a training, one after the other; between two looks all that is remembered goes through JSON."""

    trigger: Trigger
    context: Context = field(default_factory=lambda: context_of(attached()))
    state: State = None
    metrics: tuple[Metric, ...] = ()
    step: int = 0
    events: int = 0
    acted: Last | None = None

    def look(
        self, metric: float | None = None, loss: float | None = None, mode: str = "max", **more: object
    ) -> list[str]:
        self.step += 10
        epoch = len(self.metrics) + 1
        self.metrics = (*self.metrics, Metric(epoch, metric, mode))
        clock = Clock(self.step, epoch, self.step, 1000)
        view = View(self.context, clock, self.metrics, loss, self.events, self.acted)
        axes, state = self.trigger.look(replace(view, **more), self.state)  # type: ignore[arg-type]
        self.state = json.loads(json.dumps(state, allow_nan=False))
        return sorted(axes)

    def event(self) -> None:
        self.events += 1
        self.acted = Last(self.step, len(self.metrics))


def looks(history: History, values: Sequence[float | None], of: str = "metric") -> list[bool]:
    return [bool(history.look(**{of: value})) for value in values]  # type: ignore[arg-type]


# --- Plateau, Futile, Gap --------------------------------------------------------------------------------------------


def test_a_plateau_is_so_many_values_without_improvement() -> None:
    history = History(Plateau(least=0.1, patience=2))
    assert looks(history, [0.5, 0.54, 0.56, 0.56, 0.61, 0.99, 1.0, 1.0]) == [
        False, False, False, False, True, False, False, True,
    ]  # fmt: skip


def test_a_plateau_looks_at_losses_the_other_way_round() -> None:
    history = History(Plateau("loss", least=0.01, patience=2))
    assert looks(history, [2.0, 1.9, 1.95, 1.99, 1.0, None, 1.0, 1.0], "loss") == [
        False, False, False, True, False, False, False, True,
    ]  # fmt: skip
    metric = History(Plateau(patience=1))
    assert not metric.look(0.9, mode="min")
    assert not metric.look(0.5, mode="min")
    assert metric.look(0.6, mode="min")


def test_a_plateau_begins_anew_after_an_event_and_takes_every_epoch_between_two_looks() -> None:
    history = History(Plateau(least=0.0, patience=2))
    assert looks(history, [0.5, 0.5, 0.5]) == [False, False, True]
    history.event()
    assert looks(history, [0.1, 0.1, 0.1]) == [False, False, True]
    every_third = History(Plateau(least=0.0, patience=2))
    assert not every_third.look(0.5)
    every_third.metrics += (Metric(2, 0.5, "max"),)
    assert every_third.look(0.5)


def test_growth_is_futile_once_events_bring_no_improvement() -> None:
    history = History(Futile(least=0.1, events=2))
    assert looks(history, [0.5, 0.5, 0.5]) == [False, False, False]
    history.event()
    assert not history.look(0.6)  # better than the 0.5 before it, but there was only one event
    history.event()
    assert not history.look(0.6)  # 0.6 beats 0.5, the best before the last two events
    history.event()
    assert history.look(0.62)  # and 0.62 does not beat 0.6 by a tenth
    assert not history.look(0.7)


def test_nothing_measured_says_nothing() -> None:
    for one in (Plateau(patience=1), Plateau("loss", patience=1), Futile(events=1)):
        history = History(one)
        history.event()
        assert looks(history, [None, None, None]) == [False, False, False]


class Losses(nn.Module):
    """A model whose loss is a number that its batch names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_the_gap_is_held_out_loss_minus_training_loss_in_eval_mode() -> None:
    structure = esp.attach(Losses(), torch.zeros(1, 4))

    def loss(batch: float) -> Tensor:
        assert not any(module.training for module in structure.model.modules())
        return torch.tensor(batch)

    def context(training: float, *probe: float) -> Context:
        return Context(structure, ("layers.0",), 0, 0, 0.0, 7, loss, training, probe)

    wide, narrow = History(Gap(above=0.5)), History(Gap(below=0.5))
    for held_out, expected in (((1.4,), False), ((1.4, 1.8), True), ((math.nan,), False)):
        wide.context = narrow.context = context(1.0, *held_out)
        assert bool(wide.look()) == expected
        assert bool(narrow.look()) == (not expected and math.isfinite(sum(held_out)))
    assert structure.model.training
    assert Gap(above=0.5).needs == {"probe"}
    assert (Gap(above=0.5) | Plateau("loss")).held(2).needs == {"probe", "loss"}


# --- Effective rank, stability, cost ---------------------------------------------------------------------------------


def test_the_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.eye(5, dtype=torch.float64)) == pytest.approx(5)
    assert effective_rank(torch.ones(4, 4, dtype=torch.float64)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(3, 3, dtype=torch.float64)) == 0
    matrix = torch.randn(50, 6, dtype=torch.float64)
    parts = torch.linalg.svdvals(matrix)
    parts = parts / parts.sum()
    assert effective_rank(matrix.T @ matrix) == pytest.approx(float((-parts * parts.log()).sum().exp()))


@pytest.mark.parametrize(("name", "axis", "reader"), [("mlp", "0", "2"), ("vgg_batch_norm", "features.0", "features.4"),
                                                     ("resnet", "layers.0.0.conv1", "layers.0.0.conv2")])  # fmt: skip
def test_activations_are_what_readers_read(name: str, axis: str, reader: str) -> None:
    model, batch = ZOO[name]()
    structure = esp.attach(model, batch)
    found: list[Tensor] = []
    module = model.get_submodule(reader)
    hook = module.register_forward_pre_hook(lambda _, given: found.append(given[0].detach()))
    model.eval()(*batch)
    hook.remove()
    model.train()
    rows = found[0].movedim(1, -1).flatten(0, -2).double()
    expected = rows.T @ rows / len(rows)
    bigger = tuple(torch.cat([one, one]) for one in batch)
    for batches in ([batch], [batch, batch], [bigger]):
        forwards = [lambda given=given: model(*given) for given in batches]
        gram = grams(model, structure.topology, [axis], forwards)[axis]
        torch.testing.assert_close(gram, expected, rtol=1e-5, atol=1e-8)
    assert model.training
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_activations_of_a_flattened_map_count_positions_as_samples() -> None:
    model, batch = ZOO["lenet"]()
    structure = esp.attach(model, batch)
    slots = {axis.name: [one for one in axis.slots if one.role == "contract"] for axis in structure.axes.values()}
    flat = next(name for name, found in slots.items() if found and len(found[0].positions[0]) > 1)
    found: list[Tensor] = []
    reader = model.get_submodule(slots[flat][0].tensor.rpartition(".")[0])
    hook = reader.register_forward_pre_hook(lambda _, given: found.append(given[0].detach()))
    model.eval()(*batch)
    hook.remove()
    rows = found[0].view(len(found[0]), structure.axes[flat].size, -1).movedim(1, -1).flatten(0, 1).double()
    gram = grams(model, structure.topology, [flat], [lambda: model(*batch)])[flat]
    torch.testing.assert_close(gram, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-8)


def test_another_course_through_the_code_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x)) + (self.last(self.first(x)) if len(x) > 3 else 0)

    model = Twice()
    structure = esp.attach(model, torch.randn(2, 4))
    with pytest.raises(CaptureError, match=r"expected aten::addmm 2 times in a forward pass, found 4"):
        grams(model, structure.topology, ["first"], [lambda: model(torch.randn(5, 4))])


def test_axes_grow_whose_activations_fill_what_they_filled_at_first() -> None:
    structure = attached()
    model = structure.model
    batch = torch.randn(200, 10)
    context = replace(context_of(structure), batch=batch, loss=lambda given: model(given).sum())
    history = History(EffectiveRank(gamma=0.9), context)
    assert history.look() == []  # the reference is taken
    assert history.look() == ["0", "2"]
    with torch.no_grad():
        model.get_parameter("2.weight")[1:] = model.get_parameter("2.weight")[0]
        model.get_parameter("2.bias")[1:] = model.get_parameter("2.bias")[0]
    assert history.look() == ["0"]
    assert History(EffectiveRank(), context_of(structure)).look() == []  # no batch yet


def test_masks_are_stable_once_the_lowest_stay_the_same() -> None:
    history = History(Stable(share=0.5, looks=3, tolerance=0.0))

    def look(*values: float) -> bool:
        scores = Scores({"0": torch.tensor(values)})
        return bool(history.look(scores=lambda score: scores))

    assert not look(1, 2, 3, 4)
    assert not look(2, 1, 3, 4)
    assert look(1, 2, 9, 8)  # the order does not matter, nor the others
    assert not look(1, 5, 3, 4)
    assert not look(1, 5, 3, 4)
    assert look(1, 5, 3, 4)
    history.state = history.trigger.follow({}, history.state)
    assert not look(1, 5, 3, 4)
    loose = History(Stable(share=0.5, looks=2, tolerance=0.5))
    assert not loose.look(scores=lambda score: Scores({"0": torch.tensor([1.0, 2.0, 3.0, 4.0])}))
    assert loose.look(scores=lambda score: Scores({"0": torch.tensor([1.0, 5.0, 3.0, 4.0])}))


def test_reached_compares_the_cost_with_a_budget() -> None:
    structure = attached()
    first = structure.cost().parameters
    history = History(Reached(esp.Parameters(first + 40)), context_of(structure))
    fraction = History(Reached(esp.Units(1.1, of="initial")), context_of(structure))
    assert history.look() == fraction.look() == []
    structure.grow({"0": 2, "2": 1})
    assert history.look() == fraction.look() == ["0", "2"]
    assert History(~Reached(esp.Parameters(first)), context_of(structure)).look() == []


# --- How they combine ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed(Trigger):
    """Holds in the axes of a list that is written down for every look; remembers how many looks there were."""

    course: tuple[frozenset[str], ...]

    def look(self, view: View, state: State, /) -> Answer:
        at = state or 0
        return self.course[at % len(self.course)] & view.axes, at + 1


sets = st.sampled_from([frozenset[str](), frozenset({"0"}), frozenset({"2"}), frozenset(AXES)])
courses = st.lists(sets, min_size=6, max_size=6).map(lambda found: Fixed(tuple(found)))
CONTEXT = context_of(attached())


def course_of(one: Trigger) -> list[list[str]]:
    history = History(one, CONTEXT)
    return [history.look() for _ in range(6)]


@given(courses, courses, courses)
def test_triggers_combine_as_sets_do(a: Fixed, b: Fixed, c: Fixed) -> None:
    assert course_of(a & b) == course_of(b & a)
    assert course_of(a | b) == course_of(b | a)
    assert course_of((a & b) & c) == course_of(a & (b & c))
    assert course_of(a & (b | c)) == course_of((a & b) | (a & c))
    assert course_of(~(a & b)) == course_of(~a | ~b)
    assert course_of(~~a) == course_of(a) == course_of(a & a) == course_of(a | a)
    assert course_of(a & ~a) == [[]] * 6
    assert course_of(a | ~a) == [list(AXES)] * 6


@given(courses, st.integers(1, 4))
def test_held_is_so_many_looks_in_a_row_axis_by_axis(a: Fixed, n: int) -> None:
    held = course_of(a.held(n))
    for axis in AXES:
        here = [axis in found for found in course_of(a)]
        assert [axis in found for found in held] == [at + 1 >= n and all(here[at + 1 - n : at + 1]) for at in range(6)]


@given(courses, courses)
def test_between_has_a_threshold_to_begin_and_one_to_end(a: Fixed, b: Fixed) -> None:
    found = course_of(a.until(b))
    for axis in AXES:
        on = False
        for at, (start, end) in enumerate(zip(course_of(a), course_of(b), strict=True)):
            on = (on or axis in start) and axis not in end
            assert (axis in found[at]) == on


def test_counting_starts_anew_after_an_event() -> None:
    history = History(Fixed((frozenset(AXES),)).held(2), CONTEXT)
    assert [bool(history.look()) for _ in range(3)] == [False, True, True]
    history.event()
    assert [bool(history.look()) for _ in range(2)] == [False, True]


TRIGGERS: list[Trigger] = [
    Plateau(),
    Plateau("loss", least=0.05, patience=2),
    Futile(events=3),
    Gap(above=0.2).until(Gap(below=0.1)),
    EffectiveRank(0.9),
    Stable(score=GroupNorm("l1")),
    ~Reached(esp.Parameters(1000)),
    (Plateau() & ~Reached(esp.FLOPs(2.0, of="initial"))) | EffectiveRank().held(3),
]


@pytest.mark.parametrize("one", TRIGGERS, ids=lambda one: type(one).__name__)
def test_triggers_are_frozen_values_whose_text_evaluates_to_them(one: Trigger) -> None:
    names = {**vars(esp), **vars(trigger), **vars(trigger_losses), **vars(trigger_network), **vars(score)}
    assert eval(repr(one), names) == one
    hash(one)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plateau("accuracy"), "Plateau: expected one of metric, loss, probe, found 'accuracy'"),
        (lambda: Plateau(least=-0.1), "least: expected a fraction of at least 0, found -0.1"),
        (lambda: Plateau(patience=0), "patience: expected a whole number of at least 1, found 0"),
        (lambda: Futile(events=1.5), "events: expected a whole number"),
        (lambda: Gap(), "expected either above= or below="),
        (lambda: Gap(above=1, below=2), "expected either above= or below="),
        (lambda: EffectiveRank(0), "gamma: expected a number above 0, found 0"),
        (lambda: Stable(share=2), "share: expected a fraction from 0 to 1, found 2"),
        (lambda: Reached(0.5), "expected a budget such as"),
        (lambda: Reached(esp.Latency(0.5)), "time is measured at events only"),
        (lambda: Reached(esp.Units(0.5, of="largest")), "is no fixed cost"),
        (lambda: Plateau().held(0), "looks: expected a whole number"),
        (lambda: Plateau() & 3, "All: expected triggers, found 3"),
    ],
)
def test_wrong_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make()  # type: ignore[operator]
