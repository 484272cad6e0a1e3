"""Initialisers: what new units start from, and what the weights around an edit become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from espalier.parts.goal import Scores, Selection
from espalier.parts.score import Context


@dataclass(frozen=True)
class Beginning:
    """What an edit brings to the weights; empty for what surgery does by default."""

    values: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensor name -> values that broadcast to its new shape, read at the new positions only."""
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensor name -> what is added to it, in a form that broadcasts to its new shape."""
    layers: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """New layer, by the name of the candidate -> its parameters by their names in it -> what they start from."""


class Init(Protocol):
    """What the network starts from after a selection was added or removed."""

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Beginning:
        """Values for new units and changes of the weights that stay; either may be empty."""


@dataclass(frozen=True)
class Neutral:
    """What surgery does by default: Gaussian incoming and zero outgoing weights, so that growth is exact.

    For units that go, nothing: what stays is left as it is.
    """

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Beginning:
        return Beginning()


__all__ = ["Beginning", "Init", "Neutral"]
