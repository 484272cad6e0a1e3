"""`shrink`: from a trained network to a smaller one that meets a target, in one call."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from espalier.attaching import LimitLike
from espalier.errors import ShrinkError
from espalier.oneshot.asked import Evaluate, Mode, Score, Train
from espalier.oneshot.blocks import TRIAL
from espalier.oneshot.bounds import Bounds
from espalier.oneshot.folder import Kept, done
from espalier.oneshot.meter import TRAINED, Meter
from espalier.oneshot.result import Shrunk
from espalier.oneshot.rounds import Round
from espalier.oneshot.run import Run
from espalier.oneshot.search import Search
from espalier.oneshot.target import target_of
from espalier.oneshot.tuning import Distillation, Tuning, shares
from espalier.oneshot.worth import watched
from espalier.parts.budget import Budget
from espalier.parts.units.rounding import check_round_to
from espalier.parts.units.where import choose_axes

_DISTILLATION = Distillation()


def shrink(
    model: nn.Module,
    example: Any,
    *,
    target: Budget,
    train: Train,
    evaluate: Evaluate,
    max_drop: float = 0.01,
    max_training: float | None = None,
    mode: Mode = "max",
    teacher: nn.Module | None = None,
    distillation: Distillation = _DISTILLATION,
    rounds: int = 3,
    round_to: int | Literal["auto"] = "auto",
    axes: Sequence[str] | None = None,
    keep: Iterable[str] = (),
    limits: Mapping[str, LimitLike] | None = None,
    min_fraction: float = 0.1,
    refit: bool = True,
    blocks: bool = True,
    seed: int = 0,
    folder: str | Path | None = None,
    on_round: Callable[[Round], None] | None = None,
) -> Shrunk:
    """Make a trained network smaller until it meets a target, and say whether it is still as good.

    The model itself stays as it is: a copy is edited, trained and returned. In every round units are removed until the
    network costs a step less, what reads them is refitted, and `train` is called. Which units go is told by how much
    the outputs would change without them, on inputs that `evaluate` was seen to give to the network; no labels are
    used. The target is met by measuring what plans lead to, before anything is trained.

    Args:
        model: a trained network, on its device; it may be its own `teacher`.
        example: example inputs, a tensor, a tuple of positional or a dict of keyword arguments; times, FLOPs and memory
            are those of a forward pass on them.
        target: `Latency` (``Latency(ms=12, measure=run)``, ``Latency(0.5, of="initial")``), `FLOPs`, `Parameters` or
            `Memory`. `measure` is a function of a network and example inputs that returns seconds, such as
            `espalier.measure.Eager()`, `Compiled()` or `OnnxRuntime()`; it is called many times.
        train: called as ``train(model, tuning)`` after every pruning, with the network in train mode. It trains it in
            place for ``tuning.share`` of the whole training, with an optimizer of its own, on ``tuning.loss(outputs,
            inputs, own_loss)``, in which the teacher has its part (`Tuning`).
        evaluate: called as ``evaluate(model)``, in eval mode; returns how good the network is, on held-out data.
        max_drop: how much worse than at first that may be.
        max_training: how much everything may take that runs the network on data, in samples trained on with the
            network as it was given; 0.2 * epochs * len(data) is a fifth of its training. Training, the teacher, trials,
            scoring, refitting and evaluation count, by their FLOPs; passes that are timed do not. ``tuning.samples``
            then says how long `train` may train; longer is an error. None: as long as `train` likes.
        mode: whether a good score is large (``max``, as accuracy) or small (``min``, as a loss).
        teacher: network to learn from, in eval mode and without gradients; nothing about it changes.
        distillation: how much is learnt from it.
        rounds: prunings with training after each; the costs in between go down by the same factor each time.
        round_to: sizes at which all matrices divide by this; ``auto`` measures which suit the target's runtime.
        axes: names or patterns of the axes to shrink; None for all that may, the sizes of attention heads aside.
        keep: modules or axes, by name, that have to stay as they are.
        limits: axis -> (smallest, largest) size, or `Limits`, as in `attach`.
        min_fraction: part of its units that every axis keeps.
        refit: whether layers that read what goes are refitted.
        blocks: whether whole residual blocks may go too, where the target is a latency and `axes` names none. How many,
            is found by trying up to four numbers of them, for 3% of the training each; with one round it is the network
            of the best of these that is trained on.
        seed: seeds what is drawn.
        folder: where rounds are kept; called again with the same arguments, `shrink` goes on after the last one there.
        on_round: called with every round as it ends.

    Raises:
        ShrinkError: an argument is not what it should be, no axis may shrink, `evaluate` gives no number,
            `max_training` leaves nothing to train with, or `train` or `evaluate` failed: the error's ``reached`` is
            then what was reached before, if anything was.
        CaptureError: the model's forward failed on the example inputs.
        PlanError: a name in `keep`, `limits` or `axes` is unknown.
    """
    _check(rounds, round_to, min_fraction, max_drop, max_training, mode)
    score = Score(evaluate, mode)
    kept = Kept(folder, {
        "target": repr(target), "rounds": rounds, "round_to": round_to, "max_drop": max_drop, "mode": mode,
        "axes": None if axes is None else list(axes), "min_fraction": min_fraction, "refit": refit, "blocks": blocks,
        "seed": seed, "max_training": max_training,
    })  # fmt: skip
    net = _copied(model)
    bounds = Bounds(tuple(keep), dict(limits or {}), min_fraction)
    structure = bounds.attached(net, example)
    chosen = choose_axes(structure, "prune", axes)
    free = [name for name, why in chosen.items() if why is None]
    if not free:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(chosen.items())[:4])
        raise ShrinkError(f"no axis of the network may shrink ({reasons or 'it has none'}).")
    meter = Meter(structure, max_training, teacher)
    with watched(net, seed) as inputs, meter.watching(net, TRAINED):
        first = score.of(net)
    if not math.isfinite(first):
        raise ShrinkError(f"evaluate: expected a number for the network as it was given, found {first!r}.")
    search = Search(structure, free, target_of(target, model, example))
    run = Run(model, example, search, score, max_drop, kept, inputs, seed, meter, on_round)
    run.begin(first)
    if blocks and axes is None:
        run.consider_blocks(bounds.keep)
    settled = run.settled_at_once()
    if settled is not None:
        return settled
    run.prepare(round_to)
    run.drop_blocks(train, Tuning(0, rounds, TRIAL, teacher, distillation), refit)
    for number, share in enumerate(shares(rounds, run.left), 1):
        if number > done(kept.rounds):
            tuning = Tuning(number, rounds, share, teacher, distillation)
            if not run.pruned(tuning, refit):
                break
            run.trained(train, tuning)
    return run.result()


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ShrinkError(
            f"the model cannot be copied ({type(error).__name__}: {error}), and shrink works on a copy; take away what "
            "cannot be copied, such as tensors that were computed from others and are kept in attributes."
        ) from error


def _check(
    rounds: object, round_to: object, min_fraction: object, max_drop: object, max_training: object, mode: object
) -> None:
    if type(rounds) is not int or rounds < 1:
        raise ShrinkError(f"rounds: expected a whole number of at least 1, found {rounds!r}.")
    if round_to != "auto":
        check_round_to(round_to)
    for name, value, least, most in (
        ("min_fraction", min_fraction, 0, 1), ("max_drop", max_drop, 0, math.inf),
        ("max_training", 0 if max_training is None else max_training, 0, math.inf),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ShrinkError(f"{name}: expected a number from {least} to {most}, found {value!r}.")
    if mode not in get_args(Mode):
        raise ShrinkError(f"mode: expected 'max' or 'min', found {mode!r}.")


__all__ = ["shrink"]
