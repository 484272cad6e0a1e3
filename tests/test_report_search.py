"""What a search shows: its page, complete and safe whatever the records hold, and its progress."""

from __future__ import annotations

import io
import json
import math
from itertools import pairwise

import pytest
from report_page import Page

from espalier.bench.report_predictions import rank_correlation
from espalier.bench.report_search import write_search_report
from espalier.bench.search_progress import Population, SearchLines, line
from espalier.cli import main
from espalier.errors import DataError

TOTAL = 1_000_000
CONFIG = {"options": {"problem": {"source": "digits", "model": "mlp", "width": 0.25, "seed": 3}}, "text": "..."}


def network(parameters, accuracy, loss, **more):
    return {
        "parameters": parameters,
        "flops": 2 * parameters,
        "accuracy": accuracy,
        "loss": loss,
        "seconds": 1.0,
        **more,
    }


def branch(cycle, rung, name, what, spent, gain, **more):
    return {
        "kind": "branch", "cycle": cycle, "rung": rung, "name": name, "parent": 0, "edit": what.split()[0],
        "what": what, "why": f"because of {what}", "predicted": gain / 2 + 0.001, "total_spent": spent,
        "gain": gain, "error": 0.01,
        "price": 0.002, "accepted": gain > 0.05, **network(120, 0.8 + gain, 0.5 - gain), **more,
    }  # fmt: skip


def records():
    """Two cycles: a winner with a branch that also passed, one that was lost, and one that was cut; then none."""
    found = [{"kind": "start", "total": TOTAL, "total_spent": 0, **network(100, 0.1, 2.3)}]
    found += [{"kind": "trained", "steps": 10 * n, "total_spent": 50_000 * n, **network(100, 0.6, 0.9)} for n in (1, 2)]
    names = [f"0.{number}" for number in range(5)]
    edits = ["widen fc1", "widen fc2", "remove fc2", "prune <b>fc1</b>", "deepen"]
    found.append({"kind": "cycle", "cycle": 0, "proposals": 5, "total_spent": 100_000})
    found.append({"kind": "rung", "cycle": 0, "rung": 0, "names": names, "edits": edits, "steps": [9] * 6})
    found[-1]["total_spent"] = 100_000
    gains = [0.09, 0.07, -2.2, 0.01]
    found += [
        branch(0, 0, *one, 150_000, gain) for one, gain in zip(zip(names, edits, strict=True), gains, strict=False)
    ]
    lost = branch(0, 0, "0.4", "deepen", 0, 0.0)
    found.append({key: lost[key] for key in ("kind", "cycle", "rung", "name", "parent", "edit", "what", "why")})
    found[-1]["failed"] = "the worker was lost: killed"
    found.append({"kind": "control", "cycle": 0, "rung": 0, "total_spent": 150_000, **network(100, 0.7, 0.6)})
    found.append({"kind": "rung", "cycle": 0, "rung": 1, "names": names[:2], "edits": edits[:2], "steps": [9] * 3})
    found += [
        branch(0, 1, *one, 200_000, gain) for one, gain in (((names[0], edits[0]), 0.12), ((names[1], edits[1]), 0.06))
    ]
    found.append({"kind": "control", "cycle": 0, "rung": 1, "total_spent": 200_000, **network(100, 0.72, 0.55)})
    found.append({"kind": "won", "cycle": 0, "name": "0.0", "total_spent": 200_000})
    found.append({"kind": "trained", "steps": 60, "total_spent": 500_000, **network(120, 0.93, 0.3)})
    found.append({"kind": "cycle", "cycle": 1, "proposals": 1, "total_spent": 500_000})
    found.append({"kind": "rung", "cycle": 1, "rung": 0, "names": ["1.0"], "edits": ["widen fc1"], "steps": [9, 8]})
    found.append(branch(1, 0, "1.0", "widen fc1", 600_000, -0.01))
    found.append({"kind": "control", "cycle": 1, "rung": 0, "total_spent": 600_000, **network(120, 0.94, 0.28)})
    found.append({"kind": "won", "cycle": 1, "name": None, "total_spent": 600_000})
    front = [{"network": "abc<i>", **network(100, 0.72, 0.55)}, {"network": "def", **network(120, 0.95, 0.2)}]
    end = {"test_accuracy": 0.9412, "test_loss": 0.25, "network": "def", "front": front, "total_spent": 990_000}
    found.append({"kind": "end", "steps": 100, **network(120, 0.95, 0.2), **end})
    return found


def alone():
    found = [{"kind": "start", "total": TOTAL, "total_spent": 0, **network(100, 0.1, 2.3)}]
    found += [
        {"kind": "trained", "total_spent": 100_000 * n, **network(100, 0.5 + n / 25, 1 / n)} for n in range(1, 10)
    ]
    found.append(
        {"kind": "end", "total_spent": 990_000, "test_accuracy": 0.9, "test_loss": 0.3, **network(100, 0.9, 0.3)}
    )
    return found


def page(folder, mine=None, other=None):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, found in (
        ("surgeon", records() if mine is None else mine),
        ("baseline", alone() if other is None else other),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    return Page(write_search_report(folder))


def test_a_page_shows_outcome_lineage_curve_front_and_predictions(tmp_path):
    found = page(tmp_path)
    words = found.words()
    assert "94.12%" in words
    assert "90.00%" in words
    assert "4.12 points above the start alone" in words
    for title in ("Lineage", "Accuracy over cost", "Pareto front", "Predicted and happened", "Branches"):
        assert title in words
    assert "widen fc1 +0.1200 ± 0.0100" in words
    assert "deepen: lost" in words
    assert "surgeon/store/def" in words
    assert "start alone" in words
    assert "Rank correlation of 5 edits" in words  # the lost one was never judged
    outcomes = [words.count(one) for one in ("gone on with", "not accepted", "passed", "lost")]
    assert min(outcomes) >= 2  # in a legend and in the table
    assert "http" not in found.source.split("<style>")[0].replace("http-equiv", "")
    assert not [attrs for tag, attrs in found.elements if tag in ("img", "link") or "src" in attrs]


def test_the_winner_s_line_goes_on_and_the_others_stop(tmp_path):
    found = page(tmp_path)
    trunk = found.classed("trunk")[0]["d"]
    rows = found.classed("row")
    assert len(rows) == 6
    assert ["lost" in one["class"].split() for one in rows].count(True) == 1
    assert len(found.classed("tip", "won")) == 3  # in the legend, the winner and the end
    assert len(found.classed("tip", "passed")) == 2  # in the legend, and the one that the winner beat
    assert (
        trunk.count("V") == 3
    )  # to the winner's row, below its cycle, and below the second one, which the control won
    ends = [float(one["cx"]) for one in found.classed("tip") if "cx" in one]
    twigs = [one["d"] for one in found.classed("twig") if "H" in one["d"] and "control" not in one["class"]]
    assert max(float(one.split("H")[1]) for one in twigs) < max(ends)  # the search's own end


def test_a_front_on_the_page_rises_and_leaves_out_who_is_beaten(tmp_path):
    found = page(tmp_path)
    assert len(found.classed("stairs")) == 2
    heights = [float(part.split("H")[0]) for part in found.classed("stairs")[0]["d"].split("V")[1:]]
    assert all(one > other for one, other in pairwise(heights)) or len(heights) == 1
    assert len(found.classed("spot", "found")) == len(found.classed("spot", "alone")) == 2


def test_a_search_that_goes_on_has_a_page_at_any_moment(tmp_path):
    every = records()
    for count in range(1, len(every)):
        found = page(tmp_path, every[:count], alone()[: count // 3])
        assert "This search has not ended" in found.words()
        assert "not ended" in found.words()


def test_what_records_hold_cannot_break_the_page(tmp_path):
    spoiled = []
    for one in records():
        spoiled.append(
            {
                key: "<script>alert(1)</script>" if isinstance(value, (str, float)) else value
                for key, value in one.items()
            }
        )
        spoiled[-1]["kind"] = one["kind"]
        spoiled.append({"kind": one["kind"], "cycle": 0})
        spoiled.append({**one, "loss": math.nan, "gain": math.inf, "total_spent": None, "name": None})
    found = page(tmp_path, spoiled)
    assert len(found.scripts) == 1
    assert "<script>alert" not in found.source
    assert "abc<i>" not in page(tmp_path).source


def test_the_command_writes_the_page_of_a_search_too(tmp_path, capsys):
    page(tmp_path)
    (tmp_path / "report.html").unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert "search report" in (tmp_path / "report.html").read_text()
    (tmp_path / "surgeon.jsonl").write_text("")
    with pytest.raises(DataError, match=r"surgeon\.jsonl"):
        write_search_report(tmp_path)


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2, 2], [1, 1, 2, 2]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [5, 5, 5]) == 0
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)


# --- progress


def test_lines_say_what_was_decided():
    stream = io.StringIO()
    shown = SearchLines(stream).begin("search", TOTAL)
    for one in records():
        shown.record(one)
    said = stream.getvalue()
    assert "search  10%  cycle 1: 5 edits are tried" in said
    assert "15%    0.0   rung 1  loss -0.0900 ± 0.0100, price +0.0020  widen fc1" in said
    assert "deepen is lost: the worker was lost: killed" in said
    assert "20%  0.0 wins" in said
    assert "60%  the control wins" in said
    assert "60.0% of the held-out samples" not in said  # too soon after the start
    assert line(records()[1], TOTAL) == "  5%    60.0% of the held-out samples, 100 parameters"
    assert max(map(len, said.splitlines())) < 120


@pytest.mark.parametrize(("count", "said"), [(0, "no edit is tried"), (1, "1 edit is tried"), (2, "2 edits are tried")])
def test_how_many_edits_are_tried(count, said):
    assert line({"kind": "cycle", "cycle": 1, "proposals": count, "total_spent": 5}, 10) == f" 50%  cycle 2: {said}"


def test_a_price_of_nothing_is_not_shown():
    assert "price" not in str(line({**branch(0, 0, "0.0", "widen", 5, 0.1), "price": 0.0}, 10))


def test_a_population_is_what_competes_now():
    now, seen = Population("search", TOTAL), []
    for one in records():
        now.record(one)
        seen.append((one["kind"], [(row[0], row[-1]) for row in now.rows()], now.path(), now.spent))
    first = next(rows for kind, rows, _, _ in seen if kind == "rung")
    assert first == [(f"0.{number}", "") for number in range(5)]
    second = [rows for kind, rows, _, _ in seen if kind == "rung"][1]
    assert second == [("0.0", ""), ("0.1", ""), ("0.2", "out"), ("0.3", "out"), ("0.4", "lost")]
    assert [path for kind, _, path, _ in seen if kind == "won"] == ["start 100 → widen fc1 120"] * 2
    assert seen[-1][1:] == ([], "start 100 → widen fc1 120", 990_000)


def test_a_terminal_shows_the_population():
    console = pytest.importorskip("rich.console")
    from rich.live import Live
    from rich.progress import Progress

    from espalier.bench.search_progress import SearchDisplay

    stream = io.StringIO()
    screen = console.Console(file=stream, force_terminal=True, width=100)
    bar = Progress(console=screen)
    with Live(bar, console=screen, auto_refresh=False) as live:
        display = SearchDisplay(screen, live, bar)
        shown, other = display.begin("search", TOTAL), display.begin("alone", TOTAL)
        for one in records():
            shown.record(one)
            shown.result()
            live.refresh()
        for one in alone():
            other.record(one)
        live.refresh()
    said = stream.getvalue()
    assert "0.0 wins" in said
    assert "rung 2" in said
    assert "of 3 networks trained" in said
    assert "start 100 → widen fc1 120" in said
    assert "+0.1200 ± 0.0100" in said
