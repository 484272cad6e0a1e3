"""The mixed model of the benchmarks: values that are known."""

from __future__ import annotations

import math
import statistics

import pytest

from benchmarks.mixed import mixed

# Davies & Goldsmith 1972, yield of dyestuff from six batches, five samples each; Bates et al. 2015 (lme4,
# doi 10.18637/jss.v067.i01) print what restricted maximum likelihood gives
DYESTUFF = {
    "A": (1545, 1440, 1440, 1520, 1580),
    "B": (1540, 1555, 1490, 1560, 1495),
    "C": (1595, 1550, 1605, 1510, 1560),
    "D": (1445, 1440, 1595, 1465, 1545),
    "E": (1595, 1630, 1515, 1635, 1625),
    "F": (1520, 1455, 1450, 1480, 1445),
}


def test_the_mixed_model_gives_what_is_printed_of_a_known_table():
    found = mixed(DYESTUFF)
    assert found.mean == pytest.approx(1527.5)
    assert found.error == pytest.approx(19.383, abs=1e-2)
    assert math.sqrt(found.between) == pytest.approx(42.0, abs=0.05)
    assert math.sqrt(found.within) == pytest.approx(49.51, abs=0.05)
    low, high = found.interval
    assert high - 1527.5 == pytest.approx(2.571 * found.error) == pytest.approx(1527.5 - low)


def test_groups_that_differ_by_chance_alone_are_one():
    groups = {"a": (1.0, 5.0), "b": (2.0, 4.0, 3.0), "c": (0.5, 5.5)}
    found = mixed(groups)
    every = [one for group in groups.values() for one in group]
    assert found.between == pytest.approx(0, abs=1e-4)
    assert found.mean == pytest.approx(statistics.mean(every), rel=1e-4)
    assert found.error == pytest.approx(statistics.stdev(every) / math.sqrt(len(every)), rel=1e-4)
