"""A cell of the Surgeon: what a search, all branches charged, makes of the static network that it begins with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from espalier.bench.folder import finite
from espalier.bench.search_records import SURGEON
from espalier.bench.task_problem import workbench
from espalier.evolve.problem import Workbench
from espalier.evolve.proposals import Proposer, RandomMoves
from espalier.evolve.recommended import Recommended
from espalier.evolve.runners import InProcess
from espalier.evolve.store import Store
from espalier.evolve.surgeon import Search, Surgeon
from espalier.suite import machine
from espalier.suite.preparing import Prepared, prepare
from espalier.suite.suite import Cell
from espalier.suite.watching import area
from espalier.train.checkpoint import load

Record = dict[str, Any]
_PROPOSERS: Mapping[str, Proposer] = MappingProxyType({"recommended": Recommended(), "random": RandomMoves()})


@dataclass(frozen=True)
class CellProblem:
    """The static network of a cell's size, on the cell's data."""

    cell: Cell
    device: str

    def workbench(self) -> Workbench:
        """A fresh one. Raises DataError as `prepare`."""
        prepared = prepare(self.cell, self.device)
        return workbench(prepared.scaled(self.cell.point), prepared.data, prepared.row, self.cell.seed)


def surgeon_of(cell: Cell) -> Surgeon:
    """How the cell's search goes about it."""
    return Surgeon(_PROPOSERS[cell.contender.proposals], cycles=cell.contender.cycles, watched=True)


def searched(prepared: Prepared, device: str, path: Path) -> tuple[Record, nn.Module, float]:
    """Search for the cell's budget of training FLOPs; leaves ``surgeon.jsonl`` in the folder.

    Returns: the result, the network that was found, and seconds without looks.

    Raises:
        RunError: the search cannot go on.
    """
    cell, clock = prepared.cell, machine.clock(device)
    total = round(prepared.large_training_flops * cell.scale)
    problem, records, began = CellProblem(cell, device), list[Mapping[str, Any]](), clock()
    end = Search(problem, surgeon_of(cell), total, path, InProcess(), records.append).run()
    seconds = clock() - began
    (path / SURGEON).write_text("".join(json.dumps(finite(one)) + "\n" for one in records), encoding="utf-8")
    structure = load(Store(path / "store").path(str(end["network"])), prepared.scaled(cell.point), prepared.example)
    axes = {name: axis.size for name, axis in structure.axes.items() if axis.reason is None}
    curve = [
        {
            "done": round(one["total_spent"] / total, 4),
            "training_flops": float(f"{one['total_spent']:.5g}"),
            "parameters": one["parameters"],
            "val_loss": round(one["loss"], 5),
            "val_accuracy": round(one["accuracy"], 5),
        }
        for one in records
        if one["kind"] == "trained" and "accuracy" in one
    ]
    result = {
        "test_accuracy": end["test_accuracy"],
        "test_loss": end["test_loss"],
        "parameters": end["parameters"],
        "flops": end["flops"],
        "axes": axes,
        "weights": {},
        "depth": {},
        "training_flops": end["total_spent"],
        "steps": end["steps"],
        "nonzero": sum(int(one.count_nonzero()) for one in structure.model.parameters()),
        "curve": curve,
        "edits": [],
        "area": area(curve, total / 32, total),
        "won": [str(one["name"]) for one in records if one["kind"] == "won" and one["name"] is not None],
    }
    return result, structure.model, seconds


__all__ = ["CellProblem", "searched", "surgeon_of"]
