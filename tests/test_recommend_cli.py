"""`espalier recommend`: what it takes, what it prints, and one line for what it does not take."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import espalier as esp
from espalier.bench.data import load
from espalier.bench.models import build, example_inputs
from espalier.cli import main
from espalier.edit.plan import Plan

Output = pytest.CaptureFixture[str]
FEW = ["--permutations", "19"]
RUN = ["run", "digits", "--width", "0.125", "--epochs", "2", "--batch-size", "128", "--no-static"]
SCRIPT = """
import torch
from torch import nn

torch.manual_seed(0)

def network():
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        model[0].weight[3:] = 0
    return model

def whole():
    x, y = torch.randn(64, 4), torch.randn(64, 3)
    batches = zip(x.split(16), y.split(16))
    return network(), x[:2], lambda model, batch: (model(batch[0]) - batch[1]).square().mean(), batches

def plain():
    return network(), torch.zeros(2, 4)

def other():
    return network()
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main([*RUN, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine_to_judge.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def refused(capsys: Output, *words: str) -> str:
    capsys.readouterr()
    assert main(["recommend", *words]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    return output.err


def test_a_run_is_read_with_its_model_and_data(run_folder: Path, capsys: Output, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    plans = tmp_path / "plans"
    assert main(["recommend", str(run_folder), "--json", "--criterion", "bic", "--plans", str(plans), *FEW]) == 0
    found = json.loads(capsys.readouterr().out)
    data = load("digits", seed=0)
    assert found["samples"] == len(data.x_train)
    assert found["criterion"] == "BIC with all parameters"
    kinds = [one["kind"] for one in found["recommendations"]]
    assert kinds
    assert {"fc1", "fc2"} <= {site for site, evidence in found["measured"].items() if evidence}
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before
    model = build("mlp", data.input_shape, data.classes, width=0.125)
    structure = esp.load(run_folder / "network", model, example_inputs(data.input_shape))
    files = sorted(plans.glob("*.json"))
    assert len(files) == len(kinds)
    cost = structure.cost().parameters
    structure.apply(Plan.load(files[0]))
    assert structure.cost().parameters - cost == found["recommendations"][0]["parameters"]


def test_the_table_of_a_run(run_folder: Path, capsys: Output) -> None:
    capsys.readouterr()
    assert main(["recommend", str(run_folder), "--top", "1", "--layers", "--split", "training", *FEW]) == 0
    text = capsys.readouterr().out
    assert text.startswith("loss ")
    assert "AIC with effective degrees of freedom" in text
    assert "model's output" in text


def test_a_saved_network_with_its_model_and_data(run_folder: Path, capsys: Output) -> None:
    words = [str(run_folder / "network"), "--model", "mlp", "--width", "0.125", "--data", "digits", "--layers", *FEW]
    capsys.readouterr()
    assert main(["recommend", *words, "--axes", "fc1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [site for site, evidence in found["measured"].items() if evidence] == ["fc1"]


def test_a_network_and_batches_of_the_users(script: Path, capsys: Output) -> None:
    assert main(["recommend", "mine_to_judge:whole", *FEW]) == 0
    text = capsys.readouterr().out
    assert "remove 9 dead of 12 units" in text
    x, y = np.random.default_rng(0).normal(size=(80, 4)).astype("float32"), np.arange(80) % 3
    np.savez(script / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    words = ["--data", "own.npz", "--split", "training", "--batches", "2", "--batch-size", "30", "--layers"]
    assert main(["recommend", "mine_to_judge:plain", *words, "--json", *FEW]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommendations"][0]["kind"] == "dead"
    assert sorted(found["recommendations"][0]["plan"]["edits"][0]["remove"]) == list(range(3, 12))


def test_what_it_does_not_take(script: Path, run_folder: Path, capsys: Output) -> None:
    assert "recommendations need data" in refused(capsys, "mlp")
    assert "unknown network" in refused(capsys, "mpl", "--data", "digits")
    assert "should return a model and its example inputs" in refused(capsys, "mine_to_judge:other")
    assert "leave out --data" in refused(capsys, "mine_to_judge:whole", "--data", "digits")
    assert "is no folder" in refused(capsys, "mlp", "--model", "mlp", "--data", "digits")
    assert "which knows its model" in refused(capsys, str(run_folder), "--data", "digits")
    assert "say what it was built as" in refused(capsys, str(run_folder / "network"), "--data", "digits")
    assert "criterion: expected one of" in refused(capsys, "mlp", "--data", "digits", "--criterion", "mdl")
    (script / "started").mkdir()
    (script / "started" / "config.json").write_text((run_folder / "config.json").read_text())
    assert "has left no network yet" in refused(capsys, "started")


def test_losses_of_other_networks_are_asked_for(script: Path, capsys: Output) -> None:
    (script / "mine_to_judge.py").write_text(
        SCRIPT + "\ndef flat():\n    return nn.Sequential(nn.Flatten(0)), torch.zeros(2, 4)\n"
    )
    sys.modules.pop("mine_to_judge", None)
    importlib.invalidate_caches()
    message = refused(capsys, "mine_to_judge:flat", "--data", "digits")
    assert "scores of shape (samples, classes)" in message
