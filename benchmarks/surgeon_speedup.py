"""What a second process is worth to a search: seconds with one and with two, one thread each, on two idle cores.

    python -m benchmarks.surgeon_speedup digits

Prints both for `espalier evolve` as it is used, with the start trained alone beside the search, and for the search by
itself, whose single network keeps only one process busy between cycles. The last lines are rows of
docs/results/surgeon_cost.md.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

from benchmarks.paired import origin
from benchmarks.surgeon_options import asked_for
from espalier.bench.evolve import EvolveOptions, evolve
from espalier.bench.search_progress import SearchLines


def seconds(options: EvolveOptions, workers: int) -> float:
    """That a search takes with so many processes; in a process of its own even if it is one."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        evolve(options, Path(folder) / "search", SearchLines(StringIO()), workers)
        return time.perf_counter() - began


def main() -> None:
    options = asked_for(__doc__.splitlines()[0])
    print(f"{options.problem}, {options.epochs} epochs; load before: {os.getloadavg()[0]:.1f}")
    rows = []
    for name, baseline in (("with the start beside it", True), ("the search alone", False)):
        one, two = (seconds(replace(options, baseline=baseline), workers) for workers in (1, 2))
        what = f"{options.problem.source}, {options.problem.model}, {options.epochs} epochs, {name}"
        rows.append((what, f"{one:.1f}", f"{two:.1f}", f"{one / two:.2f}", origin()["commit"]))
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
