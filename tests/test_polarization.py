"""Polarization: the regulariser against brute force, thresholds, the target search."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from espalier.errors import MethodError
from espalier.parts.units.polarization import polarization, polarization_gradient
from espalier.parts.units.search import search_lambda
from espalier.parts.units.threshold import Valley

UNIT = st.floats(0.0, 1.0, allow_subnormal=False)
SCALES = st.lists(UNIT, min_size=1, max_size=12).map(lambda one: torch.tensor(one, dtype=torch.float64))
TS = [0.8, 1.0, 1.2, 1.4, 1.5]


def written_out(scales: list[float], t: float) -> float:
    mean = math.fsum(scales) / len(scales)
    return math.fsum(t * abs(g) - abs(g - mean) for g in scales)


# --- The regulariser -------------------------------------------------------------------------------------------------


@given(SCALES, st.sampled_from(TS))
def test_the_value_is_the_formula(scales: Tensor, t: float) -> None:
    assert polarization(scales, t).item() == pytest.approx(written_out(scales.tolist(), t), abs=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_subgradient_is_that_of_autograd_and_of_differences(weighted: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        scales = torch.rand(9, generator=draw, dtype=torch.float64).requires_grad_()
        weights = torch.rand(9, generator=draw, dtype=torch.float64) + 0.5 if weighted else None
        found = polarization_gradient(scales.detach(), 1.2, weights)
        (expected,) = torch.autograd.grad(polarization(scales, 1.2, weights), scales)
        torch.testing.assert_close(found, expected)
        for unit in range(9):
            step = torch.zeros(9, dtype=torch.float64)
            step[unit] = 1e-7
            with torch.no_grad():
                rise = polarization(scales + step, 1.2, weights) - polarization(scales - step, 1.2, weights)
            assert found[unit].item() == pytest.approx(rise.item() / 2e-7, abs=1e-5)


def test_the_subgradient_by_hand() -> None:
    """t sign(g_i) - s_i + mean(s); a scale that is equal to the mean has s = 0."""
    found = polarization_gradient(torch.tensor([0.0, 0.2, 0.9]), 1.2)  # mean 0.367: s = -1, -1, 1
    torch.testing.assert_close(found, torch.tensor([0 + 1 - 1 / 3, 1.2 + 1 - 1 / 3, 1.2 - 1 - 1 / 3]))


def test_equal_scales_are_pulled_as_by_l1() -> None:
    torch.testing.assert_close(polarization_gradient(torch.full((7,), 0.5), 1.4), torch.full((7,), 1.4))


@given(SCALES, st.sampled_from(TS), st.randoms(use_true_random=False))
def test_permutations_change_nothing(scales: Tensor, t: float, random: object) -> None:
    order = list(range(len(scales)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert polarization(scales[order], t).item() == pytest.approx(polarization(scales, t).item(), abs=1e-9)


@given(SCALES, st.sampled_from(TS), st.floats(0.01, 50))
def test_it_is_homogeneous(scales: Tensor, t: float, factor: float) -> None:
    assert polarization(factor * scales, t).item() == pytest.approx(factor * polarization(scales, t).item(), abs=1e-7)


@given(st.integers(2, 8).flatmap(lambda n: st.tuples(*[st.lists(UNIT, min_size=n, max_size=n)] * 2)), UNIT)
def test_it_is_concave_where_scales_are_not_negative(pair: tuple[list[float], list[float]], share: float) -> None:
    one, two = (torch.tensor(scales, dtype=torch.float64) for scales in pair)
    between = polarization(share * one + (1 - share) * two, 1.3).item()
    assert between >= share * polarization(one, 1.3).item() + (1 - share) * polarization(two, 1.3).item() - 1e-9


@pytest.mark.parametrize("t", TS)
@pytest.mark.parametrize("n", [3, 6, 9])
def test_the_minimum_against_brute_force(n: int, t: float) -> None:
    """It is at a vertex, with floor(n rho) or one more at a, and has the value of the formula."""
    a = 0.8
    values = {point: written_out([a * one for one in point], t) for point in product((0, 1), repeat=n)}
    least = min(values.values())
    expected = a * n * min(2 * (k / n) ** 2 + (t - 2) * k / n for k in range(n + 1))
    assert least == pytest.approx(expected)
    rho = min(max(0.5 - t / 4, 0.0), 1.0)
    at = {sum(point) for point, value in values.items() if value < least + 1e-12}
    assert at & {math.floor(n * rho), math.floor(n * rho) + 1}
    draw = torch.Generator().manual_seed(n)
    inside = a * torch.rand(2000, n, generator=draw, dtype=torch.float64)
    assert all(polarization(point, t).item() >= least for point in inside)


@pytest.mark.parametrize(("t", "above"), [(1.2, 0.4), (1.4, 0.3), (1.5, 0.25)])
def test_where_a_flow_along_the_subgradient_ends(t: float, above: float) -> None:
    """With min(p, 1 - t / 2) above zero, about twice the part that the minimum has at a."""
    scales = torch.rand(60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for _ in range(10_000):
        scales = (scales - 1e-3 * polarization_gradient(scales, t)).clamp(0, 1)
    assert (scales > 0).double().mean().item() == pytest.approx(above)
    assert (scales > scales.mean()).double().mean().item() == pytest.approx(above)
    few = torch.cat([torch.zeros(54, dtype=torch.float64), torch.full((6,), 0.2, dtype=torch.float64)])
    for _ in range(10_000):
        few = (few - 1e-3 * polarization_gradient(few, t)).clamp(0, 1)
    assert few.tolist() == [0.0] * 54 + [1.0] * 6


# --- Thresholds ------------------------------------------------------------------------------------------------------


def clusters(low: int, high: int, spread: float, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.cat(
        [(0.05 + spread * torch.randn(low, generator=draw)).abs(), 0.7 + spread * torch.randn(high, generator=draw)]
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("low", "high"), [(200, 200), (30, 400), (400, 30), (6, 6)])
def test_two_clusters_are_parted(low: int, high: int, seed: int) -> None:
    values = clusters(low, high, 0.04, seed)
    assert values[:low].max() < Valley()(values) < values[low:].min()


def test_zeros_and_ones_are_parted() -> None:
    assert Valley()(torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0])) == pytest.approx(0.5)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_of_equal_values_none_is_below(value: float) -> None:
    assert not (torch.full((20,), value) < Valley()(torch.full((20,), value))).any()


def test_a_single_value_is_its_own_threshold() -> None:
    assert Valley()(torch.tensor([0.3])) == pytest.approx(0.3)


def test_values_without_a_valley_are_parted_where_groups_differ_most() -> None:
    """One mode only: the border of largest variance between groups, by brute force."""
    values = torch.linspace(0, 1, 101, dtype=torch.float64).square()
    found = Valley(bins=10)(values)

    def between(border: float) -> float:
        low, high = values[values < border], values[values >= border]
        return float(len(low) * len(high) * (low.mean() - high.mean()) ** 2)

    best = max(between(float(border)) for border in values[1:])
    assert between(found) == pytest.approx(best)


def test_a_threshold_does_not_depend_on_order_or_outliers_in_few_bins() -> None:
    values = clusters(300, 300, 0.04, 1)
    assert Valley()(values.flip(0)) == Valley()(values)
    with_one = torch.cat([values, torch.tensor([0.35])])
    assert values[:300].max() < Valley()(with_one) < values[300:].min()


# --- The search ------------------------------------------------------------------------------------------------------


def test_the_search_finds_the_strength_for_a_target() -> None:
    trials: list[float] = []

    def train(strength: float) -> float:
        trials.append(strength)
        return 1 - strength / 2e-4 * 0.8

    found = search_lambda(train, 0.5, tolerance=0.01)
    assert found.within
    assert found.result == pytest.approx(0.5, abs=0.01)
    assert found.value == pytest.approx(1.25e-4, rel=0.02)
    assert [trial for trial, _ in found.trials] == trials
    assert len(trials) <= 7


def test_a_search_that_does_not_arrive_says_so_and_gives_the_nearest() -> None:
    found = search_lambda(lambda strength: 0.9 if strength < 1e-4 else 0.2, 0.5, rounds=4)
    assert not found.within
    assert len(found.trials) == 4
    assert found.result == 0.2
    with pytest.raises(MethodError, match="0 <= low < high, found low=1"):
        search_lambda(lambda strength: strength, 0.5, low=1.0)
    with pytest.raises(MethodError, match="at least one round, found 0"):
        search_lambda(lambda strength: strength, 0.5, rounds=0)
