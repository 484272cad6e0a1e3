"""Neural Plasticity Networks: stochastic gates on units that prune a large network, or expand a small one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from espalier.method import Method, register
from espalier.methods.common_gates import NPN_PAPER, gated
from espalier.parts.clock import Epochs, Moment, Steps
from espalier.parts.gates.decay import GroupDecay
from espalier.parts.gates.estimators import DisARM, Estimator
from espalier.parts.gates.expected import ExpectedCost, GatePenalty
from espalier.parts.gates.functions import GateFunction, Sigmoid
from espalier.parts.gates.kinds import Bernoulli, Judged
from espalier.parts.gates.memory import Gated
from espalier.parts.gates.planning import SleepAndWake
from espalier.parts.gates.settings import GateSettings
from espalier.parts.gates.stages import Stages
from espalier.parts.gates.waking import Algorithm1, Waking

_PRUNING, _GROWING = Stages(k=7.0, start=0.25, until=0.5), Stages(k=1.0, start=0.05, until=0.5)
_ALGORITHM_1 = Algorithm1()
_COST, _SIGMOID, _DISARM, _EVERY_EPOCH = ExpectedCost(1e-2), Sigmoid(), DisARM(), Epochs(1)


@register
def npn_pruning(
    stages: Stages = _PRUNING,
    penalty: GatePenalty | None = _COST,
    function: GateFunction = _SIGMOID,
    estimator: Estimator = _DISARM,
    rate: float = 1e-3,
    begin: float = 0.95,
    low: float = 0.1,
    patience: int = 5,
    judged: Judged = "hard",
    per_sample: bool = False,
    every: Steps | Epochs = _EVERY_EPOCH,
    start: Moment = 0.0,
    until: Moment = 1.0,
    axes: Sequence[str] | None = None,
    columns: Sequence[str] = (),
    decay: GroupDecay | None = None,
) -> Method:
    """Train a gate for every unit with the weights, under a penalty on the expected cost; shut ones leave the network.

    In the search (`espalier.parts.gates.stages`) the loss is evaluated twice per step, at antithetic samples of the
    gates, the first time without a graph. It has to be taken from ``session.loss(batch)``; to evaluate the network in
    another way while it trains do so within ``session.decided()``. A unit whose probability is below `low` at
    `patience` ends of epochs goes to sleep: it leaves the tensors and is kept aside. When the search ends all that are
    below 1/2 do. Unlike the paper's code both samples see the same mode of batch norms, gates are coupled through
    residual streams, flattening and heads, and the penalty is that of the coupled network;
    `espalier.parts.gates.expected.PerUnit` is the paper's.

    Args:
        stages: k over the training.
        penalty: on the probabilities; None for none.
        function: the gate's probability by its logit.
        estimator: of the gradient by the logits.
        rate: learning rate of the logits, by Adam.
        begin: probability at first.
        low: see above.
        patience: see above.
        judged: whether a network in eval mode multiplies its units by 1 (``hard``) or by their probability (``mean``).
        per_sample: whether every sample draws gates of its own: another sub-network for each, and less variance as far
            as samples are alike, at the price of a product per activation. The loss function of the session has to
            return one loss per sample. Axes over which norms run, or that are not read by linear or convolutional
            layers, have no gates then. What the gates of a sample do to others through batch norms is left out.
        every: how often units may leave.
        start: when they may for the first time.
        until: when for the last time, but for the last step of the training, after which what is shut leaves.
        axes: names or patterns of axes; None for all that may shrink and can have gates.
        columns: dimensions of parameters with a gate for every position, ``fc1.weight[1]`` for one; what these shut is
            masked. `ExpectedCost` does not know what they cost, `PerUnit` does.
        decay: a decay of the weights that gates multiply, by the probability of these; None for none.

    Raises MethodError for an argument that is not what it should be.
    """
    kind = Bernoulli(function, estimator, judged)
    settings = GateSettings(stages, kind, penalty, rate, begin, low, patience, axes is not None, decay)
    return gated(
        "npn",
        "prune",
        Gated(settings, per_sample=per_sample, columns=columns),
        SleepAndWake(),
        every=every,
        start=start,
        until=until,
        axes=axes,
        paper=NPN_PAPER,
        description="trains stochastic gates on units and removes those that stay shut",
    )


@register
def npn_growing(
    stages: Stages = _GROWING,
    penalty: GatePenalty | None = _COST,
    awake: Mapping[str, int] | None = None,
    waking: Waking = _ALGORITHM_1,
    fill: float = 0.0,
    fresh: bool = True,
    function: GateFunction = _SIGMOID,
    estimator: Estimator = _DISARM,
    rate: float = 1e-3,
    begin: float = 0.95,
    low: float = 0.1,
    patience: int = 5,
    judged: Judged = "hard",
    per_sample: bool = False,
    every: Steps | Epochs = _EVERY_EPOCH,
    start: Moment = 0.0,
    until: Moment = 1.0,
    axes: Sequence[str] | None = None,
    columns: Sequence[str] = (),
    decay: GroupDecay | None = None,
) -> Method:
    """As `npn_pruning`; and where the held-out loss has fallen, units wake in axes whose units are all in use.

    `waking` says when, and which. As it is by default that is Algorithm 1 of the paper: in the search, at the end of an
    epoch in which the held-out loss with the penalty is lower than when units came last, one unit comes in every axis
    in which all gates are at 1/2 or more and none fell asleep again. It is one that sleeps, with its own weights, or
    (`fresh`) a new one that nothing reads at first. `espalier.parts.gates.waking_gain.ByGain` wakes several at once,
    those of all axes whose predicted gain per parameter is largest. Both stop for good with
    ``when=WhileFalling(patience=...)`` (`espalier.parts.gates.waking`).

    Args:
        stages: k over the training.
        penalty: on the probabilities; None for none.
        awake: name or pattern of axes -> how many units are awake at first; the others fall asleep after
            the first step. None for all. Where the largest size is not to be allocated even for that step, build the
            network small instead, and leave `fresh` as it is.
        waking: when units wake, and which.
        fill: k times the logit of a unit that wakes.
        fresh: whether new units come where none sleep.
        function: as there.
        estimator: as there.
        rate: as there.
        begin: as there.
        low: as there.
        patience: as there.
        judged: as there.
        per_sample: as there.
        every: as there.
        start: as there.
        until: as there.
        axes: as there; None for all that may grow and can have gates.
        columns: as there.
        decay: as there.

    Raises MethodError for an argument that is not what it should be.
    """
    kind = Bernoulli(function, estimator, judged)
    settings = GateSettings(stages, kind, penalty, rate, begin, low, patience, axes is not None, decay)
    return gated(
        "npn",
        "grow",
        Gated(settings, waking, fill, fresh, awake, per_sample=per_sample, columns=columns),
        SleepAndWake(),
        every=every,
        start=start,
        until=until,
        axes=axes,
        paper=NPN_PAPER,
        description="wakes units under stochastic gates where the held-out loss has fallen",
        at_once=awake is not None,
    )
