"""`espalier evolve`: one command that searches, goes on, and says what came out."""

from __future__ import annotations

import io
import json
import math
import threading

import pytest
import torch
from report_page import Page

import espalier as esp
from espalier.bench.evolve import chosen, evolve
from espalier.bench.models import build, example_inputs
from espalier.bench.search_progress import SearchLines, SearchProgress, Watcher
from espalier.cli import main
from espalier.errors import RunError

COMMAND = ["evolve", "digits", "--width", "0.25", "--epochs", "5", "--cycles", "1", "--candidates", "2"]
COMMAND += ["--proposals", "random"]  # there is too little budget for others to look at the network
COMMAND += ["--dear", "inf"]  # and for any cycle
OPTIONS = {"task": "digits", "width": 0.25, "epochs": 5, "cycles": 1, "candidates": 2, "proposals": "random"}
OPTIONS |= {"dear": math.inf}


def records(path):
    return [json.loads(one) for one in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a search, and what it said."""
    out, stream = tmp_path_factory.mktemp("finished") / "search", io.StringIO()
    outcome = evolve(chosen(OPTIONS), out, SearchLines(stream))
    return out, f"{stream.getvalue()}{outcome}"


def test_a_search_leaves_its_network_its_records_and_its_page(finished):
    out, said = finished
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
    words = Page(out / "report.html").words()
    assert f"{found['test_accuracy']:.2%}" in words
    assert f"{alone['test_accuracy']:.2%}" in words
    curves = [[one.get("accuracy") for one in records(out / name)] for name in ("surgeon.jsonl", "baseline.jsonl")]
    assert all(len([one for one in curve if one is not None]) > 15 for curve in curves)


def test_a_finished_search_is_not_computed_again(finished, capsys):
    out, said = finished
    before = (out / "surgeon.jsonl").read_text()
    assert main([*COMMAND, "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == said.splitlines()[-4:]
    assert (out / "surgeon.jsonl").read_text() == before
    assert main([*COMMAND, "--seed", "1", "--out", str(out)]) == 2
    assert "other options" in capsys.readouterr().err


def test_a_budget_too_short_for_a_cycle_is_one_of_plain_training_and_the_page_says_so(tmp_path):
    stream = io.StringIO()
    given = {"task": "digits", "width": 0.25, "epochs": 1, "baseline": False}
    evolve(chosen(given), tmp_path, SearchLines(stream))
    assert "no cycle at all" in stream.getvalue()
    kinds = [one["kind"] for one in records(tmp_path / "surgeon.jsonl")]
    assert set(kinds) == {"start", "dear", "trained", "end"}
    words = Page(tmp_path / "report.html").words()
    assert "what a cycle takes was worth more as plain training" in words


class Impatient(SearchProgress, Watcher):
    """Presses Ctrl-C when the first cycle begins."""

    def begin(self, name, total):
        return self if name == "search" else SearchLines(io.StringIO()).begin(name, total)

    def record(self, record):
        if record["kind"] == "cycle":
            raise KeyboardInterrupt

    def result(self): ...
    def say(self, text): ...


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupted_search_has_a_page_and_goes_on(tmp_path, finished, workers):
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        evolve(chosen(OPTIONS), tmp_path, Impatient(), workers)
    assert threading.active_count() == before  # the start that is trained beside it has stopped, too
    assert "has not ended" in (tmp_path / "report.html").read_text()
    outcome = evolve(chosen(OPTIONS), tmp_path, SearchLines(io.StringIO()), workers)
    assert outcome.replace(str(tmp_path), str(finished[0])) in finished[1]
    assert "has not ended" not in (tmp_path / "report.html").read_text()


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


def test_prices_are_on_what_is_measured_then():
    plain = chosen({"task": "digits", "proposals": "random"})
    assert plain.problem.workbench().latency is None
    priced = chosen({"task": "digits", "proposals": "random", "price_latency": 0.1, "price_flops": 0.2})
    assert (priced.surgeon.objective.latency, priced.surgeon.objective.flops) == (0.1, 0.2)
    bench = priced.problem.workbench()
    assert bench.latency is not None
    assert 0 < bench.latency(bench.model) < 1


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main([*COMMAND, "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
