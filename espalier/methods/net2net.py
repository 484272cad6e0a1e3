"""Net2Net: new units are copies of old ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Growing, growing
from espalier.parts.ghosts.copies import Copied, Originals
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context, Equal, GroupNorm

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class EqualWithNorms:
    """Every ghost unit is worth the same; the norms of old units go along, to choose those that are copied."""

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        norms = GroupNorm()(context, replace(goal, direction="prune"))
        return Scores(Equal()(context, goal).values, norms.values)


@register
def net2net(originals: Originals = "random", noise: float = 0.1, **options: Unpack[Growing]) -> Method:
    """Add copies of units, which share what reads their originals: exact in train and in eval mode, norms included.

    Args:
        originals: which units are copied, ``random`` ones (default, as in the paper) or those of the ``largest`` norm.
        noise: how unequal the shares are, as a part of their length (default 0.1): enough to make copies go different
            ways within some steps. It is put on outgoing weights, where it sums to zero, so that growth stays exact;
            the paper puts it on all.

    Where copies would change the outputs, behind dropout or across a LayerNorm, units are added as `random` adds them,
    with a warning that names the axis and the reason.

    Raises MethodError for an option that is not what `espalier.methods.common.Growing` says.
    """
    return growing(
        "net2net",
        EqualWithNorms() if originals == "largest" else Equal(),
        init=Copied(originals, noise),
        paper="Chen et al. 2016, Net2Net: accelerating learning via knowledge transfer (arXiv:1511.05641)",
        description="adds copies of units, which share what reads their originals",
        **options,
    )
