"""The Python blocks of the pages in `docs` that say so run as they stand, one after the other, and do what they say."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from run_code import run_code

DOCS = Path(__file__).parent.parent / "docs"


def run_blocks(page: Path) -> dict[str, object]:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    return run_code(blocks, page, page.stem)


def test_schedules() -> None:
    scope = run_blocks(DOCS / "schedules.md")
    session = scope["session"]
    assert {"grow", "prune", "rejected"} <= {event.action for event in session.events}  # type: ignore[attr-defined]


def test_evolve(capsys: pytest.CaptureFixture[str]) -> None:
    scope = run_blocks(DOCS / "evolve.md")
    assert {"cycle", "branch", "won", "end"} <= {one["kind"] for one in scope["records"]}  # type: ignore[attr-defined]
    assert "training FLOPs" in capsys.readouterr().out


def test_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = run_blocks(DOCS / "layers.md")
    structure = scope["structure"]
    assert len(structure.history) == 11  # type: ignore[attr-defined]


def test_distributed() -> None:
    try:
        scope = run_blocks(DOCS / "distributed.md")
    finally:
        torch.distributed.destroy_process_group()
    assert len(scope["session"].events) >= 2  # type: ignore[attr-defined]


def test_compile() -> None:
    scope = run_blocks(DOCS / "compile.md")
    assert scope["session"].steps_done == 20  # type: ignore[attr-defined]
    torch.compiler.reset()


def test_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(DOCS / "export.md")
    assert "pruned and grown" in capsys.readouterr().out
    assert {"exported", "network.pt2"} <= {one.name for one in tmp_path.iterdir()}


def test_recommend() -> None:
    scope = run_blocks(DOCS / "recommend.md")
    found = scope["found"]
    assert len(found) >= 1  # type: ignore[arg-type]


def test_huggingface(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    run_blocks(DOCS / "huggingface.md")
    said = capsys.readouterr().out
    assert "model.layers.1.mlp.gate_proj: the model has weight (23, 12) for (24, 12)" in said


def test_grow(capsys: pytest.CaptureFixture[str]) -> None:
    scope = run_blocks(DOCS / "grow.md")
    assert scope["structure"].axes["0"].size > 4  # type: ignore[attr-defined]
    assert float(scope["accuracy"]) > 0.9  # type: ignore[arg-type]


def test_constant_budget() -> None:
    scope = run_blocks(DOCS / "constant_budget.md")
    assert len(scope["session"].structure.masks) == 3  # type: ignore[attr-defined]


def test_shrink_llm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    scope = run_blocks(DOCS / "shrink_llm.md")
    assert "wanda-units (prune)" in capsys.readouterr().out
    assert scope["perplexity"](scope["again"]) < 2 * scope["before"]  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore")  # of the trainers themselves
def test_trainers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    pytest.importorskip("accelerate")
    monkeypatch.setattr(warnings, "simplefilter", lambda _: None)
    scope = run_blocks(DOCS / "trainers.md")
    assert {"grow", "prune"} <= {event.action for event in scope["growing"].session.events}  # type: ignore[attr-defined]
    assert "espalier/widths" in capsys.readouterr().out


def test_the_site_shows_every_page() -> None:
    def pages(entries: list[object]) -> list[str]:
        inner = [one if isinstance(one, str) else next(iter(one.values())) for one in entries]  # type: ignore[attr-defined]
        return [page for one in inner for page in (pages(one) if isinstance(one, list) else [one])]

    shown = pages(yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text())["nav"])
    made = {"index.md", "changelog.md", "reference/index.md"}
    made |= {f"notebooks/{path.stem}.md" for path in (DOCS.parent / "notebooks").glob("*.ipynb")}
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} | made
    assert set(shown) == there
    assert len(shown) == len(set(shown))


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\s-]", "", re.sub(r"`|\[|\]\([^)]*\)", "", heading)).strip().lower().replace(" ", "-")


def test_headings_that_the_pages_name_exist() -> None:
    for page in sorted(DOCS.rglob("*.md")):
        for target, anchor in re.findall(r"\]\(([\w./-]*\.md)?#([^)]*)\)", page.read_text()):
            other = page.parent / target if target else page
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            assert anchor in {slug(one) for one in headings}, f"{page.name}: {target}#{anchor}"


def test_files_that_the_pages_name_exist() -> None:
    for page in sorted(DOCS.rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+\.\w+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_shrink() -> None:
    scope = run_blocks(DOCS / "shrink.md")
    found = scope["found"]
    assert found.outcome == "reached"  # type: ignore[attr-defined]
    assert found.rounds[-1].parameters <= 0.5 * found.rounds[0].parameters  # type: ignore[attr-defined]
