"""What methods share that train gates: as `espalier.methods.common` for those that score units."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from espalier.method import Method
from espalier.parts.clock import Epochs, Moment, Steps
from espalier.parts.depth.places import Places
from espalier.parts.gates.gating import Planner
from espalier.parts.gates.plastic import Probability, SampledGates
from espalier.parts.goal import Direction, Level
from espalier.parts.memory import Memory
from espalier.parts.timing.amount import Free
from espalier.parts.timing.schedule import Schedule
from espalier.parts.units.select import Select, Uniform
from espalier.parts.weights.keep import Keep

NPN_PAPER = "Li & Ji 2020, Neural Plasticity Networks (arXiv:1908.08118)"
_UNITS = Uniform()


def gated(
    name: str,
    direction: Direction,
    memory: Callable[[], Memory],
    planner: Planner,
    *,
    every: Steps | Epochs,
    start: Moment,
    until: Moment,
    axes: Sequence[str] | None,
    paper: str,
    description: str,
    select: Select | Keep = _UNITS,
    level: Level = "units",
    places: Places | None = None,
    at_once: bool = False,
) -> Method:
    """A method whose gates are in `memory`, and whose `planner` makes of them what goes and comes.

    Nothing has to be scored for an event, and there is one more at the last step, after which gates are decided.
    """
    return Method(
        name,
        direction,
        Probability(),
        select,
        Schedule(Free(), every, start, until, at_once=at_once, at_last=True),
        memory=memory,
        gating=SampledGates(),
        planner=planner,
        axes=axes,
        min_fraction=0.0,
        level=level,
        places=places,
        paper=paper,
        description=description,
    )


__all__ = ["NPN_PAPER", "gated"]
