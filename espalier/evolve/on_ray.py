"""Branches on Ray: on this machine, or on the cluster that `ray.init` finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from espalier.errors import RunError
from espalier.evolve.job import carried_out
from espalier.evolve.runners import Done, Work, ended, lost


@dataclass(frozen=True)
class OnRay:
    """As tasks of Ray, which has to be initialised (`ray.init`); all nodes have to share the folder of the search."""

    threads: int = 1
    gpus: float = 0.0
    """That each branch asks for."""
    limit: float | None = None
    """Seconds without any branch ending after which those that are running are killed; None: never."""

    def run(self, jobs: Sequence[Any], folder: Path, work: Work = carried_out) -> Iterator[Done]:
        try:
            import ray
        except ImportError as error:
            raise RunError("branches on Ray need it: pip install 'espalier[ray]'") from error
        if not ray.is_initialized():
            raise RunError("Ray is not initialised: call ray.init() first, with the address of a cluster if any")
        task = ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_retries=0)(work)
        waiting = {task.remote(job, folder, self.threads): number for number, job in enumerate(jobs)}
        while waiting:
            found, _ = ray.wait(list(waiting), num_returns=1, timeout=self.limit)
            for one in found:
                yield waiting.pop(one), ended(partial(_got, ray, one))
            if not found:
                for one, number in list(waiting.items()):
                    ray.cancel(one, force=True)
                    waiting.pop(one)
                    yield number, lost(f"no branch had ended for {self.limit:g} s")


def _got(ray: Any, one: Any) -> Mapping[str, Any]:
    return dict(ray.get(one))


__all__ = ["OnRay"]
