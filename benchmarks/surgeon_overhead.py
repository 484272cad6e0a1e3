"""What a search spends its time on besides training: by part, in one process.

    python -m benchmarks.surgeon_overhead mnist --epochs 3

Times are those of the processor (`time.process_time`) with one thread, so that other load is not in them.
Each part is counted without those that it calls. What the search is charged for (scoring of branches on held-out data)
is a part of its own; watching the curve for the report is in it too.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.surgeon_options import asked_for
from espalier.evolve import job, ledger, proposals, runners, store, surgeon
from espalier.evolve.surgeon import Search
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
    total, clock = options.total, Clock()
    for part, places in PARTS.items():
        for owner, name in places:
            setattr(owner, name, clock.around(part, getattr(owner, name)))
    with tempfile.TemporaryDirectory() as folder:
        end = Search(options.problem, options.surgeon, total, Path(folder)).run()
    spent = sum(clock.seconds.values())
    rows = [(part, f"{seconds:.2f}", f"{seconds / spent:.1%}") for part, seconds in clock.seconds.items()]
    print(f"{options.problem}, {options.epochs} epochs, {end['parameters']} parameters in the end")
    print("\n".join(text_table(("part", "seconds of the processor", "share"), rows, right=(1, 2))))
    besides = spent - clock.seconds["training"] - clock.seconds["scoring on held-out data"]
    print(f"besides training and scoring: {besides / spent:.1%}")


if __name__ == "__main__":
    main()
