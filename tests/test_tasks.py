"""Tasks: one per data set, schedules of the right shape, and settings that train."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from espalier.bench.data import DATASETS, batches, load
from espalier.bench.models import MODELS, build
from espalier.bench.tasks import TASKS, Schedule, cosine, one_cycle, task
from espalier.errors import DataError


def test_every_data_set_has_a_task_with_a_known_model() -> None:
    assert TASKS.keys() == DATASETS.keys()
    assert {row.model for row in TASKS.values()} <= MODELS.keys()


def test_any_npz_file_has_a_task() -> None:
    assert task(Path("folder/birds.npz")).name == "birds"
    assert task("birds.npz").augment is None
    with pytest.raises(DataError, match="unknown task 'birds': expected one of digits, moons"):
        task("birds")


@pytest.mark.parametrize("schedule", [one_cycle, cosine])
def test_schedules_reach_one_end_at_zero_and_do_not_jump(schedule: Schedule) -> None:
    values = [schedule(step / 1000) for step in range(1001)]
    assert max(values) == pytest.approx(1)
    assert values[-1] == pytest.approx(0, abs=1e-12)
    assert min(values) >= 0
    assert max(abs(after - before) for before, after in pairwise(values)) < 0.01


def test_the_scheduler_follows_the_schedule() -> None:
    row = TASKS["digits"]
    optimizer = row.make_optimizer(nn.Linear(2, 2))
    scheduler = row.make_scheduler(optimizer, lambda step: step / 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([row.learning_rate * row.schedule(step / 10) for step in range(10)])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_digits_are_learnt_in_a_tenth_of_the_epochs() -> None:
    row, digits = TASKS["digits"], load("digits")
    model = build(row.model, digits.input_shape, digits.classes, width=0.5, seed=0)
    optimizer = row.make_optimizer(model)
    epochs = row.epochs // 10
    steps = epochs * -(-len(digits.x_train) // row.batch_size)
    scheduler = row.make_scheduler(optimizer, lambda step: min(step / steps, 1.0))
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for x, y in batches(digits.x_train, digits.y_train, row.batch_size, generator, row.augment):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y, label_smoothing=row.label_smoothing).backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        accuracy = (model(digits.x_val).argmax(dim=1) == digits.y_val).float().mean()
    assert accuracy > 0.93
