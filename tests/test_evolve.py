"""The Surgeon: the same search wherever it runs, whatever happens to it, and nothing that is not charged."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from searching import Spirals, Wider
from torch import nn

import espalier as esp
from espalier.edit.depth_edits import Remove, Replace
from espalier.edit.plan import Plan, Resize
from espalier.edit.recipes.kinds import Skip
from espalier.errors import RunError
from espalier.evolve import ledger
from espalier.evolve import store as storing
from espalier.evolve.averaging import Mean
from espalier.evolve.horizon import Curve, Point
from espalier.evolve.job import (
    Branch,
    carried_out,
    carry_out,
    keep_plan,
    key_of,
    opened,
    packed,
    take_step,
    unpacked,
)
from espalier.evolve.judge import Objective
from espalier.evolve.pareto import Front, Judged
from espalier.evolve.processes import Processes
from espalier.evolve.proposals import RANDOM_MOVES, Material, Move, RandomMoves, joined
from espalier.evolve.recommended import Recommended
from espalier.evolve.runners import Futures, InProcess
from espalier.evolve.store import Store, StoreFull
from espalier.evolve.surgeon import Search, Surgeon

TOTAL = 3_000_000
SURGEON = Surgeon(
    Wider(),
    Objective(parameters=-0.1, confidence=0.6),
    cycles=2,
    candidates=3,
    share=0.15,
    rungs=(1.0, 1.0),
    dear=math.inf,
)
FREE = Objective(confidence=0.6)
TIMES = ("seconds", "seconds_training")


def searched(folder, runner=None, problem=None, surgeon=SURGEON, alone=None):
    records = []
    Search(problem or Spirals(), surgeon, TOTAL, folder, runner, records.append, alone=alone).run()
    return [{name: value for name, value in one.items() if name not in TIMES} for one in records]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plain")


@pytest.fixture(scope="module")
def plain(folder):
    """What the search gives when nothing happens."""
    return searched(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What plain training gives."""
    return searched(tmp_path_factory.mktemp("alone"), surgeon=Surgeon(cycles=0))


def test_a_search_spends_its_budget_and_charges_every_branch(plain):
    end = plain[-1]
    assert end["kind"] == "end"
    assert 0.95 * TOTAL < end["total_spent"] <= TOTAL
    start, cycle = plain[0], next(one for one in plain if one["kind"] == "cycle")
    won = next(one for one in plain if one["kind"] == "won")
    flops = 2 * (2 * 4 + 4 * 4 + 4 * 2)  # a multiply and an add per weight
    assert start["flops"] == flops
    branches = [one for one in plain if one["kind"] == "branch" and one["cycle"] == 0]
    assert [one["rung"] for one in branches] == [0, 0, 1, 1]
    costs = [flops] + [one["flops"] for one in branches if one["rung"] == 0]
    steps = math.floor(0.15 * TOTAL / 2 / (3 * 40 * flops) / (sum(costs) / flops))  # as many for all
    assert won["total_spent"] - cycle["total_spent"] == 2 * sum(costs) * (3 * 40 * steps + 80 + 40 * min(4, steps))
    trained = plain[: plain.index(cycle)]
    assert cycle["total_spent"] - trained[-1]["total_spent"] == 3 * 40 * flops  # a backward pass of the proposer


def test_a_winner_is_gone_on_with_and_its_edit_is_what_was_proposed(plain):
    won = [one for one in plain if one["kind"] == "won"]
    assert won[0]["name"] is not None
    winner = [one for one in plain if one["kind"] == "branch" and one["name"] == won[0]["name"]][-1]
    assert winner["accepted"]
    assert winner["parameters"] > plain[0]["parameters"]
    after = plain[plain.index(won[0]) + 1]
    assert after["kind"] == "trained"
    assert after["sizes"] == winner["sizes"]


def test_the_front_is_that_of_all_networks_that_were_judged_and_its_checkpoints_stay(folder, plain):
    points = [
        (one["accuracy"], -one["loss"], -one["parameters"], -one["flops"])
        for one in plain
        if one["kind"] in ("start", "branch", "control", "end")
    ]
    best = {one for one in points if not any(_beats(other, one) for other in points)}
    front = plain[-1]["front"]
    assert {(one["accuracy"], -one["loss"], -one["parameters"], -one["flops"]) for one in front} == best
    assert 1 < len(front) < len(set(points))
    for one in front:
        bench = Spirals().workbench()
        structure = esp.load(folder / "store" / one["network"], bench.model, bench.example)
        assert structure.cost().parameters == one["parameters"]


def _beats(one, other):
    """With accuracy and loss as one quantity, of which the accuracy counts first."""
    quality = (one[:2] > other[:2]) - (one[:2] < other[:2])
    signs = [quality, *((a > b) - (a < b) for a, b in zip(one[2:], other[2:], strict=True))]
    return min(signs) >= 0 and max(signs) > 0


def test_a_front_is_what_brute_force_finds_in_any_order():
    drawn = Random(0)
    for _ in range(30):
        judged = [
            Judged(str(at), drawn.randint(0, 4) / 4, drawn.randint(0, 2), tuple(drawn.randint(0, 3) for _ in range(3)))
            for at in range(25)
        ]
        front = Front()
        for one in judged:
            front.add(one)
        points = [(one.accuracy, -one.loss, *(-cost for cost in one.costs)) for one in judged]
        expected = {one for one in points if not any(_beats(other, one) for other in points)}
        found = [(one.accuracy, -one.loss, *(-cost for cost in one.costs)) for one in front.members()]
        assert len(found) == len(set(found))
        assert set(found) == expected


def test_what_is_watched_makes_a_curve_and_changes_nothing(tmp_path, alone):
    records = searched(tmp_path, surgeon=Surgeon(cycles=0, watched=True))
    curve = [(one.pop("accuracy"), one.pop("loss")) for one in records if one["kind"] == "trained"]
    assert len(curve) >= 20
    assert curve[-1][1] < curve[0][1]
    assert records == alone


def test_latency_is_measured_where_networks_are_judged_and_has_a_price(tmp_path):
    surgeon = replace(SURGEON, objective=Objective(latency=-0.1, confidence=0.6), cycles=1)
    records = searched(tmp_path, problem=Timed(), surgeon=surgeon)
    judged = [one for one in records if one["kind"] in ("start", "branch", "control", "end")]
    assert all(one["latency"] == one["parameters"] / 1000 for one in judged)
    branch = next(one for one in records if one["kind"] == "branch")
    free = next(one for one in searched(tmp_path / "free", problem=Timed(), surgeon=replace(surgeon, objective=FREE))
                if one["kind"] == "branch")  # fmt: skip
    more = branch["price"] - free["price"]  # than that of training it on
    assert more == pytest.approx(-0.1 * math.log(branch["parameters"] / records[0]["parameters"]))
    assert {"latency", "parameters", "flops"} <= set(records[-1]["front"][0])


@dataclass(frozen=True)
class Broken(Spirals):
    """A problem with a bug."""

    def workbench(self):
        return replace(super().workbench(), examples=1 // 0)


@dataclass(frozen=True)
class Timed(Spirals):
    """Spirals on a machine that takes a millisecond per parameter."""

    def workbench(self):
        return replace(super().workbench(), latency=lambda model: sum(one.numel() for one in model.parameters()) / 1000)


def test_a_search_loses_patience_after_cycles_in_vain(tmp_path):
    never = replace(SURGEON, objective=Objective(parameters=100.0), cycles=3, first=0.1)
    for patience in (1, 2):
        records = searched(tmp_path / str(patience), surgeon=replace(never, patience=patience))
        assert [one["name"] for one in records if one["kind"] == "won"] == [None] * patience


def test_plain_training_is_a_search_without_cycles(alone):
    assert {one["kind"] for one in alone} == {"start", "trained", "end"}
    problem = Spirals()
    bench = problem.workbench()
    structure = esp.attach(bench.model, bench.example, optimizer=bench.optimizer)
    flops, step = 3 * 40 * structure.cost().flops // 2, 0
    spent = alone[0]["flops"] * 80  # the fresh network is judged
    while spent + flops <= TOTAL:
        for group in bench.optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - 0.9 * spent / TOTAL)
        bench.optimizer.zero_grad()
        bench.loss(bench.model, bench.batch(step)).backward()
        bench.optimizer.step()
        spent, step = spent + flops, step + 1
    with torch.no_grad():
        losses = bench.losses(bench.model.eval(), bench.test[0])
    assert step == alone[-1]["steps"]
    assert float(losses.mean()) == pytest.approx(alone[-1]["test_loss"], rel=1e-5)


def test_a_job_is_known_by_its_content():
    job = Branch(Spirals(), None, None, 0, 5, 7, TOTAL)
    assert key_of(job) == key_of(Branch(Spirals(), None, None, 0, 5, 7, TOTAL))
    others = [Branch(Spirals(seed=1), None, None, 0, 5, 7, TOTAL), Branch(Spirals(), "a", None, 0, 5, 7, TOTAL)]
    others.append(Branch(Spirals(), None, None, 1, 5, 7, TOTAL))
    assert len({key_of(one) for one in (job, *others)}) == 4


def test_a_job_leaves_torch_as_it_was(tmp_path):
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first = carried_out(Branch(Spirals(), None, None, 0, 3, 0, TOTAL), tmp_path, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    torch.manual_seed(4)
    second = carried_out(Branch(Spirals(), None, None, 0, 3, 0, TOTAL), tmp_path, 1)
    assert first["network"] == second["network"]


def test_two_pieces_of_training_are_one(tmp_path):
    """Only the judging and the rates know of the pieces; with rates by what is spent these do not either."""
    whole = carried_out(Branch(Spirals(), None, None, 0, 6, 0, TOTAL, None), tmp_path, 1)
    first = carried_out(Branch(Spirals(), None, None, 0, 4, 0, TOTAL, None), tmp_path, 1)
    second = carried_out(Branch(Spirals(), first["network"], None, 4, 2, first["spent"], TOTAL, None), tmp_path, 1)
    assert second["network"] == whole["network"]
    assert first["spent"] + second["spent"] == whole["spent"]


# --- trouble


def test_a_branch_with_a_loss_that_is_no_number_is_the_only_loss(tmp_path, plain):
    surgeon = replace(SURGEON, proposer=Wider(broken=True), cycles=1, share=0.3)
    records = searched(tmp_path, surgeon=surgeon)
    failed = [one for one in records if "failed" in one]
    assert [one["edit"] for one in failed] == ["broken"]
    assert failed[0]["failed"] in (
        "a held-out loss is no number",
        "the training loss became nan",
        "the training loss became inf",
    )
    assert records[-1]["kind"] == "end"


@pytest.mark.parametrize(
    ("trouble", "runner", "why"),
    [
        ("memory", "here", "allocate"),
        ("bug", "here", r"KeyError: 'forgotten' (_come_to_grief, searching.py:"),
        pytest.param("memory", "processes", "allocate", marks=pytest.mark.slow),
    ],
)
def test_a_branch_that_needs_too_much_memory_or_meets_a_bug_is_the_only_loss(tmp_path, trouble, runner, why):
    surgeon = Surgeon(Wider(), cycles=1, candidates=2, rungs=(1.0,))
    with nullcontext(InProcess()) if runner == "here" else Processes(1) as where:
        records = searched(tmp_path, where, Spirals(trouble=trouble), surgeon)
    failed = [one for one in records if "failed" in one]
    assert [one["what"] for one in failed] == ["widen 0"]
    assert why in failed[0]["failed"]
    assert records[-1]["kind"] == "end"


def test_a_problem_that_cannot_be_trained_says_where_it_fails(tmp_path):
    with pytest.raises(RunError, match=r"ZeroDivisionError: .*\(workbench, test_evolve.py:\d+\)"):
        searched(tmp_path, problem=Broken(), surgeon=Surgeon(cycles=0))


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["kill", "hang"])
def test_a_worker_that_dies_or_hangs_loses_its_branch_and_not_the_search(tmp_path, trouble):
    with Processes(2, limit=12.0 if trouble == "hang" else None) as runner:
        records = searched(
            tmp_path, runner, Spirals(trouble=trouble), Surgeon(Wider(), cycles=1, rungs=(1.0,), share=0.3),
            alone=InProcess(),
        )  # fmt: skip
    failed = [one for one in records if "failed" in one]
    assert [one["what"] for one in failed] == ["widen 0"]  # the other edit leaves the first layer alone
    assert "worker was lost" in failed[0]["failed"]
    assert records[-1]["kind"] == "end"


def own_pid(job, folder, threads):
    return {"pid": os.getpid()}


def test_a_worker_that_is_killed_while_it_does_nothing_is_replaced(tmp_path):
    with Processes(1) as runner:
        ((_, before),) = runner.run(["any"], tmp_path, own_pid)
        os.kill(before["pid"], signal.SIGKILL)
        time.sleep(0.5)  # until it is missed
        found = dict(runner.run(["any", "other"], tmp_path, own_pid))
    assert found.keys() == {0, 1}
    assert before["pid"] not in {one["pid"] for one in found.values()}


def test_processes_that_never_start_stop_the_search(tmp_path, monkeypatch):
    class Broken:
        active = False

        def __init__(self, **settings):
            made.append(self)

        def schedule(self, *_, **__):
            raise RuntimeError("Unexpected error within the Pool")

        def stop(self): ...

        join = close = stop

    made = []
    monkeypatch.setattr("pebble.ProcessPool", Broken)
    with pytest.raises(RunError, match="broke 3 times in a row"), Processes(1) as runner:
        list(runner.run(["any"], tmp_path))
    assert len(made) == 4


@pytest.mark.slow
def test_a_branch_whose_worker_died_once_is_tried_again(tmp_path):
    problem = Spirals(trouble="kill", once=str(tmp_path / "over"))
    with Processes(1) as runner:
        records = searched(tmp_path / "run", runner, problem)
    assert (tmp_path / "over").exists()
    assert records == searched(tmp_path / "again", problem=problem)
    assert not any("failed" in one for one in records)


def test_a_search_that_is_killed_goes_on_and_ends_where_it_would_have(tmp_path, plain):
    program = (
        "import sys; from pathlib import Path; from test_evolve import searched\n"
        "if __name__ == '__main__': searched(Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path))}
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment)
    ledger = tmp_path / "ledger.sqlite"
    before = time.monotonic()
    while time.monotonic() - before < 60 and _finished_jobs(ledger) < 6:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = _finished_jobs(ledger)
    assert done >= 6
    assert searched(tmp_path) == plain
    assert _finished_jobs(ledger) > done


def test_a_full_disk_stops_the_search_which_then_goes_on(tmp_path, plain, monkeypatch):
    move, calls = storing.os.replace, []

    def full(source, target):
        calls.append(target)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return move(source, target)

    monkeypatch.setattr(storing.os, "replace", full)
    with pytest.raises(StoreFull, match="make room"):
        searched(tmp_path)
    assert not list((tmp_path / "store").glob("unfinished-*"))
    assert searched(tmp_path) == plain


def test_a_ledger_that_cannot_be_written_stops_the_search_which_then_goes_on(tmp_path, plain, monkeypatch):
    connect, calls = ledger.sqlite3.connect, []

    def full(path):
        calls.append(path)
        if len(calls) == 12:
            raise sqlite3.OperationalError("database or disk is full")
        return connect(path)

    monkeypatch.setattr(ledger.sqlite3, "connect", full)
    with pytest.raises(RunError, match="disk is full"):
        searched(tmp_path)
    assert searched(tmp_path) == plain


def test_a_folder_belongs_to_one_search(tmp_path):
    Search(Spirals(), SURGEON, TOTAL, tmp_path)
    with pytest.raises(RunError, match="another search"):
        Search(Spirals(seed=1), SURGEON, TOTAL, tmp_path)


# --- where


@pytest.mark.parametrize("kind", ["processes", pytest.param("executor", marks=pytest.mark.slow)])
def test_results_do_not_depend_on_where_branches_run(tmp_path, plain, kind):
    if kind == "processes":
        with Processes(2, prepare=Spirals().workbench) as runner:
            assert searched(tmp_path, runner, alone=InProcess()) == plain
    else:
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
            assert searched(tmp_path, Futures(executor.submit)) == plain


RAY = """
import ray
from espalier.evolve.on_ray import OnRay
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
records = searched(Path(sys.argv[1]), OnRay())
print(json.dumps([int(ray.cluster_resources()["CPU"]), records]))
"""
DASK = """
from dask.distributed import Client
from espalier.evolve.runners import Futures
with Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
    records = searched(Path(sys.argv[1]), Futures(client.submit))
    print(json.dumps([len(client.nthreads()), records]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("library", "program"), [("ray", RAY), ("distributed", DASK)], ids=["ray", "dask"])
def test_a_cluster_gives_what_one_process_does(tmp_path, plain, library, program):
    pytest.importorskip(library)  # `make slow` installs both
    start = "import json, sys\nfrom pathlib import Path\nfrom test_evolve import searched\n"
    program = start + "if __name__ == '__main__':\n" + program.replace("\n", "\n    ")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    workers, records = json.loads(done.stdout.strip().splitlines()[-1])
    assert workers >= 2
    assert records == json.loads(json.dumps(plain))


@pytest.mark.slow
def test_submitit_gives_what_this_process_does(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(Path(__file__).parent), *sys.path)))
    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="local")  # a process for each job
    executor.update_parameters(timeout_min=5)
    jobs = [Branch(Spirals(), None, None, 0, steps, 0, TOTAL) for steps in (5, 9)]
    there = dict(Futures(executor.submit).run(jobs, tmp_path / "store"))
    here = dict(InProcess().run(jobs, tmp_path / "store"))
    assert {number: one["network"] for number, one in there.items()} == {0: here[0]["network"], 1: here[1]["network"]}
    assert here[0]["network"] != here[1]["network"]


def test_results_do_not_depend_on_the_order_in_which_branches_end(tmp_path, plain):
    class Backwards:
        def run(self, jobs, folder):
            return reversed(list(InProcess().run(jobs, folder)))

    assert searched(tmp_path, Backwards()) == plain


def test_a_future_that_does_not_end_is_given_up(tmp_path):
    class Never:
        def done(self):
            return False

        def result(self):
            raise AssertionError("nobody should ask")

    job = Branch(Spirals(), None, None, 0, 1, 0, TOTAL)
    found = list(Futures(lambda *_: Never(), limit=0.05).run([job], tmp_path))
    assert found[0][0] == 0
    assert found[0][1]["lost"]


# --- parts


def test_a_verdict_is_the_paired_test_that_it_says():
    drawn = torch.Generator().manual_seed(0)
    control, branch = torch.rand(500, generator=drawn), torch.rand(500, generator=drawn)
    results = [
        {"losses": packed(one.double()), "parameters": count, "flops": 10, "latency": count * 1e-3}
        for one, count in ((branch, 200), (control, 100))
    ]
    found = Objective(parameters=0.25, latency=0.25).verdict(*results, 4, 0.125)
    difference = (branch - control).double()
    assert found.gain == pytest.approx(-float(difference.mean()), abs=1e-7)
    assert found.error == pytest.approx(float(difference.std()) / math.sqrt(500), rel=1e-6)
    assert found.price == pytest.approx(0.5 * math.log(2) + 0.125)
    assert found.score == found.price - found.gain
    assert not found.accepted


def test_a_price_on_what_was_not_measured_is_refused():
    result = {"losses": packed(torch.ones(3)), "parameters": 1, "flops": 1}
    with pytest.raises(RunError, match="latency of a branch"):
        Objective(latency=0.1).verdict(result, result, 1, 0.0)


def test_branches_that_are_no_better_are_accepted_as_rarely_as_the_confidence_says():
    drawn, accepted, trials = torch.Generator().manual_seed(1), 0, 400
    for _ in range(trials):
        control = {"losses": packed(torch.randn(200, generator=drawn)), "parameters": 1, "flops": 1}
        branches = [{**control, "losses": packed(torch.randn(200, generator=drawn))} for _ in range(5)]
        accepted += any(Objective(confidence=0.9).verdict(one, control, 5, 0.0).accepted for one in branches)
    assert accepted / trials < 0.1 + 3 * math.sqrt(0.1 * 0.9 / trials)
    assert accepted > 0


def test_a_smaller_network_need_not_be_better_and_a_larger_one_has_to():
    drawn = torch.Generator().manual_seed(2)
    losses = torch.rand(500, generator=drawn).double()
    control = {"losses": packed(losses), "parameters": 100, "flops": 100}

    def accepted(rise, parameters, flops, training=0.0):
        branch = {"losses": packed(losses + rise), "parameters": parameters, "flops": flops}
        return Objective(margin=0.01).verdict(branch, control, 1, training).accepted

    assert accepted(0.009, 80, 90)
    assert not accepted(0.011, 80, 90)
    assert accepted(0.011, 80, 90, training=-0.002)  # its steps cost less
    assert not accepted(0.009, 80, 110)  # larger in one way
    assert not accepted(0.009, 100, 100)
    assert accepted(-0.02, 300, 300, training=0.01)
    assert not accepted(-0.02, 300, 300, training=0.03)


def test_what_training_costs_is_an_estimate_and_needs_no_confidence():
    differences = torch.randn(400, generator=torch.Generator().manual_seed(3)).double()
    differences = 0.1 * (differences - differences.mean()) / differences.std()  # standard error 0.005
    control = {"losses": packed(torch.ones(400)), "parameters": 100, "flops": 100}

    def accepted(gain, training, **prices):
        branch = {"losses": packed(1.0 - gain + differences), "parameters": 200, "flops": 200}
        return Objective(**prices).verdict(branch, control, 1, training).accepted

    assert accepted(0.012, 0.010)
    assert not accepted(0.012, 0.013)
    assert not accepted(0.007, 0.0)  # 1.64 standard errors are 0.0082
    assert not accepted(0.012, 0.0, parameters=0.01)  # a price that was asked for is no estimate


def test_prices_are_those_of_the_curve_that_they_are_taken_from():
    def loss(steps):
        return 2.3 - 2 * steps / (50 + steps)

    curve = Curve.through(2.3, Point(100, loss(100)), Point(400, loss(400)))
    assert curve.at(37) == pytest.approx(loss(37))
    assert curve.slope == pytest.approx((loss(400 * 0.999) - loss(400 * 1.001)) / 0.002, rel=1e-4)  # -dL / d ln t
    assert curve.price(1600, 400) == pytest.approx(loss(800) - loss(2000))
    assert 0 > curve.price(400, 1600) > loss(2000) - loss(800)  # what is saved counts for less
    assert curve.price(1600, 1700, age=30) == pytest.approx(loss(400) - loss(30) + loss(1730) - loss(2000))


def test_a_straight_line_goes_on_so_as_far_as_a_loss_can_fall_and_a_loss_that_does_not_fall_costs_nothing():
    for before, after in (
        (Point(10, -0.1), Point(20, -0.2)),
        (Point(10, -0.05), Point(20, -0.2)),
        (Point(20, -0.2), Point(20, -0.2)),  # one point
    ):
        assert Curve.through(0.0, before, after).price(100, 40) == pytest.approx(60 * 0.01)
        positive = Curve.through(2.3, Point(before.steps, 2.3 + before.loss), Point(after.steps, 2.3 + after.loss))
        assert positive.at(20) == pytest.approx(2.1)
        assert positive.at(1e12) == pytest.approx(0.0, abs=1e-6)
        assert positive.price(100, 40) == pytest.approx(positive.at(60) - positive.at(120))
        assert 0 < positive.price(100, 40) < 60 * 0.01
    for still in (
        Curve.through(2.3, Point(100, 1.0), Point(200, 1.1)),
        Curve.through(2.3, Point(9, 2.4), Point(20, 2.5)),
    ):
        assert still.slope == still.price(1600, 10) == still.price(10, 1600) == 0.0


def test_edits_that_are_too_dear_for_a_race_of_some_length_are_not_tried(tmp_path):
    brief = replace(SURGEON, cycles=1, first=0.3, last=0.3, share=0.02)
    assert not [one for one in searched(tmp_path / "brief", surgeon=brief) if one["kind"] == "branch"]
    kinds = [one["kind"] for one in searched(tmp_path / "long", surgeon=replace(brief, least=0.01))]
    assert kinds.count("branch") == 4


def test_an_optimizer_goes_on_where_something_new_came():
    for plan in (Plan((Resize("0", add=2),)), Plan((Resize("0", remove=(1,)),))):
        bench = Spirals().workbench()
        structure = esp.attach(bench.model, bench.example, optimizer=bench.optimizer)
        take_step(structure, bench, bench.batch(0), 0.0)
        carry_out(structure, bench, plan, 1)
        assert {int(state["step"]) for state in bench.optimizer.state.values()} == {1}


def test_what_begins_anew_has_fresh_weights_of_its_sizes_and_a_fresh_optimizer(tmp_path):
    store = Store(tmp_path)
    parent = carried_out(Branch(Spirals(), None, None, 0, 4, 0, TOTAL), tmp_path, 1)["network"]
    plan = keep_plan(store, Plan((Resize("0", add=2),)))
    branches = [Branch(Spirals(), parent, plan, 4, 0, 0, TOTAL, 0.0, anew=anew) for anew in (False, True, True)]
    results = [carried_out(branch, tmp_path, 1) for branch in branches]
    assert results[1]["network"] == results[2]["network"] != results[0]["network"]
    bench = Spirals().workbench()
    structure = opened(bench, store, results[1]["network"])
    before = opened(Spirals().workbench(), store, parent)
    assert structure.axes["0"].size == 6
    assert not bench.optimizer.state
    assert not torch.equal(structure.model[0].weight[:4], before.model[0].weight)


def test_packed_losses_come_back_in_single_precision():
    values = torch.randn(7, dtype=torch.float64)
    assert torch.equal(unpacked(packed(values)), values.float().double())


def test_the_store_knows_content_and_forgets_what_is_not_kept(tmp_path):
    store = Store(tmp_path)
    one = store.put(lambda folder: (folder / "a").write_text("x") and None)
    same = store.put(lambda folder: (folder / "a").write_text("x") and None)
    other = store.put(lambda folder: (folder / "b").write_text("x") and None)
    assert one == same != other
    (tmp_path / "unfinished-1").mkdir()
    store.keep_only([other])
    assert [path.name for path in tmp_path.iterdir()] == [other]


def test_a_network_is_judged_at_the_mean_of_its_weights_and_left_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    mean, seen = Mean(model), []
    for step in range(3):
        with torch.no_grad():
            model[0].weight.fill_(step)
        mean.look()
    state = {name: one.clone() for name, one in model.state_dict().items()}
    x = torch.randn(50, 3)
    with mean.applied([lambda: model(x)]):
        seen.append(model[0].weight.clone())
        expected = (x.sum(1) + 0.0)[:, None] + model[0].bias
        assert torch.allclose(model[1].running_mean, expected.mean(0), atol=1e-5)
    assert torch.allclose(seen[0], torch.ones(4, 3))
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())


def test_plans_join_unless_they_change_the_same():
    a, b = Plan((Resize("0", add=2),)), Plan((Resize("2", remove=(1,)),))
    both = joined([a, b])
    assert both is not None
    assert [edit.axis for edit in both.edits] == ["0", "2"]
    assert joined([a, Plan((Resize("0", add=1),))]) is None
    gone = joined([Plan((), depth=(Remove(one),)) for one in "12"])
    assert gone is not None
    assert [edit.module for edit in gone.depth] == ["1", "2"]
    assert joined([gone, Plan((), depth=(Replace("0", Skip((0,))),))]) is None
    bench = Spirals().workbench()
    structure = esp.attach(bench.model, bench.example, optimizer=bench.optimizer)
    structure.apply(both)
    assert (structure.axes["0"].size, structure.axes["2"].size) == (6, 3)


@pytest.mark.parametrize("move", sorted(set(RANDOM_MOVES), key=repr), ids=str)
def test_moves_are_plans_and_leave_the_network_alone(move):
    bench = Spirals(width=6).workbench()
    structure = esp.attach(bench.model, bench.example, optimizer=bench.optimizer)
    before = {name: one.clone() for name, one in bench.model.state_dict().items()}
    material = Material(structure, lambda batch: bench.loss(bench.model, batch), [bench.batch(0), bench.batch(1)], 5)
    plan = move.plan(material, None)
    assert all(torch.equal(one, before[name]) for name, one in bench.model.state_dict().items())
    assert not structure.history
    if plan is not None:
        structure.apply(plan)
        assert (structure.cost().parameters > 64 + 8 + 6) == (move.direction == "grow")


def test_random_moves_are_as_many_as_wanted_differ_and_repeat():
    bench = Spirals(width=6).workbench()
    structure = esp.attach(bench.model, bench.example, optimizer=bench.optimizer)
    material = Material(structure, lambda batch: bench.loss(bench.model, batch), [bench.batch(0)], 5)
    found = RandomMoves()(material, 4)
    assert len({str(one.plan) for one in found}) == 4
    assert [str(one.plan) for one in RandomMoves()(material, 4)] == [str(one.plan) for one in found]


def test_recommendations_are_proposals_with_what_they_predict():
    bench = Spirals(width=6).workbench()
    structure = esp.attach(bench.model, bench.example, optimizer=bench.optimizer)
    before = {name: one.clone() for name, one in bench.model.state_dict().items()}
    asked = []

    def loss(batch):
        asked.append(len(batch[1]))
        return bench.loss(bench.model, batch)

    found = Recommended()(Material(structure, loss, [bench.batch(0), bench.batch(1)], 5), 3)
    assert 1 <= len(found) <= 3
    assert asked
    assert all(torch.equal(one, before[name]) for name, one in bench.model.state_dict().items())
    assert {one.kind for one in found} <= {"wider", "smaller", "shallower", "wide and shallow", "as asked", "deeper"}
    for one in found:
        assert (one.gain is None) == (
            one.kind in ("wider", "smaller", "wide and shallow")
        )  # of which nothing is predicted
        structure.apply(one.plan)
        structure.undo()


def test_what_is_already_wide_enough_is_not_widened():
    """Units of which others repeat each other; asked for none, and with a layer that does nothing, it is widened."""

    def kinds(width, **settings):
        bench = Spirals(width=width).workbench()
        structure = esp.attach(bench.model, bench.example, optimizer=bench.optimizer)
        with torch.no_grad():
            for name in ("0", "2"):
                layer = bench.model.get_submodule(name)
                layer.weight[width // 2 :], layer.bias[width // 2 :] = (
                    layer.weight[: width // 2],
                    layer.bias[: width // 2],
                )
        material = Material(
            structure, lambda batch: bench.loss(bench.model, batch), [bench.batch(0), bench.batch(1)], 5
        )
        return {one.kind: one for one in Recommended(**settings)(material, 5)}

    assert "wider" not in kinds(8)
    assert "smaller" in kinds(8)
    assert "wider" in kinds(8, loose=0.9)


def test_where_nothing_gets_through_no_units_go_and_all_layers_do_at_once():
    """Behind units that are dead all others could go for nothing."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    model, x, target = nn.Sequential(*layers), torch.randn(200, 4), torch.randint(3, (200,))
    nn.init.constant_(model[2].bias, -50.0)
    structure = esp.attach(model, x[:2])
    batches = [torch.arange(100), torch.arange(100, 200)]
    found = Recommended()(
        Material(structure, lambda rows: F.cross_entropy(model(x[rows]), target[rows]), batches, 5), 5
    )
    plans = {one.kind: one.plan for one in found}
    assert {"wider", "wide and shallow"} <= plans.keys()
    assert "smaller" not in plans
    assert [one.kind for one in found if one.anew] == ["wide and shallow"]
    structure.apply(plans["wide and shallow"])
    assert [tuple(one.shape) for one in model.parameters() if one.ndim == 2] == [(24, 4), (3, 24)]


def test_a_cycle_begins_when_the_curve_of_the_loss_has_bent(tmp_path):
    """Steps that lower the loss much are not spent on branches; later, when they lower it less, some are."""
    early = replace(SURGEON, dear=0.04, first=0.01, last=0.3, cycles=4)
    records = searched(tmp_path, surgeon=early)
    dear, cycles = ([one for one in records if one["kind"] == kind] for kind in ("dear", "cycle"))
    assert [one["cycle"] for one in dear] == [0]
    assert [one["cycle"] for one in cycles][:1] == [1]
    before = [one["loss"] for one in records[: records.index(dear[0])] if "loss" in one]
    assert dear[0]["cost"] > 0.04 * before[-1]
    never = searched(tmp_path / "never", surgeon=replace(early, dear=0.0))
    assert [one["kind"] for one in never].count("dear") == 4
    assert {one["kind"] for one in never} == {"start", "trained", "dear", "end"}


def test_a_network_that_begins_anew_is_judged_by_its_age():
    """All that was learnt is undone, and what is fresh learns faster: behind in a race of equal steps, it wins."""
    control = {"losses": packed(torch.full((400,), 1.2)), "parameters": 100, "flops": 100}
    branch = {"losses": packed(torch.full((400,), 1.3)), "parameters": 100, "flops": 100}
    curve = Curve.through(2.3, Point(150, 1.77), Point(480, 1.2))
    level = curve.price(7000, 7000)
    younger = curve.price(7000, 7000, age=190)
    assert level == 0.0
    assert not Objective().verdict(branch, control, 1, level).accepted
    assert Objective().verdict(branch, control, 1, younger).accepted
    worse = {**branch, "losses": packed(torch.full((400,), 2.2))}  # than the control was at its age
    assert curve.at(190) < 2.2
    assert not Objective().verdict(worse, control, 1, younger).accepted


def test_a_move_that_is_unknown_says_so():
    bench = Spirals().workbench()
    structure = esp.attach(bench.model, bench.example, optimizer=bench.optimizer)
    material = Material(structure, lambda batch: bench.loss(bench.model, batch), [bench.batch(0)], 5)
    assert Move.of("grow", "nonsense").plan(material, None) is None


def _finished_jobs(ledger):
    try:
        with closing(sqlite3.connect(ledger)) as found:
            return int(found.execute("SELECT COUNT(*) FROM results").fetchone()[0])
    except sqlite3.Error:
        return 0
