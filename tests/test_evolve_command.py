"""`espalier evolve`: one command that searches, goes on, and says what came out."""

from __future__ import annotations

import json

import pytest
import torch

import espalier as esp
from espalier.bench.evolve import chosen
from espalier.bench.models import build, example_inputs
from espalier.cli import main
from espalier.errors import RunError

COMMAND = ["evolve", "digits", "--width", "0.25", "--epochs", "2", "--cycles", "1", "--candidates", "2"]


def records(path):
    return [json.loads(one) for one in path.read_text().splitlines()]


def test_a_search_leaves_its_network_its_records_and_goes_on(tmp_path, capsys):
    out = tmp_path / "search"
    assert main([*COMMAND, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "cycle 1: 2 edits are tried" in said
    found, alone = records(out / "surgeon.jsonl")[-1], records(out / "baseline.jsonl")[-1]
    assert f"found:  {found['test_accuracy']:.2%} on the test data" in said
    assert f"start:  {alone['test_accuracy']:.2%} on the test data" in said
    total = records(out / "surgeon.jsonl")[0]["total"]
    assert 0.9 * total < found["total_spent"] <= total
    assert 0.9 * total < alone["total_spent"] <= total
    model = build("mlp", (1, 8, 8), 10, width=0.25, seed=0)
    structure = esp.load(out / "network", model, example_inputs((1, 8, 8)))
    assert structure.cost().parameters == found["parameters"]
    assert torch.isfinite(model(torch.zeros(1, 1, 8, 8))).all()
    before = (out / "surgeon.jsonl").read_text()
    assert main([*COMMAND, "--out", str(out)]) == 0  # all of it is known
    assert (out / "surgeon.jsonl").read_text() == before
    assert main([*COMMAND, "--seed", "1", "--out", str(out)]) == 2
    assert "other options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "nonsense"}, "unknown model"),
        ({"proposals": "nonsense"}, "unknown proposals"),
        ({"epochs": 0}, "--epochs"),
        ({"task": "digits", "data": "x.npz"}, "two data sets"),
        ({"cycles": -1}, "counts"),
    ],
)
def test_wrong_options_say_so(given, message):
    with pytest.raises(RunError, match=message):
        chosen(given)


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main([*COMMAND, "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
