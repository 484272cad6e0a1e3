"""Firefly: values of candidates against finite differences of the loss, and the loss after growth against values."""

import pytest
import torch
from method_setting import context_of, goal_of, grown, loss_now, perceptron
from snapshots import differences, snapshot
from torch import nn

from espalier import attach
from espalier.errors import MethodError
from espalier.parts.ghosts.firefly import FireflyInit, FireflyScore
from espalier.parts.ghosts.ghosts import Ghosts
from espalier.parts.ghosts.neighbourhood import Candidates, falls, network


def drawn(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ghosts_with(structure, batch, splits: int, new: int) -> tuple[Ghosts, dict[str, Candidates]]:
    """The first units split, and new ones, on both axes."""
    ghosts = Ghosts(context_of(structure, batch), {"0": splits + new, "2": splits + new})
    found = {
        "0": Candidates(0.05 * drawn((splits, 4), 1), drawn((new, 4), 2), 0.05 * drawn((new, 6), 3)),
        "2": Candidates(0.05 * drawn((splits, 5), 4), drawn((new, 5), 5), 0.05 * drawn((new, 2), 6)),
    }
    return ghosts, found


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()])
@pytest.mark.parametrize(("splits", "new"), [(1, 0), (0, 1)])
def test_the_value_of_a_candidate_is_a_difference_of_losses(activation, splits, new):
    structure, batch = perceptron(activation)
    for axis in ("0", "2"):
        ghosts, candidates = ghosts_with(structure, batch, splits, new)
        ghosts = Ghosts(context_of(structure, batch), {axis: 1})
        alone = {axis: candidates[axis]}
        value = falls(ghosts, alone, [batch], points=40)[axis]
        difference = loss_now(structure, batch) - float(ghosts.loss(network(ghosts, alone), batch).detach())
        assert float(value) == pytest.approx(difference, rel=2e-2 if isinstance(activation, nn.ReLU) else 1e-3)


def test_values_add_up_to_what_all_do_together():
    structure, batch = perceptron(nn.Tanh())
    ghosts, candidates = ghosts_with(structure, batch, 3, 2)
    difference = loss_now(structure, batch) - float(ghosts.loss(network(ghosts, candidates), batch).detach())
    errors = []
    for points in (1, 3, 12):
        values = falls(ghosts, candidates, [batch], points)
        errors.append(abs(float(sum(one.sum() for one in values.values())) - difference))
    assert errors[1] < 1e-2 * abs(difference)
    assert errors[2] < errors[1] < errors[0]


def test_candidates_of_length_zero_change_nothing():
    structure, batch = perceptron(nn.Tanh())
    ghosts, candidates = ghosts_with(structure, batch, 3, 2)
    nothing = {axis: one.times(0.0, 1.0, 0.0) for axis, one in candidates.items()}
    value = float(ghosts.loss(network(ghosts, nothing), batch).detach())
    assert value == pytest.approx(loss_now(structure, batch), rel=1e-13)


def test_a_split_acts_to_the_second_order_only():
    structure, batch = perceptron(nn.Tanh())
    ghosts, candidates = ghosts_with(structure, batch, 3, 0)
    changes = []
    for length in (0.5, 1.0, -1.0):
        scaled = {axis: one.times(length, 1.0, 1.0) for axis, one in candidates.items()}
        changes.append(float(ghosts.loss(network(ghosts, scaled), batch).detach()) - loss_now(structure, batch))
    assert changes[1] == pytest.approx(changes[2], rel=1e-9)
    assert changes[1] == pytest.approx(4 * changes[0], rel=0.05)


def test_candidates_stay_within_the_neighbourhood():
    structure, batch = perceptron(nn.Tanh())
    found = FireflyScore(step=0.2, steps=5)(context_of(structure, batch), goal_of(structure, "0", "2")).found
    for axis, layer in (("0", 0), ("2", 2)):
        made = structure.model[layer].weight.detach().norm(dim=1).mean()
        read = structure.model[layer + 2].weight.detach().norm(dim=0).mean()
        for side, bound in zip(found[axis].sides, (0.2 * made, made, 0.2 * read), strict=True):
            assert len(side) > 0
            assert bool((side.norm(dim=1) <= bound * (1 + 1e-9)).all())


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()])
def test_the_best_candidates_lower_the_loss_and_optimising_helps(activation):
    structure, batch = perceptron(activation)
    context, goal = context_of(structure, batch), goal_of(structure, "0", "2")
    sums = []
    for steps in (0, 10):
        scores = FireflyScore(steps=steps)(context, goal)
        sums.append(float(sum(one.clamp(min=0).sum() for one in scores.values.values())))
    assert sums[1] > 2 * sums[0]
    chosen = {axis: tuple(sorted(one.topk(3).indices.tolist())) for axis, one in scores.values.items()}
    predicted = sum(float(scores.values[axis][list(units)].sum()) for axis, units in chosen.items())
    before = loss_now(structure, batch)
    edit = grown(structure, chosen, FireflyInit()(context, chosen, scores))
    assert edit.contract == "changing"
    assert before - loss_now(structure, batch) == pytest.approx(predicted, rel=0.5)


def test_splits_and_new_units_are_placed_as_they_were_valued():
    structure, batch = perceptron(nn.Tanh())
    context = context_of(structure, batch)
    scores = FireflyScore(steps=3)(context, goal_of(structure, "0", "2"))
    chosen = {"0": (1, 3, 6), "2": (0, 7)}
    expected = {axis: scores.found[axis].of(units) for axis, units in chosen.items()}
    ghosts = Ghosts(context, {"0": 3, "2": 2})
    value = float(ghosts.loss(network(ghosts, expected, {"0": (1, 3), "2": (0,)}), batch).detach())
    grown(structure, chosen, FireflyInit()(context, chosen, scores))
    assert loss_now(structure, batch) == pytest.approx(value, rel=1e-12)


def test_scores_repeat_and_leave_nothing_behind():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 3)
    structure = attach(nn.Sequential(*layers), torch.randn(8, 2, 6, 6))
    batch = torch.randn(8, 2, 6, 6), torch.randn(8, 3)
    before = snapshot(structure.model)
    first, second = (FireflyScore()(context_of(structure, batch), goal_of(structure, "0")).values["0"] for _ in "ab")
    assert torch.equal(first, second)
    assert len(first) > 4
    assert differences(before, snapshot(structure.model)) == []


def test_what_a_layer_norm_reads_gets_no_candidates():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    batch = torch.randn(16, 4), torch.randn(16, 2)
    structure = attach(model, batch[0])
    values = FireflyScore()(context_of(structure, batch), goal_of(structure, "0", "3")).values
    assert len(values["0"]) == 0
    assert len(values["3"]) > 5
    with pytest.raises(MethodError, match=r"finds no axis whose units can be copied.*\(0 were tried"):
        FireflyScore()(context_of(structure, batch), goal_of(structure, "0"))
