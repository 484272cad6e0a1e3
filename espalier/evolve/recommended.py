"""Proposals from what the network itself says: the recommendations of `espalier.recommend`, the best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from espalier.errors import MethodError
from espalier.evolve.proposals import Material, Proposal
from espalier.parts.recommend.advising import recommend
from espalier.parts.score import derived_seed


@dataclass(frozen=True)
class Recommended:
    """The recommendations by a criterion; where there are too few, the best of what was tried and not recommended."""

    criterion: str = "loss"
    permutations: int = 19
    """Of each test against chance."""

    def __call__(self, material: Material, count: int, /) -> Sequence[Proposal]:
        try:
            found = recommend(
                material.structure,
                loss=lambda model, batch: material.loss(batch),
                batches=material.batches,
                criterion=self.criterion,
                permutations=self.permutations,
                seed=derived_seed(material.seed, "recommended"),
            )
        except MethodError:  # a network whose loss is not finite, say, of which nothing can be told
            return ()
        ranked = [*found.ranked, *found.others][:count]
        return [Proposal(one.plan, one.kind, f"{one.what} ({one.site}): {one.reason}", -one.loss) for one in ranked]


__all__ = ["Recommended"]
