"""The state of a session as what JSON can hold, and what of it is checked before a session takes it over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from espalier.edit import births
from espalier.errors import CheckpointError
from espalier.parts.timing.trigger import Metric
from espalier.train.controller import Running
from espalier.train.events import Event
from espalier.train.slowing import Stage

FORMAT = 3


@dataclass(frozen=True)
class State:
    """All that a session knows, apart from the network."""

    seed: int
    step: int
    epoch: int
    boundary: int
    """Steps that were done when the last epoch ended."""
    metrics: Sequence[Metric]
    sizes: Mapping[str, int]
    births: births.Births
    stages: Sequence[Stage]
    running: Sequence[Running]
    events: Sequence[Event]

    def to_json(self) -> dict[str, Any]:
        """As JSON, with the tensors of memories in it (`espalier.train.state_tensors`)."""
        return {
            "format": FORMAT,
            "seed": self.seed,
            "step": self.step,
            "epoch": self.epoch,
            "boundary": self.boundary,
            "metrics": [[one.epoch, one.value, one.mode] for one in self.metrics],
            "sizes": dict(self.sizes),
            "births": births.to_json(self.births),
            "stages": [one.to_json() for one in self.stages],
            "methods": [one.to_json() for one in self.running],
            "events": [event.to_json() for event in self.events],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], running: Sequence[Running], sizes: Mapping[str, int]) -> State:
        """What `to_json` gave, for a session with the methods of `running` and a network of these sizes.

        Raises:
            CheckpointError: it is damaged, of another version, of other methods or of another network.
        """
        try:
            if data["format"] != FORMAT:
                raise CheckpointError(
                    f"the session's state has format {data['format']!r}; this version of Espalier reads {FORMAT}."
                )
            _check_sizes(dict(data["sizes"]), sizes)
            if len(data["methods"]) != len(running):
                raise CheckpointError(
                    f"the state was saved with {len(data['methods'])} methods, and this session has {len(running)}; "
                    "make the session with the methods that it was saved with."
                )
            restored = [Running.from_json(each, one.method) for each, one in zip(data["methods"], running, strict=True)]
            return cls(
                int(data["seed"]),
                int(data["step"]),
                int(data["epoch"]),
                int(data["boundary"]),
                [Metric(int(epoch), value, str(mode)) for epoch, value, mode in data["metrics"]],
                dict(sizes),
                births.from_json(data["births"], sizes),
                [Stage.from_json(one) for one in data["stages"]],
                restored,
                [Event.from_json(one) for one in data["events"]],
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"this is no state of a session: {type(error).__name__}: {error}.") from error


def _check_sizes(saved: Mapping[str, int], present: Mapping[str, int]) -> None:
    if saved != present:
        name = next(name for name in {**saved, **present} if saved.get(name) != present.get(name))
        raise CheckpointError(
            f"the state was saved with {saved.get(name)} units in {name}, and the network has {present.get(name)}; "
            "load the network that was saved with it first, with espalier.load."
        )


__all__ = ["State"]
