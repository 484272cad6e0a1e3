"""Orders in which places for new layers are taken, whatever the network computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from espalier.errors import MethodError
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context

Order = Literal["spread", "middle", "last"]


@dataclass(frozen=True)
class InOrder:
    """``spread``: however many there are to be, evenly over the depth; ``middle`` or ``last``: from there outwards.

    LLaMA Pro (Wu et al. 2024, arXiv:2401.02415) interleaves new blocks evenly; SOLAR (Kim et al. 2023,
    arXiv:2312.15166) repeats the middle of a stack.
    """

    order: Order = "spread"

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise MethodError(f"order: expected one of {', '.join(get_args(Order))}, found {self.order!r}.")

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        names = list(goal.layers)
        match self.order:
            case "spread":
                ranked = _spread(len(names))
            case "middle":
                ranked = sorted(range(len(names)), key=lambda one: abs(2 * one + 1 - len(names)))
            case "last":
                ranked = list(reversed(range(len(names))))
        places = {names[index]: rank for rank, index in enumerate(ranked)}
        return Scores({name: torch.tensor([float(len(names) - places[name])]) for name in names})


def _spread(count: int) -> list[int]:
    """The numbers below `count` in an order whose every beginning is spread evenly: nearest to 1/2, 1/4, 3/4, 1/8..."""
    left, found, number = list(range(count)), list[int](), 1
    while left:
        wanted = _halved(number) * count - 0.5
        found.append(min(left, key=lambda one: (abs(one - wanted), one)))
        left.remove(found[-1])
        number += 1
    return found


def _halved(number: int) -> float:
    """The binary digits of a number mirrored at the point: 1/2, 1/4, 3/4, 1/8, 5/8, ..."""
    digits = f"{number:b}"
    return int(digits[::-1], 2) / (1 << len(digits))


__all__ = ["InOrder", "Order"]
