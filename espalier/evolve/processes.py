"""Branches in processes of this machine. One that dies or hangs is replaced, and takes its own branch with it only.

A process that imports PyTorch and this package is busy for seconds before it can do anything. So where nothing speaks
against it, all are forked off one process that has done that, and nothing else, so that no threads run in it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, wait
from contextlib import suppress
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import torch

from espalier.errors import RunError
from espalier.evolve.job import carried_out
from espalier.evolve.runners import Done, Work, ended

_LOOK = 0.2
"""Seconds after which a stop of the processes is seen at the latest."""
_IN_VAIN = 3
"""Pools that break before a job has ended, after which there is no other one."""
_NEEDED = ("__main__", "espalier.evolve.surgeon", "espalier.methods", "torch._dynamo")
"""Modules that every worker needs; the last one is imported by every optimizer when it is made."""


class Processes:
    """So many processes, which end with the ``with`` block."""

    def __init__(
        self,
        count: int,
        *,
        threads: int = 1,
        limit: float | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        """Start nothing yet, unless there is something to prepare.

        Args:
            count: processes.
            threads: of each; results depend on it in the last bits, so compare runs of the same number.
            limit: seconds after which the worker of a job is killed; None: never.
            prepare: what workers do as soon as they start, such as to read data that jobs will ask for; they start at
                once then. None: they start with the first job.

        Raises:
            RunError: a number is not above 0, or pebble is not installed.
        """
        if count < 1 or threads < 1 or (limit is not None and limit <= 0):
            raise RunError(f"expected numbers above 0, found count={count!r}, threads={threads!r}, limit={limit!r}.")
        try:
            from pebble import ProcessPool
        except ImportError as error:
            raise RunError("branches in processes need pebble: pip install 'espalier[evolve]'") from error
        self._new: Callable[[], Any] = partial(ProcessPool, max_workers=count, context=_context())
        self._pool: Any = self._new()
        self._replacing = Lock()
        self._threads, self._limit = threads, limit
        self._stopped = False
        if prepare is not None:
            for _ in range(count):
                self._pool.schedule(_without_result, args=(prepare,), timeout=limit)  # what fails, fails in a job too

    def run(self, jobs: Sequence[Any], folder: Path, work: Work = carried_out) -> Iterator[Done]:
        left, in_vain = dict(enumerate(jobs)), 0
        while left:
            count = len(left)
            for number, result in self._tried(dict(left), folder, work):
                del left[number]
                yield number, result
            in_vain = in_vain + 1 if len(left) == count else 0
            if left and self._stopped:  # jobs that were running will never end
                raise RunError("the processes were stopped")
            if left and in_vain == _IN_VAIN:
                raise RunError(
                    f"the processes broke {in_vain} times in a row before any job had ended, as when they are killed "
                    "while they start; start the same search again with fewer: it goes on from what was finished"
                )

    def _tried(self, jobs: Mapping[int, Any], folder: Path, work: Work) -> Iterator[Done]:
        """What ends of these jobs before the pool breaks, if it does: when a worker dies that has no job to lose."""
        pool, waiting = self._whole(), dict[int, Any]()
        try:
            with suppress(RuntimeError):  # it broke just now, or was stopped
                for number, job in jobs.items():
                    waiting[number] = pool.schedule(work, args=(job, folder, self._threads), timeout=self._limit)
            while waiting:
                for number in [one for one, future in waiting.items() if future.done()]:
                    future = waiting.pop(number)
                    if not isinstance(future.exception(), BrokenExecutor):
                        yield number, ended(future.result)
                if self._stopped or not pool.active:
                    break
                if waiting:
                    wait(waiting.values(), _LOOK, FIRST_COMPLETED)
        finally:
            for future in waiting.values():
                future.cancel()

    def _whole(self) -> Any:
        """The pool, or a new one if it is broken."""
        with self._replacing:
            if not self._stopped and not self._pool.active:
                self._pool.stop()
                self._pool.join()
                self._pool = self._new()
            return self._pool

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._pool.close()
        else:
            self._stopped = True
            self._pool.stop()
        self._pool.join()


def _without_result(prepare: Callable[[], object]) -> None:
    prepare()


def _context() -> BaseContext:
    """How workers start. What a device's driver began in a process does not outlive a fork of it."""
    if "forkserver" not in multiprocessing.get_all_start_methods() or torch.accelerator.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_NEEDED))
    return context


__all__ = ["Processes"]
