"""Replicas under DistributedDataParallel: edited alike, trained as one process would; or stopped with one error."""

from __future__ import annotations

import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_training import batches, difference, loss_of, methods, network, optimizer_of, part, train
from ranks import double, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import espalier as esp
from espalier.edit.plan import Plan, prune_plan
from espalier.errors import CheckpointError, MethodError, ParallelError, PlanError, SurgeryError
from espalier.methods.common import pruning
from espalier.parallel.batches import digest, together

X = torch.zeros(2, 6)


def message(call: Any) -> str:
    """What the error of a call says, which every rank has to raise."""
    with pytest.raises((CheckpointError, ParallelError, PlanError, SurgeryError)) as raised:
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


def kept(rank: int, size: int) -> None:
    """What a wrapper does besides is done by the one that takes its place."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    heard: list[int] = []
    for settings in (
        {"find_unused_parameters": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 1},
        {"static_graph": True},
        {},
    ):
        wrapper = DistributedDataParallel(network(), **settings)
        handle = wrapper.register_forward_hook(lambda *_: heard.append(1))
        wrapper.register_comm_hook(None, allreduce_hook)
        optimizer = optimizer_of("adamw", wrapper)
        structure = esp.attach(wrapper, X, optimizer=optimizer)
        reducer = wrapper.reducer
        for number, batch in enumerate(batches(6)):
            with nullcontext() if wrapper.static_graph else wrapper.no_sync():  # torch cannot do both
                loss_of(wrapper, part(batch, rank, size)).backward()
            if number == 1:
                structure.grow("0", by=3)  # gradients of one step that are not synchronised yet
            if number == 3:
                structure.prune("2", [0, 1])
                structure.undo()
            loss_of(wrapper, part(batch, rank, size)).backward()
            torch.nn.utils.clip_grad_norm_(wrapper.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        assert in_step(wrapper, size)
        assert reducer is not wrapper.reducer
        assert [wrapper._comm_hooks[0][0]] == [allreduce_hook]
        assert all(getattr(wrapper, name) for name in settings if name not in ("bucket_cap_mb",))
        assert wrapper.bucket_bytes_cap == (2**20 if "bucket_cap_mb" in settings else 25 * 2**20)
        assert all_equal(wrapper, size)
        count = len(heard)
        handle.remove()
        wrapper(X)
        assert len(heard) == count > 0


def all_equal(model: nn.Module, size: int) -> bool:
    """Whether all ranks have the same parameters."""
    for one in model.parameters():
        found = [torch.zeros_like(one) for _ in range(size)]
        dist.all_gather(found, one.detach())
        if not all(torch.equal(found[0], other) for other in found):
            return False
    return True


def named(rank: int, size: int) -> dict[str, str]:
    """Wrappers, optimizers and methods that are refused by name."""
    from torch.distributed.fsdp import fully_shard

    said = {}
    wrapper = DistributedDataParallel(network())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
        from torch.distributed.optim import ZeroRedundancyOptimizer

        zero = ZeroRedundancyOptimizer(wrapper.parameters(), torch.optim.SGD, lr=0.1)
    said["ZeroRedundancyOptimizer"] = message(lambda: esp.attach(wrapper, X, optimizer=zero))
    structure = esp.attach(wrapper, X, optimizer=optimizer_of("sgd", wrapper))
    with pytest.raises(MethodError, match=r"gates that each process would draw"):
        esp.Session(structure, [esp.prune.NPN()], loss=loss_of, total_steps=4)
    with wrapper.join():
        said["join()"] = message(lambda: structure.prune("0", [0]))
    wrapper = DistributedDataParallel(network())
    structure = esp.attach(wrapper, X)
    wrapper.register_comm_hook(PowerSGDState(None, matrix_approximation_rank=1), powerSGD_hook)
    said["PowerSGDState"] = message(lambda: structure.prune("0", [0]))
    model = network()
    model._ddp_params_and_buffers_to_ignore = ["0.weight"]  # type: ignore[assignment]
    said["parameters_to_ignore"] = message(lambda: esp.attach(DistributedDataParallel(model), X))
    said["sharded already"] = message(lambda: esp.attach(fully_shard(network()), X))
    said["fully_shard on the whole"] = message(lambda: esp.FullyShard(network(), lambda model: fully_shard(model[0])))
    fully = esp.FullyShard(network(), fully_shard)
    structure = esp.attach(fully, X, optimizer=optimizer_of("sgd", fully.model))
    said["masks"] = message(lambda: structure.mask("0.weight", torch.ones(16, 6, dtype=torch.bool)))
    said["layers cannot come or go"] = message(lambda: structure.insert_layer(after="1"))
    said["save on all ranks"] = message(lambda: esp.export_code(structure, Path("nowhere"), network))
    said["another edit"] = message(lambda: structure.prune("0", [rank]))
    with pytest.raises(MethodError, match=r"looks at parameters in every step"):
        esp.Session(structure, [esp.prune.L1()], loss=loss_of, total_steps=4)
    return said


def everything_else(rank: int, size: int, folder: Path) -> list[float]:
    """Layers, masks, triggers, metrics, judging, uneven batches, and a checkpoint, under a wrapper."""
    wrapper = DistributedDataParallel(network())
    optimizer = optimizer_of("adamw", wrapper)
    structure = esp.attach(wrapper, X, optimizer=optimizer)
    structure.insert_layer(after="1")
    structure.mask("0.weight", torch.arange(96).view(16, 6) % 2 == 0)
    once = esp.steps(2)
    session = esp.Session(
        structure,
        [
            esp.grow.GradMax(amount=0.2, every=once, accept=esp.Accept(), max_events=2),
            esp.grow.Random(amount=0.1, every=once, when=esp.Plateau(patience=1), until=0.9),
        ],
        loss=loss_of,
        probe=batches(2),
        total_steps=12,
    )
    losses = []
    for number, batch in enumerate(batches(12)):
        mine = (batch[0][: 3 + 2 * rank], batch[1][: 3 + 2 * rank])
        loss = session.loss(mine)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step()
        if number % 4 == 3:
            session.epoch_end(0.5 if rank == 0 else None)
        if number == 5:
            esp.save(structure, folder, session=session)
        if number > 5:
            losses.append(float(loss.detach()))
    assert session.events
    assert all(one.value == 0.5 for one in session._metrics)
    assert in_step(wrapper, size)
    assert all_equal(wrapper, size)
    assert not structure.model[0].weight.flatten()[1].any()  # type: ignore[index,union-attr]
    return losses


def gone_on(rank: int, size: int, folder: Path) -> list[str]:
    wrapper = DistributedDataParallel(network())
    optimizer = optimizer_of("adamw", wrapper)
    structure = esp.load(folder, wrapper, X, optimizer=optimizer)
    assert in_step(wrapper, size)
    optimizer.step()
    assert message(lambda: esp.load(folder / str(rank), DistributedDataParallel(network()), X))
    structure.grow("0", by=1)
    assert all_equal(wrapper, size)
    return [str(structure.cost())]


def missing(rank: int, size: int) -> str:
    """One rank makes no edit."""
    structure = esp.attach(DistributedDataParallel(network()), X)
    if rank == 1:
        time.sleep(15)
        return ""
    return message(lambda: structure.prune("0", [0]))


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_replicas_train_as_one_process_for_fifty_steps_after_each_edit(kind: str) -> None:
    alone = train(kind, 0, 1, 220, methods(20, 50))
    found = run(train_replicas, 2, kind, 220)
    assert all(alone["edits"] == one["edits"] for one in found)
    assert difference(alone, found[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("double")
def test_four_replicas_train_as_one_process() -> None:
    alone = train("adamw", 0, 1, 44, methods(4, 10))
    found = run(double, 4, train_replicas, "adamw", 44, {"static_graph": True})
    assert all(alone["edits"] == one["edits"] for one in found)
    assert difference(alone, found[0]) < 1e-8


@pytest.mark.slow
def test_settings_hooks_and_accumulated_gradients_survive() -> None:
    run(kept, 2)


@pytest.mark.slow
def test_what_is_refused_is_named_on_every_rank() -> None:
    first, second = run(named, 2)
    assert first == second
    for word, said in first.items():
        assert word in said


@pytest.mark.slow
def test_layers_masks_triggers_and_checkpoints_under_a_wrapper(tmp_path: Path) -> None:
    run(everything_else, 2, tmp_path)
    assert len({tuple(one) for size in (1, 2) for one in run(gone_on, size, tmp_path)}) == 1


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_noticed() -> None:
    said, _ = run(missing, 2, collective=10.0)
    assert "not all of the 2 ranks came here" in said


def train_replicas(
    rank: int, size: int, kind: str, steps: int, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    between = 50 if steps > 100 else 10
    return train(kind, rank, size, steps, methods(20 if steps > 100 else 4, between), **(settings or {}))


def test_batches_are_put_together() -> None:
    x, y = torch.arange(6).view(3, 2), torch.arange(3)
    parts = [{"x": x[:1], "y": [y[:1]], "name": "a"}, {"x": x[1:], "y": [y[1:]], "name": "a"}]
    found = together(parts, parts[0])
    assert torch.equal(found["x"], x)
    assert torch.equal(found["y"][0], y)
    for other, word in (
        ({**parts[1], "name": "b"}, "differs among the ranks"),
        ({**parts[1], "x": x[1:, :1]}, r"shapes \(1, 2\), \(2, 1\)"),
        ({"x": x[1:]}, "different structure"),
        ({**parts[1], "y": [torch.tensor(1)]}, "first dimension"),
    ):
        with pytest.raises(ParallelError, match=word):
            together([parts[0], other], parts[0])
    assert digest(parts[0]) == digest({**parts[0], "x": x[:1].clone()}) != digest(parts[1])
    assert digest(prune_plan({"0": [1]})) != digest(prune_plan({"0": [2]}))
    assert digest(Plan((), values={"a": x})) != digest(Plan((), values={"a": x + 1}))
