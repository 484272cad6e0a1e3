"""Gates in the report of a run: pictures at a few times, probabilities over all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from gated_records import gated_records, gates, plane
from report_page import Page

from espalier.bench.gate_history import MOST_MOMENTS, MOST_POINTS, gates_of
from espalier.bench.gate_pictures import SIDE
from espalier.bench.heat import MOST_COLUMNS, SHADES, Column, heat_chart
from espalier.bench.records import action_of, read_run
from espalier.bench.report import write_report

TWO = {"embed": 100, "hidden": 80}
MANY = {f"layer{at}.conv1": 16 * (1 + at % 4) for at in range(27)}


def render(folder: Path, records: list[dict[str, object]]) -> Page:
    (folder / "config.json").write_text(json.dumps({"task": "moons", "model": "moons", "grow": "none", "prune": "npn"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Page(write_report(folder))


def test_there_is_a_picture_of_every_map(tmp_path: Path) -> None:
    page = render(tmp_path, gated_records(TWO))
    names = [attrs["data-name"] for attrs in page.classed("frame")]
    assert names == ["Epoch 10", "Epoch 20", "Epoch 30", "Epoch 40"]
    assert len(page.classed("map")) == 4
    assert "Epoch 10 search, k = 7 · 75.0% of validation right · 90 parameters" in page.words()
    assert "Epoch 20 fine-tuning · 75.0%" in page.words()
    assert "Gates were undecided in the search, from epoch 10 to 20." in page.words()
    assert "Of 180 gates 90 are in the network at last, 90 sleep." in page.words()
    assert page.words().count("embed 100 of 100") == 1
    assert page.words().count("embed 50 of 100") == 3


def test_the_boundary_lies_where_both_classes_are_as_likely(tmp_path: Path) -> None:
    page = render(tmp_path, gated_records(TWO, epochs=10))
    (edge,) = page.classed("edge")
    places = [tuple(map(float, place.split(","))) for place in re.findall(r"[\d.]+,[\d.]+", edge["d"])]
    tall = max(y for _, y in places)
    inner = [x for x, y in places if 0 < y < tall and x < SIDE]  # not along the border
    assert len(inner) >= 6
    for x in inner:
        assert x == pytest.approx(SIDE * (0.5 + 2) / 4, abs=4)
    points = [attrs["d"] for attrs in page.classed("points") if "rim" not in attrs["class"]]
    assert points == [f"M100,{tall / 4:.0f}h0", f"M300,{3 * tall / 4:.0f}h0"]  # the third is outside of the map


def test_of_many_points_all_classes_are_shown(tmp_path: Path) -> None:
    records = gated_records(TWO, epochs=10)
    labels = [0] * MOST_POINTS + [1] * MOST_POINTS
    records[0]["points"] = {"inputs": [[label - 0.5, 0.0] for label in labels], "labels": labels}
    page = render(tmp_path, records)
    counts = [attrs["d"].count("h0") for attrs in page.classed("points") if "rim" not in attrs["class"]]
    assert counts == [MOST_POINTS // 2, MOST_POINTS // 2]


def test_sure_regions_lie_within_each_other(tmp_path: Path) -> None:
    page = render(tmp_path, gated_records(TWO, epochs=10))
    lefts = [min(map(float, re.findall(r"([\d.]+),", attrs["d"]))) for attrs in page.classed("sure", "one")]
    assert len(lefts) == 4
    assert lefts == sorted(lefts)
    assert lefts[0] == pytest.approx(250, abs=4)


def test_every_unit_is_a_dot(tmp_path: Path) -> None:
    page = render(tmp_path, gated_records(TWO))
    assert [attrs["aria-label"] for attrs in page.classed("units")][:3] == [
        "embed: 50 open, 50 rather shut, 0 asleep",
        "hidden: 40 open, 40 rather shut, 0 asleep",
        "embed: 50 open, 0 rather shut, 50 asleep",
    ]
    frame = page.source[page.source.index('data-name="Epoch 20"') :]
    drawing = frame[frame.index('<svg class="units"') :]
    drawing = drawing[: drawing.index("</svg>")]
    assert re.findall(r'class="(\w+)".*?d="(.*?)"', drawing)[0][1].count("h0") == 50
    assert re.findall(r'class="off" d="(.*?)"', drawing)[0].count("M") == 50


def test_large_networks_are_bars_and_are_pooled(tmp_path: Path) -> None:
    page = render(tmp_path, gated_records(MANY, planar=False))
    frames = page.classed("frame")
    assert len(frames) == 12
    assert [frames[0]["data-name"], frames[-1]["data-name"]] == ["Epoch 1", "Epoch 40"]
    assert len(page.classed("bar")) == len(MANY) * len(frames)
    assert page.classed("units") == page.classed("map") == []
    assert "All gates of 27 axes over time" in page.words()
    assert "one class" not in page.words()
    assert "gates are in the network at last" not in page.words()
    words = render(tmp_path, gated_records(MANY, planar=False)[:15]).words()
    assert f"All {sum(MANY.values()):,} gates are in the network at last." in words


def test_all_pictures_are_shown_where_no_script_runs(tmp_path: Path) -> None:
    page = render(tmp_path, gated_records(TWO))
    assert [attrs for attrs in page.classed("frame") if "hidden" in attrs] == []
    (bar,) = page.classed("stepper")
    assert "hidden" in bar
    (slider,) = [attrs for tag, attrs in page.elements if tag == "input"]
    assert (slider["min"], slider["max"]) == ("0", "3")


def test_a_single_picture_needs_no_slider(tmp_path: Path) -> None:
    page = render(tmp_path, gated_records(TWO, epochs=1, every=1))
    assert len(page.classed("frame")) == 1
    assert page.classed("stepper") == []


def test_runs_without_gates_have_no_such_section(tmp_path: Path) -> None:
    records = [{key: value for key, value in one.items() if key != "gates"} for one in gated_records(TWO)]
    page = render(tmp_path, records)
    assert "Gates" not in page.words()
    assert page.classed("steps") == []


def test_a_long_run_has_few_pictures_and_columns(tmp_path: Path) -> None:
    page = render(tmp_path, gated_records(TWO, epochs=2000, every=5))
    frames = page.classed("frame")
    assert len(frames) == MOST_MOMENTS
    assert [frames[0]["data-name"], frames[-1]["data-name"]] == ["Epoch 5", "Epoch 2,000"]
    heat = page.source[page.source.index("Probabilities of gates of embed") :]
    assert MOST_COLUMNS / 2 < heat[: heat.index("</svg>")].count("<rect") <= MOST_COLUMNS + 1
    assert (tmp_path / "report.html").stat().st_size < 700_000


def test_shades_follow_shares_and_neighbours_are_one() -> None:
    columns = [Column(float(at), (0.0, 25.0), 75.0, "tip") for at in range(1, 5)]
    chart = heat_chart("label", columns, "epoch", "asleep", [(2.0, "search")])
    cells = re.findall(r'<path class="(.*?)" fill-opacity="(.*?)" d="(.*?)"/>', chart)
    assert [(css, float(shade)) for css, shade, _ in cells] == [("heat", 0.5), ("heat out", 0.9)]
    assert [path.count("M") for _, _, path in cells] == [1, 1]
    assert SHADES == 10
    (mark,) = re.findall(r'<line class="mark" x1="([\d.]+)"', chart)
    left, right = map(float, re.findall(r"M([\d.]+),[\d.]+H([\d.]+)", cells[0][2])[0])
    assert float(mark) == pytest.approx((left + right) / 2, abs=0.2)  # columns end at their epoch: 2 of 0 to 4


WRONG = [None, "x", [], {}, [1], [[1]], -1, [-1.0], ["nan"], [float("nan")], [1e400], True, [[0.5] * 3] * 300]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: str(value)[:12])
def test_what_cannot_be_read_is_left_out(tmp_path: Path, wrong: object) -> None:
    records = gated_records(TWO, epochs=20)
    good = plane(0.0)
    places = ({**gates(2, 20, TWO), "axes": wrong}, {**gates(2, 20, TWO), "asleep": wrong, "stage": wrong, "k": wrong})
    records[2]["gates"], records[3]["gates"] = places
    records[4]["gates"] = {**gates(4, 20, TWO), "axes": {"embed": wrong, "hidden": [1] * 20}}
    records[5]["gates"] = wrong
    records[6]["map"] = wrong
    for at, key in enumerate(("x", "y", "values"), start=7):
        records[at]["map"] = {**good, key: wrong}
    records[10]["map"] = {**good, "values": [[0.5, wrong], [0.5, 0.5]]}
    records[11]["map"] = {**good, "values": [[0.5, 0.5], [0.5, 7.0]]}
    records[0]["points"] = {"inputs": [wrong, [0.0, wrong], [0.5, 0.5]], "labels": [0, 1, wrong]}
    page = render(tmp_path, records)
    assert [attrs["data-name"] for attrs in page.classed("frame")] == ["Epoch 20"]
    drawn = [attrs[key] for _, attrs in page.elements for key in ("d", "x", "y", "width", "height") if key in attrs]
    assert [value for value in drawn if re.search("nan|inf|none|e[+]", value.lower())] == []


def test_names_of_what_has_gates_cannot_become_markup(tmp_path: Path) -> None:
    evil = "\"' onload='alert(3)'</code></svg><script>alert(1)</script><img src=x>"
    for places in ({evil: 30}, {evil: 3000}, {f"{evil}{at}": 30 for at in range(9)}):
        page = render(tmp_path, gated_records(places))
        assert [tag for tag, _ in page.elements if tag in ("script", "img")] == ["script"]
        assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]


def test_units_that_come_and_go_under_one_name_of_a_method() -> None:
    shrank = {"action": "grow", "axes": {"a": [80, 3], "b": [9, 9]}}
    assert action_of(shrank) == "prune"
    assert action_of({**shrank, "axes": {"a": [3, 4]}}) == "grow"
    assert action_of({**shrank, "axes": {"a": [3, 4], "b": [5, 4]}}) == "grow"
    assert action_of({**shrank, "layers": ["insert"]}) == "grow"
    assert action_of({"action": "rejected", "axes": {"a": [80, 3]}}) == "rejected"
    assert action_of({"action": "grow", "axes": {"a": ["?", 3]}}) == "grow"


def test_gates_of_a_run_are_its_epochs(tmp_path: Path) -> None:
    render(tmp_path, gated_records(TWO))
    found = gates_of(read_run(tmp_path))
    assert found is not None
    assert found.places == ("embed", "hidden")
    assert [one.stage for one in found.epochs] == ["pre-training"] * 9 + ["search"] * 10 + ["fine-tuning"] * 21
    middle = found.epochs[12]
    assert (middle.there("embed"), middle.open("embed"), middle.all("embed")) == (100, 50, 100)
    last = found.epochs[-1]
    assert (last.there("hidden"), last.open("hidden"), last.all("hidden")) == (40, 40, 80)
    assert found.points == ((-1.0, 0.5, 0), (1.0, -0.5, 1), (9.0, 9.0, 1))
