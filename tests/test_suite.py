"""The benchmark: suites as files, cells that repeat, budgets that are kept, peers, and what can be joined to it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import espalier as esp
from espalier.bench.records import read_run
from espalier.bench.report import write_report
from espalier.bench.report_search import write_search_report
from espalier.cli import main
from espalier.errors import MethodError, RunError
from espalier.measure.runtimes import Eager, Runtime
from espalier.suite import speed
from espalier.suite.cells import contenders, expand
from espalier.suite.comparing import Results
from espalier.suite.declared import find_suite, read_suite, shipped
from espalier.suite.disturbing import disturb
from espalier.suite.kept import Kept
from espalier.suite.pages import write_pages
from espalier.suite.running import Place, Plan, run, status
from espalier.suite.sheets import sheets
from espalier.suite.speed import run_speed
from espalier.suite.suite import Cell, Contender, SuiteTask
from espalier.suite.work import Job, carried_out, methods_of
from espalier.train.settings import Course, build

HEAD = """
name = "tiny"
about = "As small as can be."
takes = "a second"
seeds = [0, 1]
points = [0.4]
looks = 3

[[tasks]]
name = "digits"
data = "digits"
like = "digits"
model = "mlp"
width = 0.2
epochs = 1
samples = 300
"""
TINY = (
    HEAD
    + """
[[contenders]]
name = "magnitude"
tracks = ["shrinking"]
prune = "magnitude"

[[contenders]]
name = "static"
tracks = ["shrinking", "growing"]
kind = "static"
role = "control"

[[contenders]]
name = "again"
tracks = ["shrinking"]
kind = "retrained"
of = "magnitude"
role = "control"

[[contenders]]
name = "gromo"
tracks = ["shrinking"]
kind = "peer"
peer = "gromo"
role = "peer"

[[comparisons]]
of = "magnitude"
other = "static"
track = "shrinking"

[[comparisons]]
of = "magnitude"
other = "static"
track = "shrinking"
claim = "not worse"
margin = 0.9
value = "loss"
"""
)
TASK = SuiteTask("digits", "digits", "digits", "mlp", epochs=1, width=0.2, samples=300, start=0.3)


def cell(track: str = "shrinking", seed: int = 0, budget: str = "training_flops", **contender: Any) -> Cell:
    one = Contender("one", (), **{"periods": 4, **contender})
    return Cell(TASK, one, track, 0.4, "parameters", budget, 1.0, seed, looks=3)  # type: ignore[arg-type]


def done(one: Cell, folder: Path) -> dict[str, Any]:
    record = carried_out(Job(one), folder, 1)
    assert "failed" not in record, record
    assert record["warnings"] == []
    return record


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped())
def test_suites_that_are_shipped_say_what_they_take(name):
    suite = find_suite(name)
    assert suite.name == name
    assert suite.takes
    cells = expand(suite)
    assert len({one.task.name for one in cells}) == len(suite.tasks)
    for one in {one.track: one for one in cells if one.contender.kind == "methods"}.values():
        assert methods_of(one, 4.0, 1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            TINY.replace('prune = "magnitude"', 'prun = "magnitude"'),
            "contenders.*magnitude.*unknown key 'prun'; .*prune",
        ),
        (TINY.replace('kind = "static"', 'kind = "statics"'), "kind: expected one of methods, static, .* 'statics'"),
        (TINY.replace("seeds = [0, 1]", 'seeds = ["0"]'), r"seeds\[0\]: expected int, found '0'"),
        (TINY.replace("epochs = 1\n", ""), "tasks.*digits.*'epochs' is missing"),
        (TINY.replace("points = [0.4]", "points = [1.4]"), "points: expected parts of the large network"),
        (TINY.replace('name = "static"', 'name = "magnitude"'), "'magnitude' stands for two"),
        (TINY + "confirm_seeds = [1]\n", "unknown key 'confirm_seeds'"),
        ("points = [", "tiny.toml is no TOML"),
        ('based_on = "tests"', "there is no suite 'tests': expected one of .*smoke"),
        ("based_on = 1", "based_on: expected the name of a suite or the path of its file, found 1"),
        (HEAD, "expected .*contenders.* or .*grids.*, found neither"),
    ],
)
def test_what_a_file_cannot_mean_is_refused_with_the_place(text, message):
    with pytest.raises(RunError, match=message):
        read_suite(text, Path("tiny.toml"))


def test_a_file_says_what_is_not_as_in_another(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "smaller.toml").write_text('based_on = "tiny.toml"\nname = "smaller"\nseeds = [7]\n')
    (tmp_path / "smallest.toml").write_text('based_on = "smaller.toml"\npoints = [0.1]\n')
    tiny, found = (find_suite(str(tmp_path / f"{name}.toml")) for name in ("tiny", "smallest"))
    assert found == dataclasses.replace(tiny, name="smaller", seeds=(7,), points=(0.1,))
    assert find_suite("study-cpu").grids == find_suite("study").grids


def test_files_that_are_based_on_each_other_are_refused(tmp_path):
    for name, other in ("ab", "ba"):
        (tmp_path / f"{name}.toml").write_text(f'based_on = "{other}.toml"\n')
    with pytest.raises(RunError, match=r"b.toml: based_on: 'a.toml' is based on this file itself"):
        find_suite(str(tmp_path / "a.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TINY.replace('of = "magnitude"\nrole', 'of = "nobody"\nrole'), "expected a contender, found 'nobody'"),
        (TINY.replace('other = "static"', 'other = "nobody"'), "there is no contender 'nobody'"),
        (TINY.replace('["shrinking", "growing"]', '["growing"]'), "'static' is not in the track 'shrinking'"),
        (TINY.replace('["shrinking"]\nkind = "ret', '["unstructured"]\nkind = "ret'), "masks are not retrained"),
    ],
)
def test_names_have_to_stand_for_something(text, message):
    with pytest.raises(RunError, match=message):
        expand(read_suite(text, Path("tiny.toml")))


def test_a_grid_is_a_regular_fraction_of_all_combinations():
    levels = '\ngrow = ["random", "gradmax"]\nprune = ["l1", "magnitude"]\nperiods = [8, 16]\nswing = [0.1, 0.3]\n'
    text = HEAD + f'[[grids]]\nname = "g"\ntracks = ["constant"]{levels}modulus = 2\n'
    found = contenders(read_suite(text, Path("grid.toml")))
    assert len(found) == 8
    for name in ("grow", "prune", "periods", "swing"):
        assert set(Counter(getattr(one, name) for one in found).values()) == {4}
    assert set(Counter((one.grow, one.prune) for one in found).values()) == {2}


def test_a_ninth_of_three_factors_of_three_levels_has_each_level_in_every_combination_of_the_others():
    levels = '\nperiods = [8, 16, 32]\nswing = [0.1, 0.2, 0.4]\norder = ["alternating", "grow first", "prune first"]\n'
    methods = 'grow = ["random", "gradmax", "firefly", "tiny"]\nprune = ["l1", "magnitude"]\n'
    text = HEAD + f'[[grids]]\nname = "g"\ntracks = ["constant"]{levels}{methods}modulus = 3\nrelations = 2\n'
    found = contenders(read_suite(text, Path("grid.toml")))
    assert len(found) == 4 * 2 * 27 // 9
    for name in ("periods", "swing", "order"):
        assert set(Counter((one.grow, one.prune, getattr(one, name)) for one in found).values()) == {1}


def test_the_suite_of_the_page_can_be_read():
    page = (Path(__file__).parent.parent / "docs" / "benchmark.md").read_text()
    (text,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    suite = read_suite(text, Path("benchmark.md"))
    assert len(expand(suite)) == 2 * 2 * 5
    for name in shipped():
        assert f"| `{name}` |" in page


def test_an_unknown_suite_names_those_there_are():
    with pytest.raises(RunError, match=r"there is no suite 'nothing': expected one of cpu, .*smoke"):
        find_suite("nothing")


# --- cells -----------------------------------------------------------------------------------------------------------


def test_a_cell_repeats_and_another_seed_does_not(tmp_path):
    one = cell("growing", grow="random", prune="magnitude")
    first, second = done(one, tmp_path / "a"), done(one, tmp_path / "b")
    assert first["result"] == second["result"]
    assert first["key"] == second["key"]
    other = done(dataclasses.replace(one, seed=1), tmp_path / "a")
    assert other["key"] != first["key"]
    assert other["result"]["curve"] != first["result"]["curve"]
    # sizes follow the budget, not the seed
    assert other["result"]["parameters"] == first["result"]["parameters"]
    folder = tmp_path / "a" / "cells" / first["key"]
    kept = read_run(folder)
    assert kept.end is not None
    assert len(kept.events) == len(first["result"]["edits"]) > 1
    assert write_report(folder).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("track", "contender"),
    [
        ("growing", {"grow": "random"}),
        ("shrinking", {"prune": "magnitude"}),
        ("constant", {"kind": "no-op"}),
        ("unstructured", {"kind": "peer", "peer": "torch.nn.utils.prune"}),
    ],
)
def test_budgets_and_sizes_are_kept_on_every_track(track, contender, tmp_path):
    large = done(cell("shrinking", kind="static", static="large"), tmp_path)["result"]
    result = done(cell(track, **contender), tmp_path)["result"]
    budget = 3 * large["flops"] * 300
    # training ends with the step that reaches the budget
    assert budget <= result["training_flops"] <= budget * 1.2
    assert result["curve"][-1]["done"] == 1
    if track == "unstructured":
        assert result["parameters"] == large["parameters"]
        assert 0.4 <= result["nonzero"] / large["nonzero"] < 0.42  # biases are left
    else:
        assert 0.34 < result["parameters"] / large["parameters"] <= 0.4
    if track in ("growing", "shrinking"):
        assert result["edits"]
        assert all(edit["recovery"] is None or edit["recovery"] >= 1 for edit in result["edits"])


def test_equal_samples_are_equal_steps(tmp_path):
    few = done(cell(kind="static", budget="samples"), tmp_path)["result"]
    many = done(cell(kind="static", static="large", budget="samples"), tmp_path)["result"]
    assert few["steps"] == many["steps"] == 5
    assert few["training_flops"] < many["training_flops"]


def test_content_is_what_decides_the_numbers_and_nothing_else():
    one = cell(kind="static")
    for same in (
        dataclasses.replace(one, track="growing"),
        dataclasses.replace(
            one, contender=Contender("another", ("growing",), kind="static", role="control", tuning="?")
        ),
    ):
        assert Job(same).key == Job(one).key
    for other in (
        dataclasses.replace(one, point=0.5),
        dataclasses.replace(one, task=dataclasses.replace(TASK, epochs=2)),
        dataclasses.replace(one, contender=Contender("one", (), kind="static", static="large")),
    ):
        assert Job(other).key != Job(one).key
    assert Job(one, "cuda:1").key == Job(one, "cuda").key != Job(one).key


def test_a_disturbance_takes_memory_and_leaves_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    structure = esp.attach(model, torch.zeros(2, 6), optimizer=optimizer)
    model(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()
    before = [one.clone() for one in model.parameters()]
    assert disturb(structure, 0.3, 0) == {"0": 3}
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    moments = optimizer.state[model[0].weight]["exp_avg"]
    assert int((moments == 0).all(dim=1).sum()) == 3
    assert int((optimizer.state[model[2].weight]["exp_avg"] == 0).all(dim=0).sum()) == 3


# --- running ---------------------------------------------------------------------------------------------------------


def test_a_suite_runs_resumes_and_is_written_down(tmp_path):
    place, suite = Place(tmp_path / "out"), read_suite(TINY, Path("tiny.toml"))
    few = Plan(suite, place, {"contender": ["magnitude"], "seed": ["0"]})
    assert "1 runs are left" in status(few, place.kept())
    assert "nothing is left" in run(few, place, print)
    plan, said = Plan(suite, place), []
    left = run(plan, place, said.append)
    assert "nothing is left" in left
    assert len(said) == 7  # static networks are one for both tracks; retrained ones come last
    assert "again" in said[-1]
    assert run(plan, place, said.append) == left
    assert len(said) == 7
    kept = place.kept()
    again, pruned = (
        next(plan.record(one, kept) for one in plan.cells if one.contender.name == name)
        for name in ("again", "magnitude")
    )
    assert again is not None
    assert pruned is not None
    assert again["result"]["axes"] == pruned["result"]["axes"]
    _written(Results(plan, kept), tmp_path)


def _written(results: Results, folder: Path) -> None:
    better, not_worse = results.rows()
    assert (better.pairs, better.missing) == (2, 0)
    assert not_worse.comparison.value == "loss"
    page, text = write_pages(results, folder / "pages", ["espalier", "bench", "report", "tiny.toml"])
    words, html = text.read_text(), page.read_text()
    assert "| magnitude against static | shrinking | better (accuracy) |" in words
    assert "| digits | shrinking | gromo | 2 | gromo adds units and removes none" in words
    assert "espalier bench report tiny.toml" in words
    assert "have not" not in words
    assert "<script>" in html
    assert "http" not in html.replace("http-equiv", "")


def test_the_smoke_suite_has_every_part(tmp_path):
    """One seed and one size of it, on a smaller network for fewer epochs; all of it is `espalier bench run smoke`."""
    suite = find_suite("smoke")
    short = dataclasses.replace(suite.tasks[0], epochs=3, width=0.25, samples=300)
    place, only = (
        Place(tmp_path),
        {"seed": ["0"], "point": ["0.4"], "size": ["parameters"], "budget": ["training_flops"]},
    )
    plan = Plan(dataclasses.replace(suite, tasks=(short,), looks=3), place, only)
    assert "nothing is left" in run(plan, place, print)
    results = Results(plan, place.kept())
    assert len(results.cells) == len(plan.cells)
    assert {cell.track for cell, _ in results.cells} == {"growing", "shrinking", "constant", "unstructured"}
    failed = {cell.contender.name for cell, record in results.cells if "failed" in record}
    assert failed <= {"torch-pruning"}  # which may not be installed
    assert {row.comparison for row in results.rows()} == set(suite.comparisons)
    assert all(record["warnings"] == [] for _, record in results.cells)


def test_a_line_that_was_cut_short_is_a_cell_that_was_not_run(tmp_path):
    kept = Kept(tmp_path)
    where = {"cell": {"task": "digits"}}
    first = {
        **where,
        "key": "a",
        "result": {"curve": [{"done": 0.5, "step": 1}, {"done": 1.0, "step": 2}], "edits": []},
    }
    kept.put(first)
    with (tmp_path / "digits.jsonl").open("a") as file:
        file.write('{"key": "b", "res')
    again = Kept(tmp_path)
    assert (again.get("b"), again.get("a")) == (None, first)
    second = {**where, "key": "b", "failed": "no"}
    again.put(second)
    assert Kept(tmp_path / "other", [tmp_path]).get("b") == second
    assert Kept(tmp_path / "other", [tmp_path / "digits.jsonl"]).get("a") == first
    with pytest.raises(RunError, match="expected a file of records, or a folder"):
        Kept(tmp_path, [tmp_path / "none.jsonl"])
    with (tmp_path / "digits.jsonl").open("a") as file:
        file.write('{"val_loss": 0.1}\n')
    with pytest.raises(RunError, match=r"expected lines that `espalier bench run` wrote, found '.\"val_loss"):
        Kept(tmp_path)


def test_only_what_is_there_can_be_asked_for(tmp_path):
    suite = read_suite(TINY, Path("tiny.toml"))
    with pytest.raises(RunError, match="there is no field 'colour'; expected one of task,"):
        Plan(suite, Place(tmp_path), {"colour": ["red"]})
    with pytest.raises(RunError, match="no cell of the suite 'tiny' fits"):
        Plan(suite, Place(tmp_path), {"seed": ["7"]})


THEIRS = """
from espalier import register
from espalier.methods.common import pruning
from espalier.parts.score import Chance


@register
def theirs(**options):
    return pruning("theirs", Chance(), paper="", description="a method of others", **options)
"""


def test_a_method_of_others_joins_with_one_file_and_one_command(tmp_path):
    """A package that is installed, as far as Python can tell, and names its module in an entry point."""
    info = tmp_path / "site" / "theirs-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[espalier.methods]\ntheirs = their_methods\n")
    (tmp_path / "site" / "their_methods.py").write_text(THEIRS)
    head = HEAD.replace("seeds = [0, 1]", "seeds = [0]").replace('"digits"', '"moons"')
    (tmp_path / "s.toml").write_text(
        head + '[[contenders]]\nname = "theirs"\ntracks = ["shrinking"]\nprune = "theirs"\nperiods = 4\n'
    )
    command = [sys.executable, "-m", "espalier", "bench", "run", "s.toml", "--out", "out"]
    paths = os.pathsep.join([str(tmp_path / "site"), str(Path(esp.__file__).parent.parent)])
    ran = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    record = json.loads((tmp_path / "out" / "moons.jsonl").read_text())
    assert record["cell"]["contender"] == "theirs"
    events = read_run(tmp_path / "out" / "cells" / record["key"]).events
    assert {event["method"] for event in events} == {"theirs"}


def test_or_from_a_file(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(THEIRS.replace("theirs", "mine"))
    (tmp_path / "s.toml").write_text(HEAD + '[[contenders]]\nname = "mine"\ntracks = ["shrinking"]\nprune = "mine"\n')
    arguments = ["bench", "status", str(tmp_path / "s.toml"), "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert "there is no prune method 'mine'" in capsys.readouterr().err
    assert main([*arguments, "--methods-from", str(tmp_path / "mine.py")]) == 0
    assert "2 runs are left" in capsys.readouterr().out
    one = Job(cell(prune="mine"), methods_from=str(tmp_path / "mine.py"))
    before = one.key
    with (tmp_path / "mine.py").open("a") as file:
        file.write("# another way of doing it\n")
    assert one.key != before


def test_torch_pruning_comes_as_near_as_one_ratio_allows(tmp_path):
    pytest.importorskip("torch_pruning")
    large = done(cell("shrinking", kind="static", static="large"), tmp_path)["result"]
    result = done(cell(kind="peer", peer="torch-pruning"), tmp_path)["result"]
    assert abs(result["parameters"] / large["parameters"] - 0.4) < 0.06
    failed = carried_out(Job(cell("growing", kind="peer", peer="torch-pruning")), tmp_path, 1)
    assert "cannot add any" in failed["failed"]


def test_gromo_grows_the_perceptron_to_the_size_that_is_asked_for(tmp_path):
    pytest.importorskip("gromo")
    large = done(cell("shrinking", kind="static", static="large"), tmp_path)["result"]
    result = done(cell("growing", kind="peer", peer="gromo"), tmp_path)["result"]
    assert 0.36 < result["parameters"] / large["parameters"] <= 0.4
    assert {edit["action"] for edit in result["edits"]} == {"grow"}
    vit = dataclasses.replace(TASK, model="vit")
    other = dataclasses.replace(cell("growing", kind="peer", peer="gromo"), task=vit)
    assert "not 'vit'" in carried_out(Job(other), tmp_path, 1)["failed"]


class Missing(Runtime):
    def ready(self, model, example):
        raise MethodError("it is not installed")


def test_networks_are_timed_beside_the_large_one(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "runtimes", lambda device: {"eager": Eager(), "ONNX Runtime": Missing()})
    place, suite = Place(tmp_path), read_suite('timed = ["static"]\n' + TINY, Path("tiny.toml"))
    plan = Plan(suite, place, {"contender": ["static"], "seed": ["0"], "track": ["shrinking"]})
    assert run_speed(plan, place, print).startswith("0 networks")
    run(plan, place, print)
    said: list[str] = []
    assert run_speed(plan, place, said.append).startswith("1 networks")
    run_speed(plan, place, said.append)
    assert len(said) == 1
    ((_, record),) = Results(plan, place.kept()).speeds
    assert record["flops"][0] > record["flops"][1]
    assert min(record["speed"]["eager 256"]) > 0
    assert record["speed"]["ONNX Runtime 1"] == "it is not installed"
    (sheet,) = [one for one in sheets(Results(plan, place.kept())) if one.title == "Realised speed"]
    assert sheet.rows[0][:4] == ("digits", "static", "0.4", f"{record['flops'][0] / record['flops'][1]:.2f}")
    assert sheet.rows[1][1] == "not for FLOPs"
    assert "ONNX Runtime 1: it is not installed" in sheet.about


@pytest.mark.slow
def test_the_surgeon_is_charged_for_all_its_branches(tmp_path):
    large = done(cell("shrinking", kind="static", static="large"), tmp_path)["result"]
    one = done(cell("growing", kind="surgeon", proposals="random", cycles=1), tmp_path)
    result, budget = one["result"], 3 * large["flops"] * 300
    assert 0.8 * budget < result["training_flops"] <= budget
    assert set(result["axes"]) == set(large["axes"])
    assert write_search_report(tmp_path / "cells" / one["key"]).stat().st_size > 10_000


def test_a_method_that_decides_the_size_begins_with_the_large_network(tmp_path):
    moons = SuiteTask("moons", "moons", "moons", "embedded-mlp", epochs=6, batch_size=128)
    one = dataclasses.replace(cell("shrinking", budget="samples", prune="npn"), task=moons)
    record = done(one, tmp_path)
    folder = read_run(tmp_path / "cells" / record["key"])
    assert folder.start["parameters"] == 80 * 100 + 80 + 2 * 80 + 2 + 200
    assert record["result"]["steps"] == 24
    optioned = dataclasses.replace(one.contender, prune_options={"low": 0.1})
    with pytest.raises(RunError, match="comes with the training of 'embedded-mlp'"):
        methods_of(dataclasses.replace(one, contender=optioned), 1.0, 10)


# --- what the benchmark asked of the rest ----------------------------------------------------------------------------


def test_schedules_follow_the_part_of_a_budget_that_is_spent():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    structure = esp.attach(model, torch.zeros(2, 4), optimizer=optimizer)
    methods = [esp.grow.Random(width=2.0, every=esp.steps(10), start=0.1, until=0.6)]
    session = esp.Session(structure, methods, loss=lambda net, x: net(x).square().mean(), total_steps=100)
    for done_now in (0.05, 0.101, 0.102, 0.35, 0.351, 0.59, 0.6, 1.0):
        optimizer.zero_grad()
        session.loss(torch.randn(8, 4)).backward()
        optimizer.step()
        session.step(done_now)
    assert [event.step for event in session.events] == [10, 35, 59]
    assert structure.axes["0"].size == 16  # the last event within the window reaches the budget
    with pytest.raises(MethodError, match=r"done: expected a part from 1 to 1, found 0.5"):
        session.step(0.5)


@pytest.mark.parametrize("order", ["alternating", "grow first", "prune first"])
def test_orders_of_growing_and_pruning(order):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    structure = esp.attach(model, torch.zeros(2, 4), optimizer=optimizer)
    methods = build("constant", "random", "magnitude", total_steps=160, course=Course(16, 0.6, 0.2, order))
    session = esp.Session(structure, methods, loss=lambda net, x: net(x).square().mean(), total_steps=160)
    for _ in range(160):
        optimizer.zero_grad()
        session.loss(torch.randn(8, 4)).backward()
        optimizer.step()
        session.step()
    actions = [event.action for event in session.events]
    turns = sum(one != other for one, other in pairwise(actions))
    assert (turns > 4) == (order == "alternating")
    assert actions[0] == ("prune" if order == "prune first" else "grow")
    assert structure.axes["0"].size == 40
