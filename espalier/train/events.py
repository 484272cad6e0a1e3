"""What happened to the network while it trained, one record per event."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from espalier.errors import CheckpointError
from espalier.measure.cost import Cost

Action = Literal["grow", "prune", "rejected", "stopped", "skipped", "failed"]


@dataclass(frozen=True)
class Event:
    """One event of a method."""

    step: int
    """Optimizer steps that were done."""
    epoch: int
    """Epochs that were done."""
    method: str
    """Name of the method."""
    action: Action
    """``grow`` or ``prune``; ``rejected``: the held-out loss became worse, and the edit was undone; ``stopped``: the
    method stopped for good; ``skipped``: the loss was not finite; ``failed``: an edit was refused and left out."""
    sizes: Mapping[str, tuple[int, int]]
    """Axis -> (size before, size after), of those that changed."""
    cost_before: Cost
    cost_after: Cost
    loss_before: float | None
    """Loss in eval mode; None if there was no batch yet, or if it was not finite."""
    loss_after: float | None
    """Loss in eval mode on the same batch."""
    contract: str
    """``exact``, ``bounded`` or ``changing``; empty if nothing changed."""
    why: str
    """Why the contract holds, or why nothing changed."""
    seconds: float
    masks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Parameter -> (live weights before, after), of those whose mask was set."""
    layers: tuple[str, ...] = ()
    """What came and went of layers and cells, in words."""

    def __str__(self) -> str:
        where = f"step {self.step}: {self.method}"
        sizes = [f"{axis} {before} -> {after}" for axis, (before, after) in self.sizes.items()]
        sizes += [f"{name} {before:,} -> {after:,} live" for name, (before, after) in self.masks.items()]
        sizes += self.layers
        return f"{where} ({self.action}) {', '.join(sizes)}" if sizes else f"{where} {self.action}: {self.why}"

    def to_json(self) -> dict[str, Any]:
        """The event as what JSON can hold."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "method": self.method,
            "action": self.action,
            "sizes": {axis: list(pair) for axis, pair in self.sizes.items()},
            "parameters": [self.cost_before.parameters, self.cost_after.parameters],
            "flops": [self.cost_before.flops, self.cost_after.flops],
            "loss": [self.loss_before, self.loss_after],
            "contract": self.contract,
            "why": self.why,
            "seconds": self.seconds,
            "masks": {name: list(pair) for name, pair in self.masks.items()},
            "layers": list(self.layers),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Event:
        """The event that `to_json` gave. Raises CheckpointError if it is none."""
        try:
            if data["action"] not in get_args(Action):
                raise ValueError(f"unknown action {data['action']!r}")
            parameters, flops, losses = data["parameters"], data["flops"], data["loss"]
            return cls(
                int(data["step"]),
                int(data["epoch"]),
                str(data["method"]),
                data["action"],
                {str(axis): (int(pair[0]), int(pair[1])) for axis, pair in data["sizes"].items()},
                Cost(int(parameters[0]), int(flops[0])),
                Cost(int(parameters[1]), int(flops[1])),
                None if losses[0] is None else float(losses[0]),
                None if losses[1] is None else float(losses[1]),
                str(data["contract"]),
                str(data["why"]),
                float(data["seconds"]),
                {str(name): (int(pair[0]), int(pair[1])) for name, pair in data.get("masks", {}).items()},
                tuple(map(str, data.get("layers", ()))),
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"this is no event of a session: {type(error).__name__}: {error}.") from error


def finite(loss: float) -> float | None:
    """The loss as an event records it: None where it is no number that JSON knows."""
    return loss if math.isfinite(loss) else None


__all__ = ["Action", "Event", "finite"]
