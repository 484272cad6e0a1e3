"""Initialisers: what new units start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from espalier.parts.goal import Scores, Selection
from espalier.parts.score import Context


class Init(Protocol):
    """Values for the new units that a selection adds."""

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Mapping[str, Tensor]:
        """Tensor name -> values that broadcast to its new shape, read at the new positions only; may be empty."""


@dataclass(frozen=True)
class Neutral:
    """What surgery does by default: Gaussian incoming and zero outgoing weights, so that growth is exact."""

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Mapping[str, Tensor]:
        return {}


__all__ = ["Init", "Neutral"]
