"""What is written down of gates and of the plane."""

from __future__ import annotations

import json

import pytest
import torch

from espalier.bench.gate_records import (
    BINS,
    COLUMNS,
    MOST_POINTS,
    MOST_UNITS,
    ROWS,
    Plane,
    gates_record,
    picture_epochs,
    plane_of,
    points_record,
    units_record,
)


def test_gates_are_counted_and_binned() -> None:
    p = {"fc": torch.tensor([0.0, 0.02, 0.5, 0.51, 1.0]), "fc.weight": torch.full((4, 5), 0.26)}
    record = json.loads(json.dumps(gates_record(1, 7.0, p, {"fc": 3})))
    assert (record["stage"], record["k"]) == (1, 7.0)
    fc, weights = record["places"]["fc"], record["places"]["fc.weight"]
    assert (fc["awake"], fc["asleep"], fc["open"], fc["expected"]) == (5, 3, 3, 2.03)
    assert len(fc["histogram"]) == BINS
    assert {at: count for at, count in enumerate(fc["histogram"]) if count} == {0: 2, 10: 2, BINS - 1: 1}
    assert (weights["awake"], weights["asleep"], weights["histogram"][5]) == (20, 0, 20)


def test_a_picture_holds_units_one_by_one_where_they_are_few() -> None:
    p = {"few": torch.tensor([[0.12345], [1.0]]), "many": torch.rand(MOST_UNITS + 1), "none": torch.zeros(0)}
    assert units_record(p) == {"few": [0.123, 1.0]}


def test_the_map_is_read_from_the_lowest_row_up() -> None:
    plane = Plane((0.0, 4.0), (0.0, 1.0))

    def logits(points: torch.Tensor) -> torch.Tensor:  # class 1 to the right of x = 2, class 2 above y = 0.5
        x, y = points.unbind(1)
        return 20 * torch.stack([torch.full_like(x, 0.5), (x > 2).float(), 2 * (y > 0.5).float()], 1)

    grid = plane.record(logits)
    assert (grid["x"], grid["y"], grid["columns"], grid["rows"]) == ([0.0, 4.0], [0.0, 1.0], COLUMNS, ROWS)
    rows = [grid["winner"][at : at + COLUMNS] for at in range(0, COLUMNS * ROWS, COLUMNS)]
    assert rows[0] == [0] * (COLUMNS // 2) + [1] * (COLUMNS // 2)
    assert rows[-1] == [2] * COLUMNS
    assert set(grid["confidence"]) == {100}
    assert set(plane.record(lambda points: torch.zeros(len(points), 4))["confidence"]) == {25}


def test_a_diverged_network_has_a_map_without_confidence() -> None:
    grid = Plane((0.0, 1.0), (0.0, 1.0)).record(lambda points: torch.full((len(points), 2), torch.nan))
    assert set(grid["confidence"]) == {0}


def test_points_of_a_plane_have_a_map() -> None:
    plane = plane_of(torch.tensor([[0.0, 5.0], [10.0, 5.0]]))
    assert plane is not None
    assert plane.x == pytest.approx((-1.2, 11.2))
    assert plane.y == pytest.approx((4.88, 5.12))
    assert plane_of(torch.zeros(3, 3)) is None
    assert plane_of(torch.zeros(3, 1, 2)) is None
    assert plane_of(torch.zeros(0, 2)) is None


def test_no_more_points_than_can_be_told_apart() -> None:
    points = points_record(torch.full((MOST_POINTS + 5, 2), 0.123456), torch.arange(MOST_POINTS + 5))
    assert len(points) == MOST_POINTS
    assert points[7] == [0.1235, 0.1235, 7]


@pytest.mark.parametrize(("epochs", "start", "until"), [(1999, 0.05, 0.75), (100, 0.25, 0.5), (8, 0.0, 1.0), (1, 0, 1)])
def test_pictures_are_few_and_in_every_stage(epochs: int, start: float, until: float) -> None:
    found = picture_epochs(epochs, start, until)
    assert {0, epochs} <= found <= set(range(epochs + 1))
    assert len(found) <= 11
    if epochs >= 100:
        assert {round(start * epochs), round(until * epochs)} <= found
        assert sum(start * epochs < at < until * epochs for at in found) >= 5
