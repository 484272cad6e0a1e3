"""Branches in processes."""

from pathlib import Path

from espalier.evolve.processes import Processes


def work(job: int, folder: Path, threads: int) -> int:
    return job + 1


if __name__ == "__main__":
    with Processes(2) as runner:
        assert len(list(runner.run([1, 2], Path(), work))) == 2
