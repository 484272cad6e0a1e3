"""`espalier run`: what it leaves behind, that its figures are true, and that an interrupted run ends as it should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import espalier as esp
from espalier.bench import run as run_module
from espalier.bench.data import load
from espalier.bench.folder import RunFolder, next_free
from espalier.bench.models import build, example_inputs
from espalier.bench.options import NONE, Options, resolve
from espalier.bench.progress import Lines, Silent, progress_on
from espalier.bench.run import resume, start
from espalier.bench.tasks import task
from espalier.bench.training import Assignment, Training
from espalier.errors import CheckpointError, DataError, EspalierWarning, MethodError, RunError

SMALL = {"task": "digits", "width": 0.125, "epochs": 4, "batch_size": 128, "lr": 2e-2}


def small(**changes: object) -> Options:
    return resolve({**SMALL, **changes})


def records(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if kind in (None, record["kind"])]


def without_times(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records that two runs of the same options share to the last digit."""
    cleaned = []
    for record in found:
        kept = {key: value for key, value in record.items() if key != "seconds"}
        if kept.get("static"):
            kept["static"] = {key: value for key, value in kept["static"].items() if key != "seconds"}
        cleaned.append(kept)
    return cleaned


def network(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "network" / "network.safetensors")


def assert_same_outcome(first: Path, second: Path) -> None:
    assert without_times(records(first)) == without_times(records(second))
    expected = network(first)
    assert all(torch.equal(expected[name], tensor) for name, tensor in network(second).items())
    assert sorted(os.listdir(first)) == sorted(os.listdir(second))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    start(small(), folder, Silent(), command=["espalier", "run"])
    return folder


class InterruptAfter(Silent):
    """Presses Ctrl-C after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, step: int) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


class FailAfter(InterruptAfter):
    """Ends the run without warning after a number of steps."""

    def step(self, step: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise ConnectionError("the machine is gone")


# ------------------------------------------------------------------------------------------- what a run leaves behind


def test_a_run_leaves_its_folder_complete(finished: Path) -> None:
    assert sorted(os.listdir(finished)) == ["config.json", "metrics.jsonl", "network", "report.html"]
    config = json.loads((finished / "config.json").read_text())
    assert config["command"] == ["espalier", "run"]
    assert config["task"] == "digits"
    assert config["epochs"] == 4
    assert config["torch_version"] == torch.__version__
    kinds = [record["kind"] for record in records(finished)]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert kinds.count("epoch") == 4
    assert "Static network" in (finished / "report.html").read_text()


def test_an_event_that_brings_layers_tells_all_widths(tmp_path: Path) -> None:
    options = small(model="resnet20", width=0.125, epochs=3, grow="copy-blocks", prune="none", size=1.5, static=False)
    start(options, tmp_path / "run", Silent())
    before = records(tmp_path / "run", "start")[0]["axes"]
    events = records(tmp_path / "run", "event")
    assert events
    for event in events:
        assert event["layers"]
        assert set(before) < set(event["widths"])
        before = event["widths"]
    assert before == records(tmp_path / "run", "end")[0]["axes"]
    assert all("widths" not in record for record in records(tmp_path / "run", "epoch"))


def test_the_network_grew_and_shrank_to_the_size_asked_for(finished: Path) -> None:
    events = records(finished, "event")
    assert {event["action"] for event in events} == {"grow", "prune"}
    start_record, end = records(finished)[0], records(finished)[-1]
    assert end["parameters"] / start_record["parameters"] == pytest.approx(6, rel=0.05)
    for before, after in pairwise(events):
        assert after["parameters"][0] == before["parameters"][1]
    assert events[-1]["parameters"][1] == end["parameters"]
    assert events[-1]["action"] == "prune"
    assert all(
        event["loss"][1] == pytest.approx(event["loss"][0], rel=1e-5) for event in events if event["action"] == "grow"
    )


def test_the_saved_network_is_the_one_that_was_tested(finished: Path) -> None:
    digits = load("digits", seed=0)
    model = build("mlp", digits.input_shape, digits.classes, width=0.125)
    esp.load(finished / "network", model, example_inputs(digits.input_shape))
    end = records(finished, "end")[0]
    assert sum(parameter.numel() for parameter in model.parameters()) == end["parameters"]
    with torch.no_grad():
        accuracy = (model.eval()(digits.x_test).argmax(dim=1) == digits.y_test).float().mean()
    assert float(accuracy) == pytest.approx(end["test_accuracy"], abs=1e-6)
    assert end["test_accuracy"] > 0.7
    assert {name: list(module.weight.shape) for name, module in model.named_children()} == {
        row["module"]: list(map(int, reversed(row["shape"].split(" → ")))) for row in end["architecture"]
    }


def test_the_static_twin_has_the_same_size_and_training_flops(finished: Path) -> None:
    end = records(finished, "end")[0]
    twin = end["static"]
    assert (twin["parameters"], twin["flops"]) == (end["parameters"], end["flops"])
    one_step = 3 * twin["flops"] * 128
    assert abs(twin["training_flops"] - end["training_flops"]) <= one_step
    static_epochs = records(finished, "static_epoch")
    assert static_epochs[-1]["training_flops"] == twin["training_flops"]
    assert static_epochs[0]["axes"] == end["axes"]
    # it starts from weights of its own, not from those that were trained
    assert static_epochs[0]["train_loss"] > 1.5
    # and its learning rate falls to nothing at its own last step
    assert static_epochs[-1]["learning_rate"] == pytest.approx(0, abs=1e-12)
    assert records(finished, "epoch")[-1]["learning_rate"] == pytest.approx(0, abs=1e-12)


def test_the_test_set_is_looked_at_once_by_each_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[tuple[int, int]] = []
    evaluate = Training.evaluate

    def watched(self: Training, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        looked.append((len(labels), self.step))
        return evaluate(self, inputs, labels)

    monkeypatch.setattr(Training, "evaluate", watched)
    start(small(epochs=2), tmp_path / "run", Silent())
    last_steps = [records(tmp_path / "run", kind)[-1]["step"] for kind in ("epoch", "static_epoch")]
    assert [(count, step) for count, step in looked if count == 359] == [(359, step) for step in last_steps]


def test_without_the_static_network(tmp_path: Path) -> None:
    start(small(epochs=2, static=False), tmp_path / "run", Silent())
    assert records(tmp_path / "run", "end")[0]["static"] is None
    assert records(tmp_path / "run", "static_epoch") == []


@pytest.mark.parametrize(
    ("setting", "size", "actions"), [("shrinking", 0.5, {"prune"}), ("constant", 1.0, {"grow", "prune"})]
)
def test_other_settings_end_at_their_size(tmp_path: Path, setting: str, size: float, actions: set[str]) -> None:
    start(small(setting=setting, width=0.25, static=False), tmp_path / "run", Silent())
    found = records(tmp_path / "run")
    assert {record["action"] for record in found if record["kind"] == "event"} == actions
    assert found[-1]["parameters"] / found[0]["parameters"] == pytest.approx(size, rel=0.06)


def test_single_weights_are_recorded_and_the_twin_has_the_same_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Training] = []

    class Watched(Training):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            made.append(self)

    monkeypatch.setattr(run_module, "Training", Watched)
    options = small(setting="constant", grow="rigl", prune="weights-magnitude", size=0.2, width=0.25)
    said = start(options, tmp_path / "run", Silent())
    ours, twin = (training.structure.masks for training in made)
    assert ours
    assert all(torch.equal(ours[name], mask) for name, mask in twin.items())
    assert ours.keys() == twin.keys()
    assert all(not bool(made[1].model.get_parameter(name)[~mask].any()) for name, mask in twin.items())
    counted = {name: [int(mask.sum()), mask.numel()] for name, mask in ours.items()}
    found = records(tmp_path / "run")
    assert found[0]["weights"] == {}
    assert found[-1]["weights"] == counted
    assert next(record["weights"] for record in found if record["kind"] == "static_epoch") == counted
    live, every = (sum(pair[at] for pair in counted.values()) for at in (0, 1))
    assert live == round(0.2 * every)
    assert f"{live:,} of {every:,} weights live" in said
    assert "the same size and masks from the start" in said
    events = [record for record in found if record["kind"] == "event"]
    for event in events:
        assert all(event["weights"][name][0] == after for name, (_, after) in event["masks"].items())
    assert events[-1]["weights"] == counted
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Sparsity</h2>" in page
    assert "the final size and masks from the start" in page


def test_images_from_an_npz_file_train_a_network_with_batch_norm(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 150)
    images = (draw.normal(0, 30, (150, 8, 8, 3)) + 60 * labels[:, None, None, None]).clip(0, 255).astype(np.uint8)
    arrays = {"x_train": images[:120], "y_train": labels[:120], "x_test": images[120:], "y_test": labels[120:]}
    np.savez(tmp_path / "blobs.npz", **arrays)
    given = {"data": tmp_path / "blobs.npz", "model": "resnet20", "width": 0.125, "epochs": 2, "batch_size": 32}
    start(resolve(given), tmp_path / "whole", Silent())
    assert records(tmp_path / "whole", "end")[0]["parameters"] > 2 * records(tmp_path / "whole")[0]["parameters"]
    with pytest.raises(KeyboardInterrupt):
        start(resolve(given), tmp_path / "parts", InterruptAfter(6))
    resume(tmp_path / "parts", {}, Silent())
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


# ------------------------------------------------------------------------------------------------------------ training


def test_training_flops_are_three_forward_passes_of_every_sample() -> None:
    digits = load("digits")
    row = task("digits")
    model = build("mlp", digits.input_shape, digits.classes, width=0.125, seed=0)
    training = Training(Assignment(row, digits, (), 30, 0), model)
    epochs: list[dict[str, Any]] = []
    training.run(lambda: None, epochs.append, lambda record: None)
    forward = 2 * (64 * 16 + 16 * 16 + 16 * 10)
    assert training.cost()["flops"] == forward
    # 21 batches of 61 or 62 samples make the first epoch
    assert epochs[0]["training_flops"] == 3 * forward * len(digits.x_train)
    assert [epoch["step"] for epoch in epochs] == [21, 30]


def test_an_event_is_charged_for_measuring_the_loss(tmp_path: Path) -> None:
    """Training FLOPs, counted again from the records alone; no pruning, which may measure and find nothing to do."""
    start(small(prune=NONE, static=False), tmp_path / "run", Silent())
    found = [record for record in records(tmp_path / "run") if record["kind"] in ("start", "epoch", "event")]
    assert len(found) > 10
    batch_sizes = [len(part) for part in torch.arange(1295).tensor_split(11)]
    flops, expected, step = found[0]["flops"], 0, 0
    for record in found[1:]:
        while step < record["step"]:
            expected += 3 * flops * batch_sizes[step % 11]
            step += 1
        if record["kind"] == "event":
            expected += sum(record["flops"]) * batch_sizes[(step - 1) % 11]
            flops = record["flops"][1]
        assert record["training_flops"] == expected


def test_a_diverging_loss_ends_the_run_with_advice(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"no longer a finite number in epoch \d: try a smaller learning rate than 1e\+30"
    ):
        start(small(lr=1e30, static=False), tmp_path / "run", Silent())


def test_torch_is_left_as_it_was(tmp_path: Path) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    start(small(epochs=1, static=False), tmp_path / "run", Silent())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("steps", [[1], [17], [43, 1], [44, 2], [30, 20, 5]], ids=str)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path, finished: Path, steps: list[int]) -> None:
    """44 steps train the network, the rest the twin; 11 make an epoch."""
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        start(small(), folder, InterruptAfter(steps[0]))
    for count in steps[1:]:
        with pytest.raises(KeyboardInterrupt):
            resume(folder, {}, InterruptAfter(count))
    resume(folder, {}, Silent())
    assert_same_outcome(finished, folder)


def test_what_came_after_the_last_checkpoint_is_done_again(tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        start(small(), folder, InterruptAfter(15))
    kept = records(folder)
    with pytest.raises(ConnectionError):
        resume(folder, {}, FailAfter(12))
    assert len(records(folder)) > len(kept)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epo')
    resume(folder, {}, Silent())
    assert_same_outcome(finished, folder)


def test_a_run_without_a_checkpoint_begins_again(tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ConnectionError):
        start(small(), folder, FailAfter(20))
    assert not (folder / "checkpoint.json").exists()
    resume(folder, {}, Silent())
    assert_same_outcome(finished, folder)


def test_a_killed_process_loses_nothing_but_time(tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "run"
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from espalier.bench.options import resolve\n"
        "from espalier.bench.progress import Silent\n"
        "from espalier.bench.run import start\n"
        "torch.set_num_threads(1)\n"
        f"start(resolve({SMALL!r}), Path(sys.argv[1]), Silent(), checkpoint_seconds=0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)])
    deadline = time.monotonic() + 60
    while not (folder / "checkpoint.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not RunFolder.reopen(folder).finished
    resume(folder, {}, Silent())
    assert_same_outcome(finished, folder)


def test_checkpoints_are_written_now_and_then(tmp_path: Path, finished: Path) -> None:
    seen: set[str] = set()

    class Look(Silent):
        def step(self, step: int) -> None:
            seen.update(name for name in os.listdir(tmp_path / "run") if name.startswith("checkpoint-"))

    start(small(), tmp_path / "run", Look(), checkpoint_seconds=0)
    assert len(seen) > 2
    assert_same_outcome(finished, tmp_path / "run")


def test_a_finished_run_is_left_alone(tmp_path: Path, finished: Path) -> None:
    (finished / "report.html").unlink()
    before = (finished / "metrics.jsonl").read_bytes()
    assert "holds a finished run" in resume(finished, {}, Silent())
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert (finished / "report.html").exists()


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_taken_folder_is_refused(tmp_path: Path, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="holds a finished run: choose another --out"):
        start(small(), finished, Silent())
    assert (finished / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ConnectionError):
        start(small(), tmp_path / "open", FailAfter(1))
    with pytest.raises(RunError, match="holds a run that has not ended: continue it with --resume"):
        start(small(), tmp_path / "open", Silent())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(RunError, match="holds other files"):
        start(small(), tmp_path / "other", Silent())
    with pytest.raises(RunError, match="is a file"):
        start(small(), tmp_path / "other" / "thesis.tex", Silent())


def test_other_options_are_named_when_a_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        start(small(), folder, InterruptAfter(1))
    with pytest.raises(RunError, match="other options: batch-size was 128 and is 64 now; seed was 0 and is 1 now"):
        resume(folder, {"batch_size": 64, "epochs": 4, "seed": 1, "model": None}, Silent())
    with pytest.raises(RunError, match="static was True and is False now"):
        resume(folder, {"static": False}, Silent())
    with pytest.raises(RunError, match="nowhere holds no run to resume"):
        resume(tmp_path / "nowhere", {}, Silent())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "holds no run to resume"),
        ("config.json", '{"task": "digits"}', "'data' should be str or NoneType, found None|'model' should be str"),
        ("checkpoint.json", "[]", "expected a JSON object, found list"),
        ("checkpoint.json", "{}", "expected a checkpoint of format 1"),
        ("checkpoint.json", '{"format": 2, "number": 0, "metrics_bytes": 0, "state": {}}', "checkpoint of format 1"),
        ("checkpoint.json", '{"format": 1, "number": 9, "metrics_bytes": 0, "state": {}}', "names checkpoint-9"),
        ("checkpoint.json", '{"format": 1, "number": 0, "metrics_bytes": 0, "state": {}}', "its checkpoint is damaged"),
        ("checkpoint-0/random.safetensors", "", "checkpoint-0 is damaged"),
        ("checkpoint-0/network/network.json", "{", "should have .* bytes"),
        ("metrics.jsonl", "", r"expected at least \d+ bytes, found 0; records were lost"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        start(small(), folder, InterruptAfter(2))
    (folder / name).write_text(content)
    with pytest.raises((RunError, CheckpointError), match=message):
        resume(folder, {}, Silent())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"task": "letters"}, DataError, "unknown task 'letters': expected one of digits, moons"),
        ({"model": "mlp2"}, RunError, "unknown model 'mlp2': expected one of mlp, lenet5"),
        ({"setting": "wild"}, RunError, "unknown setting 'wild': expected one of growing, shrinking, constant"),
        ({"grow": "wild"}, MethodError, "no grow method 'wild'"),
        ({"prune": "wild"}, MethodError, "no prune method 'wild'"),
        ({"grow": NONE, "prune": NONE}, RunError, "neither --grow nor --prune"),
        ({"epochs": 0}, RunError, "--epochs: expected at least 1, found 0"),
        ({"batch_size": -1}, RunError, "--batch-size: expected at least 1, found -1"),
        ({"width": 0.0}, RunError, "--width: expected a number above 0, found 0.0"),
        ({"lr": float("inf")}, RunError, "--lr: expected a number above 0, found inf"),
        ({"seed": -1}, RunError, "--seed: expected a whole number from 0"),
        ({"device": "abacus"}, RunError, "--device abacus: no such device here"),
        ({"data": "birds.csv"}, RunError, "a file whose name ends in .npz"),
        ({"data": "birds.npz", "task": "digits"}, RunError, "give only one of them"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(given)


def test_what_cannot_be_run_leaves_no_folder(tmp_path: Path) -> None:
    for given, error in (
        ({"task": "moons", "model": "lenet5"}, DataError),
        ({"setting": "shrinking", "size": 2.0}, MethodError),
        ({"data": str(tmp_path / "none.npz")}, DataError),
    ):
        with pytest.raises(error):
            start(resolve(given), tmp_path / "run", Silent())
        assert not (tmp_path / "run").exists()


def test_defaults_depend_on_task_and_setting() -> None:
    assert resolve({}).task == "digits"
    assert resolve({"task": "mnist"}).model == "lenet5"
    assert resolve({"setting": "shrinking"}).grow == NONE
    assert resolve({"setting": "shrinking"}).width == 1
    assert resolve({"data": "here.npz"}).data == str(Path.cwd() / "here.npz")


def test_the_next_free_folder(tmp_path: Path) -> None:
    assert next_free(tmp_path, "digits") == tmp_path / "digits-1"
    (tmp_path / "digits-1").mkdir()
    assert next_free(tmp_path, "digits") == tmp_path / "digits-2"


# ------------------------------------------------------------------------------------------------------------ progress


def test_lines_tell_of_stages_events_and_figures(tmp_path: Path) -> None:
    stream = StringIO()
    outcome = start(small(), tmp_path / "run", Lines(stream))
    text = stream.getvalue()
    assert "digits: 1,295 training, 143 validation, 359 test samples of shape 1x8x8" in text
    assert "training the network" in text
    assert "training the static network" in text
    events = records(tmp_path / "run", "event")
    assert text.count(" parameters\n") == len(events)
    assert f"{events[0]['parameters'][0]:,} → {events[0]['parameters'][1]:,} parameters" in text
    assert "epoch 4/4  loss" in text
    end = records(tmp_path / "run", "end")[0]
    assert f"test accuracy {100 * end['test_accuracy']:.2f}%" in outcome
    assert f"static twin   {100 * end['static']['test_accuracy']:.2f}%" in outcome
    assert str(tmp_path / "run" / "report.html") in outcome


def test_a_terminal_gets_a_live_display(tmp_path: Path) -> None:
    pytest.importorskip("rich")

    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress_on(stream) as progress:
        start(small(epochs=2), tmp_path / "run", progress)
    text = stream.getvalue()
    assert "static network" in text
    assert "epoch 2/2  loss" in text
    assert "[/" not in text
    with progress_on(StringIO()) as progress:
        assert type(progress) is Lines


def test_warnings_of_the_session_are_shown_and_others_stay_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = StringIO()

    def noisy(*arguments: Any, **options: Any) -> Any:
        warnings.warn("nothing is left to prune", EspalierWarning, stacklevel=2)
        return build_methods(*arguments, **options)

    build_methods = run_module.build_methods
    monkeypatch.setattr(run_module, "build_methods", noisy)
    start(small(epochs=1, static=False), tmp_path / "run", Lines(stream))
    assert "warning: nothing is left to prune" in stream.getvalue()
    with pytest.warns(UserWarning, match="other"):
        warnings.warn("other", UserWarning, stacklevel=2)
