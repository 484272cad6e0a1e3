"""What a peer has to do, and the training that it does it in."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import nn

from espalier.bench.training import Training
from espalier.suite.preparing import Prepared
from espalier.suite.watching import Record, Watching


class Peer(Protocol):
    """A package of others."""

    @property
    def package(self) -> str:
        """Its name where packages are installed from; cells of another version are other cells."""

    def train(self, prepared: Prepared, watching: Watching) -> Training:
        """Train what the cell asks for, to the end of its budget.

        Raises:
            RunError: it cannot do this cell, or is not installed; the text is the reason in the empty cell.
        """


Edit = Callable[[Training, int, int], nn.Module]
"""Training, which event, how many there are -> the network after it: the same one, changed, or another."""


class _Pause(Exception):
    """The training stops for an edit."""


def in_turns(
    prepared: Prepared, watching: Watching, model: nn.Module, moments: tuple[float, ...], edit: Edit, name: str
) -> Training:
    """Train a network that others change at some moments; the learning rate goes on along its schedule, and so does the
    optimizer's state of parameters that are still there. Where a package makes new parameters, it is lost."""
    assignment = prepared.assignment(())
    training = Training(assignment, model)
    watching.begin(training)

    def after_step(until: float) -> None:
        watching.after_step(training)
        if training.done >= until:
            raise _Pause

    number = 0
    while True:
        until = moments[number] if number < len(moments) else math.inf
        try:
            training.run(partial(after_step, until), watching.on_epoch, watching.on_event)
        except _Pause:
            number = sum(moment <= training.done for moment in moments)  # one step may go past several
            before, loss = training.cost(), _probed(training)
            changed = edit(training, number - 1, len(moments))
            training = Training(assignment, changed, follows=training)
            watching.on_event(_event(training, before, (loss, _probed(training)), name))
        else:
            return training


def _probed(training: Training) -> float:
    data = training.assignment.data
    return training.evaluate(data.x_val, data.y_val)[0]


def _event(training: Training, before: dict[str, int], loss: tuple[float, float], name: str) -> Record:
    after = training.cost()
    return {
        "step": training.step,
        "epoch": training.epoch + 1,
        "method": name,
        "action": "grow" if after["parameters"] > before["parameters"] else "prune",
        "axes": {},
        "masks": {},
        "layers": [],
        "weights": training.weights(),
        "depth": training.depth(),
        "parameters": [before["parameters"], after["parameters"]],
        "flops": [before["flops"], after["flops"]],
        "loss": list(loss),
        "contract": "",
        "why": "",
        "training_flops": training.training_flops,
        "seconds": round(training.seconds, 3),
    }


__all__ = ["Edit", "Peer", "in_turns"]
