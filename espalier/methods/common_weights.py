"""What methods share that prune and grow single weights: as `espalier.methods.common` for units."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from espalier.errors import MethodError
from espalier.method import Method
from espalier.methods.common_timing import Timing
from espalier.parts.budget import Sparsity
from espalier.parts.clock import Epochs, Moment, Steps
from espalier.parts.memory import Memory
from espalier.parts.score import Score
from espalier.parts.timing.amount import Amount, Fading, Ramp, Shape, Steady
from espalier.parts.timing.recovery import Accept, Recovery
from espalier.parts.timing.schedule import Schedule
from espalier.parts.timing.trigger import Trigger
from espalier.parts.weights.densities import Density
from espalier.parts.weights.keep import NM, Entries, Keep, Per

_EVERY_EPOCH = Epochs(1)
_AS_BEFORE = Recovery()
_SPARSITY = 0.9


class WeightScheduling(Timing, total=False):
    """Arguments of every method of the level ``weights``. Growing is from the first step to 0.75 by default."""

    axes: Sequence[str] | None
    """Names or patterns of parameters; None (default) for all matrices and filters, biases and norms left out."""
    budget: Sparsity | None
    """The fraction of weights that is to be masked in the end; ``Sparsity(0.9)`` if no amount is given either."""
    density: Density
    """How live weights are shared out: ``uniform``, ``erk``, ``present`` or ``global``."""


class WeightPruning(WeightScheduling, total=False):
    """Arguments of every method that prunes single weights."""

    amount: float | None
    """Instead of a budget: the fraction of live weights that each event masks."""
    fading: bool
    """With an amount: it falls to zero by a cosine over the events (default False)."""
    shape: Shape
    """How events approach the budget: ``cubic`` (default; Zhu & Gupta 2017) or another one."""
    pattern: Keep | None
    """``NM(2, 4)`` or ``Blocks(4, 4)`` in place of single weights anywhere; None (default). It replaces `density`, and
    an N:M pattern has a budget of its own."""


def pruning_weights(
    name: str,
    score: Score,
    *,
    paper: str,
    description: str,
    memory: Callable[[], Memory] | None = None,
    per: Per = "tensor",
    density: Density = "uniform",
    pattern: Keep | None = None,
    budget: Sparsity | None = None,
    amount: float | None = None,
    fading: bool = False,
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
    axes: Sequence[str] | None = None,
) -> Method:
    """A method that masks weights, from its score and the arguments of `WeightPruning`.

    Raises:
        MethodError: an argument is not what it should be.
    """
    if isinstance(pattern, NM):
        own = Sparsity(1 - pattern.n / pattern.m)
        if amount is not None or budget not in (None, own):
            raise MethodError(f"{pattern!r} leaves {own!r}; give it no other budget and no amount.")
        budget = own
    if amount is not None and budget is not None:
        raise MethodError(f"these exclude each other, so give one of them: {budget=} and {amount=}.")
    if fading and amount is None:
        raise MethodError("fading=True is for an amount=, the fraction of the weights that goes at first.")
    how_far: Amount = Ramp(budget or Sparsity(_SPARSITY), shape)
    if amount is not None:
        how_far = Fading(amount) if fading else Steady(amount)
    return Method(
        name,
        "prune",
        score,
        pattern if pattern is not None else Entries(density, "tensor" if density == "global" else per),
        Schedule(how_far, every, start, until, when, cooldown, max_events, stop),
        memory=memory,
        recovery=recovery,
        accept=accept,
        axes=axes,
        min_fraction=0.0,
        level="weights",
        paper=paper,
        description=description,
    )


def growing_weights(
    name: str,
    score: Score,
    *,
    paper: str,
    description: str,
    density: Density = "erk",
    budget: Sparsity | None = None,
    every: Steps | Epochs = _EVERY_EPOCH,
    start: Moment = 0.0,
    until: Moment = 0.75,
    when: Trigger | None = None,
    cooldown: Steps | Epochs | None = None,
    max_events: int | None = None,
    stop: Trigger | None = None,
    recovery: Recovery = _AS_BEFORE,
    accept: Accept | None = None,
    axes: Sequence[str] | None = None,
) -> Method:
    """A method that lets weights live, up to its budget at every event, from its score and `WeightScheduling`.

    Raises:
        MethodError: an argument is not what it should be.
    """
    return Method(
        name,
        "grow",
        score,
        Entries(density),
        Schedule(
            Ramp(budget or Sparsity(_SPARSITY), "constant"), every, start, until, when, cooldown, max_events, stop
        ),
        recovery=recovery,
        accept=accept,
        axes=axes,
        min_fraction=0.0,
        level="weights",
        paper=paper,
        description=description,
    )


def once_at_the_start(options: WeightPruning) -> WeightPruning:
    """The options with one event after the first step in place of the shared schedule, unless they say otherwise."""
    first: WeightPruning = {"every": Steps(1), "start": 0.0, "until": 1.0, "max_events": 1, "shape": "constant"}
    return {**first, **options}
