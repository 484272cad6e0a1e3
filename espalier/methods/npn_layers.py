"""Neural Plasticity Networks on layers and cells: a stochastic gate for every residual branch."""

from __future__ import annotations

from collections.abc import Sequence

from espalier.method import Method, register
from espalier.methods.common_gates import NPN_PAPER, gated
from espalier.parts.clock import Epochs, Moment, Steps
from espalier.parts.depth.places import Removable
from espalier.parts.depth.select import Rank
from espalier.parts.gates.expected import GatePenalty
from espalier.parts.gates.expected_levels import ExpectedLayers
from espalier.parts.gates.kinds import Bernoulli, GateKind
from espalier.parts.gates.layer_memory import GatedLayers
from espalier.parts.gates.planning import RemoveShut
from espalier.parts.gates.settings import GateSettings
from espalier.parts.gates.stages import Stages

_STAGES, _COST, _KIND, _EVERY_EPOCH = Stages(7.0, 0.25, 0.75), ExpectedLayers(1e-2), Bernoulli(), Epochs(1)


@register
def npn_layers(
    stages: Stages = _STAGES,
    penalty: GatePenalty | None = _COST,
    kind: GateKind = _KIND,
    rate: float = 1e-3,
    begin: float = 0.95,
    low: float = 0.1,
    patience: int = 5,
    kept: int = 0,
    every: Steps | Epochs = _EVERY_EPOCH,
    start: Moment = 0.0,
    until: Moment = 1.0,
    axes: Sequence[str] | None = None,
) -> Method:
    """As `espalier.prune.NPN`, with a gate for every block that hands on its input where it is removed.

    The paper names gates on layers as future work. A gate multiplies what makes the branch of a residual block; shut,
    it leaves the stream as it is. Blocks whose gates stay shut are removed.

    Args:
        stages: k over the training.
        penalty: on the probabilities; None for none.
        kind: how gates are drawn and learn: `Bernoulli` or `HardConcrete`.
        rate: learning rate of the logits, by Adam.
        begin: probability at first.
        low: a block whose probability is below it at `patience` ends of epochs goes; when the search ends, all that
            are judged as shut do.
        patience: see above.
        kept: at least so many blocks of each stage stay.
        every: how often blocks may go.
        start: when they may for the first time.
        until: when for the last time, but for the last step of the training.
        axes: names or patterns of modules; None for all blocks that can have a gate.

    Raises MethodError for an argument that is not what it should be.
    """
    places, settings = Removable(kept, "entry"), GateSettings(stages, kind, penalty, rate, begin, low, patience)
    return gated(
        "npn-layers",
        "prune",
        GatedLayers(settings, places, axes),
        RemoveShut(),
        every=every,
        start=start,
        until=until,
        axes=axes,
        paper=NPN_PAPER,
        description="trains stochastic gates on residual blocks and removes those that stay shut",
        select=Rank(),
        level="layers",
        places=places,
    )
