"""Branches on Ray."""

from pathlib import Path

import ray

from espalier.evolve.on_ray import OnRay


def work(job: int, folder: Path, threads: int) -> int:
    return job + 1


ray.init(num_cpus=1, include_dashboard=False)
assert len(list(OnRay().run([1, 2], Path(), work))) == 2
