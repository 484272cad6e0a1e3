"""Where branches run: whatever it is, what they give is the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from espalier.errors import RunError
from espalier.evolve.job import carried_out
from espalier.evolve.store import StoreFull

Done = tuple[int, Mapping[str, Any]]
"""Number of the job, and what it gave."""


Work = Callable[[Any, Path, int], Mapping[str, Any]]
"""What workers call: job, folder and number of threads -> what the job gave. It and the jobs can be pickled."""


class Runner(Protocol):
    """Does jobs."""

    def run(self, jobs: Sequence[Any], folder: Path, work: Work = carried_out) -> Iterator[Done]:
        """Do all, in any order; yields each as it ends. A job whose worker is lost gives ``failed``.

        Args:
            jobs: what `work` takes: of a search, each a `espalier.evolve.job.Job`.
            folder: of the search; workers share it.
            work: what does one job.

        Raises:
            StoreFull: there is no space left.
        """


@dataclass(frozen=True)
class InProcess:
    """One after the other, in this process."""

    threads: int = 1

    def run(self, jobs: Sequence[Any], folder: Path, work: Work = carried_out) -> Iterator[Done]:
        for number, job in enumerate(jobs):
            yield number, work(job, folder, self.threads)


class Future(Protocol):
    """The part of `concurrent.futures.Future` that is needed here; dask's and submitit's have it too."""

    def done(self) -> bool: ...

    def result(self) -> Any: ...


@dataclass(frozen=True)
class Futures:
    """On anything whose ``submit(function, *arguments)`` gives a future: a `concurrent.futures` executor, a
    ``dask.distributed.Client``, a ``submitit.AutoExecutor``.

    The folder of the search has to be one that all workers share.
    """

    submit: Callable[..., Future]
    threads: int = 1
    limit: float | None = None
    """Seconds after which a job that has not ended is given up; None: never. What its worker does then is the
    executor's affair."""
    pause: float = 0.02
    """Seconds between two looks."""

    def run(self, jobs: Sequence[Any], folder: Path, work: Work = carried_out) -> Iterator[Done]:
        waiting = {number: self.submit(work, job, folder, self.threads) for number, job in enumerate(jobs)}
        began = time.monotonic()
        while waiting:
            for number in [one for one, future in waiting.items() if future.done()]:
                yield number, ended(waiting.pop(number).result)
            if self.limit is not None and time.monotonic() - began > self.limit:
                for number in list(waiting):
                    waiting.pop(number)
                    yield number, lost(f"it had not ended after {self.limit:g} s")
            if waiting:
                time.sleep(self.pause)


def ended(result: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """What a job gave, or that its worker was lost.

    Raises:
        StoreFull: there is no space left.
        RunError: the executor takes no more jobs.
    """
    try:
        return result()
    except StoreFull:
        raise
    except BrokenExecutor as error:
        raise RunError(
            f"the executor broke ({error}) and takes no more jobs; start the same search again with a new one: it goes "
            "on from what was finished. The runner Processes replaces workers that die."
        ) from error
    except Exception as error:  # whatever a library's way is of saying that a worker is gone
        return lost(f"{type(error).__name__}: {error}")


def lost(why: str) -> dict[str, Any]:
    """What a job gives whose worker is gone."""
    return {"failed": f"the worker was lost: {why}", "lost": True, "seconds": 0.0}


__all__ = ["Done", "Future", "Futures", "InProcess", "Runner", "Work", "ended", "lost"]
