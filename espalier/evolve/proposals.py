"""Edits that a search may try on a network: every registered method proposes, at every level and in both directions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor

from espalier.edit.depth_edits import Remove
from espalier.edit.plan import Plan
from espalier.errors import EspalierError, EspalierWarning, MethodError
from espalier.evolve.job import FORWARD_AND_BACKWARD, keep_plan, key_of, opened
from espalier.evolve.problem import Batch, Problem, Workbench
from espalier.evolve.store import Store
from espalier.method import Method, find
from espalier.parts.clock import steps
from espalier.parts.goal import Direction
from espalier.parts.score import derived_seed
from espalier.parts.units.where import choose_axes
from espalier.structure import Structure
from espalier.train.session import Session


@dataclass(frozen=True)
class Proposal:
    """A plan for a network, and why."""

    plan: Plan
    kind: str
    what: str
    """What it does, in a few words."""
    why: str
    gain: float | None = None
    """By how much the loss is predicted to fall, if anything is predicted."""
    anew: bool = False
    """Whether the network then begins with fresh weights: it is compared with others at its age."""


@dataclass(frozen=True)
class Material:
    """What proposals may be made from: data that the networks are trained on, and nothing that is held out."""

    structure: Structure
    loss: Callable[[Batch], Tensor]
    """Charged to the search."""
    batches: Sequence[Batch]
    seed: int


class Proposer(Protocol):
    """Proposes edits; a value, whose `repr` tells it from others."""

    def __call__(self, material: Material, count: int, /) -> Sequence[Proposal]:
        """So many at most, the most promising first. The structure is afterwards as it was."""


@dataclass(frozen=True)
class Scout:
    """The job of asking a proposer."""

    problem: Problem
    parent: str | None
    proposer: Proposer
    count: int
    first: int
    """Number of the first step, whose batches are looked at."""
    batches: int
    most: int
    """Training FLOPs after which nothing more is looked at, about."""

    def work(self, bench: Workbench, store: Store) -> dict[str, Any]:
        structure = opened(bench, store, self.parent)
        per_sample, spent = structure.cost().flops // bench.examples, 0

        def loss(batch: Batch) -> Tensor:
            nonlocal spent
            if spent >= self.most:
                raise MethodError(f"looking at the network has cost the {self.most:,} FLOPs that it may.")
            passes = FORWARD_AND_BACKWARD if torch.is_grad_enabled() else 1
            spent += passes * per_sample * bench.samples(batch)
            return bench.loss(structure.model, batch)

        batches = [bench.batch(self.first + number) for number in range(self.batches)]
        material = Material(structure, loss, batches, derived_seed("scout", key_of(self)))
        found = []
        for one in self.proposer(material, self.count):
            structure.apply(one.plan)
            flops = structure.cost().flops // bench.examples
            structure.undo()
            found.append({
                "plan": keep_plan(store, one.plan), "kind": one.kind, "what": one.what, "why": one.why,
                "gain": one.gain, "anew": one.anew, "flops": flops,
            })  # fmt: skip
        return {"proposals": found, "spent": spent}


@dataclass(frozen=True)
class Move:
    """A registered method, with settings, as something that can be done to a network once."""

    direction: Direction
    name: str
    settings: tuple[tuple[str, Any], ...] = ()
    """Arguments of the method and their values."""

    @classmethod
    def of(cls, direction: Direction, name: str, **settings: Any) -> Move:
        """With arguments by name."""
        return cls(direction, name, tuple(sorted(settings.items())))

    @property
    def kind(self) -> str:
        """In words."""
        return f"{self.direction} {self.name}"

    def __str__(self) -> str:
        return f"{self.kind} {', '.join(f'{name}={value}' for name, value in self.settings)}".rstrip()

    def method(self, axes: Sequence[str] | None) -> Method:
        """The method, with one event at the first step."""
        once = {"start": steps(1), "until": steps(1), "every": steps(1), "axes": axes}
        return find(self.direction, self.name).make(**once, **dict(self.settings))

    def plan(self, material: Material, axes: Sequence[str] | None) -> Plan | None:
        """What the method would do now; None if it finds nothing to do, or cannot. The structure is left as it was."""
        structure = material.structure
        known = len(structure.history)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EspalierWarning)  # what it cannot do is no plan
                session = Session(
                    structure,
                    [self.method(axes)],
                    loss=lambda model, batch: material.loss(batch),
                    probe=material.batches,
                    total_steps=2,
                    seed=derived_seed(material.seed, repr(self), repr(axes)),
                )
                torch.autograd.backward(session.loss(material.batches[0]))
                structure.model.zero_grad()
                session.step()
        except EspalierError:
            return None
        finally:
            made = [edit.plan for edit in structure.history[known:]]
            for _ in made:
                structure.undo()
        return made[0] if len(made) == 1 else None


RANDOM_MOVES = (
    Move.of("grow", "random", amount=0.25),
    Move.of("grow", "random", amount=0.5),
    Move.of("grow", "random", amount=1.0),
    Move.of("prune", "random", amount=0.2),
    Move.of("prune", "random", amount=0.4),
    Move.of("grow", "net2deeper", per_event=1),
    Move.of("prune", "layers-random", per_event=1),
)


@dataclass(frozen=True)
class RandomMoves:
    """Moves drawn at random, each on an axis that is drawn at random too, or on all: what others have to beat."""

    moves: tuple[Move, ...] = RANDOM_MOVES
    tries: int = 5
    """How often another one is drawn for one that finds nothing to do, for each that is wanted."""

    def __call__(self, material: Material, count: int, /) -> Sequence[Proposal]:
        drawn, found = Random(material.seed), dict[str, Proposal]()
        for _ in range(count * self.tries):
            if len(found) == count:
                break
            move = drawn.choice(self.moves)
            axes = self._axes(material.structure, move, drawn)
            plan = move.plan(material, axes)
            where = "everything" if axes is None else ", ".join(axes)
            if plan:
                found.setdefault(str(plan), Proposal(plan, move.kind, f"{move}, {where}", "drawn at random"))
        return tuple(found.values())

    def _axes(self, structure: Structure, move: Move, drawn: Random) -> Sequence[str] | None:
        if find(move.direction, move.name).method.level != "units":
            return None
        able = [name for name, why in choose_axes(structure, move.direction, None).items() if why is None]
        return None if not able or drawn.random() < 1 / (1 + len(able)) else [drawn.choice(able)]


def joined(plans: Sequence[Plan]) -> Plan | None:
    """Several plans for one network as a single one; None where two of them change the same."""
    axes = [edit.axis for plan in plans for edit in plan.edits]
    masks = [one.tensor for plan in plans for one in plan.masks]
    values = [name for plan in plans for name in plan.values]
    deltas = [name for plan in plans for name in plan.deltas]
    deep = [plan for plan in plans if plan.depth]
    gone = all(isinstance(one, Remove) for plan in deep for one in plan.depth)
    same = len({(plan.interface, plan.hold_norms) for plan in plans}) == 1
    twice = any(len(set(one)) < len(one) for one in (axes, masks, values, deltas))
    if not same or twice or (len(deep) > 1 and not gone):
        return None
    return Plan(
        tuple(edit for plan in plans for edit in plan.edits),
        interface=plans[0].interface,
        hold_norms=plans[0].hold_norms,
        seed=plans[0].seed,
        values=_merged([plan.values for plan in plans]),
        deltas=_merged([plan.deltas for plan in plans]),
        masks=tuple(one for plan in plans for one in plan.masks),
        depth=tuple(one for plan in plans for one in plan.depth),
        starts=deep[0].starts if len(deep) == 1 else {},  # by the number of the edit; removals have none
    )


def _merged(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: one for part in parts for name, one in part.items()}


__all__ = [
    "RANDOM_MOVES", "Material", "Move", "Proposal", "Proposer", "RandomMoves",
    "Scout", "joined",
]  # fmt: skip
