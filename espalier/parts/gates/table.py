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
from espalier.parts.gates.packing import packed, unpacked
from espalier.parts.gates.settings import GateSettings
from espalier.parts.names import Now, carried

_NEVER = 1e-9
"""A probability at which a gate never is open."""


class GateTable:
    """The gates of one session."""

    def __init__(self, settings: GateSettings) -> None:
        self.settings = settings
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
        self._priced: tuple[Topology, frozenset[str], Priced] | None = None
        self._slopes: dict[str, Tensor] | None = None
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
        k = self.k_at(progress)
        return {key: self.settings.kind.judged(one, k) for key, one in self.logits.items()}

    def cost(self, topology: Topology, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The penalty, and its gradient by the logits of every key."""
        if self.settings.penalty is None:
            return torch.zeros(()), {key: torch.zeros_like(one) for key, one in self.logits.items()}
        k = self.k_at(progress)
        leaves = {key: one.clone().requires_grad_() for key, one in self.logits.items()}
        with torch.enable_grad():
            p = {key: self.settings.kind.probability(one, k) for key, one in leaves.items()}
            value = self._price(topology)(p)
            grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        found = zip(leaves, grads, strict=True)
        return value.detach(), {
            key: torch.zeros_like(self.logits[key]) if grad is None else grad for key, grad in found
        }

    def expect(self, slopes: Mapping[str, Tensor], drawn: Drawn | None = None) -> None:
        """The gradient by the logits that the next step takes, with that of a loss."""
        found = dict(slopes)
        for key, one in (drawn.slopes if drawn is not None else {}).items():
            found[key] = found[key] + one
        self._slopes, self._leaves = found, {} if drawn is None else dict(drawn.leaves)

    def forget(self) -> None:
        """Expect nothing: the network is another one."""
        self._slopes, self._leaves = None, {}

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

    def step(self, progress: float) -> None:
        """Move the logits."""
        slopes, leaves = self._slopes or {}, self._leaves
        self.forget()
        stage = self.settings.stages.stage(progress)
        if stage != self.stage:
            self.stage = stage
            self._adam = {key: Adam.fresh(one) for key, one in self.logits.items()}
            self._low = {key: torch.zeros_like(one) for key, one in self._low.items()}
        self.k = self.k_at(progress)
        for key, slope in slopes.items():
            late = leaves[key].grad if key in leaves else None
            gradient = torch.nan_to_num(slope if late is None else slope + late, 0.0, 0.0, 0.0)
            if bool(gradient.any()):  # decided gates rest, whatever their momenta
                self._adam[key], step = self._adam[key].step(gradient)
                self.logits[key] = self.logits[key] - self.settings.rate * step

    def end_epoch(self, progress: float) -> None:
        """Count which gates are low."""
        for key, p in self.probabilities(progress).items():
            self._low[key] = torch.where(p < self.settings.low, self._low[key] + 1, 0)

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
        rows = (torch.where(present, one[at], 0.0) for one in (adam.mean, adam.square, adam.steps))
        self._adam[key] = Adam(*rows)
        self._low[key] = torch.where(present, self._low[key][at], 0)

    def rename(self, now: Now) -> None:
        """Gates stay with what they are on."""
        self.logits, self._adam = carried(self.logits, now), carried(self._adam, now)
        self._low = carried(self._low, now)

    def state(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "logits": {key: packed(one) for key, one in self.logits.items()},
            "adam": {key: one.to_json() for key, one in self._adam.items()},
            "low": {key: packed(one) for key, one in self._low.items()},
            "k": self.k,
            "stage": self.stage,
            "reference": self.reference,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` gave. Raises KeyError, TypeError or ValueError for anything else."""
        fresh = GateTable(self.settings)
        fresh.logits = {str(key): unpacked(one) for key, one in state["logits"].items()}
        fresh._adam = {str(key): Adam.from_json(one) for key, one in state["adam"].items()}
        fresh._low = {str(key): unpacked(one) for key, one in state["low"].items()}
        fresh.k, fresh.stage, fresh.reference = float(state["k"]), int(state["stage"]), float(state["reference"])
        for key, one in fresh.logits.items():
            if one.shape != fresh._low[key].shape or one.shape != fresh._adam[key].mean.shape:
                raise ValueError("logits and counts do not fit")
        self.__dict__.update(fresh.__dict__)


__all__ = ["GateTable"]
