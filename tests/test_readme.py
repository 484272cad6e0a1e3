"""The README's Python examples run as they stand, one after the other, and do what they say."""

import re
import warnings
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 4
    scope: dict[str, object] = {}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in blocks:
            exec(compile(block, str(README), "exec"), scope)
    printed = capsys.readouterr().out
    assert "grow, prune" in printed
    assert "changing" in printed
    assert (tmp_path / "run").is_dir()
    session = scope["session"]
    assert {event.action for event in session.events} == {"grow", "prune"}  # type: ignore[attr-defined]


def test_the_first_example_is_short() -> None:
    first = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert first is not None
    assert len([line for line in first.group(1).splitlines() if line.strip()]) <= 15


def test_files_that_the_readme_names_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
