"""Branches in processes of this machine. One that dies or hangs is replaced, and takes its own branch with it only."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from espalier.errors import RunError
from espalier.evolve.job import carried_out
from espalier.evolve.runners import Done, Work, ended

_PAUSE = 0.02


class Processes:
    """So many processes, which start with the first job and end with the ``with`` block."""

    def __init__(self, count: int, *, threads: int = 1, limit: float | None = None) -> None:
        """Start nothing yet.

        Args:
            count: processes.
            threads: of each; results depend on it in the last bits, so compare runs of the same number.
            limit: seconds after which the worker of a job is killed; None: never.

        Raises:
            RunError: a number is not above 0, or pebble is not installed.
        """
        if count < 1 or threads < 1 or (limit is not None and limit <= 0):
            raise RunError(f"expected numbers above 0, found count={count!r}, threads={threads!r}, limit={limit!r}.")
        try:
            from pebble import ProcessPool
        except ImportError as error:
            raise RunError("branches in processes need pebble: pip install 'espalier[evolve]'") from error
        self._pool: Any = ProcessPool(max_workers=count, context=multiprocessing.get_context("spawn"))
        self._threads, self._limit = threads, limit
        self._stopped = False

    def run(self, jobs: Sequence[Any], folder: Path, work: Work = carried_out) -> Iterator[Done]:
        waiting = {
            number: self._pool.schedule(work, args=(job, folder, self._threads), timeout=self._limit)
            for number, job in enumerate(jobs)
        }
        try:
            while waiting:
                for number in [one for one, future in waiting.items() if future.done()]:
                    yield number, ended(waiting.pop(number).result)
                if waiting and self._stopped:  # jobs that were running will never end
                    raise RunError("the processes were stopped")
                if waiting:
                    time.sleep(_PAUSE)
        finally:
            for future in waiting.values():
                future.cancel()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._pool.close()
        else:
            self._stopped = True
            self._pool.stop()
        self._pool.join()


__all__ = ["Processes"]
