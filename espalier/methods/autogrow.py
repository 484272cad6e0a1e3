"""AutoGrow: stages get blocks in turn, each as long as that makes the network better."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_depth import LayerOptions, of_layers
from espalier.parts.clock import Epochs
from espalier.parts.depth.places import StageEnds, Start
from espalier.parts.depth.turns import Growths, InTurn

if TYPE_CHECKING:
    from typing_extensions import Unpack

_EVERY = Epochs(3)


@register
def autogrow(init: Start = "random", least: float = 0.0005, **options: Unpack[LayerOptions]) -> Method:
    """Add one block at the end of a stage at a time, stage after stage; one that it does not help stops for good.

    Needs ``session.epoch_end(metric)``: without a metric no stage ever stops. Periodic growth and random blocks did
    better in the paper than growth at convergence and blocks that begin as the identity.

    Args:
        init: how the new block begins, a copy of the last one of its stage: ``random``, ``zero`` (hands on what it
            gets) or ``copy``.
        least: by how much the best metric since a stage grew has to beat the best one before.
        options: those of `espalier.methods.common_depth.LayerOptions`, which says what raises MethodError. By default
            every 3 epochs one block, without a budget.
    """
    given: LayerOptions = {"every": _EVERY, "per_event": 1, **options}
    return of_layers(
        "autogrow",
        "grow",
        InTurn(least),
        StageEnds(init),
        memory=Growths(given.get("axes")),
        paper="Wen et al. 2020, AutoGrow: Automatic layer growing in deep convolutional networks (arXiv:1906.02909)",
        description="adds blocks to the stages in turn, to each as long as the metric gets better",
        **given,
    )
