"""What workers do: every job is a value, and what it gives is a function of it and of nothing else.

So a job that ran once need not run again, wherever it ran and whatever ran beside it: its key is its content. Random
numbers are seeded by the job, one number of threads is used for all, and training batches follow from the step.
"""

from __future__ import annotations

import base64
import hashlib
import math
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from espalier.attaching import attach
from espalier.edit.plan import Plan
from espalier.edit.recipes.redrawn import redraw
from espalier.errors import EspalierError
from espalier.evolve.averaging import Mean
from espalier.evolve.problem import Batch, Problem, Workbench
from espalier.evolve.store import Store, StoreFull
from espalier.measure.stats import calibrate, new_statistics
from espalier.parts.score import derived_seed
from espalier.structure import Structure
from espalier.train.checkpoint import load, save

FORWARD_AND_BACKWARD = 3
"""What a training step costs in forward passes (Kaplan et al. 2020, arXiv:2001.08361, section 2.1)."""
_CALIBRATED_ON = 4
_PLAN = "plan.json"

Result = Mapping[str, Any]
"""What JSON can hold. With the key ``failed`` it says why there is nothing else."""


class Job(Protocol):
    """A piece of work."""

    @property
    def problem(self) -> Problem:
        """What is trained."""

    def work(self, bench: Workbench, store: Store) -> dict[str, Any]:
        """Do it on a fresh workbench. Raises what it likes."""


def key_of(job: Job) -> str:
    """The same for equal jobs in every process, and another one for all others."""
    return hashlib.sha256(repr(job).encode()).hexdigest()[:32]


def carried_out(job: Job, folder: Path, threads: int) -> dict[str, Any]:
    """Do a job in this process, whose random state and number of threads are as before afterwards.

    A branch that cannot go on (a loss that is no number, an edit that is refused, no memory left, an error in the
    problem's own code) gives ``failed``.

    Raises:
        StoreFull: there is no space left.
    """
    before, began = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed("job", key_of(job)))
            result = job.work(job.problem.workbench(), Store(folder))
    except StoreFull:
        raise
    except (Diverged, EspalierError) as error:
        result = {"failed": str(error)}
    except (MemoryError, torch.OutOfMemoryError) as error:
        result = {"failed": f"out of memory: {error}"}
    except Exception as error:  # in the problem's own code, say: wherever it runs, its branch is lost
        at = traceback.extract_tb(error.__traceback__)[-1]
        result = {"failed": f"{type(error).__name__}: {error} ({at.name}, {Path(at.filename).name}:{at.lineno})"}
    finally:
        torch.set_num_threads(before)
    return {**result, "seconds": time.perf_counter() - began}


class Diverged(Exception):
    """The loss of a branch is no number any more."""


@dataclass(frozen=True)
class Branch:
    """Train a network on, after a plan if there is one, and judge it on held-out data."""

    problem: Problem
    parent: str | None
    """Address of the network; None for a fresh one."""
    plan: str | None
    """Address of a plan that is carried out first."""
    first: int
    """Number of the first step."""
    steps: int
    spent: int
    """Training FLOPs that the whole search was charged before."""
    total: int
    """Training FLOPs that the whole search may take: rates follow the part of them that is spent."""
    judged: float | None = 0.5
    """The network is judged in the end, at the mean of its weights over this part of the steps; None: it is not."""
    watched: bool = False
    """A network that is not judged is looked at on held-out data all the same, as it is; nothing depends on it, and it
    is not charged."""
    anew: bool = False
    """What is trained begins with fresh weights, of the sizes that there are then."""

    def work(self, bench: Workbench, store: Store) -> dict[str, Any]:
        structure = opened(bench, store, self.parent)
        if self.plan is not None:
            carry_out(structure, bench, read_plan(store, self.plan), self.first)
        if self.anew:
            begin_anew(structure, bench)
        cost = structure.cost()
        per_sample, spent, training = cost.flops // bench.examples, 0, time.perf_counter()
        mean, last = Mean(structure.model), self.first + self.steps
        for step in range(self.first, last):
            batch = bench.batch(step)
            take_step(structure, bench, batch, min(1.0, (self.spent + spent) / self.total))
            spent += FORWARD_AND_BACKWARD * per_sample * bench.samples(batch)
            if self.judged is not None and step >= last - self.judged * self.steps:
                mean.look()
        training = time.perf_counter() - training
        found: dict[str, Any] = {
            "parameters": cost.parameters,
            "flops": per_sample,
            "step_flops": FORWARD_AND_BACKWARD * per_sample * bench.samples(bench.batch(self.first)),
            "sizes": {name: axis.size for name, axis in structure.axes.items()},
            "seconds_training": training,
        }
        if self.judged is not None:
            recent = [bench.batch(step) for step in range(max(self.first, last - _CALIBRATED_ON), last)]
            with mean.applied([partial(bench.loss, structure.model, batch) for batch in recent]):
                losses, right = measured(structure, bench, bench.held_out)
            if not bool(torch.isfinite(losses).all()):
                raise Diverged("a held-out loss is no number")
            found |= {"losses": packed(losses), "loss": float(losses.mean()), "accuracy": float(right.mean())}
            spent += per_sample * (len(losses) + sum(map(bench.samples, recent)))
            if bench.latency is not None:
                found["latency"] = float(bench.latency(structure.model))
        elif self.watched:
            losses, right = measured(structure, bench, bench.held_out)
            found |= {"loss": float(losses.mean()), "accuracy": float(right.mean())}
        address = store.put(partial(save, structure))
        return {**found, "network": address, "spent": spent}


@dataclass(frozen=True)
class Exam:
    """Look at the test data, once, with the network that a search ended with."""

    problem: Problem
    network: str

    def work(self, bench: Workbench, store: Store) -> dict[str, Any]:
        structure = opened(bench, store, self.network)
        losses, right = measured(structure, bench, bench.test)
        return {"test_accuracy": float(right.mean()), "test_loss": float(losses.mean())}


def opened(bench: Workbench, store: Store, network: str | None) -> Structure:
    """The workbench's model and optimizer, as they were saved under an address; fresh without one."""
    if network is None:
        return attach(bench.model, bench.example, optimizer=bench.optimizer)
    return load(store.path(network), bench.model, bench.example, optimizer=bench.optimizer)


def take_step(structure: Structure, bench: Workbench, batch: Any, done: float) -> None:
    """One step of the optimizer. Raises Diverged if the loss is no number."""
    optimizer, factor = bench.optimizer, bench.rate(done)
    with _rates_times(optimizer, factor):
        structure.model.train()
        optimizer.zero_grad()
        loss = bench.loss(structure.model, batch)
        if not math.isfinite(float(loss.detach())):
            raise Diverged(f"the training loss became {float(loss.detach())}")
        torch.autograd.backward(loss)
        optimizer.step()


def carry_out(structure: Structure, bench: Workbench, plan: Plan, step: int) -> None:
    """Apply a plan, and give the norms of new units the statistics of their inputs."""
    edit = structure.apply(plan)
    grown = {one.axis: one.add for one in plan.edits if one.add and one.axis in structure.axes}
    places = new_statistics(structure.model, structure.topology, grown, given=edit.given)
    batches = [bench.batch(step + number) for number in range(_CALIBRATED_ON)]
    calibrate(structure.model, places, [partial(bench.loss, structure.model, batch) for batch in batches])


def measured(structure: Structure, bench: Workbench, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Losses, and where the network is right, in eval mode: one number per sample each, float64 on the CPU."""
    model = structure.model
    losses, right = [], []
    model.eval()
    with torch.no_grad():
        for batch in batches:
            losses.append(bench.losses(model, batch).double().cpu())
            right.append(bench.right(model, batch).double().cpu())
    model.train()
    return torch.cat(losses), torch.cat(right)


def packed(losses: Tensor) -> str:
    """Numbers as text, in single precision."""
    return base64.b64encode(losses.float().numpy().tobytes()).decode()


def unpacked(text: str) -> Tensor:
    """What `packed` made into text, float64."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32).double()


def keep_plan(store: Store, plan: Plan) -> str:
    """Put a plan into the store; its address."""
    return store.put(lambda folder: plan.save(folder / _PLAN))


def read_plan(store: Store, address: str) -> Plan:
    """The plan of an address."""
    return Plan.load(store.path(address) / _PLAN)


def begin_anew(structure: Structure, bench: Workbench) -> None:
    """Draw what is trained again, and forget the optimizer's state."""
    for module in structure.model.modules():
        if any(one.requires_grad for one in module.parameters(recurse=False)):
            redraw(module)
    bench.optimizer.state.clear()


@contextmanager
def _rates_times(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


__all__ = [
    "FORWARD_AND_BACKWARD",
    "Branch",
    "Diverged",
    "Exam",
    "Job",
    "Result",
    "begin_anew",
    "carried_out",
    "carry_out",
    "keep_plan",
    "key_of",
    "measured",
    "opened",
    "packed",
    "read_plan",
    "take_step",
    "unpacked",
]  # fmt: skip
