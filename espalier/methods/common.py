"""What all methods share: the arguments that say when, where and how far, and how they become parts.

A method of one's own takes ``**options: Unpack[Pruning]`` (or `Growing`) and passes them on to `pruning` (`growing`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from espalier.errors import MethodError
from espalier.method import Method, Penalty
from espalier.methods.common_timing import Timing
from espalier.parts.budget import Budget, FLOPs, Units
from espalier.parts.clock import Epochs, Moment, Steps
from espalier.parts.init import Init, Neutral
from espalier.parts.memory import Memory
from espalier.parts.score import Score
from espalier.parts.timing.amount import Amount, Ramp, Shape, Steady
from espalier.parts.timing.recovery import Accept, Recovery
from espalier.parts.timing.schedule import Schedule
from espalier.parts.timing.trigger import Trigger
from espalier.parts.units.refit import Refit
from espalier.parts.units.select import Scope, Select, Uniform, scope_of

_EVERY_EPOCH = Epochs(1)
_NEUTRAL = Neutral()
_UNIFORM = Uniform()
_AS_BEFORE = Recovery()


class Scheduling(Timing, total=False):
    """Arguments of every method that changes units: when it acts, where, and what follows."""

    axes: Sequence[str] | None
    """Names or patterns of axes; None (default) for all that may shrink, or that can grow without changing the outputs,
    except the size of attention heads."""
    round_to: int
    """Axes that change get sizes at which all matrices divide by this, such as 8 for fast kernels (default 1). An axis
    that has no such size within its bounds, because it is smaller, stays as it is."""
    uniform: bool
    """Whether axes of the same role in repeated layers keep one size, as one configuration of all layers needs it."""


class Pruning(Scheduling, total=False):
    """Arguments of every pruning method."""

    scope: Scope | None
    """``axis`` cuts all axes in proportion; ``global`` lets units compete by score per cost. None (default): what the
    method says, else ``axis``."""
    budget: Budget | None
    """What the network may cost after the last event; FLOPs(0.5, of="initial") if no amount is given either."""
    amount: float | None
    """Instead of a budget: the fraction of the present units that each event removes."""
    shape: Shape
    """How events approach the budget: ``cubic`` (default; Zhu & Gupta 2017), ``linear``, ``cosine``, ``exponential`` or
    ``constant`` (at once)."""
    min_fraction: float
    """Part of its first units that every axis keeps (default 0.1)."""
    grace: Steps | None
    """steps(n): units that came less than so many steps ago are not removed; None (default): any may go."""
    refit: bool
    """Whether layers that read what goes are refitted by ridge least squares on a few batches
    (`espalier.parts.units.refit`); False by default."""


class Growing(Scheduling, total=False):
    """Arguments of every growing method."""

    scope: Scope | None
    """``axis`` grows all axes in proportion; ``global`` lets units compete by score per cost. None (default): what the
    method says, else ``axis``."""
    width: float | None
    """Number of units after the last event, as a multiple of those at first; 1.5 if nothing else is given."""
    budget: Budget | None
    """Instead of a width: what the network may cost, which is never exceeded."""
    amount: float | None
    """Instead of either: the fraction of the present units that each event adds."""
    shape: Shape
    """How events approach width or budget: ``linear`` (default), ``cubic``, ``cosine``, ``exponential`` (by the same
    factor each time) or ``constant`` (at once)."""


def pruning(
    name: str,
    score: Score,
    *,
    paper: str,
    description: str,
    init: Init = _NEUTRAL,
    select: Select | None = None,
    penalty: Penalty | None = None,
    memory: Callable[[], Memory] | None = None,
    scope: Scope | None = None,
    budget: Budget | None = None,
    amount: float | None = None,
    shape: Shape = "cubic",
    every: Steps | Epochs = _EVERY_EPOCH,
    start: Moment = 0.1,
    until: Moment = 0.7,
    when: Trigger | None = None,
    cooldown: Steps | Epochs | None = None,
    max_events: int | None = None,
    stop: Trigger | None = None,
    recovery: Recovery = _AS_BEFORE,
    accept: Accept | None = None,
    grace: Steps | None = None,
    min_fraction: float = 0.1,
    axes: Sequence[str] | None = None,
    round_to: int = 1,
    uniform: bool = False,
    refit: bool = False,
) -> Method:
    """A pruning method from its score and the arguments of `Pruning`; `select` is what it does without a `scope`.

    Raises:
        MethodError: an argument is not what it should be.
    """
    how_far: Amount = _amount(Ramp(budget or FLOPs(0.5, of="initial"), shape), amount, budget=budget)
    return Method(
        name,
        "prune",
        score,
        scope_of(scope) if scope is not None else select or _UNIFORM,
        Schedule(how_far, every, start, until, when, cooldown, max_events, stop),
        init=Refit() if refit else init,
        penalty=penalty,
        memory=memory,
        recovery=recovery,
        accept=accept,
        grace=grace,
        axes=axes,
        min_fraction=min_fraction,
        round_to=round_to,
        uniform=uniform,
        paper=paper,
        description=description,
    )


def growing(
    name: str,
    score: Score,
    *,
    paper: str,
    description: str,
    init: Init = _NEUTRAL,
    select: Select | None = None,
    memory: Callable[[], Memory] | None = None,
    scope: Scope | None = None,
    width: float | None = None,
    budget: Budget | None = None,
    amount: float | None = None,
    shape: Shape = "linear",
    every: Steps | Epochs = _EVERY_EPOCH,
    start: Moment = 0.1,
    until: Moment = 0.6,
    when: Trigger | None = None,
    cooldown: Steps | Epochs | None = None,
    max_events: int | None = None,
    stop: Trigger | None = None,
    recovery: Recovery = _AS_BEFORE,
    accept: Accept | None = None,
    axes: Sequence[str] | None = None,
    round_to: int = 1,
    uniform: bool = False,
) -> Method:
    """A growing method from its score, its initialiser and the arguments of `Growing`; `scope` replaces `select`.

    Raises:
        MethodError: an argument is not what it should be.
    """
    target = budget or Units(1.5 if width is None else width, of="initial")
    how_far = _amount(Ramp(target, shape), amount, width=width, budget=budget)
    return Method(
        name,
        "grow",
        score,
        scope_of(scope) if scope is not None else select or _UNIFORM,
        Schedule(how_far, every, start, until, when, cooldown, max_events, stop),
        init=init,
        memory=memory,
        recovery=recovery,
        accept=accept,
        axes=axes,
        round_to=round_to,
        uniform=uniform,
        paper=paper,
        description=description,
    )


def _amount(ramp: Ramp, amount: float | None, **others: object) -> Amount:
    given = {name: value for name, value in {**others, "amount": amount}.items() if value is not None}
    if len(given) > 1:
        shown = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise MethodError(f"these exclude each other, so give one of them: {shown}.")
    return ramp if amount is None else Steady(amount)
