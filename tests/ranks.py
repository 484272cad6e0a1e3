"""Runs a function in several processes that train together, with an end to everything that could hang."""

from __future__ import annotations

import io
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[..., Any]


def run(work: Work, size: int, *args: Any, timeout: float = 240.0, collective: float = 60.0) -> list[Any]:
    """What `work(rank, size, *args)` returns in each of `size` processes, by rank; it has to be found by its name.

    Raises AssertionError with the traceback of a process that failed, or if one has not come to its end in time.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            here, there = context.Pipe(duplex=False)
            given = (work, rank, size, Path(folder) / "store", there, collective, args)
            processes.append(context.Process(target=_process, args=given, daemon=True))
            processes[-1].start()
            there.close()
            pipes.append(here)
        try:
            return _results(pipes, timeout)
        finally:
            for process in processes:
                process.join(5)
                process.kill()
                process.join()


def double(rank: int, size: int, work: Work, *args: Any) -> Any:
    """The same in double precision. In single, rounding decides where gradients of new entries are close to zero, whose
    own squares their steps are divided by."""
    torch.set_default_dtype(torch.float64)
    return work(rank, size, *args)


def _results(pipes: list[Connection], timeout: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        missing = [pipe for rank, pipe in enumerate(pipes) if rank not in found]
        ready = wait(missing, timeout)
        assert ready, f"ranks {sorted(set(range(len(pipes))) - found.keys())} have not ended within {timeout} s"
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            failure, result = pipes[rank].recv()
            assert failure is None, f"rank {rank} failed: {failure}"
            found[rank] = torch.load(io.BytesIO(result), weights_only=False)
    return [found[rank] for rank in range(len(pipes))]


def _process(
    work: Work, rank: int, size: int, store: Path, pipe: Connection, collective: float, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=collective)
    )
    try:
        result = io.BytesIO()
        torch.save(work(rank, size, *args), result)  # a pipe would send tensors as memory of a process that ends
        pipe.send((None, result.getvalue()))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    finally:
        dist.destroy_process_group()
