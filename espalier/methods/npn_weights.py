"""Neural Plasticity Networks on single weights: a stochastic gate for every weight; those that stay shut are masked."""

from __future__ import annotations

from collections.abc import Sequence

from espalier.method import Method, register
from espalier.methods.common_gates import NPN_PAPER, gated
from espalier.parts.clock import Epochs, Moment, Steps
from espalier.parts.gates.expected import GatePenalty
from espalier.parts.gates.expected_levels import ExpectedWeights
from espalier.parts.gates.kinds import Bernoulli, GateKind
from espalier.parts.gates.planning import MaskShut
from espalier.parts.gates.settings import GateSettings
from espalier.parts.gates.stages import Stages
from espalier.parts.gates.weight_memory import GatedWeights
from espalier.parts.weights.keep import Entries

_STAGES, _COST, _KIND, _EVERY_EPOCH = Stages(7.0, 0.25, 0.75), ExpectedWeights(1e-2), Bernoulli(), Epochs(1)


@register
def npn_weights(
    stages: Stages = _STAGES,
    penalty: GatePenalty | None = _COST,
    kind: GateKind = _KIND,
    rate: float = 1e-3,
    begin: float = 0.95,
    low: float = 0.1,
    patience: int = 5,
    every: Steps | Epochs = _EVERY_EPOCH,
    start: Moment = 0.0,
    until: Moment = 1.0,
    axes: Sequence[str] | None = None,
) -> Method:
    """As `espalier.prune.NPN`, with a gate for every single weight; what stays shut is masked.

    The paper names gates on weights as future work. Two losses have to tell all gates apart, so that thousands of them
    learn slowly; gradients pass through `HardConcrete` gates. With 8,160 weights on moons (400 epochs of 4 steps, two
    seeds, logits at 5e-3) those masked 48 to 50% at a test accuracy of 99.8 to 100%, under a penalty of 0.15; Bernoulli
    gates masked none under 0.5, and 27% with logits at 5e-2. Masks that others set, or take away, are followed: a
    masked weight has its gate shut, and does not count.

    Args:
        stages: k over the training.
        penalty: on the probabilities; None for none.
        kind: how gates are drawn and learn: `Bernoulli` or `HardConcrete`.
        rate: learning rate of the logits, by Adam.
        begin: probability at first.
        low: a weight whose probability is below it at `patience` ends of epochs is masked; when the search ends, all
            that are judged as shut are.
        patience: see above.
        every: how often weights may be masked.
        start: when they may for the first time.
        until: when for the last time, but for the last step of the training.
        axes: names or patterns of parameters; None for all matrices and filters.

    Raises MethodError for an argument that is not what it should be.
    """
    return gated(
        "npn-weights",
        "prune",
        GatedWeights(GateSettings(stages, kind, penalty, rate, begin, low, patience, axes is not None)),
        MaskShut(),
        every=every,
        start=start,
        until=until,
        axes=axes,
        paper=NPN_PAPER,
        description="trains stochastic gates on single weights and masks those that stay shut",
        select=Entries(),
        level="weights",
    )
