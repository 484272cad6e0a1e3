"""What methods share that remove and add whole layers and cells: as `espalier.methods.common` for units."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from espalier.method import Method
from espalier.methods.common_timing import Timing
from espalier.parts.budget import Budget, Units
from espalier.parts.clock import Epochs, Moment, Steps
from espalier.parts.depth.places import Places
from espalier.parts.depth.select import Rank
from espalier.parts.goal import Direction
from espalier.parts.memory import Memory
from espalier.parts.score import Score
from espalier.parts.timing.amount import Amount, Free, Ramp, Shape
from espalier.parts.timing.recovery import Accept, Recovery
from espalier.parts.timing.schedule import Schedule
from espalier.parts.timing.trigger import Trigger

_EVERY_EPOCH = Epochs(1)
_AS_BEFORE = Recovery()


class LayerOptions(Timing, total=False):
    """Arguments of every method of the level ``layers``."""

    axes: Sequence[str] | None
    """Names or patterns of modules, as they are at each event, when others may have come or gone before; None (default)
    for the blocks of the network (`espalier.parts.depth.places`)."""
    budget: Budget | None
    """What the network may cost in the end. In ``Units`` every layer or cell that the method looks at counts as one:
    ``Units(0.5, of="initial")``, half of the layers, if neither this nor `per_event` is given (2.0 to grow)."""
    per_event: int | None
    """The largest number of layers that go or come in one event; None (default): as many as the budget asks for.
    Without a budget growing goes on, and pruning until each stage has what it keeps."""
    per_cost: bool
    """Whether scores are divided by what a layer costs in the budget's currency (default False)."""
    shape: Shape
    """How events approach the budget: ``linear`` (default) or another one; ``constant`` with `per_event`."""


def of_layers(
    name: str,
    direction: Direction,
    score: Score,
    places: Places,
    *,
    paper: str,
    description: str,
    memory: Callable[[], Memory] | None = None,
    budget: Budget | None = None,
    per_event: int | None = None,
    per_cost: bool = False,
    shape: Shape | None = None,
    every: Steps | Epochs = _EVERY_EPOCH,
    start: Moment = 0.1,
    until: Moment | None = None,
    when: Trigger | None = None,
    cooldown: Steps | Epochs | None = None,
    max_events: int | None = None,
    stop: Trigger | None = None,
    recovery: Recovery = _AS_BEFORE,
    accept: Accept | None = None,
    axes: Sequence[str] | None = None,
) -> Method:
    """A method that removes or adds layers, from its score, its candidates and the arguments of `LayerOptions`.

    Raises:
        MethodError: an argument is not what it should be.
    """
    growing = direction == "grow"
    if budget is None and per_event is None:
        budget = Units(2.0 if growing else 0.5, of="initial")
    last = until if until is not None else 0.6 if growing else 0.7
    way = shape or ("linear" if per_event is None else "constant")
    how_far: Amount = Free() if budget is None else Ramp(budget, way)
    return Method(
        name,
        direction,
        score,
        Rank(per_cost, per_event),
        Schedule(how_far, every, start, last, when, cooldown, max_events, stop),
        memory=memory,
        recovery=recovery,
        accept=accept,
        axes=axes,
        min_fraction=0.0,
        level="layers",
        places=places,
        paper=paper,
        description=description,
    )


__all__ = ["LayerOptions", "of_layers"]
