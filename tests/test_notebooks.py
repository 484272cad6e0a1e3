"""The notebooks run from top to bottom, as they stand, and what they assert holds."""

import json
from pathlib import Path

import pytest
from run_code import run_code

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda one: one.stem)
def test_a_notebook_runs(path: Path) -> None:
    book = json.loads(path.read_text())
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert book["nbformat"] == 4
    assert any("assert " in cell for cell in cells)
    assert all(cell["outputs"] for cell in book["cells"] if "print(" in "".join(cell["source"])), "run it before saving"
    run_code(cells, path, "__main__")


def test_there_are_notebooks() -> None:
    assert {"grow_a_network", "shrink_a_network"} <= {path.stem for path in NOTEBOOKS}
