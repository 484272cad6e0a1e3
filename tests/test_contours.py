"""Closed lines around where a field is high."""

from __future__ import annotations

import math
import random

import pytest

from espalier.bench.contours import Place, rings


def area(ring: list[Place]) -> float:
    """Signed: above 0 where the line turns left."""
    pairs = zip(ring, [*ring[1:], ring[0]], strict=True)
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs) / 2


def test_a_disc_is_one_ring_of_its_area() -> None:
    field = [[9 - math.hypot(x - 10, y - 10) for x in range(21)] for y in range(21)]
    (ring,) = rings(field, 3.0)
    assert area(ring) == pytest.approx(math.pi * 6**2, rel=0.01)
    for x, y in ring:
        assert math.hypot(x - 10, y - 10) == pytest.approx(6, abs=0.06)


def test_a_hole_turns_the_other_way() -> None:
    field = [[-abs(math.hypot(x - 15, y - 15) - 8) for x in range(31)] for y in range(31)]
    found = sorted(map(area, rings(field, -3.0)))
    assert found == [pytest.approx(-math.pi * 5**2, rel=0.02), pytest.approx(math.pi * 11**2, rel=0.02)]


def test_lines_close_at_the_border_of_the_field() -> None:
    (ring,) = rings([[1.0] * 5 for _ in range(4)], 0.5)
    assert area(ring) == pytest.approx(4 * 3)
    assert {(round(x, 6), round(y, 6)) for x, y in ring} <= {(x, y) for x in range(5) for y in range(4)}


@pytest.mark.parametrize("seed", range(5))
def test_rings_hold_all_that_is_high_and_nothing_else(seed: int) -> None:
    draw = random.Random(seed)
    field = [[draw.random() for _ in range(12)] for _ in range(9)]
    found = rings(field, 0.5)
    for y, row in enumerate(field):
        for x, value in enumerate(row):
            # a high corner on the border lies on the line itself
            if 0 < x < 11 and 0 < y < 8:
                assert winding(found, (x + 1e-7, y + 1e-7)) == (value >= 0.5)


def winding(found: list[list[Place]], place: Place) -> bool:
    """Whether a line to the right from a place crosses the rings an odd number of times."""
    px, py = place
    crossings = 0
    for ring in found:
        for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True):
            if (y0 > py) != (y1 > py):
                crossings += x0 + (py - y0) / (y1 - y0) * (x1 - x0) > px
    return crossings % 2 == 1


@pytest.mark.parametrize("field", [[], [[0.0, 0.0]], [[0.2]]])
def test_nothing_high_has_no_rings(field: list[list[float]]) -> None:
    assert rings(field, 0.5) == []


def test_squares_with_high_corners_across_are_parted() -> None:
    found = rings([[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], 0.5)
    assert [area(ring) for ring in found] == [pytest.approx(0.5)] * 2
