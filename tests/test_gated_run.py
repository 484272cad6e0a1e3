"""`espalier run --method npn`: options without a size, what is recorded of gates, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_run import InterruptAfter, assert_same_outcome, records

import espalier as esp
from espalier.bench.gate_history import gates_of
from espalier.bench.options import NONE, Options, resolve
from espalier.bench.presets import PRESETS
from espalier.bench.progress import Silent
from espalier.bench.records import read_run
from espalier.bench.run import resume, start
from espalier.bench.tasks import flat_then, flat_then_cosine, task
from espalier.cli import main
from espalier.errors import EspalierError, MethodError, RunError
from espalier.parts.budget import Parameters
from espalier.train.settings import build

MOONS = {"task": "moons", "method": "npn", "epochs": 40, "static": False}


def moons(**changes: object) -> Options:
    return resolve({**MOONS, **changes})


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "grown"
    start(moons(setting="growing", static=True), folder, Silent())
    return folder


# ---- options


def test_one_name_is_the_method_of_the_setting() -> None:
    growing, shrinking = moons(setting="growing"), moons(setting="shrinking")
    assert (growing.grow, growing.prune) == ("npn", NONE)
    assert (shrinking.grow, shrinking.prune) == (NONE, "npn")
    other = resolve({"method": "magnitude", "setting": "shrinking"})
    assert (other.grow, other.prune, other.size) == (NONE, "magnitude", 0.5)
    assert moons(method=None, grow="npn") == growing, "growing needs no pruning where gates decide"


def test_gates_begin_with_the_whole_network_and_take_no_size() -> None:
    for setting in ("growing", "shrinking"):
        chosen = moons(setting=setting)
        assert (chosen.size, chosen.width, chosen.model) == (None, 1.0, "embedded-mlp")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": "npn", "size": 0.5}, MethodError, "'npn' takes no size, since its penalty decides"),
        ({"method": "npn", "grow": "random"}, RunError, "leave out --grow, or --method"),
        ({"method": "npn", "grow": "random", "prune": "npn"}, RunError, "leave out --grow and --prune, or --method"),
        ({"method": "npn", "setting": "constant"}, RunError, "'constant' needs two: give --grow and --prune"),
        (
            {"grow": "npn", "prune": "magnitude"},
            MethodError,
            "works alone, in the setting 'growing'; found .*prune='ma",
        ),
        ({"grow": NONE, "prune": "npn", "setting": "growing"}, MethodError, "alone, in the setting 'shrinking'"),
        ({"method": "wild"}, MethodError, "there is no grow method 'wild'"),
        ({"method": "wild", "setting": "shrinking"}, MethodError, "there is no prune method 'wild'"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], error: type[EspalierError], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(given)


def test_settings_make_a_method_without_a_budget() -> None:
    (method,) = build("shrinking", None, "npn", total_steps=100, axes=["fc1"])
    assert method == esp.prune.NPN(axes=["fc1"])
    with pytest.raises(MethodError, match="takes no budget; leave measure= and scope= out, found 'flops'"):
        build("shrinking", None, "npn", total_steps=100, measure="flops")
    (other,) = build("shrinking", None, "magnitude", total_steps=100)
    assert other.schedule.amount.budget == Parameters(0.5, of="initial")


@pytest.mark.parametrize("key", PRESETS)
def test_a_preset_makes_its_method_and_says_how_to_train(key: tuple[str, str, str]) -> None:
    preset, (model, name, setting) = PRESETS[key], key
    method = preset.method()
    assert (method.name, method.direction) == (name, "grow" if setting == "growing" else "prune")
    row = preset.of(task("cifar10"))
    assert (row.name, row.augment, row.epochs, row.label_smoothing) == ("cifar10", preset.augment, preset.epochs, 0)
    other = "growing" if setting == "shrinking" else "shrinking"
    assert (model, name, other) in PRESETS


def test_a_schedule_that_falls_once() -> None:
    schedule = flat_then(0.75, 0.1)
    assert [schedule(at / 4) for at in range(5)] == [1.0, 1.0, 1.0, 0.1, 0.1]
    assert [flat_then_cosine(0.5)(at / 4) for at in range(5)] == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0])
    assert [flat_then_cosine(0.5, 6.0)(at / 4) for at in range(5)] == pytest.approx([1.0, 1.0, 6.0, 3.0, 0.0])


def test_a_preset_is_for_its_own_network() -> None:
    assert resolve({"task": "mnist", "method": "npn"}).preset is PRESETS["lenet5", "npn", "growing"]
    other = resolve({"task": "mnist", "method": "npn", "model": "mlp"})
    assert (other.preset, other.epochs, other.make_task()) == (None, 10, task("mnist"))
    assert resolve({"task": "mnist"}).preset is None


# ---- runs


def test_a_growing_run_wakes_units_and_records_its_gates(grown: Path) -> None:
    epochs = records(grown, "epoch")
    assert epochs[0]["axes"] == {"embed": 3, "hidden": 3}  # the others never were trained
    assert max(record["axes"]["hidden"] for record in epochs) > 5
    stages = [record["gates"]["stage"] for record in epochs]
    assert stages == sorted(stages)
    assert set(stages) == {0, 1, 2}
    for record in epochs[1:]:
        gates = record["gates"]
        assert {axis: sum(counts) for axis, counts in gates["axes"].items()} == record["axes"]
        assert all(len(counts) == 20 for counts in gates["axes"].values())
        assert gates["k"] == 5000 if gates["stage"] != 1 else 1 <= gates["k"] < 50
        assert gates["asleep"]["hidden"] + record["axes"]["hidden"] == 80


def test_maps_are_made_of_a_plane_and_points_are_kept(grown: Path) -> None:
    (begin,) = records(grown, "start")
    assert len(begin["points"]["inputs"]) == len(begin["points"]["labels"]) == 450
    shown = {record["epoch"]: record["map"] for record in records(grown, "epoch") if "map" in record}
    assert {1, 4, 20, 40} <= shown.keys()
    assert len(shown) < 20
    inputs = torch.tensor(begin["points"]["inputs"])
    for found in shown.values():
        values = torch.tensor(found["values"])
        assert values.shape == (40, 40)
        assert 0 <= float(values.min()) <= float(values.max()) <= 1
        assert found["x"][0] < float(inputs[:, 0].min()) < float(inputs[:, 0].max()) < found["x"][1]
    # the network that is left sees the upper moon, class 0, above the lower one
    last = torch.tensor(shown[40]["values"])
    assert float(last[:10].mean()) > 0.5 > float(last[30:].mean())


def test_a_run_begins_with_the_gates_and_the_plane_before_the_first_step(grown: Path) -> None:
    (begin,) = records(grown, "start")
    assert (begin["gates"]["stage"], begin["gates"]["k"]) == (0, 5000.0)
    assert {axis: (counts[0], sum(counts)) for axis, counts in begin["gates"]["axes"].items()} == {
        "embed": (97, 100),
        "hidden": (77, 80),
    }
    assert torch.tensor(begin["map"]["values"]).shape == (40, 40)
    assert begin["map"] != records(grown, "epoch")[0]["map"]
    first = gates_of(read_run(grown)).epochs[0]
    assert (first.epoch, first.open("hidden")) == (0, 3)


def test_the_network_that_is_left_is_what_was_tested(grown: Path) -> None:
    (end,) = records(grown, "end")
    assert end["axes"] == records(grown, "epoch")[-1]["axes"]
    assert end["parameters"] < 100 * 2 + 100 * 80 + 80 + 80 * 2 + 2
    assert end["static"]["parameters"] == end["parameters"]
    assert not any("gates" in record for record in records(grown, "static_epoch"))


def test_other_runs_record_no_gates(tmp_path: Path) -> None:
    start(resolve({"task": "moons", "epochs": 2, "static": False}), tmp_path / "run", Silent())
    assert not any("gates" in record or "map" in record or "points" in record for record in records(tmp_path / "run"))


def test_an_interrupted_run_with_gates_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    chosen = moons(setting="growing", epochs=16)
    start(chosen, tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        start(chosen, tmp_path / "again", InterruptAfter(23))
    given = {"method": "npn", "setting": "growing"}
    resume(tmp_path / "again", given, Silent())
    assert_same_outcome(tmp_path / "whole", tmp_path / "again")
    with pytest.raises(RunError, match="grow was npn and is random now"):
        resume(tmp_path / "again", {"method": "random"}, Silent())


def test_points_of_a_file_are_pruned_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    points = generator.normal(size=(200, 2))
    np.savez(tmp_path / "points.npz", points=points, labels=(points[:, 0] > 0).astype(int))
    words = ["run", "--data", str(tmp_path / "points.npz"), "--model", "embedded-mlp", "--method", "npn"]
    out = tmp_path / "run"
    assert main([*words, "--setting", "shrinking", "--epochs", "3", "--no-static", "--out", str(out)]) == 0
    assert "test accuracy" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert (config["grow"], config["prune"], config["size"], config["lr"]) == (NONE, "npn", None, 1e-3)


@pytest.mark.parametrize(("method", "model"), [("npn-weights", "mlp"), ("npn-layers", "resnet20")])
def test_weights_and_layers_have_gates_on_the_command_line(tmp_path: Path, method: str, model: str) -> None:
    generator = np.random.default_rng(0)
    images = {f"x_{part}": generator.normal(size=(60, 1, 8, 8)).astype(np.float32) for part in ("train", "test")}
    np.savez(tmp_path / "images.npz", **images, y_train=np.arange(60) % 2, y_test=np.arange(60) % 2)
    words = ["run", "--data", str(tmp_path / "images.npz"), "--model", model, "--width", "0.25", "--method", method]
    out = tmp_path / "run"
    assert main([*words, "--setting", "shrinking", "--epochs", "2", "--no-static", "--out", str(out)]) == 0
    ((begin,), epochs, (end,)) = (records(out, kind) for kind in ("start", "epoch", "end"))
    axes = begin["gates"]["axes"]
    if method == "npn-weights":
        assert {key: sum(counts) for key, counts in axes.items()}["fc1.weight"] == 64 * 32
    else:
        assert "layer1.1" in axes
        assert begin["depth"] == end["depth"] == {"layer1": 3, "layer2": 3, "layer3": 3}
    assert all(record["gates"]["axes"].keys() == axes.keys() for record in epochs)
    assert [record["gates"]["stage"] for record in epochs] == [1, 2]
    assert end["parameters"] == begin["parameters"], "the penalty is too weak for anything to leave in six steps"
    assert (out / "report.html").read_text().count("Gates over time") == 1


def test_gates_are_seen_through_the_session() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    batch = (torch.randn(8, 3), torch.zeros(8, dtype=torch.int64))

    def loss(network: torch.nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(network(data[0]), data[1])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    structure = esp.attach(model, batch[0], optimizer=optimizer)
    plain = esp.Session(structure, [esp.prune.Magnitude()], loss=loss, total_steps=10)
    assert plain.gates() is None
    found = esp.Session(structure, [esp.prune.NPN()], loss=loss, total_steps=10).gates()
    assert found is not None
    assert (found.stage, found.k, found.asleep) == (0, 5000.0, {})
    assert found.probabilities.keys() == {"0"}
    assert len(found.probabilities["0"]) == 5
