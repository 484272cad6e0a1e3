"""What a search spends its time on besides training: by part, in one process.

    python -m benchmarks.surgeon_overhead mnist --epochs 3

Times are those of the processor (`time.process_time`) with one thread, so that other load is not in them.
Each part is counted without those that it calls. What the search is charged for (scoring of branches on held-out data)
is a part of its own; watching the curve for the report is in it too. The last line is a row of
docs/results/surgeon_cost.md.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.paired import origin
from benchmarks.surgeon_options import asked_for
from espalier.evolve import job, ledger, proposals, runners, store, surgeon
from espalier.evolve.surgeon import Record, Search
from espalier.table import text_table

PARTS = {
    "training": [(job, "take_step"), (job.Branch, "work")],  # the latter: batches and means of weights
    "scoring on held-out data": [(job, "measured"), (job, "calibrate")],
    "reading networks and checkpoints": [(job, "opened"), (proposals, "opened")],
    "surgery": [(job, "carry_out")],
    "recommendation": [(proposals.Scout, "work")],
    "writing checkpoints": [(store.Store, "put"), (store.Store, "keep_only")],
    "ledger": [(ledger.Ledger, "put"), (ledger.Ledger, "get")],
    "fresh networks and data": [(runners, "carried_out")],
    "deciding": [(surgeon.Search, "run")],
}


COLUMNS = (
    ("training",),
    ("scoring on held-out data",),
    ("recommendation",),
    ("surgery", "reading networks and checkpoints", "writing checkpoints", "fresh networks and data"),
    ("ledger", "deciding"),
)
"""Of the row."""


class Clock:
    """Seconds of each part, without those of parts that it calls."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inner = [0.0]

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - began
                self.seconds[part] += took - self._inner.pop()
                self._inner[-1] += took

        return timed


def main() -> None:
    options = asked_for(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    options.problem.workbench()  # data that are read once
    total, clock, records = options.total, Clock(), list[Record]()
    for part, places in PARTS.items():
        for owner, name in places:
            setattr(owner, name, clock.around(part, getattr(owner, name)))
    with tempfile.TemporaryDirectory() as folder:
        end = Search(options.problem, options.surgeon, total, Path(folder), on_record=records.append).run()
    spent = sum(clock.seconds.values())
    rows = [(part, f"{seconds:.2f}", f"{seconds / spent:.1%}") for part, seconds in clock.seconds.items()]
    print(f"{options.problem}, {options.epochs} epochs, {end['parameters']} parameters in the end")
    print("\n".join(text_table(("part", "seconds of the processor", "share"), rows, right=(1, 2))))
    besides = spent - clock.seconds["training"] - clock.seconds["scoring on held-out data"]
    counts = [sum(one["kind"] == kind for one in records) for kind in ("cycle", "branch")]
    parts = (sum(clock.seconds[part] for part in parts) for parts in COLUMNS)
    cells = (
        f"{options.problem.source}, {options.problem.model}, {options.epochs} epochs", *map(str, counts),
        *(f"{seconds:.1f}" for seconds in parts), f"{besides / spent:.1%}", origin()["commit"],
    )  # fmt: skip
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
