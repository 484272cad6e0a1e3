"""Stochastic gates on units, trained with the weights: what a method with gates remembers, and how it is set.

The memory holds a logit for every unit, an Adam for the logits, and the units that sleep
(`espalier.parts.gates.dormant`). It follows every edit: units that another method removes take their gates with them,
and those that it adds start open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.dims import IntArray
from espalier.measure.stats import eval_loss
from espalier.parts.gates.dormant import Sleeper, give_state_back, kept
from espalier.parts.gates.estimators import DisARM, Estimator
from espalier.parts.gates.expected import ExpectedCost, GatePenalty
from espalier.parts.gates.functions import GateFunction, Sigmoid
from espalier.parts.gates.places import Gates, gate_problem
from espalier.parts.gates.stages import Stages
from espalier.parts.names import Names, carried
from espalier.parts.score import Context, derived_seed

Judged = Literal["hard", "mean"]
_BETAS, _EPS = (0.9, 0.999), 1e-8
_ASLEEP, _NEVER = -40.0, 1e-9
"""k times the logit of units that begin asleep; and a probability at which a unit never is there."""


@dataclass(frozen=True)
class Gated:
    """How gates are trained; makes the memory of a method with gates."""

    stages: Stages = field(default_factory=Stages)
    function: GateFunction = field(default_factory=Sigmoid)
    estimator: Estimator = field(default_factory=DisARM)
    penalty: GatePenalty | None = field(default_factory=lambda: ExpectedCost(1e-2))
    rate: float = 1e-3
    """Learning rate of the logits, by Adam."""
    begin: float = 0.95
    """Probability at which gates of units that are awake begin, at the k of the search."""
    awake: Mapping[str, int] | None = field(default=None, hash=False)
    """Name or pattern of axes -> how many of their units, the first ones, are awake when a session begins; the others
    go to sleep at the first event. None: all are."""
    fill: float = 0.0
    """k times the logit of a unit that wakes: 0 for a probability of 1/2."""
    grows: bool = False
    """Whether units wake, or come new, where the held-out loss has fallen (`Plastic`)."""
    fresh: bool = True
    """Whether new units come where none sleep any more."""
    low: float = 0.1
    patience: int = 5
    """A unit whose probability is below `low` at so many ends of epochs in a row goes to sleep; while gates are decided
    one below 1/2 does, at once."""
    judged: Judged = "hard"
    """In eval mode units of at least 1/2 are there, multiplied by 1 (``hard``) or by their probability (``mean``, as in
    the paper)."""

    strict: bool = False
    """Whether all axes of the method need to have gates, as those do that were named; else what cannot is left out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "awake", None if self.awake is None else dict(self.awake))
        if self.judged not in get_args(Judged):
            raise MethodError(f"judged: expected 'hard' or 'mean', found {self.judged!r}.")
        if not 0 < self.low <= 0.5 or not 0.5 < self.begin < 1:
            raise MethodError(
                f"expected low from 0 to 1/2 and begin from 1/2 to 1, found low={self.low!r}, begin={self.begin!r}."
            )
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise MethodError(f"rate: expected a number above 0, found {self.rate!r}.")
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise MethodError(f"patience: expected a whole number of at least 1, found {self.patience!r}.")

    def __call__(self) -> GateMemory:
        return GateMemory(self)


@dataclass(frozen=True)
class _Adam:
    """The state of one axis."""

    mean: Tensor
    square: Tensor
    steps: Tensor

    @classmethod
    def fresh(cls, count: int) -> _Adam:
        return cls(*(torch.zeros(count, dtype=torch.float64) for _ in range(3)))

    def step(self, gradient: Tensor) -> tuple[_Adam, Tensor]:
        """The state after a step, and the step for a rate of 1."""
        steps = self.steps + 1
        mean = _BETAS[0] * self.mean + (1 - _BETAS[0]) * gradient
        square = _BETAS[1] * self.square + (1 - _BETAS[1]) * gradient.square()
        root = (square / (1 - _BETAS[1] ** steps)).sqrt()
        return _Adam(mean, square, steps), mean / (1 - _BETAS[0] ** steps) / (root + _EPS)

    def picked(self, old: Tensor) -> _Adam:
        """For units that were these before, -1 for new ones."""
        return _Adam(*(_picked(one, old, 0.0) for one in (self.mean, self.square, self.steps)))


class GateMemory:
    """The gates of one session."""

    def __init__(self, settings: Gated) -> None:
        self.settings = settings
        self.logits: dict[str, Tensor] = {}
        """Axis -> logits of its units, float64 on the CPU."""
        self.refused: dict[str, str] = {}
        """Axis -> why it has no gates."""
        self.asleep: dict[str, list[Sleeper]] = {}
        """Axis -> its units that sleep, those first that wake first."""
        self.fallen: dict[str, int] = {}
        """Axis -> how many of its units went to sleep after they had been awake."""
        self._adam: dict[str, _Adam] = {}
        self._low: dict[str, list[int]] = {}
        self._ids: dict[str, list[int]] = {}
        self._next = 0
        self._k = settings.stages.at(0.0)
        self._stage = 0
        self._epoch = 0
        self._best = math.inf
        self._improved = False
        self._reference = 0.0
        self._restoring: list[Sleeper] = []
        self._expected: dict[str, Tensor] | None = None
        self._gates: Gates | None = None
        self._leaving: dict[str, dict[int, Sleeper]] = {}
        self._waking: dict[str, int] = {}

    # --- what training asks for

    def gates(self, context: Context) -> Gates:
        """Where the gates act now.

        Raises:
            MethodError: no axis can have gates, or one that was asked for by name cannot.
        """
        structure = context.structure
        if self._gates is None or self._gates.topology is not structure.topology:
            self._meet(context)
            self._gates = Gates(structure, self.logits)
            if self._restoring:
                give_state_back(structure, self._restoring, self._ids)
                self._restoring = []
        return self._gates

    def probabilities(self, context: Context) -> dict[str, Tensor]:
        """Axis -> probability of every unit now."""
        self.gates(context)
        k = self.settings.stages.at(context.progress)
        return {axis: self.settings.function.probability(one, k) for axis, one in self.logits.items()}

    def decided(self, context: Context) -> dict[str, Tensor]:
        """Axis -> what its units are multiplied by when the network is judged."""
        found = self.probabilities(context)
        if self.settings.judged == "mean":
            return {axis: torch.where(p >= 0.5, p, 0.0) for axis, p in found.items()}
        return {axis: (p >= 0.5).to(p) for axis, p in found.items()}

    def cost(self, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The penalty now, and its gradient by the logits of every axis."""
        k = self.settings.stages.at(context.progress)
        leaves = {axis: one.clone().requires_grad_() for axis, one in self.logits.items()}
        if self.settings.penalty is None:
            return torch.zeros(()), {axis: torch.zeros_like(one) for axis, one in self.logits.items()}
        with torch.enable_grad():
            p = {axis: self.settings.function.probability(one, k) for axis, one in leaves.items()}
            value = self.settings.penalty(context.structure.topology, p, self._reference)
            grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        found = zip(leaves, grads, strict=True)
        return value.detach(), {
            axis: torch.zeros_like(self.logits[axis]) if grad is None else grad for axis, grad in found
        }

    def expect(self, gradients: Mapping[str, Tensor]) -> None:
        """The gradient by the logits that the next step takes."""
        self._expected = {axis: torch.nan_to_num(one, 0.0, 0.0, 0.0) for axis, one in gradients.items()}

    # --- what events ask for

    def leaving(self, context: Context, axes: Iterable[str], least: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The units that go to sleep now, of some axes, each of which keeps at least so many."""
        found = {}
        for axis, p in self.probabilities(context).items():
            if axis not in axes:
                continue
            ready = (p < 0.5).tolist()
            if self._stage == 1:
                never = (p < _NEVER).tolist()
                counts = zip(self._low[axis], never, strict=True)
                ready = [shut or count >= self.settings.patience for count, shut in counts]
            order = [unit for unit in torch.argsort(p, stable=True).tolist() if ready[unit]]
            chosen = tuple(sorted(order[: max(0, len(p) - least[axis])]))
            if chosen:
                found[axis] = chosen
                self._leaving[axis] = kept(context.structure, axis, chosen, self._ids)
        return found

    def waking(self, context: Context, axes: Iterable[str], most: Mapping[str, int]) -> dict[str, Sleeper | None]:
        """Axis -> the unit that wakes there now, None for a new one.

        By Algorithm 1 of the paper: one for every axis in which all units are awake and likely to be there and none
        fell asleep again, if the held-out loss is lower than when units came last.
        """
        found: dict[str, Sleeper | None] = {}
        if not (self.settings.grows and self._improved and self._stage == 1):
            return found
        for axis, p in self.probabilities(context).items():
            full = bool((p >= 0.5).all()) and not self.fallen.get(axis)
            if axis in axes and full and len(p) < most[axis]:
                sleepers = self.asleep.get(axis, [])
                if sleepers or self.settings.fresh:
                    found[axis] = sleepers[0] if sleepers else None
                    self._waking[axis] = 1
        return found

    def numbers(self, after: Mapping[str, Sequence[int]], woken: Mapping[str, Sleeper | None]) -> dict[str, list[int]]:
        """The numbers of the units once only these (old) units of some axes are left, and others woke."""
        found = dict(self._ids)
        for axis, old in after.items():
            found[axis] = [self._ids[axis][unit] for unit in old]
        for axis, sleeper in woken.items():
            found[axis] = [*found[axis], self._next if sleeper is None else sleeper.number]
        return found

    # --- what the session asks for

    def after_step(self, context: Context, /) -> None:
        """Move the logits, and look at all units once per epoch."""
        self._leaving, self._waking = {}, {}
        self.gates(context)
        expected, self._expected = self._expected, None
        stage = self.settings.stages.stage(context.progress)
        if stage != self._stage:
            self._stage = stage
            self._adam = {axis: _Adam.fresh(len(one)) for axis, one in self.logits.items()}
            self._low = {axis: [0] * len(one) for axis, one in self.logits.items()}
        self._k = self.settings.stages.at(context.progress)
        for axis, gradient in (expected or {}).items():
            if bool(gradient.any()):  # decided gates rest, whatever their momenta
                self._adam[axis], step = self._adam[axis].step(gradient)
                self.logits[axis] = self.logits[axis] - self.settings.rate * step
        if context.epoch > self._epoch:
            self._epoch = context.epoch
            self._look(context)

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        """Gates go and come with their units."""
        self._gates = self._expected = None
        for axis, origins in units.items():
            if axis not in self._ids:
                continue
            known, old = self._ids[axis], torch.from_numpy(origins)
            gone = [unit for unit in range(len(known)) if unit not in set(origins.tolist())]
            slept = [self._leaving[axis][unit] for unit in gone if unit in self._leaving.get(axis, {})]
            numbers, woken = [], 0
            for origin in origins.tolist():
                if origin >= 0:
                    numbers.append(known[origin])
                elif woken < self._waking.get(axis, 0) and self.asleep.get(axis):
                    sleeper, woken = self.asleep[axis].pop(0), woken + 1
                    self._restoring.append(sleeper)
                    numbers.append(sleeper.number)
                else:
                    numbers.append(self._next)
                    self._next += 1
            self._ids[axis] = numbers
            if slept:
                awake = [unit for unit in gone if self._was_awake(axis, unit)]
                self.fallen[axis] = self.fallen.get(axis, 0) + len(awake)
                self.asleep.setdefault(axis, []).extend(slept)
            if axis in self.logits:
                fresh = self._fresh(axis, numbers, wakes=axis in self._waking)
                self.logits[axis] = torch.where(old >= 0, self.logits[axis][old.clamp_min(0)], fresh)
                self._adam[axis] = self._adam[axis].picked(old)
                self._low[axis] = [0 if origin < 0 else self._low[axis][origin] for origin in origins.tolist()]
        self._improved = self._improved and not self._waking

    def rename(self, names: Names, /) -> None:
        """Gates stay with their axes; units that sleep in a layer that is gone are forgotten."""
        self._gates = self._expected = None
        self.logits, self._adam = carried(self.logits, names.axes), carried(self._adam, names.axes)
        self._low, self._ids = carried(self._low, names.axes), carried(self._ids, names.axes)
        self.fallen, self.asleep = carried(self.fallen, names.axes), carried(self.asleep, names.axes)
        self.refused = {}
        for axis, sleepers in self.asleep.items():
            self.asleep[axis] = [_renamed(one, names) for one in sleepers]

    def state(self) -> dict[str, Any]:
        """All of it."""
        return {
            "logits": {axis: one.tolist() for axis, one in self.logits.items()},
            "adam": {
                axis: [one.mean.tolist(), one.square.tolist(), one.steps.tolist()] for axis, one in self._adam.items()
            },
            "low": {axis: list(one) for axis, one in self._low.items()},
            "ids": {axis: list(one) for axis, one in self._ids.items()},
            "asleep": {axis: [one.to_state() for one in found] for axis, found in self.asleep.items()},
            "restoring": [one.to_state() for one in self._restoring],
            "fallen": dict(self.fallen),
            "next": self._next,
            "k": self._k,
            "stage": self._stage,
            "epoch": self._epoch,
            "best": None if math.isinf(self._best) else self._best,
            "improved": self._improved,
            "reference": self._reference,
        }

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Become what `state` gave."""
        fresh = GateMemory(self.settings)
        fresh.logits = {str(axis): _row(one) for axis, one in dict(state["logits"]).items()}
        fresh._adam = {str(axis): _Adam(*map(_row, one)) for axis, one in dict(state["adam"]).items()}
        fresh._low = {str(axis): [int(count) for count in one] for axis, one in dict(state["low"]).items()}
        fresh._ids = {str(axis): [int(count) for count in one] for axis, one in dict(state["ids"]).items()}
        fresh.asleep = {str(axis): list(map(Sleeper.from_state, one)) for axis, one in dict(state["asleep"]).items()}
        fresh._restoring = list(map(Sleeper.from_state, state["restoring"]))
        fresh.fallen = {str(axis): int(one) for axis, one in dict(state["fallen"]).items()}
        fresh._next, fresh._k, fresh._stage = int(state["next"]), float(state["k"]), int(state["stage"])
        fresh._epoch, fresh._improved = int(state["epoch"]), bool(state["improved"])
        fresh._best = math.inf if state["best"] is None else float(state["best"])
        fresh._reference = float(state["reference"])
        if any(len(one) != len(fresh._low[axis]) for axis, one in fresh.logits.items()):
            raise ValueError("logits and counts do not fit")
        self.__dict__.update(fresh.__dict__)

    # --- how

    def _meet(self, context: Context) -> None:
        """Take in axes that are not known yet."""
        structure = context.structure
        first = not self._ids
        for name, record in structure.topology.by_name.items():
            if name not in self._ids:
                count = structure.topology.sizes[record.number]
                self._ids[name] = list(range(self._next, self._next + count))
                self._next += count
        for axis in context.axes:
            if axis in self.logits or axis in self.refused:
                continue
            why = gate_problem(structure, axis)
            if why is not None and self.settings.strict:
                raise MethodError(f"{axis} cannot have gates: {why}; leave it out of axes=.")
            if why is not None:
                self.refused[axis] = why
                continue
            count = len(self._ids[axis])
            self.logits[axis] = self._first(axis, count, first)
            self._adam[axis], self._low[axis] = _Adam.fresh(count), [0] * count
        if not self.logits:
            shown = "; ".join(f"{axis}: {why}" for axis, why in list(self.refused.items())[:3])
            raise MethodError(f"no axis can have gates ({shown}).")
        if self.settings.grows and not context.probe:
            raise MethodError("units wake by the held-out loss; give the session probe=[batches].")
        if not self._reference and self.settings.penalty is not None:
            self._reference = self.settings.penalty.reference(structure.topology)

    def _first(self, axis: str, count: int, first: bool) -> Tensor:
        """The logits of an axis that is met for the first time."""
        k = self.settings.stages.k or 1.0
        awake = count
        for pattern, wanted in (self.settings.awake or {}).items() if first else ():
            if fnmatchcase(axis, pattern):
                awake = wanted
                break
        centre = torch.full((count,), _ASLEEP / k, dtype=torch.float64)
        centre[:awake] = self.settings.function.logit(self.settings.begin, k)
        return centre + torch.tensor([_noise(axis, number) for number in self._ids[axis]], dtype=torch.float64)

    def _fresh(self, axis: str, numbers: Sequence[int], wakes: bool) -> Tensor:
        k = self.settings.stages.k or 1.0
        centre = (
            self.settings.fill / (self._k or 1.0) if wakes else self.settings.function.logit(self.settings.begin, k)
        )
        return torch.tensor([centre + _noise(axis, number) for number in numbers], dtype=torch.float64)

    def _was_awake(self, axis: str, unit: int) -> bool:
        """Whether a unit that goes to sleep ever was awake: those that begin asleep are far below all others."""
        return float(self.logits[axis][unit]) > _ASLEEP / 2 / (self.settings.stages.k or 1.0)

    def _look(self, context: Context) -> None:
        """What is looked at once per epoch."""
        for axis, p in self.probabilities(context).items():
            counts = zip(self._low[axis], (p < self.settings.low).tolist(), strict=True)
            self._low[axis] = [count + 1 if low else 0 for count, low in counts]
        if self.settings.grows and self._stage == 1:
            model = context.structure.model
            losses = [eval_loss(model, partial(context.loss, batch)) for batch in context.probe]
            value = sum(losses) / len(losses) + float(self.cost(context)[0])
            self._improved = value < self._best
            if self._improved:
                self._best = value


def _noise(axis: str, number: int) -> float:
    generator = torch.Generator().manual_seed(derived_seed("gate", axis, number))
    return 0.01 * float(torch.randn((), generator=generator, dtype=torch.float64))


def _row(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _picked(row: Tensor, old: Tensor, fresh: float) -> Tensor:
    return torch.where(old >= 0, row[old.clamp_min(0)], fresh)


def _renamed(sleeper: Sleeper, names: Names) -> Sleeper:
    slices = [
        replace(one, tensor=name)
        for one in sleeper.slices
        if (name := names.tensors.get(one.tensor, one.tensor)) is not None
    ]
    return replace(sleeper, slices=tuple(slices))


__all__ = ["GateMemory", "Gated", "Judged"]
