"""How gates are trained: the settings that gates of all kinds and places share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from espalier.errors import MethodError
from espalier.parts.gates.decay import GroupDecay
from espalier.parts.gates.expected import ExpectedCost, GatePenalty
from espalier.parts.gates.kinds import Bernoulli, GateKind
from espalier.parts.gates.stages import Stages


@dataclass(frozen=True)
class GateSettings:
    """How gates are trained."""

    stages: Stages = field(default_factory=Stages)
    kind: GateKind = field(default_factory=Bernoulli)
    penalty: GatePenalty | None = field(default_factory=lambda: ExpectedCost(1e-2))
    rate: float = 1e-3
    """Learning rate of the logits, by Adam."""
    begin: float = 0.95
    """Probability at which gates begin, at the k of the search."""
    low: float = 0.1
    patience: int = 5
    """What has a probability below `low` at so many ends of epochs in a row leaves; while gates are decided what is
    judged as 0 does, at once."""
    strict: bool = False
    """Whether all that the method may change needs to have gates, as what was named does; else what cannot is left
    out."""
    decay: GroupDecay | None = None
    """Of the weights that gates multiply; added to the loss of training only."""

    def __post_init__(self) -> None:
        if not 0 < self.low <= 0.5 or not 0.5 < self.begin < 1:
            raise MethodError(
                f"expected low from 0 to 1/2 and begin from 1/2 to 1, found low={self.low!r}, begin={self.begin!r}."
            )
        if isinstance(self.kind, Bernoulli) and self.kind.logit(self.begin, 1.0) <= 0:
            raise MethodError(
                f"begin: expected a higher probability than gates have at k=0, below which they are shut before the "
                f"search, found {self.begin!r} with {self.kind.function!r}."
            )
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise MethodError(f"rate: expected a number above 0, found {self.rate!r}.")
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise MethodError(f"patience: expected a whole number of at least 1, found {self.patience!r}.")


__all__ = ["GateSettings"]
