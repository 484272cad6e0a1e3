"""Replicas under DistributedDataParallel: edited alike, trained as one process would; or stopped with one error."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_training import batches, difference, loss_of, methods, network, optimizer_of, part, train
from ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import espalier as esp
from espalier.errors import ParallelError, PlanError, SurgeryError
from espalier.methods.common import pruning

X = torch.zeros(2, 6)


def message(call: Any) -> str:
    """What the error of a call says, which every rank has to raise."""
    with pytest.raises((ParallelError, PlanError, SurgeryError)) as raised:
        call()
    return f"{type(raised.value).__name__}: {raised.value}"


def in_step(wrapper: nn.Module, size: int) -> bool:
    """Whether all ranks have the same gradients after a backward of different data."""
    wrapper.zero_grad()
    wrapper(torch.randn(4, 6) + dist.get_rank()).square().sum().backward()
    for parameter in wrapper.parameters():
        assert parameter.grad is not None
        found = [torch.zeros_like(parameter.grad) for _ in range(size)]
        dist.all_gather(found, parameter.grad)
        if not all(torch.equal(found[0], one) for one in found):
            return False
    return True


@dataclass(frozen=True)
class OneSided:
    """Scores that lead to a proposal on one rank and to another one, or an error, on the others."""

    fails: bool = False

    def __call__(self, context: esp.Context, goal: esp.Goal) -> esp.Scores:
        rank = dist.get_rank()
        if self.fails and rank == 1:
            raise ValueError("this rank has no luck")
        return esp.Scores({name: torch.arange(size) * (-1.0) ** rank for name, size in goal.sizes.items()})


def refused(rank: int, size: int) -> dict[str, str]:
    """What cannot be done together, and that everything goes on afterwards."""
    found = {}
    wrapper = DistributedDataParallel(network())
    bare = esp.attach(wrapper.module, X)
    found["inside"] = message(lambda: bare.prune("0", [1]))
    structure = esp.attach(wrapper, X)
    found["inside still"] = message(lambda: bare.prune("0", [1]))
    found["another edit"] = message(lambda: structure.prune("0", [rank]))
    found["edit or undo"] = message(lambda: structure.prune("0", [1]) if rank else structure.undo())
    found["nothing to undo"] = message(structure.undo)
    found["unknown"] = message(lambda: structure.prune("no such axis", [1]))
    structure.prune("0", [1])
    assert in_step(wrapper, size)
    optimizer = optimizer_of("sgd", wrapper)
    structure = esp.attach(wrapper, X, optimizer=optimizer)
    start = partial(esp.Session, structure, loss=loss_of, total_steps=4)
    found["another seed"] = message(lambda: start([esp.prune.Random(amount=0.2)], seed=rank))
    found["another probe"] = message(lambda: start([esp.prune.Random(amount=0.2)], probe=[batches(2)[rank]]))
    once = {"amount": 0.2, "every": esp.steps(1), "until": esp.steps(2)}
    failing = start([pruning("one-sided", OneSided(fails=True), paper="", description="", **once)])
    failing.loss(part(batches(1)[0], rank, size))
    found["failure of one"] = message(failing.step)
    session = start([pruning("one-sided", OneSided(), paper="", description="", **once)])
    session.loss(part(batches(1)[0], rank, size)).backward()
    session.step()
    found["rank 0 decides"] = str(structure.history[-1].plan)
    assert in_step(wrapper, size)
    return found


def both(rank: int, size: int) -> tuple[dict[str, Any], dict[str, str]]:
    return train("adamw", rank, size, 24, methods(4, 6)), refused(rank, size)


def test_two_replicas_train_as_one_process_and_stop_together() -> None:
    alone = train("adamw", 0, 1, 24, methods(4, 6))
    (first, said), (second, other) = run(both, 2)
    assert [one.count("add") > 0 for one in alone["edits"]] == [True, False, True, False]
    assert alone["edits"] == first["edits"] == second["edits"]
    assert difference(alone, first) < 1e-5
    assert first["same"], "whoever holds the wrapper goes on with it"
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    assert said == other, "every rank raises the same error"
    for name, words in {
        "inside": "does not know of this edit",
        "inside still": "does not know of this edit",
        "another edit": r"'0: remove 1 (0)' on rank 0, '0: remove 1 (1)' on rank 1",
        "edit or undo": "'undo' on rank 0, '0: remove 1 (1)' on rank 1",
        "nothing to undo": "SurgeryError: There is nothing to undo",
        "unknown": "no such axis",
        "another seed": "rank 1 has another seed",
        "another probe": "rank 1 has another probe",
        "failure of one": "failed on 1 of 2 ranks: rank 1: ValueError: this rank has no luck",
    }.items():
        assert words in said[name], said[name]
    assert said["rank 0 decides"].startswith("0: remove 3 (0, 1, 2)")
