"""The statistics of the benchmark, against scipy and against what can be worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from espalier.suite.statistics import Effect, holm, not_worse, over_tasks, paired, t_cdf, t_quantile
from espalier.suite.watching import area, recovery


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 30, 200])
def test_students_t_is_scipys(freedom):
    for t in (-30.0, -2.5, -0.5, 0.0, 0.1, 1.0, 3.0, 40.0):
        assert t_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-9)
    for part in (0.025, 0.6, 0.9, 0.975, 0.995):
        assert t_quantile(part, freedom) == pytest.approx(stats.t.ppf(part, freedom), rel=1e-9)


@settings(max_examples=25)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12))
def test_paired_differences_are_scipys_t_test(values):
    if max(values) - min(values) < 1e-6:
        return
    found, expected = paired(values), stats.ttest_1samp(values, 0.0)
    assert found.p == pytest.approx(expected.pvalue, abs=1e-8)
    low, high = expected.confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(low, abs=1e-8)
    assert found.mean + found.half == pytest.approx(high, abs=1e-8)


def test_one_sample_claims_nothing():
    found = paired([0.3])
    assert (found.mean, found.half, found.p, found.sure) == (0.3, math.inf, 1.0, False)
    assert not_worse([0.3], 0.1) == 1.0
    with pytest.raises(ValueError, match="at least one difference"):
        paired([])


def test_no_difference_is_not_no_loss():
    noisy = [-0.03, 0.02, 0.01, -0.01, 0.01]
    assert not paired(noisy).sure
    assert not_worse(noisy, 0.005) > 0.05
    assert not_worse(noisy, 0.05) < 0.05
    expected = stats.ttest_1samp(noisy, -0.05, alternative="greater").pvalue
    assert not_worse(noisy, 0.05) == pytest.approx(expected, abs=1e-9)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_random_effects_by_hand():
    alike = [Effect(0.2, 0.1, 0.01, 5, 0.04), Effect(0.2, 0.1, 0.01, 5, 0.04)]
    same = over_tasks(alike)
    assert same.mean == pytest.approx(0.2)
    assert same.error == pytest.approx(0.04 / math.sqrt(2))  # nothing between tasks: that of fixed effects
    assert same.samples == 10
    apart = over_tasks([Effect(0.0, 0.1, 1.0, 5, 0.01), Effect(0.4, 0.1, 0.0, 5, 0.01)])
    # DerSimonian & Laird: q = 800, tau^2 = (800 - 1) / (20000 - 10000) = 0.0799
    assert apart.mean == pytest.approx(0.2)
    assert apart.error == pytest.approx(math.sqrt((0.0001 + 0.0799) / 2), rel=1e-6)
    assert not apart.sure
    assert over_tasks(alike[:1]) == alike[0]


def test_area_under_a_curve_in_the_logarithm():
    curve = [{"training_flops": 10**at, "val_accuracy": value} for at, value in ((1, 0.2), (2, 0.6), (3, 0.8))]
    assert area(curve, 10, 1000) == pytest.approx((0.4 + 0.7) / 2)
    assert area(curve, 100, 1000) == pytest.approx(0.7)
    assert area(curve, 1, 10) == pytest.approx(0.2)  # before the first look
    assert area([], 1, 10) is None


def test_recovery_is_the_first_step_that_is_as_good_as_before():
    before = [1.0] * 12
    assert recovery([*before, 3.0, 0.5, 0.2, 0.2], 12, 16) == 4  # means of the steps since: 3, 1.75, 1.23, 0.975
    assert recovery([*before, 0.9], 12, 13) == 1
    assert recovery([*before, 3.0, 2.0], 12, 14) is None
    assert recovery([1.0, 1.0], 0, 2) is None  # nothing was before
