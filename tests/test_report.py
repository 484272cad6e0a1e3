"""The report page: complete, well-formed, self-contained, and safe whatever the files of a run hold."""

from __future__ import annotations

import json
import math
import random
import re
from base64 import b64encode
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest
from gated_records import gated_records
from report_page import Page

from espalier.bench.charts import BOTTOM, HEIGHT, TOP
from espalier.bench.report import write_report
from espalier.errors import DataError

STEPS = 40  # per epoch


def sample_records(
    axes: dict[str, int], epochs: int = 30, setting: str = "growing", twin: bool = True, seed: int = 0
) -> list[dict[str, object]]:
    """A made-up run with plausible learning curves in which the axes grow, shrink or both."""
    draw = random.Random(seed)
    sizes = dict(axes)
    names = list(axes)
    records: list[dict[str, object]] = [
        {"kind": "start", **_cost(sizes), "axes": dict(sizes), "architecture": _architecture(sizes)}
    ]
    spent = 0.0
    for epoch in range(1, epochs + 1):
        for at in (1, 2):
            chosen = draw.sample(names, k=max(1, len(names) // 3))
            grows = at == 1 if setting == "constant" else setting == "growing"
            grows = not grows if draw.random() < 0.15 else grows
            if epoch > 0.75 * epochs or draw.random() < 0.4:
                continue
            before, cost = dict(sizes), _cost(sizes)
            for name in chosen:
                sizes[name] = max(2, round(sizes[name] * (1.12 if grows else 0.87)))
            loss = 0.05 + 2 * math.exp(-epoch / 6)
            records.append(
                {
                    "kind": "event",
                    "step": (epoch - 1) * STEPS + at * STEPS // 2,
                    "epoch": epoch,
                    "method": "gradmax" if grows else "polarization",
                    "action": "grow" if grows else "prune",
                    "axes": {name: [before[name], sizes[name]] for name in chosen},
                    "parameters": [cost["parameters"], _cost(sizes)["parameters"]],
                    "flops": [cost["flops"], _cost(sizes)["flops"]],
                    "loss": [loss, loss if grows else loss * 1.04],
                    "contract": "exact" if grows else "changing",
                    "training_flops": spent + at / 2 * _cost(sizes)["flops"] * STEPS * 3 * 32,
                    "seconds": 1.7 * epoch,
                }
            )
        spent += _cost(sizes)["flops"] * STEPS * 3 * 32
        records.append({"kind": "epoch", **_learned(draw, epoch, epochs, 0.0), **_cost(sizes), "axes": dict(sizes)})
        records[-1] |= {"training_flops": spent, "seconds": 1.9 * epoch}
    cost = _cost(sizes)
    if twin:
        for epoch in range(1, epochs + 1):
            records.append({"kind": "static_epoch", **_learned(draw, epoch, epochs, -0.011), **cost})
            records[-1] |= {"training_flops": spent * epoch / epochs, "seconds": 1.1 * epoch}
    static = {"test_accuracy": 0.9722, "test_loss": 0.1034, **cost, "training_flops": spent} if twin else None
    result = {"test_accuracy": 0.9861, "test_loss": 0.0521, **cost, "training_flops": spent, "seconds": 61.4}
    records.append({"kind": "end", **result, "axes": sizes, "architecture": _architecture(sizes), "static": static})
    return records


def _cost(sizes: dict[str, int]) -> dict[str, int]:
    widths = [64, *sizes.values(), 10]
    parameters = sum(a * b + b for a, b in pairwise(widths))
    return {"parameters": parameters, "flops": 2 * parameters}


def _architecture(sizes: dict[str, int]) -> list[dict[str, object]]:
    widths = [64, *sizes.values(), 10]
    return [
        {"module": name, "type": "Linear", "shape": f"{a} → {b}", "parameters": a * b + b}
        for name, a, b in zip([*sizes, "head"], widths, widths[1:], strict=False)
    ]


def _learned(draw: random.Random, epoch: int, epochs: int, offset: float) -> dict[str, object]:
    def noise() -> float:
        return draw.uniform(-0.004, 0.004)

    error = 0.7 * math.exp(-epoch / 1.3) + 0.3 * math.exp(-6 * epoch / epochs)
    return {
        "epoch": epoch,
        "step": epoch * STEPS,
        "train_loss": 0.008 + 2.2 * error * (1 + 6 * noise()),
        "train_accuracy": min(1.0, 0.998 - 0.8 * error + noise() / 3),
        "val_loss": 0.05 - offset * 3 + 2.1 * error * (1 + 12 * noise()),
        "val_accuracy": 0.985 + offset - 0.75 * error + noise(),
        "learning_rate": 1e-3,
    }


def sample_config() -> dict[str, object]:
    return {
        "task": "digits",
        "model": "mlp",
        "grow": "gradmax",
        "prune": "polarization",
        "setting": "growing",
        "epochs": 30,
        "seed": 0,
        "device": "cpu",
        "command": ["espalier", "run", "digits", "--model", "mlp", "--out", "my runs/first"],
        "limits": {"fc1": [8, 256]},
        "espalier_version": "0.1.0",
        "torch_version": "2.13.0",
        "machine": "x86_64, 2 cores",
    }


def write_folder(folder: Path, records: list[dict[str, object]], tail: str = "") -> Path:
    """A run folder as `espalier run` leaves it; `tail` is raw text after the last line."""
    (folder / "config.json").write_text(json.dumps(sample_config()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return folder


def masked_records(dynamic: bool) -> list[dict[str, object]]:
    """A made-up run with masks on two parameters: one event each ten steps, of growing too where it is dynamic."""
    every = {"fc1.weight": 1000, "head.weight": 100}
    live, records = dict(every), [{"kind": "start", "parameters": 1111, "flops": 2222, "axes": {}, "weights": {}}]

    def event(step: int, action: str, goal: dict[str, int]) -> None:
        masks = {name: [live[name], count] for name, count in goal.items()}
        live.update(goal)
        event = {"kind": "event", "step": step, "epoch": 1, "method": "m", "action": action, "axes": {}}
        weights = {name: [live[name], every[name]] for name in live}
        records.append({**event, "masks": masks, "weights": weights, "contract": "changing"})

    for at, part in enumerate((0.5, 0.2, 0.1), start=1):
        goal = {"fc1.weight": round(900 * part), "head.weight": round(100 * part)}
        if dynamic:
            event(10 * at, "prune", {"fc1.weight": 60, "head.weight": 5})
            goal = {"fc1.weight": 100, "head.weight": 10}
        event(10 * at, "grow" if dynamic else "prune", goal)
    records.append({"kind": "epoch", "epoch": 1, "step": 50, "axes": {}, "weights": records[-1]["weights"]})
    return records


FEW = {"fc1": 32, "fc2": 24, "fc3": 16}
MANY = {f"encoder.layer.{at}.{name}": 16 + 8 * (at % 5) for at in range(20) for name in ("q", "v", "up", "down")}


def render(folder: Path, records: list[dict[str, object]], tail: str = "") -> Page:
    return Page(write_report(write_folder(folder, records, tail)))


def events_of(records: list[dict[str, object]]) -> list[dict[str, object]]:
    return [record for record in records if record["kind"] == "event"]


RUNS = {
    "few axes": lambda: sample_records(FEW),
    "many axes": lambda: sample_records(MANY, setting="constant"),
    "shrinking, no twin": lambda: sample_records({"fc1": 128, "fc2": 64}, setting="shrinking", twin=False),
    "one epoch": lambda: sample_records(FEW, epochs=1),
    "nothing but the start": lambda: sample_records(FEW)[:1],
    "nothing but the end": lambda: sample_records(FEW)[-1:],
    "no events": lambda: [record for record in sample_records(FEW) if record["kind"] != "event"],
    "masks": lambda: masked_records(dynamic=False),
    "masks that move": lambda: masked_records(dynamic=True),
    "gates": lambda: gated_records({"fc1": 32, "fc2": 16}),
    "gates of a large network": lambda: gated_records({f"layer{at}": 256 for at in range(30)}, planar=False),
    "bare records": lambda: [{"kind": kind} for kind in ("start", "event", "epoch", "static_epoch", "end")],
}


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS.keys())
def test_page_is_complete_well_formed_and_self_contained(tmp_path: Path, make) -> None:
    page = render(tmp_path, make())
    headings = ("Learning", "Size and cost", "Width of every axis", "Architecture", "Events", "Configuration")
    assert [heading for heading in headings if heading not in page.words()] == []
    loads = {"src", "href", "srcset", "action", "data", "xlink:href"}
    assert [attrs for _, attrs in page.elements if loads & set(attrs)] == []
    assert not {"link", "img", "iframe", "object", "embed", "base", "use"} & {tag for tag, _ in page.elements}
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert "//" not in page.source  # no address of any kind


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS.keys())
def test_every_event_is_marked_in_both_cost_plots_and_listed(tmp_path: Path, make) -> None:
    records = make()
    page = render(tmp_path, records)
    plots = 2 if len(records) > 1 and any("parameters" in record for record in records) else 0
    for action in ("grow", "prune"):
        expected = sum(event.get("action") == action for event in events_of(records))
        assert len(page.classed("event", action)) == plots * expected
        assert len(page.classed("act", action)) == expected
    assert page.source.count("contract: ") >= plots * len(events_of(records))


def test_figures_stand_on_the_page(tmp_path: Path) -> None:
    records = sample_records(FEW)
    end = records[-1]
    words = render(tmp_path, records).words()
    assert "98.61%" in words
    assert "97.22%" in words
    assert "1.39 points above a static network" in words
    assert "1 min 01 s" in words
    assert "espalier run digits --model mlp --out 'my runs/first'" in words
    assert "2.13.0" in words
    for name, size in end["axes"].items():
        assert f"{name} {FEW[name]} → {size}" in words
    for row in end["architecture"]:
        assert row["shape"] in words
        assert f"{row['parameters']:,}" in words


def test_lines_run_through_their_values(tmp_path: Path) -> None:
    accuracies = [0.5, 0.75, 1.0]
    records = [
        {"kind": "epoch", "epoch": at + 1, "step": 10 * (at + 1), "val_accuracy": accuracy}
        for at, accuracy in enumerate(accuracies)
    ]
    (path,) = [attrs["d"] for attrs in render(tmp_path, records).classed("line", "val")]
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, point.split(","))) for point in re.split("[ML]", path)[1:]]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y0 > y1 + 50


def test_a_steep_beginning_does_not_flatten_the_rest(tmp_path: Path) -> None:
    accuracies = [0.1, 0.5] + [0.96 + 0.001 * at for at in range(38)]
    records = [
        {"kind": "epoch", "epoch": at + 1, "step": at + 1, "training_flops": at, "val_accuracy": accuracy}
        for at, accuracy in enumerate(accuracies)
    ]
    page = render(tmp_path, records)
    heights = [float(y) for _, y in re.findall(r"([\d.]+),(-?[\d.]+)", page.classed("line", "val")[0]["d"])]
    assert max(heights[5:]) - min(heights[5:]) > 100
    assert heights[0] > 270  # below the drawing, where the inner svg cuts it off
    assert page.words().count("The first values lie outside of the plot.") == 2
    assert "outside of the plot" not in render(tmp_path, records[2:]).words()


def test_no_tick_is_above_all_that_can_be(tmp_path: Path) -> None:
    for values in ((1.0, 1.0, 1.0), (0.97, 1.0, 0.99), (0.0, 0.0, 0.0), (1.0, 0.0, 0.5)):
        records = [{"kind": "epoch", "epoch": at, "step": at, "val_accuracy": one} for at, one in enumerate(values)]
        source = render(tmp_path, records).source
        chart = source[source.index('aria-label="Accuracy;') :]
        ticks = [float(one) for one in re.findall(r'text-anchor="end">(-?[\d.]+)%', chart[: chart.index("</figure>")])]
        assert len(ticks) >= 3
        assert max(ticks) <= 100
        assert min(ticks) <= 100 * min(values)
        assert max(ticks) >= 100 * max(values)


def test_a_static_network_of_many_epochs_leaves_room_for_ours(tmp_path: Path) -> None:
    ours = [{"kind": "epoch", "epoch": at, "step": at, "val_accuracy": 0.5} for at in range(1, 11)]
    theirs = [{"kind": "static_epoch", "epoch": at, "step": at, "val_accuracy": 0.6} for at in range(1, 81)]
    page = render(tmp_path, [*ours, *theirs])
    line, twin = page.classed("line", "val")[0]["d"], page.classed("line", "twin")[0]["d"]
    assert max(re.findall(r"([\d.]+),", line), key=float) == max(re.findall(r"([\d.]+),", twin), key=float)
    assert page.words().count("The static network trained on to epoch 80.") == 2
    assert "trained on" not in render(tmp_path, [*ours, *theirs[:10]]).words()


def test_a_long_line_keeps_its_highest_and_lowest_values(tmp_path: Path) -> None:
    draw = random.Random(0)
    accuracies = [0.5 + 0.01 * draw.random() for _ in range(5000)]
    accuracies[2345], accuracies[3456] = 1.0, 0.0
    records = [{"kind": "epoch", "epoch": at, "step": at, "val_accuracy": one} for at, one in enumerate(accuracies)]
    path = render(tmp_path, records).classed("line", "val")[0]["d"]
    places = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+),(-?[\d.]+)", path)]
    assert 500 < len(places) < 1100
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    heights = [y for _, y in places]
    assert max(heights) - min(heights) == HEIGHT - TOP - BOTTOM  # the whole plot, by the two outliers
    assert sum(abs(y - sorted(heights)[len(heights) // 2]) > 50 for y in heights) == 2


def test_sparsity_by_parameter_and_over_time(tmp_path: Path) -> None:
    page = render(tmp_path, masked_records(dynamic=False))
    assert "Masks hold 90.9% of 1,100 weights at zero, in 2 parameters." in page.words()
    for row in ("fc1.weight 1,000 90 91.0%", "head.weight 100 10 90.0%", "all of them 1,100 100 90.9%"):
        assert row in page.words()
    assert "just as many, 90.9% masked" in page.words()
    assert "fc1.weight 1,000 → 450 live" in page.words()
    strips = page.source[page.source.index("width of fc1.weight over time") :]
    first, rest = strips[: strips.index("</svg>")], strips[strips.index("width of head.weight over time") :]
    assert re.findall(r"steps (\d+) to (\d+): ([\d,]+)", first) == [
        ("0", "10", "1,000"),
        ("10", "20", "450"),
        ("20", "30", "180"),
        ("30", "50", "90"),
    ]
    assert re.findall(r": (\d+) \(", rest[: rest.index("</svg>")]) == ["100", "50", "20", "10"]
    chart = page.source[page.source.index('aria-label="Sparsity;') :]
    assert re.findall(r"held at zero: ([\d.]+%)", chart[: chart.index("</figure>")]) == [
        "0%",
        "54.55%",
        "81.82%",
        "90.91%",
        "90.91%",
    ]


def test_what_one_step_takes_and_gives_back_is_no_change_of_sparsity(tmp_path: Path) -> None:
    page = render(tmp_path, masked_records(dynamic=True))
    assert "Masks hold 90.0% of 1,100 weights at zero" in page.words()
    strip = page.source[page.source.index("width of fc1.weight over time") :]
    assert re.findall(r"steps (\d+) to (\d+): ([\d,]+)", strip[: strip.index("</svg>")]) == [
        ("0", "10", "1,000"),
        ("10", "50", "100"),
    ]
    moves = page.source[page.source.index('aria-label="Weights per event;') :]
    tips = moves[: moves.index("</figure>")]
    assert re.findall(r"masked: ([\d.k]+)", tips) == ["1.03k", "45", "45"]
    assert re.findall(r"made live: ([\d.k]+)", tips) == ["45", "45", "45"]


def test_a_parameter_without_a_mask_is_live_as_a_whole(tmp_path: Path) -> None:
    records = [
        {"kind": "start", "axes": {}, "weights": {}},
        {"kind": "epoch", "epoch": 1, "step": 10, "weights": {"a": [25, 100]}},
        {"kind": "epoch", "epoch": 2, "step": 20, "weights": {"a": [25, 100], "b": [40, 300]}},
        {"kind": "epoch", "epoch": 3, "step": 30, "weights": {"b": [40, 300], "": ["?", 3], "c": [5, 4], "d": 1}},
    ]
    page = render(tmp_path, records)
    assert "Masks hold 65.0% of 400 weights at zero, in 2 parameters." in page.words()
    assert "a 100 100 0.0%" in page.words()
    assert "b 300 40 86.7%" in page.words()
    chart = page.source[page.source.index('aria-label="Sparsity;') :]
    found = re.findall(r"held at zero: ([\d.]+%)", chart[: chart.index("</figure>")])
    assert found == ["0%", "18.75%", "83.75%", "65%"]


def test_without_masks_nothing_is_said_of_sparsity(tmp_path: Path) -> None:
    words = render(tmp_path, sample_records(FEW)).words()
    assert "Sparsity" not in words
    assert "masked" not in words


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 14, 15, 28, 77])
def test_epoch_labels_are_whole_and_evenly_spaced(tmp_path: Path, epochs: int) -> None:
    records = [{"kind": "epoch", "epoch": at + 1, "step": at + 1, "val_accuracy": 0.5} for at in range(epochs)]
    source = render(tmp_path, records).source
    labels = re.findall(r'y="244" text-anchor="middle">([\d,.]+)<', source[: source.index("over training FLOPs")])
    ticks = [int(label) for label in labels]
    assert len(ticks) >= min(epochs, 2)
    assert len({b - a for a, b in pairwise(ticks)}) <= 1


def test_names_from_files_cannot_become_markup(tmp_path: Path) -> None:
    evil = "\" onload='alert(3)' ' onfocus=alert(4) </title></style></script><script>alert(1)</script>"
    evil += "<img src=x onerror='alert(2)'>&amp;"
    axes = {evil: 4}
    cost = {"parameters": 10, "flops": 20}
    module = {"module": evil, "type": evil, "shape": evil, "parameters": evil}
    records = [
        {"kind": "start", **cost, "axes": axes, "architecture": [module]},
        {
            "kind": "event",
            "step": 1,
            **dict.fromkeys(("epoch", "method", "action", "contract"), evil),
            "loss": [evil, 1],
        },
        {"kind": "event", "step": evil, "action": "grow", "axes": {evil: [4, 6]}, "parameters": [evil, evil]},
        {"kind": "event", "step": 2, "action": "grow", "axes": {evil + str(at): [evil, 6] for at in range(9)}},
        {"kind": "epoch", "epoch": 1, "val_accuracy": 0.5, "val_loss": evil, "axes": {evil: 7, evil + "b": evil}},
        {"kind": "end", "test_accuracy": evil, "static": {"test_loss": evil}, "architecture": [module]},
    ]
    write_folder(tmp_path, records)
    config = dict.fromkeys(("task", "model", "grow", "prune", "seed", "command", "device", evil), evil)
    (tmp_path / "config.json").write_text(json.dumps({**config, "nested": {evil: [evil]}}))
    page = Page(write_report(tmp_path))
    assert [tag for tag, _ in page.elements if tag in ("script", "img")] == ["script"]
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert len(page.scripts) == 1
    assert "alert" not in page.scripts[0]
    assert "alert(1)" in page.words()


def test_only_the_pages_own_script_may_run(tmp_path: Path) -> None:
    page = render(tmp_path, sample_records(FEW))
    (policy,) = [attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    digest = b64encode(sha256(page.scripts[0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_a_run_that_has_not_ended_says_so(tmp_path: Path) -> None:
    records = [record for record in sample_records(FEW) if record["kind"] not in ("end", "static_epoch")]
    page = render(tmp_path, records)
    assert "This run has not ended" in page.words()
    assert "Validation accuracy so far" in page.words()
    assert "Test accuracy" not in page.words()
    assert "has not ended" not in render(tmp_path, sample_records(FEW)).words()


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    records = sample_records(FEW)[:8]
    whole_page = render(tmp_path, records[:7])
    lines = [json.dumps(record) for record in records]
    for length in (1, len(lines[7]) // 2, len(lines[7]) - 1):
        page = render(tmp_path, records[:7], tail=lines[7][:length])
        assert "The last line of metrics.jsonl was cut short" in page.words()
        assert page.classed("line") == whole_page.classed("line")
    assert "cut short" not in whole_page.words()


def test_other_lines_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in sample_records(FEW)]
    lines[1:1] = ["{broken", "[1]", "[" * 100_000, '{"kind": "later version"}', '{"kind": ["epoch"]}']
    write_folder(tmp_path, [], tail="\n".join(lines))
    words = Page(write_report(tmp_path)).words()
    assert "Lines of metrics.jsonl that cannot be read and are left out: 2, 3, 4." in words
    assert "2 records of a kind that this version does not know are left out." in words


BAD_NUMBERS = ["NaN", "Infinity", "-Infinity", '"nan"', '"inf"', "null", "1e400", "1" + "0" * 400, "true", "[]", "{}"]


@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=lambda text: text[:9])
def test_values_that_are_not_finite_leave_gaps_and_break_nothing(tmp_path: Path, bad: str) -> None:
    records = sample_records(FEW)
    keys = ("train_loss", "val_accuracy", "parameters", "flops", "training_flops", "seconds", "step")
    hurt = [{**record, **dict.fromkeys(keys, "BAD")} if at % 7 == 3 else record for at, record in enumerate(records)]
    hurt[-1] = {**hurt[-1], "test_loss": "BAD", "seconds": "BAD"}
    event = events_of(hurt)[0]
    event["loss"], event["axes"] = ["BAD", "BAD"], {"fc1": ["BAD", 12]}
    write_folder(tmp_path, [])
    text = "\n".join(json.dumps(record) for record in hurt).replace('"BAD"', bad)
    (tmp_path / "metrics.jsonl").write_text(text)
    page = Page(write_report(tmp_path))
    drawn = [attrs[key] for _, attrs in page.elements for key in attrs if key in GEOMETRY]
    assert [value for value in drawn if re.search("nan|inf|none|e[+]", value.lower())] == []
    assert len(page.classed("line", "val")) > len(render(tmp_path, records).classed("line", "val"))
    assert "leave a gap" in page.words()


GEOMETRY = {"d", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "transform", "style"}


@pytest.mark.parametrize(
    "values",
    [(5e-324, 5e-324), (0.0, 5e-324), (-8e89, 8e89), (1e16, 1e16 + 2), (1e-200, 1.0), (-3.0, -3.0), (0.0, 0.0)],
    ids=str,
)
def test_extreme_values_are_drawn_inside_the_plot(tmp_path: Path, values: tuple[float, float]) -> None:
    records = [
        {"kind": "epoch", "epoch": at, "step": at, "training_flops": value, "val_loss": value, "parameters": value}
        for at, value in enumerate(values)
    ]
    for attrs in render(tmp_path, records).classed("line", "val"):
        places = [float(number) for number in re.findall(r"-?[\d.]+", attrs["d"])]
        assert min(places) >= 0
        assert max(places) <= 560


def test_axes_and_modules_that_come_and_go(tmp_path: Path) -> None:
    first, last = {"a": 4, "gone": 8}, {"a": 4, "new": 6}
    records = [
        {"kind": "start", "axes": first, "architecture": [{"module": name} for name in ("a", "gone", "head")]},
        {"kind": "epoch", "epoch": 1, "step": 10, "axes": first},
        {"kind": "epoch", "epoch": 2, "step": 20, "axes": last},
        {"kind": "end", "axes": last, "architecture": [{"module": name} for name in ("a", "new", "head")]},
    ]
    page = render(tmp_path, records)
    assert "gone 8 → 0" in page.words()
    assert "new 0 → 6" in page.words()
    assert "1 axis that never changed a 4" in page.words()
    body = page.source[page.source.index("<h2>Architecture") : page.source.index("<h2>Events")]
    assert re.findall("<td><code>(.*?)</code>", body) == ["a", "gone", "new", "head"]
    runs = [attrs for tag, attrs in page.elements if tag == "rect" and "fill-opacity" in attrs]
    assert [attrs["class"] for attrs in runs] == ["even", "prune", "even", "grow"]
    assert [float(attrs["x"]) for attrs in runs] == [0, 1000, 0, 1000]


def test_axes_that_come_and_go_in_a_short_while_are_seen(tmp_path: Path) -> None:
    def event(step: int, layers: list[str], widths: dict[str, int]) -> dict[str, object]:
        return {"kind": "event", "step": step, "action": "grow", "axes": {}, "layers": layers, "widths": widths}

    records = [
        {"kind": "start", "axes": {"a": 4}},
        event(4001, ["insert copy(source=a, seed=77) after a"], {"a": 4, "b": 16}),
        event(4004, ["remove b"], {"a": 4}),
        {"kind": "epoch", "epoch": 1, "step": 9999, "axes": {"a": 4}},
    ]
    page = render(tmp_path, records)
    assert "b 0 → 16 → 0" in page.words()
    assert "insert copy(source=a) after a" in page.words()
    strip = page.source[page.source.index("width of b over time") :]
    assert re.findall(r"steps ([\d,]+) to ([\d,]+): (\d+)", strip[: strip.index("</svg>")]) == [
        ("0", "4,001", "0"),
        ("4,001", "4,004", "16"),
        ("4,004", "9,999", "0"),
    ]


def test_a_strip_of_many_changes_has_few_pieces(tmp_path: Path) -> None:
    records = [{"kind": "epoch", "epoch": at, "step": at, "axes": {"a": 4 + at % 7}} for at in range(3000)]
    strip = render(tmp_path, records).source.split("width of a over time")[1]
    assert 100 < strip[: strip.index("</svg>")].count("<rect") <= 161


def test_text_that_utf8_cannot_hold_is_replaced(tmp_path: Path) -> None:
    words = render(tmp_path, [{"kind": "start", "axes": {"lone \ud800 surrogate": 3}}]).words()
    assert "lone ? surrogate" in words


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    write_folder(tmp_path, [])
    (tmp_path / "metrics.jsonl").write_bytes('{"kind": "start", "axes": {"one\u2028name": 4}}\n'.encode())
    assert "1 axis that never changed one name 4" in Page(write_report(tmp_path)).words()


def test_a_long_run_makes_a_page_of_ordinary_size(tmp_path: Path) -> None:
    records = sample_records(FEW, epochs=3000)
    page = write_report(write_folder(tmp_path, [record for record in records if record["kind"] != "event"]))
    assert page.stat().st_size < 2_000_000
    assert (tmp_path / "metrics.jsonl").stat().st_size > page.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json: expected a file written by a run"),
        ("metrics.jsonl", None, "metrics.jsonl: expected a file written by a run"),
        ("config.json", "{", "not JSON"),
        ("config.json", "[1, 2]", "expected a JSON object .* found list"),
        ("metrics.jsonl", "", "found 0 lines and none of these"),
        ("metrics.jsonl", '{"kind": "sta', "found 1 lines and none of these"),
    ],
)
def test_a_folder_without_a_run_is_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    write_folder(tmp_path, sample_records(FEW))
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
