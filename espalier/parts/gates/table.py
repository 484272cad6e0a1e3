"""The logits of all gates of a session, their optimizer, and how long each has been low.

Whatever gates are on, they are kept by a key, with a vector of logits for each. What keys are, and what becomes of them
when the network is edited, the memories know that hold such a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from espalier.graph.topology import Topology
from espalier.parts.gates.adam import Adam
from espalier.parts.gates.expected import Priced
from espalier.parts.gates.kinds import Drawn
from espalier.parts.gates.rows import joined, parted
from espalier.parts.gates.settings import GateSettings
from espalier.parts.names import Now, carried

SHUT = -1e6
"""The logit of a gate that is shut for good: it does not move."""
_OPEN = 1e6
"""The logit of one that is open for good: nothing pulls at it."""
_NEVER = 1e-9
"""A probability at which a gate never is open."""


class GateTable:
    """The gates of one session."""

    def __init__(self, settings: GateSettings, *, never_empty: bool = False) -> None:
        self.settings = settings
        self.never_empty = never_empty
        """Whether the likeliest gate of a key is judged as open if all of them would be shut, since not all may go."""
        self.logits: dict[str, Tensor] = {}
        """Key -> logits, float64 on the CPU."""
        self.stage = 0
        """That of the last step."""
        self.k = settings.stages.at(0.0)
        """That of the last step."""
        self.reference = 0.0
        """What the penalty is relative to; 0 before it was asked."""
        self._adam: dict[str, Adam] = {}
        self._low: dict[str, Tensor] = {}
        self._epoch = 0
        self._priced: tuple[Topology, frozenset[str], Priced] | None = None
        self._slope: Tensor | None = None
        self._leaves: dict[str, Tensor] = {}

    def add(self, key: str, logits: Tensor) -> None:
        """Gates that were not there before."""
        self.logits[key], self._adam[key] = logits, Adam.fresh(logits)
        self._low[key] = torch.zeros(logits.shape, dtype=torch.int64)

    # --- what training asks for

    def k_at(self, progress: float) -> float:
        """k at a fraction of the training."""
        return self.settings.stages.at(progress)

    def probabilities(self, progress: float) -> dict[str, Tensor]:
        """Key -> probability of every gate to be open."""
        k = self.k_at(progress)
        return {key: self.settings.kind.probability(one, k) for key, one in self.logits.items()}

    def judged(self, progress: float) -> dict[str, Tensor]:
        """Key -> what every gate multiplies by when the network is judged."""
        k, kind = self.k_at(progress), self.settings.kind
        found = {key: kind.judged(one, k) for key, one in self.logits.items()}
        for key, one in found.items() if self.never_empty else ():
            if not bool(one.any()):
                one[int(self.logits[key].argmax())] = 1.0
        return found

    def cost(self, topology: Topology, progress: float) -> tuple[Tensor, Tensor]:
        """The penalty, and its gradient by the logits of all keys in a row (`espalier.parts.gates.rows`)."""
        if not self.logits:
            return torch.zeros(()), torch.zeros(0)
        row = joined(self.logits)
        if self.settings.penalty is None:
            return torch.zeros(()), torch.zeros_like(row)
        leaf = row.requires_grad_()
        with torch.enable_grad():
            p = self.settings.kind.probability(leaf, self.k_at(progress))
            value = self._price(topology)(parted(p, self.logits))
            (slope,) = torch.autograd.grad(value, leaf)
        return value.detach(), slope

    def expect(self, slope: Tensor, drawn: Drawn | None = None) -> None:
        """The gradient by the logits of all keys in a row that the next step takes, with that of a loss."""
        learnt = {} if drawn is None else drawn.slopes
        self._slope = slope + joined({key: learnt[key] for key in self.logits}) if learnt else slope
        self._leaves = {} if drawn is None else dict(drawn.leaves)

    def forget(self) -> None:
        """Expect nothing: the network is another one."""
        self._slope, self._leaves = None, {}

    def _price(self, topology: Topology) -> Priced:
        """The penalty as it is until the network is edited."""
        penalty = self.settings.penalty
        assert penalty is not None
        known = self._priced
        if known is None or known[0] is not topology or known[1] != self.logits.keys():
            if not self.reference:
                self.reference = penalty.reference(topology)
            keys = frozenset(self.logits)
            known = self._priced = topology, keys, penalty.priced(topology, keys, self.reference)
        return known[2]

    # --- what sessions ask for

    def step(self, progress: float, epoch: int) -> bool:
        """Move the logits, and count once per epoch which gates are low; whether an epoch ended."""
        self._learn(progress)
        ended, self._epoch = epoch > self._epoch, epoch
        if ended:
            self.end_epoch(progress)
        return ended

    def _learn(self, progress: float) -> None:
        slope, leaves = self._slope, self._leaves
        self.forget()
        stage = self.settings.stages.stage(progress)
        if stage != self.stage:
            self.stage = stage
            self._keep_one(progress)
            self._adam = {key: Adam.fresh(one) for key, one in self.logits.items()}
            self._low = {key: torch.zeros_like(one) for key, one in self._low.items()}
        self.k = self.k_at(progress)
        if slope is None or not self.logits:
            return
        late = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
        if late:
            slope = slope + joined({key: late.get(key, torch.zeros_like(one)) for key, one in self.logits.items()})
        gradient = torch.nan_to_num(slope, 0.0, 0.0, 0.0)
        moving = {key: one for key, one in parted(gradient, self.logits).items() if bool(one.any())}
        if moving:  # decided gates rest, whatever their momenta
            self._move(moving, gradient if len(moving) == len(self.logits) else joined(moving))

    def _keep_one(self, progress: float) -> None:
        """Open for good what has to stay though it is shut: it is trained as what it is judged as.

        That is the last gate of a key, and once all are decided the likeliest one of a key of which all are shut.
        """
        found = self.settings.kind.judged
        for row in self.logits.values() if self.never_empty else ():
            if (len(row) == 1 or self.stage == 2) and not bool(found(row, self.k_at(progress)).any()):
                row[int(row.argmax())] = _OPEN

    def _move(self, keys: Mapping[str, Tensor], gradient: Tensor) -> None:
        """A step of Adam with the logits of some keys; `gradient` is theirs in a row."""
        states = ([one.flatten() for one in self._adam[key].tensors] for key in keys)
        state, step = Adam(*(torch.cat(one) for one in zip(*states, strict=True))).step(gradient)
        row = joined({key: self.logits[key] for key in keys})
        moved = torch.where(row == SHUT, row, row - self.settings.rate * step)
        self.logits |= parted(moved, keys)
        parts = [parted(one, keys) for one in state.tensors]
        self._adam |= {key: Adam(*(one[key] for one in parts)) for key in keys}

    def end_epoch(self, progress: float) -> None:
        """Count which gates are low."""
        for key, p in self.probabilities(progress).items():
            self._low[key] = torch.where(p < self.settings.low, self._low[key] + 1, 0)
        self._keep_one(progress)

    def ready(self, progress: float) -> dict[str, Tensor]:
        """Key -> which gates have been shut for so long that what they are on may leave."""
        if self.stage != 1:
            return {key: one == 0 for key, one in self.judged(progress).items()}
        patience = self.settings.patience
        return {
            key: (p < _NEVER) | (self._low[key] >= patience) for key, p in self.probabilities(progress).items()
        }  # fmt: skip

    # --- what edits ask for

    def follow(self, key: str, old: Tensor, fresh: Tensor) -> None:
        """Gates for what was these before, -1 for what is new and begins at `fresh`."""
        adam, present, at = self._adam[key], old >= 0, old.clamp_min(0)
        self.logits[key] = torch.where(present, self.logits[key][at], fresh)
        rows = (torch.where(present, one[at], 0.0) for one in adam.tensors)
        self._adam[key] = Adam(*rows)
        self._low[key] = torch.where(present, self._low[key][at], 0)

    def clear(self) -> None:
        """There are no gates any more."""
        self.rename(dict.fromkeys(self.logits))

    def rename(self, now: Now) -> None:
        """Gates stay with what they are on."""
        self.logits, self._adam = carried(self.logits, now), carried(self._adam, now)
        self._low = carried(self._low, now)

    def state(self) -> dict[str, Any]:
        """All of it, as `Memory.state`."""
        return {
            "logits": {key: one.clone() for key, one in self.logits.items()},
            "adam": {key: [each.clone() for each in one.tensors] for key, one in self._adam.items()},
            "low": {key: one.clone() for key, one in self._low.items()},
            "k": self.k,
            "stage": self.stage,
            "epoch": self._epoch,
            "reference": self.reference,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` gave. Raises KeyError, TypeError or ValueError for anything else."""
        fresh = GateTable(self.settings, never_empty=self.never_empty)
        fresh.logits = {str(key): _row(one) for key, one in state["logits"].items()}
        fresh._adam = {str(key): Adam(*map(_row, one)) for key, one in state["adam"].items()}
        fresh._low = {str(key): _row(one) for key, one in state["low"].items()}
        fresh._epoch = int(state["epoch"])
        fresh.k, fresh.stage, fresh.reference = float(state["k"]), int(state["stage"]), float(state["reference"])
        for key, one in fresh.logits.items():
            if one.shape != fresh._low[key].shape or one.shape != fresh._adam[key].mean.shape:
                raise ValueError("logits and counts do not fit")
        self.__dict__.update(fresh.__dict__)


def _row(data: Any) -> Tensor:
    if not isinstance(data, Tensor) or data.dim() != 1:
        raise TypeError(f"expected a row of numbers, found {data!r}")
    return data.clone()


__all__ = ["SHUT", "GateTable"]
