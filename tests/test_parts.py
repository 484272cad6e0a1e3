"""The parts of methods, each against arithmetic done by hand or by brute force."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zoo_small import ZOO

import espalier as esp
from espalier.errors import MethodError, PlanError
from espalier.measure.cost import cost_of
from espalier.parts.budget import Budget, FLOPs, Parameters, Polynomial, Units
from espalier.parts.clock import Clock, Epochs, Last, Steps
from espalier.parts.goal import Cap, Goal, Scores, Selection
from espalier.parts.score import Chance, Context, GroupNorm, Share, check_scores, derived_seed
from espalier.parts.timing.amount import Ramp, Steady
from espalier.parts.timing.schedule import Schedule
from espalier.parts.units.select import Global, Select, Uniform, proportional
from espalier.parts.units.where import choose_axes
from espalier.structure import Structure

NETWORKS = ["mlp", "vgg_batch_norm", "resnext", "densenet", "vit", "grouped_query", "tied_embeddings"]


def attached(name: str) -> Structure:
    model, example = ZOO[name]()
    return esp.attach(model, example)


# --- Budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_polynomials_are_the_measured_cost_at_any_size(name: str) -> None:
    structure = attached(name)
    topology = structure.topology
    draw = torch.Generator().manual_seed(1)
    polynomials = {kind: kind(1).cost(topology, ()) for kind in (Parameters, FLOPs)}
    for _ in range(5):
        sizes = {one: int(torch.randint(1, 30, (), generator=draw)) for one in topology.by_name}
        measured = cost_of(topology, {topology.by_name[one].number: size for one, size in sizes.items()})
        assert polynomials[Parameters].at(sizes) == measured.parameters
        assert polynomials[FLOPs].at(sizes) == measured.flops


def test_polynomial_steps_and_fixed_axes_agree_with_evaluation() -> None:
    cost = Polynomial({("a", "b"): 3, ("a", "a"): 2, ("b",): 5, (): 7})
    sizes = {"a": 4, "b": 6}
    assert cost.at(sizes) == 3 * 24 + 2 * 16 + 30 + 7
    for axis, by in (("a", -1), ("a", 2), ("b", -3)):
        assert cost.step(axis, sizes, by) == cost.at({**sizes, axis: sizes[axis] + by}) - cost.at(sizes)
    assert cost.fixed({"b": 6}).at({"a": 4}) == cost.at(sizes)
    assert cost.neighbours("b") == {"a", "b"}


def test_units_count_the_axes_of_the_method_only() -> None:
    structure = attached("mlp")
    assert Units(1).cost(structure.topology, ["0"]).at({"0": 12, "2": 9}) == 12


def test_a_fraction_is_of_what_it_says() -> None:
    assert FLOPs(0.29, of="initial").limit(100, 400) == 29
    assert FLOPs(0.29, of="largest").limit(100, 400) == 116
    assert Parameters(1234).limit(100, 400) == 1234


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parameters(0.5), r"for a fraction write Parameters\(0\.5, of='initial'\)"),
        (lambda: FLOPs(-1, of="initial"), "expected a number above 0, found -1"),
        (lambda: FLOPs(math.nan, of="initial"), "expected a number above 0, found nan"),
        (lambda: Parameters(True), "expected a number above 0, found True"),
        (lambda: FLOPs(0.5, of="finally"), "found of='finally'"),
        (lambda: Steps(0), "steps: expected a whole number of at least 1, found 0"),
        (lambda: Epochs(1.5), "epochs: expected a whole number of at least 1, found 1.5"),
        (lambda: Ramp(0.5), "expected a budget such as"),
        (lambda: Ramp(Units(3), "square"), "found 'square'"),
        (lambda: Steady(0.0), "expected a fraction of the units above 0, found 0.0"),
        (lambda: Schedule(Steady(0.1), every=3), r"every: expected steps\(n\) or epochs\(n\), found 3"),
        (lambda: Schedule(Steady(0.1), Steps(1), start=1.2), "start: expected a fraction from 0 to 1"),
        (lambda: Schedule(Steady(0.1), Steps(1), start=0.5, until=0.5), "start=0.5 must come before until=0.5"),
        (lambda: GroupNorm("l3"), "norm: expected 'l1' or 'l2', found 'l3'"),
    ],
)
def test_wrong_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make()  # type: ignore[operator]


# --- Schedules -------------------------------------------------------------------------------------------------------


def events_of(schedule: Schedule, total: int, epoch: int) -> list[tuple[int, int]]:
    """(step, events that are still to come) of every event of a run, as a session finds them."""
    found: list[tuple[int, int]] = []
    last, boundary, due = None, 0, schedule.next_step(Clock(0, 0, 0, total), None)
    for step in range(1, total + 1):
        if due == step:
            clock = Clock(step, (step - 1) // epoch, boundary, total)
            found.append((step, schedule.remaining(clock)))
            last = Last(step, clock.epoch)
            due = schedule.next_step(clock, last)
        if step % epoch == 0:
            boundary = step
            due = schedule.next_step(Clock(step, step // epoch, boundary, total), last)
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(Steady(0.1), Steps(10)), [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (Schedule(Steady(0.1), Steps(30), start=0.1, until=0.7), [10, 40, 70]),
        (Schedule(Steady(0.1), Steps(30), start=Steps(7), until=Steps(66)), [7, 37]),
        (Schedule(Steady(0.1), Epochs(2)), [21, 41, 61, 81]),
        (Schedule(Steady(0.1), Epochs(1), start=0.35, until=0.7), [41, 51, 61]),
        (Schedule(Steady(0.1), Epochs(3), start=Epochs(2), until=Epochs(8)), [21, 51, 81]),
        (Schedule(Steady(0.1), Steps(15), start=Epochs(1), until=Epochs(4)), [11, 26, 41]),
    ],
)
def test_events_come_when_the_schedule_says_and_the_last_is_known(schedule: Schedule, expected: list[int]) -> None:
    found = events_of(schedule, total=100, epoch=10)
    assert [step for step, _ in found] == expected
    assert [remaining for _, remaining in found] == list(range(len(expected)))[::-1]


def test_ramps_follow_zhu_and_gupta() -> None:
    cubic, linear, constant = (Ramp(Units(100), shape) for shape in ("cubic", "linear", "constant"))
    for tau in (0.25, 0.5, 1.0):
        assert cubic.target(tau, 0, 500, 100, -1) == math.floor(100 + 400 * (1 - tau) ** 3)
        assert linear.target(tau, 0, 500, 100, -1) == math.floor(100 + 400 * (1 - tau))
        assert constant.target(tau, 0, 500, 100, -1) == 100


def test_a_steady_amount_is_a_fraction_of_what_there_is_and_at_least_one() -> None:
    assert Steady(0.1).target(0.5, 50, 0, 0, 1) == 55
    assert Steady(0.1).target(0.5, 3, 0, 0, -1) == 2


# --- Selections ------------------------------------------------------------------------------------------------------


def chain(widths: list[int]) -> Polynomial:
    """Parameters of a multi-layer perceptron of 10 inputs and 4 outputs by its hidden widths."""
    names = [f"axis{number}" for number in range(len(widths))]
    terms: dict[tuple[str, ...], int] = {(names[0],): 10 + 1, (): 4}
    for one, two in pairwise(names):
        terms[one, two] = 1
        terms[(two,)] = 1
    terms[(names[-1],)] = terms.get((names[-1],), 0) + 4
    return Polynomial(terms)


@st.composite
def pruning(draw: st.DrawFn) -> tuple[Goal, Scores]:
    widths = draw(st.lists(st.integers(2, 40), min_size=1, max_size=5))
    sizes = {f"axis{number}": width for number, width in enumerate(widths)}
    cost = chain(widths)
    least = {name: draw(st.integers(1, max(1, size // 3))) for name, size in sizes.items()}
    target = draw(st.integers(cost.at(least), cost.at(sizes)))
    goal = Goal("prune", sizes, least, sizes, {name: float(size) for name, size in sizes.items()}, Cap(cost, target))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return goal, Scores({name: torch.rand(size, generator=generator) for name, size in sizes.items()})


@pytest.mark.parametrize("select", [Uniform(), Global()])
@given(pruning())
def test_pruning_meets_its_target_and_no_unit_that_went_would_have_fitted(
    select: Select, drawn: tuple[Goal, Scores]
) -> None:
    goal, scores = drawn
    chosen = select(scores, goal)
    sizes = {name: size - len(chosen.get(name, ())) for name, size in goal.sizes.items()}
    cost, target = goal.target.cost, goal.target.most
    assert all(sizes[name] >= goal.least[name] for name in sizes)
    assert cost.at(sizes) <= target
    removed = [name for name in sizes if sizes[name] < goal.sizes[name]]
    for name in removed:
        assert cost.at({**sizes, name: sizes[name] + 1}) > target
        kept = set(range(goal.sizes[name])) - set(chosen[name])
        assert max(scores.values[name][list(chosen[name])]) <= min(scores.values[name][list(kept)])


@pytest.mark.parametrize("select", [Uniform(), Global()])
@given(pruning())
def test_growing_stays_within_every_cap_and_leaves_no_room(select: Select, drawn: tuple[Goal, Scores]) -> None:
    goal = drawn[0]
    cost, start = goal.target.cost, goal.least
    most = dict.fromkeys(start, 60)
    units = Cap(Polynomial({(name,): 1 for name in start}), sum(start.values()) + 25)
    grown = Goal("grow", start, start, most, goal.reference, goal.target, (units,))
    ghosts = Scores({name: torch.rand(grown.room(name)) for name in start})
    chosen = select(ghosts, grown)
    sizes = {name: size + len(chosen.get(name, ())) for name, size in start.items()}
    assert cost.at(sizes) <= goal.target.most
    assert sum(sizes.values()) <= units.most
    for name in sizes:
        assert sizes[name] == most[name] or not grown.fits({**sizes, name: sizes[name] + 1})


def test_uniform_keeps_proportions() -> None:
    sizes = {"axis0": 100, "axis1": 60, "axis2": 20}
    cost = chain(list(sizes.values()))
    goal = Goal("prune", sizes, dict.fromkeys(sizes, 1), sizes, sizes, Cap(cost, cost.at(sizes) // 4))
    chosen = Uniform()(Scores({name: torch.rand(size) for name, size in sizes.items()}), goal)
    fractions = [len(chosen[name]) / size for name, size in sizes.items()]
    assert max(fractions) - min(fractions) < 0.075  # one unit of the smallest is 0.05


def test_a_coarse_axis_does_not_pay_for_what_finer_ones_can() -> None:
    """Three of four coarse units cost 0.75 of all: the finer axis makes up the rest, not one more coarse unit."""
    cost = Polynomial({("coarse", "fine"): 1, ("coarse",): 20})
    sizes = {"coarse": 4, "fine": 100}
    goal = Goal("prune", sizes, dict.fromkeys(sizes, 1), sizes, sizes, Cap(cost, cost.at(sizes) * 54 // 100))
    chosen = proportional(goal)
    assert chosen == {"coarse": 3, "fine": 66}
    assert 0.53 < cost.at(chosen) / cost.at(sizes) <= 0.54


def test_global_takes_the_least_useful_unit_per_cost_first() -> None:
    """By hand: units go in the order of score per parameter, and prices fall as others go."""
    sizes = {"axis0": 6, "axis1": 3}
    cost = chain([6, 3])  # a unit of axis0 costs 11 + 3, one of axis1 costs 6 + 1 + 4
    scores = Scores({"axis0": torch.tensor([5.0, 4.0, 9.0, 9.0, 9.0, 9.0]), "axis1": torch.tensor([3.0, 8.0, 8.0])})

    def chosen(excess: int, scores: Scores) -> Selection:
        target = Cap(cost, cost.at(sizes) - excess)
        return Global()(scores, Goal("prune", sizes, dict.fromkeys(sizes, 1), sizes, sizes, target))

    assert 3.0 / 11 < 4.0 / 14 < 8.0 / 11
    assert chosen(11 + 13, scores) == {"axis0": (1,), "axis1": (0,)}
    dearer = Scores({**scores.values, "axis1": torch.tensor([7.0, 8.0, 8.0])})
    assert 4.0 / 14 < 5.0 / 14 < 7.0 / 11
    assert chosen(14 + 14, dearer) == {"axis0": (0, 1)}


def test_the_last_units_overshoot_as_little_as_single_units_allow() -> None:
    sizes = {"axis0": 6, "axis1": 3}
    cost = chain([6, 3])  # units of 14 and 11; those of axis0 are worth nothing
    scores = Scores({"axis0": torch.full((6,), 0.1), "axis1": torch.full((3,), 9.0)})
    for excess, expected in ((1, {"axis1": (0,)}), (11, {"axis1": (0,)}), (12, {"axis0": (0,)})):
        goal = Goal("prune", sizes, dict.fromkeys(sizes, 1), sizes, sizes, Cap(cost, cost.at(sizes) - excess))
        assert Global()(scores, goal) == expected


def test_room_is_what_fits() -> None:
    cost = chain([5, 5])
    sizes = {"axis0": 5, "axis1": 5}
    goal = Goal("grow", sizes, sizes, {"axis0": 1000, "axis1": 7}, sizes, Cap(cost, cost.at(sizes) + 100))
    assert goal.room("axis0") == 100 // (10 + 1 + 5)
    assert goal.room("axis1") == 2


# --- Scores ----------------------------------------------------------------------------------------------------------


def context_of(structure: Structure) -> Context:
    return Context(structure, tuple(structure.axes), 0, 0, 0.0, 7, lambda batch: torch.zeros(()), None, ())


def everything(structure: Structure, *names: str) -> Goal:
    sizes = {name: structure.axes[name].size for name in names}
    return Goal("prune", sizes, sizes, sizes, sizes, Cap(Polynomial({}), 0))


def test_group_norm_counts_coupled_weights_and_scales() -> None:
    structure = attached("resnet")
    modules = dict(structure.model.named_modules())
    for module in modules.values():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    for norm, order in (("l1", 1), ("l2", 2)):
        scores = GroupNorm(norm)(context_of(structure), everything(structure, "conv1")).values["conv1"]
        producers = ["conv1", "layers.0.0.conv2", "layers.0.1.conv2"]
        tensors = [modules[name].weight.detach().flatten(1) for name in producers]
        tensors += [modules[name].weight.detach()[:, None] for name in ("bn1", "layers.0.0.bn2", "layers.0.1.bn2")]
        readers = {slot.tensor for slot in structure.axes["conv1"].slots if slot.role == "contract"}
        assert {"layers.0.0.conv1.weight", "layers.0.1.conv1.weight"} < readers
        tensors += [structure.model.get_parameter(name).detach().transpose(0, 1).flatten(1) for name in readers]
        norms = [tensor.norm(order, dim=1) for tensor in tensors]
        expected = torch.stack([one / one.mean() for one in norms]).mean(0)
        torch.testing.assert_close(scores.float(), expected)
        assert scores.mean() == pytest.approx(1.0)


def test_group_norm_sums_over_the_positions_of_a_head() -> None:
    structure = attached("vit")
    name = "blocks.0.qkv:heads"
    scores = GroupNorm("l1")(context_of(structure), everything(structure, name)).values[name]
    weight = structure.model.get_parameter("blocks.0.qkv.weight").detach().view(3, 2, -1)
    made = weight.abs().sum((0, 2))
    readers = [slot.tensor for slot in structure.axes[name].slots if slot.role == "contract"]
    assert len(readers) == 1
    reader = structure.model.get_parameter(readers[0]).detach()
    read = reader.view(len(reader), 2, -1).abs().sum((0, 2))
    torch.testing.assert_close(scores.float(), (made / made.mean() + read / read.mean()) / 2)


def test_shares_are_what_is_lost_of_what_remains() -> None:
    @dataclass(frozen=True)
    class Given:
        def __call__(self, context: Context, goal: Goal, /) -> Scores:
            return Scores({"0": torch.tensor([3.0, 1.0, 2.0, 2.0]), "2": torch.zeros(3)}, {"found": 1})

    structure = attached("mlp")
    shares = Share(Given())(context_of(structure), everything(structure, "0"))
    expected = torch.tensor([9 / 9, 1 / 18, 4 / 17, 4 / 13], dtype=torch.float64)
    torch.testing.assert_close(shares.values["0"], expected)
    assert shares.values["2"].tolist() == [0.0, 0.0, 0.0]
    assert shares.found == {"found": 1}


def test_weights_that_are_no_numbers_are_named() -> None:
    structure = attached("mlp")
    with torch.no_grad():
        structure.model.get_parameter("2.weight")[1, 0] = math.nan
    with pytest.raises(MethodError, match=r"0: 2\.weight holds values that are not finite"):
        GroupNorm()(context_of(structure), everything(structure, "0", "2"))


def test_scores_that_are_no_numbers_are_named() -> None:
    structure = attached("mlp")
    goal = everything(structure, "0")
    values = torch.rand(12)
    values[4] = math.nan
    with pytest.raises(MethodError, match=r"mine: the score of unit 4 of 0 is not a number: the score itself"):
        check_scores(Scores({"0": values}), context_of(structure), goal, "mine")
    with torch.no_grad():
        structure.model.get_parameter("2.weight")[0] = math.inf
    with pytest.raises(MethodError, match=r"2\.weight is not finite"):
        check_scores(Scores({"0": values}), context_of(structure), goal, "mine")
    with pytest.raises(MethodError, match=r"expected scores of shape \(12,\) for 0, found \(3,\)"):
        check_scores(Scores({"0": torch.rand(3)}), context_of(structure), goal, "mine")
    with pytest.raises(MethodError, match="gave no scores for 0"):
        check_scores(Scores({}), context_of(structure), goal, "mine")


def test_chance_repeats_with_the_seed_and_differs_between_axes() -> None:
    structure = attached("mlp")
    goal = everything(structure, "0", "2")
    first, second = (Chance()(context_of(structure), goal).values for _ in range(2))
    assert torch.equal(first["0"], second["0"])
    assert not torch.equal(first["0"][:9], first["2"])
    assert derived_seed(1, "a") != derived_seed(1, "b")


# --- Which axes ------------------------------------------------------------------------------------------------------


def test_automatic_axes_leave_out_head_sizes_and_inexact_growth() -> None:
    structure = attached("vit")
    shrinking, growing = (choose_axes(structure, way, None) for way in ("prune", "grow"))
    assert "within an attention head" in (shrinking["blocks.0.qkv:head_dim"] or "")
    assert shrinking["patch_embed"] is None
    assert "would change the outputs" in (growing["patch_embed"] or "")
    assert growing["blocks.0.mlp.0"] is None
    assert growing["blocks.0.qkv:heads"] is None
    assert "output" in (growing["head"] or "")


def test_axes_are_asked_for_by_name_or_pattern() -> None:
    structure = attached("vit")
    assert list(choose_axes(structure, "grow", ["blocks.*.mlp.0"])) == ["blocks.0.mlp.0", "blocks.1.mlp.0"]
    assert choose_axes(structure, "grow", ["blocks.0.qkv:head_dim"]) == {"blocks.0.qkv:head_dim": None}
    with pytest.raises(MethodError, match=r"no axis fits the pattern 'nothing\*'"):
        choose_axes(structure, "grow", ["nothing*"])
    with pytest.raises(PlanError, match="did you mean"):
        choose_axes(structure, "grow", ["patch_embedding"])
    with pytest.raises(MethodError, match="head cannot shrink: it is dimension 1 of the model's output"):
        choose_axes(structure, "prune", ["head"])


def test_budgets_are_abstract_or_final() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Budget(1)  # type: ignore[abstract]
