"""Dropout on the units of any axis: gates of a fixed probability. It prunes at every step, and nothing for good."""

from __future__ import annotations

from collections.abc import Sequence

from espalier.method import Method, register
from espalier.methods.common_gates import gated
from espalier.parts.clock import Epochs, Moment, Steps
from espalier.parts.gates.dropout import Dropout
from espalier.parts.gates.memory import Gated
from espalier.parts.gates.planning import KeepAll
from espalier.parts.gates.settings import GateSettings
from espalier.parts.gates.stages import Stages

_EVERY_EPOCH = Epochs(1)


@register
def dropout(
    rate: float = 0.5,
    inverted: bool = True,
    during: tuple[float, float] = (0.0, 1.0),
    every: Steps | Epochs = _EVERY_EPOCH,
    start: Moment = 0.0,
    until: Moment = 1.0,
    axes: Sequence[str] | None = None,
) -> Method:
    """Leave units out at random while the network trains, whole coupled ones, on any axis and without a module for it.

    A unit is left out of a step for the whole batch. The loss has to be taken from ``session.loss(batch)``. A rate of 0
    is plain training, to the bit. Inverted dropout multiplies what is left by 1 / (1 - rate) and needs no more; the
    original multiplies by 1 - rate when the network is judged, and for good at the first event after its time.

    Args:
        rate: probability of being left out.
        inverted: see above.
        during: from where to where in the training, as fractions of it.
        every: how often to look whether the time is over.
        start: when to look for the first time.
        until: when for the last time, but for the last step of the training.
        axes: names or patterns of axes; None for all that may shrink and can have gates.

    Raises MethodError for an argument that is not what it should be.
    """
    settings = GateSettings(Stages(0.0, *during), Dropout(rate, inverted), None, strict=axes is not None)
    return gated(
        "dropout",
        "prune",
        Gated(settings),
        KeepAll(),
        every=every,
        start=start,
        until=until,
        axes=axes,
        paper="Srivastava et al. 2014, Dropout (JMLR 15:1929-1958)",
        description="leaves units out at random at every step, and none for good",
    )
