"""esp.shrink: whole blocks go where the time of calls is what a network costs, if a short training finds it better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_shrink import CLASSES, EXAMPLE, FEATURES, TRAIN, accuracy, fit
from torch import Tensor, nn

import espalier as esp
from espalier.errors import ShrinkError
from espalier.oneshot.blocks import droppable
from espalier.oneshot.meter import Meter

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.down(F.relu(self.up(x)))


class Residual(nn.Module):
    def __init__(self, blocks: int = 5) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))))


@pytest.fixture(scope="module")
def deep() -> Residual:
    torch.manual_seed(0)
    model = Residual()
    fit(model, esp.Tuning(1, 1, 1.0), steps=150)
    return model.eval()


def calls(model: nn.Module, example: Any) -> float:
    """Time of calls, and a ten-thousandth of that for a weight."""
    layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    return 1e-3 * layers + 1e-7 * sum(one.numel() for one in model.parameters())


HALF = esp.Latency(0.5, of="initial", measure=calls)


def shrunk(model: nn.Module, **options: Any) -> esp.Shrunk:
    given = {"train": fit, "evaluate": accuracy, "max_drop": 0.1, "rounds": 2, "round_to": 1, **options}
    return esp.shrink(model, EXAMPLE, target=HALF, **given)


def test_blocks_go_where_widths_save_nothing_and_the_training_is_shared_out(deep: Residual, tmp_path: Path) -> None:
    seen: list[tuple[int, float, int]] = []

    def noted(model: Any, tuning: esp.Tuning) -> None:
        seen.append((tuning.number, tuning.share, len(model.blocks)))
        if [number for number, *_ in seen].count(2) == 1:
            raise RuntimeError("out of time")
        fit(model, tuning)

    with pytest.raises(ShrinkError, match="train failed in round 2 of 2: RuntimeError: out of time"):
        shrunk(deep, train=noted, folder=tmp_path)
    found = shrunk(deep, train=noted, folder=tmp_path)
    assert found.outcome == "reached", found
    assert len(found.model.blocks) < len(deep.blocks) == 5
    assert any("without the blocks blocks." in note for note in found.notes)
    assert calls(found.model, None) <= 0.5 * calls(deep, None)
    trials, rounds = [one for one in seen if one[0] == 0], [one for one in seen if one[0]]
    assert [blocks for *_, blocks in trials] == [2], "widths alone do not lead there, and are not trained"
    assert len(rounds) == 3, "after the failure no trial and no first round again"
    assert sum(share for _, share, _ in (*trials, *rounds[:2])) <= 1
    kept = len(found.model.blocks)
    assert all(blocks == kept for *_, blocks in rounds)
    assert found.rounds[-1].score == accuracy(found.model)


def test_blocks_stay_where_asked_and_where_they_are_worth_more_than_width(deep: Residual) -> None:
    for options in ({"blocks": False}, {"axes": ["stem"]}):
        assert shrunk(deep, **options).outcome == "out of reach"
    structure = esp.attach(deep, EXAMPLE)
    able = droppable(structure, ["blocks.2.up"], [((TRAIN[0],), {})], Meter(structure, None, None))
    assert {one.name for one in able} == {"blocks.0", "blocks.1", "blocks.3", "blocks.4"}

    def worthless(model: nn.Module) -> float:
        model(TRAIN[0])
        return float(len(model.blocks))  # the more the better

    by_weights = esp.Latency(0.6, of="initial", measure=lambda model, _: sum(one.numel() for one in model.parameters()))
    found = esp.shrink(deep, EXAMPLE, target=by_weights, train=fit, evaluate=worthless, rounds=1, round_to=1)
    assert len(found.model.blocks) == 5
    assert found.outcome == "reached"
