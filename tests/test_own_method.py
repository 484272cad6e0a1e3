"""The page about methods of one's own: its template is the example, and everything on it runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import espalier as esp
from espalier.method import find, load_methods, methods

ROOT = Path(__file__).parent.parent
PAGE, EXAMPLE = ROOT / "docs" / "own_method.md", ROOT / "examples" / "own_method.py"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def espalier(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "espalier", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_template_is_the_example_and_short():
    assert blocks()[0] == EXAMPLE.read_text()
    code = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(code) <= 30


RUN = ["run", "digits", "--prune", "redundancy", "--setting", "shrinking", "--epochs", "1", "--no-static"]


def test_the_command_line_knows_it(tmp_path):
    done = espalier(*RUN, "--methods-from", str(EXAMPLE), "--out", "mine", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "redundancy" in (tmp_path / "mine" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_the_command_line_lists_it_goes_on_with_it_and_misses_it(tmp_path):
    listed = espalier("methods", "--methods-from", str(EXAMPLE), folder=tmp_path)
    assert "prune redundancy (units): removes units that others repeat" in listed.stdout
    done = espalier(*RUN, "--methods-from", str(EXAMPLE), "--out", "mine", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    again = espalier("run", "--resume", "--out", "mine", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    unknown = espalier(*RUN, folder=tmp_path)
    assert unknown.returncode == 2
    assert "there is no prune method 'redundancy'" in unknown.stderr


def test_the_other_blocks_run():
    scope: dict[str, object] = {}
    for block in blocks()[1:]:
        exec(compile(block, str(PAGE), "exec"), scope)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    structure = esp.attach(model, torch.zeros(4, 8), optimizer=optimizer)
    lively, held_back = find("grow", "lively").make(every=esp.steps(4), start=0.1), scope["method"]
    batch = torch.randn(16, 8), torch.randint(3, (16,))
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    session = esp.Session(structure, [lively, held_back], loss=loss, total_steps=20)
    for _ in range(20):
        optimizer.zero_grad()
        session.loss(batch).backward()
        optimizer.step()
        session.step()
    grown = [event for event in session.events if event.method == "lively"]
    assert {event.action for event in grown} == {"grow"}
    assert {event.contract for event in grown} == {"exact"}
    assert structure.axes["0"].size == 18
    multiplier = session.state_dict()["methods"][1]["memory"]["value"]
    assert multiplier == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "read from a Python file whose name ends in .py; found .*mine.py"),
        ("1 +", "could not be imported: SyntaxError"),
        ("x = 1", "registers no method; put @register"),
        (EXAMPLE.read_text().replace('"redundancy"', '"magnitude"'), "there is a prune method 'magnitude' already"),
    ],
)
def test_files_that_are_none(text, message, tmp_path):
    path, before = tmp_path / "mine.py", methods()
    if text is not None:
        path.write_text(text)
    with pytest.raises(esp.EspalierError, match=message):
        load_methods(path)
    assert methods() == before
