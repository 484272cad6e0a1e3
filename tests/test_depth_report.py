"""Depth over time in the report of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

from espalier.bench.records import read_run
from espalier.bench.report import write_report
from espalier.bench.report_depth import depths_of

EVENT = {"kind": "event", "epoch": 1, "method": "autogrow", "axes": {}, "masks": {}, "parameters": [10, 20]}


def folder(path: Path, *, depth: bool) -> Path:
    counts = [{"layer1": 1, "layer2": 2}, {"layer1": 2, "layer2": 2}, {"layer2": 2}]
    records = [
        {"kind": "start", "parameters": 10, "flops": 5, "axes": {"a": 4}},
        {**EVENT, "step": 3, "action": "grow", "layers": ["insert <b>copy</b> after layer1.0"]},
        {**EVENT, "step": 7, "action": "prune", "layers": ["remove layer1.0", "remove layer1.1"]},
    ]
    if depth:
        records = [{**record, "depth": one} for record, one in zip(records, counts, strict=True)]
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"task": "digits"}))
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    return path


def test_every_stage_has_its_history(tmp_path: Path) -> None:
    run = read_run(folder(tmp_path / "run", depth=True))
    assert depths_of(run) == {"layer1": [(0.0, 1.0), (3.0, 2.0), (7.0, 0.0)], "layer2": [(0.0, 2.0)]}


def test_the_page_says_what_came_and_went(tmp_path: Path) -> None:
    page = write_report(folder(tmp_path / "run", depth=True)).read_text()
    assert "Depth</h2>" in page
    assert "3 layers or cells at the start, 2 at the end, in 2 stages" in page
    assert "insert &lt;b&gt;copy&lt;/b&gt; after layer1.0" in page
    assert "<b>copy</b>" not in page
    assert "an axis goes by the name that it has at each time" in page


def test_counts_of_layers_have_ticks_at_whole_numbers(tmp_path: Path) -> None:
    page = write_report(folder(tmp_path / "run", depth=True)).read_text()
    for name in ("Layers and cells;", "Layers and cells per event;"):
        chart = page[page.index(f'aria-label="{name}') :]
        ticks = re.findall(r'text-anchor="end">(.*?)<', chart[: chart.index("</figure>")])
        assert len(ticks) == len(set(ticks)) >= 3
        assert ticks == [str(at) for at in range(int(ticks[0]), int(ticks[-1]) + 1)]


def test_runs_without_layers_have_no_such_section(tmp_path: Path) -> None:
    assert "Depth</h2>" not in write_report(folder(tmp_path / "run", depth=False)).read_text()
