"""What all trainers share: a structure and a session that begin, or go on, when the trainer's optimizer is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.adapters.records import Logger, logged
from espalier.attaching import LimitLike, attach
from espalier.errors import MethodError
from espalier.graph.trees import map_tensors
from espalier.method import Method
from espalier.structure import Structure
from espalier.train.events import Event
from espalier.train.outline import Outline, continued, outline_of, put_in_order, reshaped
from espalier.train.session import Session


def check_alone(processes: int) -> None:
    """Raise MethodError for several processes: edits inside the wrapper of a trainer would not be synchronised."""
    if processes > 1:
        raise MethodError(
            f"callbacks grow and prune in one process, found {processes}; attach to a DistributedDataParallel in a "
            "loop of your own (see the documentation on data parallel training)."
        )


@dataclass
class Driver:
    """Makes the session of a trainer, fresh or from an outline."""

    methods: Sequence[Method]
    example: Any
    """Example inputs, as for `espalier.attach`, at the original sizes; they are moved to the model's device."""
    loss: Callable[[nn.Module, Any], Tensor]
    """Model and batch -> loss, as `espalier.Session` wants it."""
    probe: Sequence[Any] = ()
    seed: int = 0
    loggers: Sequence[Logger] = ()
    keep: Iterable[str] = ()
    limits: Mapping[str, LimitLike] | None = None
    on_event: Callable[[Structure, Event], None] | None = None
    """Called with every event, before the loggers."""
    _structure: Structure | None = field(default=None, init=False)
    _session: Session | None = field(default=None, init=False)
    _outline: Outline | None = field(default=None, init=False)

    @property
    def session(self) -> Session:
        """The session. Raises MethodError before the training has begun."""
        if self._session is None:
            raise MethodError("there is no session before the training has begun.")
        return self._session

    @property
    def running(self) -> bool:
        """Whether there is a session."""
        return self._session is not None

    def reshape(self, model: nn.Module, outline: Outline, *, optimizer: Optimizer | None = None) -> None:
        """Give a freshly built model the sizes of an outline, before its values are loaded."""
        self._session, self._outline = None, outline
        self._structure = reshaped(
            outline, model, self._example(model), optimizer=optimizer, keep=self.keep, limits=self.limits
        )

    def begin(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> Session:
        """The session, now that the optimizer is there and holds the state that it goes on with.

        Raises:
            CheckpointError: the optimizer, or the methods, are others than those that were saved.
        """
        if self._structure is None or self._structure.model is not model:
            structure = attach(model, self._example(model), optimizer=optimizer, keep=self.keep, limits=self.limits)
            self._outline = None
        else:
            structure = self._structure
            if self._outline is not None:
                put_in_order(self._outline, model, optimizer)
            structure.train_with(optimizer)
        tell = logged(structure, *self.loggers)

        def on_event(event: Event) -> None:
            if self.on_event is not None:
                self.on_event(structure, event)
            tell(event)

        session = Session(
            structure, self.methods, loss=self.loss, probe=self.probe, total_steps=total_steps, seed=self.seed,
            on_event=on_event,
        )  # fmt: skip
        if self._outline is not None:
            continued(self._outline, session)
        self._structure, self._session, self._outline = structure, session, None
        return session

    def outline(self) -> dict[str, Any]:
        """The outline of the training as it is."""
        return outline_of(self.session)

    def _example(self, model: nn.Module) -> Any:
        device = next(model.parameters()).device
        return map_tensors(self.example, lambda tensor: tensor.to(device))


__all__ = ["Driver", "check_alone"]
