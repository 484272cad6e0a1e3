"""The training of `parallel_training` with a network that is shared out, and checkpoints of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from parallel_training import batches, loss_of, mean, network, optimizer_of, part
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import espalier as esp


def example() -> Tensor:
    return torch.zeros(2, 6)


def shard(model: nn.Module) -> None:
    assert isinstance(model, nn.Sequential)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.get_default_dtype())
    fully_shard(model[2], reshard_after_forward=False, mp_policy=policy)
    fully_shard(model)


def shared_out(kind: str) -> tuple[esp.FullyShard, torch.optim.Optimizer]:
    fully = esp.FullyShard(network(), shard)
    return fully, optimizer_of(kind, fully.model)


def go_on(session: esp.Session, rank: int, size: int, steps: int, total: int) -> list[float]:
    """The losses of some further steps."""
    losses = []
    for batch in batches(total)[session.steps_done : session.steps_done + steps]:
        loss = session.loss(part(batch, rank, size))
        session.optimizer.zero_grad()
        loss.backward()
        session.optimizer.step()
        session.step()
        losses.append(mean(loss, size))
    return losses


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All parameters and all optimizer state, put together where they are shared out."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = whole(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}:{key}"] = whole(value)
    return found


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(rank: int, size: int, kind: str, steps: int, chosen: list[esp.Method]) -> dict[str, Any]:
    fully, optimizer = shared_out(kind)
    structure = esp.attach(fully, example(), optimizer=optimizer)
    session = esp.Session(structure, chosen, loss=loss_of, total_steps=steps)
    losses = go_on(session, rank, size, steps, steps)
    assert isinstance(session.model, FSDPModule)
    assert session.optimizer is optimizer
    return {"losses": losses, "edits": [str(edit.plan) for edit in structure.history]}


def save_in_the_middle(rank: int, size: int, kind: str, folder: Path, total: int, chosen: list[esp.Method]) -> Any:
    """Train half the way, save, and go on."""
    fully, optimizer = shared_out(kind)
    structure = esp.attach(fully, example(), optimizer=optimizer)
    session = esp.Session(structure, chosen, loss=loss_of, total_steps=total)
    go_on(session, rank, size, total // 2, total)
    esp.save(structure, folder, session=session)
    return go_on(session, rank, size, total - total // 2, total)


def load_and_go_on(rank: int, size: int, kind: str, folder: Path, total: int, chosen: list[esp.Method]) -> Any:
    fully, optimizer = shared_out(kind)
    structure = esp.load(folder, fully, example(), optimizer=optimizer)
    session = esp.Session(structure, chosen, loss=loss_of, total_steps=total)
    session.load(folder)
    return go_on(session, rank, size, total - total // 2, total)


def edited(rank: int, size: int, kind: str) -> dict[str, Any]:
    """Some edits by hand, undone ones too; what they make of the network; and what is refused."""
    fully, optimizer = shared_out(kind)
    structure = esp.attach(fully, example(), optimizer=optimizer)
    for batch in batches(3):
        optimizer.zero_grad()
        loss_of(fully.model, part(batch, rank, size)).backward()
        optimizer.step()
    kept = everything(fully.model, optimizer)
    first = fully.model
    structure.prune({"0": [1, 5], "2": [0]})
    structure.undo()
    assert fully.model is first
    undone = everything(fully.model, optimizer)
    structure.prune({"0": [1, 5], "2": [0]})
    grown = structure.grow({"0": 3, "2": 2}, seed=7)
    result = everything(fully.model, optimizer)
    for batch in batches(3):
        optimizer.zero_grad()
        loss_of(fully.model, part(batch, rank, size)).backward()
        optimizer.step()
    hollow = list(fully.plain.parameters())
    empty = [bool(one.isnan().all()) and one.untyped_storage().nbytes() == one.element_size() for one in hollow]
    return {
        "undone": all(torch.equal(kept[name], undone[name]) for name in kept),
        "contract": grown.contract,
        "result": result,
        "after": everything(fully.model, optimizer),
        "empty": all(empty),
        "reshard": fully.model[2]._get_fsdp_state()._fsdp_param_group.post_forward_mesh_info is None,
    }
