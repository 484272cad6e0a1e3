"""What the networks of a suite take where they run: eager, compiled and in ONNX Runtime, beside the large network.

A network is made again from the sizes that a run ended with; what it was trained to makes no difference to its time. It
takes turns with the large network, pass by pass, so that other work on the machine slows both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.measure.runtimes import Compiled, Eager, OnnxRuntime, Runtime
from espalier.suite import machine
from espalier.suite.kept import Kept, Record
from espalier.suite.preparing import prepare
from espalier.suite.running import Place, Plan
from espalier.suite.suite import Cell, digest

PASSES = 30
SAMPLES = (1, machine.SATURATED)


@dataclass(frozen=True)
class Timing:
    """A network whose passes are timed."""

    cell: Cell
    """The run that it is from."""
    sizes: tuple[tuple[str, int], ...]

    def key(self, device: str) -> str:
        """The same for equal networks on a device of this kind."""
        task = self.cell.task
        return digest(["speed", task.data, task.model, task.width, task.pixels, self.sizes, SAMPLES, device])


def timings(plan: Plan, kept: Kept) -> Iterator[Timing]:
    """The networks to be timed: those of the suite's ``timed`` contenders at all points, of the first seed, under the
    first condition, whose runs are there. Networks whose layers came or went are left out."""
    suite = plan.suite
    first = suite.conditions[0]
    for cell in plan.cells:
        wanted = cell.contender.name in suite.timed and cell.seed == suite.seeds[0]
        if wanted and (cell.size, cell.budget, cell.scale) == (first.size, first.budget, first.scale):
            record = plan.record(cell, kept)
            if record is not None and "result" in record and not record["result"]["depth"]:
                yield Timing(cell, tuple(sorted(record["result"]["axes"].items())))


def run_speed(plan: Plan, place: Place, say: Callable[[str], None]) -> str:
    """Time what was not timed yet, with one thread; returns how many networks there are.

    Raises:
        RunError: records cannot be written, or the suite names no contenders to be timed.
    """
    kept = place.kept()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    count = 0
    try:
        for one in timings(plan, kept):
            count += 1
            if kept.get(one.key(place.device)) is None:
                record = timed(one, place.device)
                kept.put(record)
                say(f"{one.cell.task.name} {one.cell.point:g} {one.cell.contender.name}: {_said(record)}")
    finally:
        torch.set_num_threads(threads)
    return f"{count} networks are timed; those of {', '.join(plan.suite.timed) or 'no contender'} are asked for"


def timed(one: Timing, device: str) -> dict[str, Any]:
    """Seconds of a pass of the large network and of this one, in every runtime, or why a runtime has none."""
    prepared = prepare(one.cell, device)
    large, small = prepared.large(), prepared.sized(dict(one.sizes))
    speed: dict[str, Any] = {}
    for name, runtime in runtimes(device).items():
        for samples in SAMPLES:
            inputs = prepared.example[:1].expand(samples, *prepared.example.shape[1:]).contiguous()
            speed[f"{name} {samples}"] = _beside(runtime, large, small, inputs)
    return {
        "key": one.key(device),
        "cell": one.cell.names(),
        "speed": speed,
        "flops": [prepared.large_cost.flops, prepared.cost(small).flops],
        "place": machine.place(device, 1),
    }


def runtimes(device: str) -> Mapping[str, Runtime]:
    """Where networks are timed, by name."""
    clock = machine.clock(device)
    return {"eager": Eager(clock), "compiled": Compiled(clock), "ONNX Runtime": OnnxRuntime(clock)}


def _beside(runtime: Runtime, large: nn.Module, small: nn.Module, inputs: Tensor) -> list[float] | str:
    try:
        both = [runtime.prepared(model, inputs) for model in (large, small)]
    except EspalierError as error:
        return str(error)
    except Exception as error:  # compilers and exporters raise many kinds
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    turns = [[run() for run in both] for _ in range(PASSES)]
    return [float(f"{statistics.median(times):.4g}") for times in zip(*turns, strict=True)]


def _said(record: Record) -> str:
    return ", ".join(
        f"{name} {value if isinstance(value, str) else f'{value[0] / value[1]:.2f} x'}"
        for name, value in record["speed"].items()
    )


__all__ = ["PASSES", "SAMPLES", "Timing", "run_speed", "runtimes", "timed", "timings"]
