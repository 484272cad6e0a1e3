"""Training steps and random edits, shared by the tests of edits."""

import random

import torch
from snapshots import Snapshot, snapshot
from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.edit.plan import Plan, Resize
from espalier.structure import Structure

LARGEST = 12


def loss_of(model: nn.Module, x: object) -> Tensor:
    result = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
    result = result.logits if hasattr(result, "logits") else result
    return (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)).sum() / result.shape[0]


def train(model: nn.Module, x: object, optimizer: Optimizer, steps: int) -> None:
    """Leaves gradients, statistics and optimizer state behind."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()


def random_plan(structure: Structure, rng: random.Random) -> Plan:
    """One to three axes that grow, shrink, or both, within sensible sizes; the interface too at times."""
    interface = rng.random() < 0.2
    axes = [axis for axis in structure.axes.values() if axis.reason is None]
    edits = []
    for axis in rng.sample(axes, min(len(axes), rng.choice((1, 1, 2, 3)))):
        most = min(3, axis.size - 1)
        remove = rng.sample(range(axis.size), rng.randint(0, most)) if most > 0 else []
        room = LARGEST - axis.size
        add = rng.randint(0, min(3, room)) if room > 0 else 0
        if remove or add:
            edits.append(Resize(axis.name, tuple(sorted(remove)), add))
    return Plan(tuple(edits), interface, seed=rng.randrange(100))


def edited(structure: Structure, rng: random.Random, count: int) -> list[Snapshot]:
    """Apply `count` random plans; what was there before each."""
    seen = []
    while len(seen) < count:
        plan = random_plan(structure, rng)
        if plan:
            seen.append(snapshot(structure.model, structure.optimizer, structure))
            structure.apply(plan)
    return seen


def finite(model: nn.Module) -> bool:
    return all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())


def assert_state_fits(optimizer: Optimizer) -> None:
    """Every state is one number, or of its parameter's shape, or of that shape with reduced dimensions."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor) or value.numel() == 1:
                    continue
                fits = value.dim() == parameter.dim() and all(
                    have in (want, 1) for have, want in zip(value.shape, parameter.shape, strict=True)
                )
                assert fits, (key, tuple(value.shape), tuple(parameter.shape))
                assert value.isfinite().all(), key
