"""Networks that `fully_shard` shares out: edited tensor by tensor, trained as one process would, saved by all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded_training as sharded
import torch
from parallel_training import batches, difference, loss_of, methods, network, optimizer_of, train
from ranks import double, run

import espalier as esp

pytestmark = pytest.mark.slow
KINDS = ("sgd", "adamw")


@pytest.mark.parametrize("kind", KINDS)
def test_shards_train_as_one_process(kind: str) -> None:
    chosen = methods(20, 50)
    alone = train(kind, 0, 1, 220, chosen)
    first, second = run(sharded.train, 2, kind, 220, chosen)
    assert [one.count("add") > 0 for one in alone["edits"]] == [True, False, True, False]
    assert alone["edits"] == first["edits"] == second["edits"]
    assert difference(alone, first) < 1e-5


@pytest.mark.usefixtures("double")
def test_four_shards_train_as_one_process() -> None:
    chosen = methods(4, 10)
    alone = train("adamw", 0, 1, 44, chosen)
    found = run(double, 4, sharded.train, "adamw", 44, chosen)
    assert all(alone["edits"] == one["edits"] for one in found)
    assert difference(alone, found[0]) < 1e-8


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_gives_what_it_gives_in_one_process(kind: str) -> None:
    model = network()
    optimizer = optimizer_of(kind, model)
    structure = esp.attach(model, sharded.example(), optimizer=optimizer)

    def steps() -> None:
        for batch in batches(3):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()

    steps()
    structure.prune({"0": [1, 5], "2": [0]})
    grown = structure.grow({"0": 3, "2": 2}, seed=7)
    expected = sharded.everything(model, optimizer)
    steps()
    after = sharded.everything(model, optimizer)
    for one in run(double, 2, sharded.edited, kind):
        assert all(one[what] for what in ("undone", "empty", "reshard"))
        assert one["contract"] == grown.contract == "exact"
        assert one["result"].keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(one["result"][name], tensor, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(one["after"][name], after[name], rtol=1e-7, atol=1e-9)


def test_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    chosen, total = methods(4, 6), 24
    expected = run(sharded.save_in_the_middle, 2, "adamw", tmp_path, total, chosen)[0]
    for size in (4, 2):
        found = run(sharded.load_and_go_on, size, "adamw", tmp_path, total, chosen)[0]
        assert found == pytest.approx(expected, abs=1e-5)
    model = network()
    optimizer = optimizer_of("adamw", model)
    structure = esp.load(tmp_path, model, sharded.example(), optimizer=optimizer)
    session = esp.Session(structure, chosen, loss=loss_of, total_steps=total)
    session.load(tmp_path)
    assert sharded.go_on(session, 0, 1, total - total // 2, total) == pytest.approx(expected, abs=1e-5)
    esp.save(structure, tmp_path / "whole")
    assert len(list(tmp_path.glob("shards-*"))) == 1
