"""L0 regularisation: hard-concrete gates on units, trained by gradients under a penalty on how many are not zero."""

from __future__ import annotations

from collections.abc import Sequence

from espalier.method import Method, register
from espalier.methods.common_gates import gated
from espalier.parts.clock import Epochs, Moment, Steps
from espalier.parts.gates.expected import ExpectedCost, GatePenalty
from espalier.parts.gates.hard_concrete import HardConcrete
from espalier.parts.gates.memory import Gated
from espalier.parts.gates.planning import SleepAndWake
from espalier.parts.gates.settings import GateSettings
from espalier.parts.gates.stages import Stages

_STAGES, _COST, _KIND, _EVERY_EPOCH = Stages(start=0.0, until=0.75), ExpectedCost(1e-2), HardConcrete(), Epochs(1)


@register
def l0(
    stages: Stages = _STAGES,
    penalty: GatePenalty | None = _COST,
    kind: HardConcrete = _KIND,
    rate: float = 1e-3,
    begin: float = 0.8,
    low: float = 0.1,
    patience: int = 5,
    every: Steps | Epochs = _EVERY_EPOCH,
    start: Moment = 0.0,
    until: Moment = 1.0,
    axes: Sequence[str] | None = None,
) -> Method:
    """Train a gate between 0 and 1 for every unit with the weights, by gradients that pass through it.

    The loss is evaluated once per step and has to be taken from ``session.loss(batch)``. Units leave as under
    `espalier.prune.NPN`, whose search is the part of `stages` that counts here. When it ends, what the gates that are
    left multiply by becomes part of the weights, and there are no gates any more. The penalty is that of the coupled
    network; the paper's, a number of weights per unit of every layer, is `espalier.parts.gates.expected.PerUnit`.

    Args:
        stages: when gates learn; k has no meaning for them.
        penalty: on the probability that a gate is not zero; None for none.
        kind: temperature and stretch of the gates.
        rate: learning rate of the logits, by Adam.
        begin: probability at first that a gate is not zero.
        low: a unit whose probability is below it at `patience` ends of epochs goes to sleep; when the search ends, all
            that are judged as 0 do.
        patience: see above.
        every: how often units may leave.
        start: when they may for the first time.
        until: when for the last time, but for the last step of the training, after which gates join the weights.
        axes: names or patterns of axes; None for all that may shrink and can have gates.

    Raises MethodError for an argument that is not what it should be.
    """
    return gated(
        "l0",
        "prune",
        Gated(GateSettings(stages, kind, penalty, rate, begin, low, patience, axes is not None)),
        SleepAndWake(),
        every=every,
        start=start,
        until=until,
        axes=axes,
        paper="Louizos, Welling & Kingma 2018, Learning sparse neural networks through L0 regularization "
        "(arXiv:1712.01312)",
        description="trains hard-concrete gates on units by gradients and removes those that end at zero",
    )
