"""What recommendations are made of, against closed forms, brute force, and what chance gives."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import espalier as esp
from espalier import attach
from espalier.edit.depth_edits import Remove
from espalier.edit.plan import Plan, Resize
from espalier.errors import MethodError
from espalier.parts.recommend.batches import halved, samples_in
from espalier.parts.recommend.criteria import Criterion, criterion_named
from espalier.parts.recommend.freedom import Freedoms
from espalier.parts.recommend.nulls import apart, falls, p_high, p_low, until_settled
from espalier.parts.recommend.planned import as_planned
from espalier.parts.recommend.redundancy import constant_units, elimination, readers_of, twins, unread_units
from espalier.parts.recommend.rows import rows_of
from espalier.parts.recommend.spectra import (
    covariance,
    effective_rank,
    rank_test,
    signal_rank,
    stable_rank,
    unrelated,
)
from espalier.parts.recommend.wbic import wbic
from espalier.parts.score import seed_random_numbers


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def gaussian(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Negative log-likelihood per sample of Gaussian targets of variance 1, without its constant."""
    return (model(batch[0]) - batch[1]).square().flatten(1).sum(1).mean() / 2


# ------------------------------------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (3.0, 1.0), (5.0, 2.0, 2.0, 0.5)])
def test_effective_rank_is_the_entropy_of_known_eigenvalues(values: tuple[float, ...]) -> None:
    basis = torch.linalg.qr(drawn(len(values), len(values))).Q
    matrix = basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T
    parts = [value / sum(values) for value in values if value]
    assert effective_rank(matrix) == pytest.approx(math.prod(part**-part for part in parts), rel=1e-9)


def test_effective_rank_of_centred_activations() -> None:
    one = drawn(50, 1)
    assert effective_rank(covariance(one @ drawn(1, 6, seed=1) + 7.0)) == pytest.approx(1.0, abs=1e-6)
    assert effective_rank(covariance(torch.full((50, 3), 2.0))) == 0.0
    assert effective_rank(covariance(torch.linalg.qr(drawn(40, 40) - drawn(40, 40).mean(0)).Q[:, :5])) < 5.0 + 1e-9


def test_stable_and_signal_rank() -> None:
    assert stable_rank(torch.eye(7, dtype=torch.float64)) == pytest.approx(7.0)
    assert stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(6 / 4)
    assert stable_rank(torch.zeros(3, 4)) == 0.0
    noise, found = drawn(30, 40, seed=2), drawn(30, 3, seed=3) @ drawn(3, 40, seed=4)
    assert signal_rank(found + 0.3 * noise, 9, generator()) == 3
    assert signal_rank(noise, 9, generator()) <= 1


# --------------------------------------------------------------------------------------------------------------- nulls


def test_permuted_units_keep_what_they_do_by_themselves() -> None:
    rows = drawn(20, 3, 5)
    mixed = apart(rows, generator(1))
    for unit in range(5):  # whole samples were exchanged, in another order for every unit
        order = [(mixed[sample, :, unit] == rows[:, :, unit]).all(1).nonzero().item() for sample in range(20)]
        assert sorted(order) == list(range(20))
    assert not torch.equal(mixed, rows)


def test_signs_are_changed_exactly_where_there_are_few() -> None:
    differences = torch.tensor([-1.0, -2.0, -4.0, 0.5], dtype=torch.float64)
    sums = [sum(s * d for s, d in zip(signs, differences.tolist(), strict=True))
            for signs in itertools.product((1, -1), repeat=4)]  # fmt: skip
    expected = sum(one <= -6.5 for one in sums) / 16
    assert falls(differences, torch.full((4,), 0.25, dtype=torch.float64), generator()) == expected == 2 / 16


def random_rows(seed: int, samples: int = 60, inputs: int = 16, units: int = 8) -> Tensor:
    """Units of a random layer that have nothing in common: orthogonal weights, independent inputs, a ReLU."""
    weights = torch.linalg.qr(drawn(inputs, units, seed=2 * seed)).Q
    return torch.relu(drawn(samples, inputs, seed=2 * seed + 1) @ weights).unsqueeze(1)


def test_random_networks_are_taken_for_redundant_as_seldom_as_the_level_says() -> None:
    trials, level = 300, 0.1
    found = (random_rows(seed) for seed in range(trials))
    rejected = sum(
        rank_test(covariance(rows), unrelated(rows, 19, generator(seed))).p <= level for seed, rows in enumerate(found)
    )
    # binomial: 30 expected, standard deviation 5.2
    assert 14 <= rejected <= 46


def test_random_units_are_no_twins() -> None:
    for seed in range(100):
        rows = random_rows(seed)
        assert not twins(covariance(rows), 0.5, unrelated(rows, 9, generator(seed))).pairs


def test_units_in_common_are_seen() -> None:
    rows = random_rows(0)
    mixed = rows @ drawn(8, 8, seed=5).softmax(0)
    found = rank_test(covariance(mixed), unrelated(mixed, 39, generator()))
    assert found.p <= 0.05
    assert found.rank < found.null


def test_the_level_of_signs_holds() -> None:
    weights = torch.full((12,), 1 / 12, dtype=torch.float64)
    found = [falls(drawn(12, seed=seed), weights, generator(seed)) for seed in range(400)]
    assert 22 <= sum(p <= 0.1 for p in found) <= 60  # 40 expected, standard deviation 6


def test_p_values_are_never_zero() -> None:
    assert p_low(0.0, [1.0] * 19) == 1 / 20
    assert p_low(2.0, [1.0] * 19) == 1.0


@pytest.mark.parametrize(("permutations", "level"), [(19, 0.05), (39, 0.05), (30, 0.1)])
def test_a_test_that_ends_early_has_the_verdict_of_all_permutations(permutations: int, level: float) -> None:
    passed, drawn_in_all, trials = 0, 0, 200
    for seed in range(trials):
        value, *null = torch.rand(1 + permutations, generator=generator(seed)).tolist()
        value = 1 - value / 8  # near the verdict
        waiting = iter(null)
        some = until_settled(value, lambda waiting=waiting: next(waiting), permutations, level)
        drawn_in_all += len(some)
        assert list(some) == null[: len(some)]
        assert (p_high(value, some) <= level) == (p_high(value, null) <= level)
        passed += p_high(value, null) <= level
    assert 0 < passed < trials
    assert drawn_in_all < trials * permutations


# ---------------------------------------------------------------------------------------------------------- redundancy


def test_elimination_against_refits_of_every_subset() -> None:
    rows, readers = drawn(200, 1, 5) @ drawn(5, 5, seed=1), drawn(3, 5, seed=2)
    found = elimination(covariance(rows), readers)
    flat = rows.flatten(0, 1) - rows.flatten(0, 1).mean(0)
    made = flat @ readers.T
    for count in range(1, 5):
        stay = [unit for unit in range(5) if unit not in found.order[:count]]
        best = torch.linalg.lstsq(flat[:, stay], made).solution
        lost = float((flat[:, stay] @ best - made).square().sum() / made.square().sum())
        assert found.lost[count - 1] == pytest.approx(lost, rel=1e-4)
    for unit in range(5):  # the first one is the best of all
        stay = [other for other in range(5) if other != unit]
        best = torch.linalg.lstsq(flat[:, stay], made).solution
        assert float((flat[:, stay] @ best - made).square().sum() / made.square().sum()) >= found.lost[0] * (1 - 1e-6)


def test_dead_and_doubled_units() -> None:
    rows = drawn(100, 1, 6)
    rows[..., 2] = -3 * rows[..., 0] + 1 + 0.01 * rows[..., 5]
    rows[..., 4] = 5.0
    flat = rows.flatten(0, 1)
    assert constant_units(flat.amin(0), flat.amax(0)) == (4,)
    found = twins(covariance(rows), 0.01, unrelated(rows, 9, generator()))
    assert [(unit, other) for unit, other, _ in found.pairs] == [(2, 0)]
    assert found.pairs[0][2] == pytest.approx(-1.0, abs=1e-3)
    weights = drawn(3, 6)
    weights[:, 1] = 0
    assert unread_units(weights) == (1,)


def test_readers_of_an_axis_by_unit() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(3 * 4, 2)).double()
    structure = attach(model, torch.zeros(2, 1, 4, 4, dtype=torch.float64))
    found = readers_of(structure, "0")
    weight = model[2].weight.detach()  # channel c of the convolution is inputs 4c to 4c + 3
    assert found is not None
    assert found.shape == (8, 3)
    for unit in range(3):
        expected = weight[:, 4 * unit : 4 * unit + 4].square().sum() / weight.square().sum()
        assert float(found[:, unit].square().sum()) == pytest.approx(float(expected))


class TokensFirst(nn.Module):
    """Batches of (samples, tokens, 3), computed with tokens first; the units of `inner` see tokens times samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x.transpose(0, 1).reshape(-1, 3)))
        hidden = torch.tanh(self.outer(hidden)).view(x.shape[1], x.shape[0], -1)
        return self.head(hidden.transpose(0, 1).flatten(0, 1)).view(*x.shape[:2], 2)


def test_samples_are_found_wherever_they_are() -> None:
    torch.manual_seed(0)
    model = TokensFirst().double()
    x = drawn(6, 4, 3)
    structure = attach(model, x)
    found, problems = rows_of(structure, ["inner", "outer"], [x], lambda m, b: m(b).sum(), generator())
    assert not problems
    inner = torch.tanh(model.inner(x)).detach()
    outer = torch.tanh(model.outer(inner)).detach()
    torch.testing.assert_close(found["inner"].values, inner)
    torch.testing.assert_close(found["outer"].values, outer)


# ------------------------------------------------------------------------------------------------------------- planned


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def block_network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


CASES = {
    "units go": (block_network, (3,), Plan((Resize("0", remove=(1, 4)),))),
    "units come": (block_network, (3,), Plan((Resize("2", add=3),), seed=3)),
    "a layer goes": (block_network, (3,), Plan((), depth=(Remove("2"),))),
    "a recurrent layer": (Recurrent, (4, 3), Plan((Resize("cell", remove=(0, 2)),))),
    "a batch norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
        (2, 4, 4),
        Plan((Resize("0", remove=(3,)),)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_network_held_as_planned_is_what_the_plan_makes(name: str) -> None:
    make, shape, plan = CASES[name]
    torch.manual_seed(0)
    model = make().double()
    x = drawn(8, *shape)
    model(x)  # gives a batch norm statistics
    structure = attach(model, x)
    axis = plan.edits[0].axis if plan.edits else ""
    if axis and axis not in structure.axes:
        axis = next(one for one in structure.axes if structure.axes[one].reason is None)
        plan = Plan((Resize(axis, remove=plan.edits[0].remove),))
    batch = (x, drawn(8, 2, seed=4))
    with as_planned(structure, plan, gaussian) as planned:
        predicted, cost = float(planned.losses([batch])[0]), planned.cost
        fresh = {name: int(mask.sum()) for name, mask in planned.fresh.items()}
        kept = {name: planned.kept(name, one.detach()[None]) for name, one in model.named_parameters()
                if not plan.depth or name not in planned.parameters or plan.edits}  # fmt: skip
    sizes = {name: tuple(one.shape) for name, one in model.named_parameters()}
    edit = structure.apply(plan)
    model.eval()
    assert predicted == pytest.approx(float(gaussian(model, batch).detach()), rel=1e-12)
    assert cost == structure.cost() == edit.cost_after
    grown = sum(one.numel() for one in model.parameters())
    assert grown == sum(one.numel() for one in kept.values() if one is not None) + sum(fresh.values()) or plan.depth
    assert set(sizes) >= set(kept)


# ------------------------------------------------------------------------------------------------------------- freedom


def regression(samples: int = 400, inputs: int = 6, noise: float = 1.0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A linear model at the maximum of its likelihood."""
    x = drawn(samples, inputs)
    y = x @ drawn(inputs, 1, seed=1) + noise * drawn(samples, 1, seed=2)
    model = nn.Sequential(nn.Linear(inputs, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    return model, (x, y)


def split(batch: tuple[Tensor, Tensor], parts: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch[0].tensor_split(parts), batch[1].tensor_split(parts), strict=True))


def test_degrees_of_freedom_against_the_full_matrix() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = drawn(40, 4), drawn(40, 2, seed=1)
    parts = split((x, y), 40)
    with as_planned(attach(model, x), Plan(()), gaussian) as planned:
        found = Freedoms(planned, parts, 1000)
    names = [name for name, _ in model.named_parameters()]
    rows = torch.stack([
        torch.cat([one.flatten() for one in torch.autograd.grad(gaussian(model, part), list(model.parameters()))])
        for part in parts
    ])  # fmt: skip
    fisher = torch.cov(rows.T)
    precision = torch.cat([torch.full((model.get_parameter(name).numel(),), found.precisions[name],
                                      dtype=torch.float64) for name in names])  # fmt: skip
    influence = 1000 * fisher @ torch.linalg.inv(1000 * fisher + torch.diag(precision))
    assert found.total == pytest.approx(float(influence.trace()), rel=1e-4)
    start = 0
    for name in names:  # the fixed point of the evidence: a |w|^2 is the freedom of the tensor
        size = model.get_parameter(name).numel()
        own = float(influence.diagonal()[start : start + size].sum())
        square = float(model.get_parameter(name).detach().square().sum())
        assert found.precisions[name] * square == pytest.approx(own, rel=1e-3)
        start += size


def test_what_the_data_determine_counts_one_each() -> None:
    model, batch = regression(samples=2000)
    live = {"0.weight": torch.tensor([[True, False, True, True, True, True]])}
    with as_planned(attach(model, batch[0]), Plan(()), gaussian) as planned:
        assert Freedoms(planned, split(batch, 200), 2000).total == pytest.approx(6, abs=0.05)
        assert Freedoms(planned, split(batch, 200), 2000, live).total == pytest.approx(5, abs=0.05)


def test_doubles_count_once_and_dead_units_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        for one in (model[0].weight, model[0].bias):
            one[3:] = one[:3]  # three units and their doubles
        model[2].weight[:, 3:] = model[2].weight[:, :3]
    x, y = drawn(60, 4), drawn(60, 2, seed=1)
    structure = attach(model, x)
    parts = split((x, y), 60)
    deltas = {"2.weight": model[2].weight.detach()[:, 3:].clone()}
    with as_planned(structure, Plan(()), gaussian) as planned:
        whole = Freedoms(planned, parts, 600)
    with as_planned(structure, Plan((Resize("0", remove=(3, 4, 5)),), deltas=deltas), gaussian) as planned:
        doubles = whole.change(planned)
    with as_planned(structure, Plan((Resize("0", remove=(0, 3)),)), gaussian) as planned:
        pair = whole.change(planned)
    assert abs(doubles) < 0.12 * whole.total
    assert abs(doubles) / 3 < 0.5 * abs(pair) / 2  # of each unit that goes
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = 0, 0
        model[2].weight[:, 5] = 0
    with as_planned(structure, Plan(()), gaussian) as planned:
        whole = Freedoms(planned, parts, 600)
    with as_planned(structure, Plan((Resize("0", remove=(5,)),)), gaussian) as planned:
        # nothing but what reads it could still be learnt, from its activation, which is zero
        assert whole.change(planned) == pytest.approx(0.0, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------- wbic


def sampled(model: nn.Module, batch: tuple[Tensor, Tensor], draws: int = 300):  # type: ignore[no-untyped-def]
    with as_planned(attach(model, batch[0]), Plan(()), gaussian) as planned:
        return wbic(
            planned, [batch], split(batch, 20), len(batch[0]), draws=draws, burn_in=40, generator=generator(5)
        )  # fmt: skip


def test_wbic_of_a_regular_model_is_in_closed_form() -> None:
    """A Gaussian posterior: E[n L] = n L* + sum of b h / (b h + a) / (2 b), h the eigenvalues of n Hessians."""
    model, batch = regression()
    found = sampled(model, batch)
    count, heat = len(batch[0]), 1 / math.log(len(batch[0]))
    prior = 1 / float(model[0].weight.detach().square().mean())
    hessian = torch.linalg.eigvalsh(batch[0].T @ batch[0])
    expected = float((heat * hessian / (heat * hessian + prior)).sum()) / 2
    assert found.learning == pytest.approx(expected, rel=0.12)
    assert 0.9 * 3 < expected < 3  # half the number of parameters, as BIC has it, but for what the prior holds
    start = float(gaussian(model, batch).detach())
    assert found.value == pytest.approx(start + found.learning * math.log(count) / count)
    assert 0.5 < found.accepted <= 1
    assert found.error < 0.3 * (found.value - start)


def test_wbic_counts_singular_directions_for_less_than_bic() -> None:
    """Two linear layers in a row through a hidden layer as wide as the input: 42 parameters make 6."""
    model, batch = regression()
    deep = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 1, bias=False)).double()
    with torch.no_grad():
        deep[0].weight.copy_(torch.eye(6))
        deep[1].weight.copy_(model[0].weight)
    found = sampled(deep, batch, draws=200)
    assert found.learning < 0.5 * 42 / 2
    assert found.learning == pytest.approx(3, abs=1.5)


# ------------------------------------------------------------------------------------------------------ the other parts


def test_criteria_by_hand() -> None:
    assert Criterion("none").change(0.3, -50, math.nan, 100) == 0.3
    assert Criterion("aic", "parameters").change(0.3, -50, -5.0, 100) == pytest.approx(0.3 - 0.5)
    assert Criterion("bic", "parameters").change(0.3, -50, -5.0, 100) == pytest.approx(0.3 - 0.25 * math.log(100))
    assert Criterion("bic", "effective").change(0.3, -50, -5.0, 100) == pytest.approx(0.3 - 0.025 * math.log(100))
    assert criterion_named("aic-effective") == Criterion("aic", "effective")
    with pytest.raises(MethodError, match="expected one of loss, aic, bic"):
        criterion_named("bic?")
    with pytest.raises(MethodError, match="penalty"):
        Criterion("mdl")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="draws"):
        esp.WBIC(draws=0)


def test_samples_are_parted_without_overlap() -> None:
    batches = [{"x": torch.arange(11), "y": torch.arange(11)}, {"x": torch.arange(11, 30), "y": torch.arange(11, 30)}]
    found = halved(batches, 8, lambda batch: batch["x"].sum())
    seen = torch.cat([one["x"] for one in (*found.found, *found.judged)])
    assert sorted(seen.tolist()) == list(range(30))
    assert float(found.weights.sum()) == pytest.approx(1.0)
    assert sum(samples_in(one) for one in found.cut(12)) == found.count == 30


def test_batches_without_samples_are_refused() -> None:
    with pytest.raises(MethodError, match="samples along the first dimension"):
        samples_in((torch.zeros(3), torch.zeros(4)))
    with pytest.raises(MethodError, match="samples along the first dimension"):
        samples_in("text")
    with pytest.raises(MethodError, match="8 samples or more"):
        halved([torch.zeros(6, 2)], 4, lambda batch: batch.sum())
    with pytest.raises(MethodError, match="cannot be evaluated on the first batch: ZeroDivisionError"):
        halved([torch.zeros(8, 2)], 4, lambda batch: 1 / 0)


def test_a_network_of_fixed_batches_is_looked_at_by_whole_ones() -> None:
    batches = [torch.full((8, 2), float(number)) for number in range(4)]
    found = halved(batches, 4, lambda batch: batch.view(8, 2).sum())
    assert not found.divisible
    assert [float(one[0, 0]) for one in found.found] == [0.0, 2.0]
    assert found.cut(9) == found.whole
    with pytest.raises(MethodError, match="give several batches"):
        halved(batches[:1], 4, lambda batch: batch.view(8, 2).sum())


def test_random_numbers_are_those_of_torch_by_the_same_seed():
    seed_random_numbers(7)
    found = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(found, torch.rand(3))
