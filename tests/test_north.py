"""NORTH: candidates against least squares and brute force, and the units that grow from them."""

from itertools import combinations

import pytest
import torch
from method_setting import context_of, goal_of, grown, loss_now, perceptron
from snapshots import differences, snapshot
from torch import Tensor, nn

from espalier import attach
from espalier.errors import MethodError
from espalier.measure.activations import effective_rank
from espalier.parts.ghosts.ghosts import Ghosts
from espalier.parts.ghosts.north import NorthInit, NorthScore, novelty


def residual(activations: Tensor, others: Tensor) -> Tensor:
    """The part of squared lengths that no combination of the others gives, by least squares."""
    left = activations - others @ torch.linalg.lstsq(others, activations, driver="gelsd").solution
    return left.square().sum(0) / activations.square().sum(0)


def test_the_first_is_what_least_squares_explain_worst_and_the_next_follow():
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(30, 12, generator=generator, dtype=torch.float64).relu()
    activations[:, 9] = activations[:, :4] @ torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    activations[:, 10] = 0.0
    found = novelty(activations.T @ activations, 5)
    order = found.argsort(descending=True, stable=True)
    for turn in range(5):
        before = torch.cat([activations[:, :5], activations[:, 5 + order[:turn]]], 1)
        candidates = [one for one in range(7) if one not in order[:turn].tolist() and one != 5]
        shares = residual(activations[:, [5 + one for one in candidates]], before)
        assert candidates[int(shares.argmax())] == int(order[turn])
        assert float(found[order[turn]]) == pytest.approx(float(shares.max()), rel=1e-9)
    assert float(found[4]) < 1e-9
    assert float(found[5]) == 0.0


@pytest.mark.parametrize("activations", ["post", "pre"])
def test_candidates_are_judged_by_their_activations(activations):
    structure, batch = perceptron(nn.Tanh())
    model = structure.model
    context, goal = context_of(structure, batch), goal_of(structure, "2", by=2)
    scores = NorthScore(activations)(context, goal)
    assert len(scores.values["2"]) == 8
    ghosts = Ghosts(context, {"2": 8})
    with torch.no_grad():
        hidden = model[1](model[0](batch[0]))
        made = hidden @ ghosts.tensors["2.weight"].T + ghosts.tensors["2.bias"]
        made = made.tanh() if activations == "post" else made
    shares = residual(made[:, 6:], made[:, :6])
    best = int(scores.values["2"].argmax())
    assert best == int(shares.argmax())
    assert float(scores.values["2"][best]) == pytest.approx(float(shares[best]), rel=1e-6, abs=1e-9)
    torch.testing.assert_close(scores.found["2"], ghosts.tensors["2.weight"][6:])


def test_chosen_units_fill_more_directions_than_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    batch = torch.randn(100, 8, dtype=torch.float64), torch.randn(100, 2, dtype=torch.float64)
    structure = attach(model, batch[0])
    context, goal = context_of(structure, batch), goal_of(structure, "0", by=2)
    scores = NorthScore()(context, goal)
    chosen = {"0": tuple(sorted(scores.values["0"].topk(2).indices.tolist()))}
    ghosts = Ghosts(context, {"0": len(scores.values["0"])})
    with torch.no_grad():
        made = (batch[0] @ ghosts.tensors["0.weight"].T + ghosts.tensors["0.bias"]).relu()
    made = made / made.norm(dim=0)

    def rank(units: tuple[int, ...]) -> float:
        some = made[:, [*range(6), *(6 + unit for unit in units)]]
        return effective_rank(some.T @ some)

    all_ranks = sorted(rank(units) for units in combinations(range(len(scores.values["0"])), 2))
    assert rank(chosen["0"]) > all_ranks[int(0.8 * len(all_ranks))]
    before = loss_now(structure, batch)
    edit = grown(structure, chosen, NorthInit()(context, chosen, scores))
    assert edit.contract == "exact"
    assert loss_now(structure, batch) == pytest.approx(before, rel=1e-12)
    torch.testing.assert_close(model[0].weight.detach()[6:], scores.found["0"][list(chosen["0"])])


def test_convolutions_and_norms_stay_exact_and_nothing_is_left_behind():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 3)
    structure = attach(nn.Sequential(*layers), torch.randn(8, 2, 6, 6))
    batch = torch.randn(8, 2, 6, 6), torch.randn(8, 3)
    context, before = context_of(structure, batch), snapshot(structure.model)
    for activations in ("post", "pre"):
        first, second = (NorthScore(activations)(context, goal_of(structure, "0")) for _ in "ab")
        assert torch.equal(first.values["0"], second.values["0"])
        assert differences(before, snapshot(structure.model)) == []
    assert grown(structure, {"0": (1, 2)}, NorthInit()(context, {"0": (1, 2)}, first)).contract == "exact"


def test_axes_whose_activations_cannot_be_told_are_refused():
    torch.manual_seed(0)
    batch = torch.randn(8, 4), torch.randn(8, 2)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.sigmoid(self.gate(x)) * self.up(x))

    structure = attach(Gated(), batch[0])
    context, goal = context_of(structure, batch), goal_of(structure, "gate")
    assert float(NorthScore("post")(context, goal).values["gate"].max()) > 0
    with pytest.raises(MethodError, match="2 weights make its units"):
        NorthScore("pre")(context, goal)


def test_more_candidates_than_limits_allow_units():
    structure, batch = perceptron(nn.Tanh())
    limited = attach(structure.model, batch[0], limits={"2": (None, 8)})
    assert len(NorthScore()(context_of(limited, batch), goal_of(limited, "2", by=2)).values["2"]) == 8
