"""The processes that train one network together, as everything else sees them; alone, where there is one."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from espalier.edit.plan import Plan
from espalier.errors import ParallelError

T = TypeVar("T")


class Peers(Protocol):
    """What an edit and a session ask of the other processes. Every process makes every call, in the same order.

    What they find differs by no more than rounding, since they look at the same data; where it decides, the word of the
    one that leads counts.
    """

    @property
    def size(self) -> int:
        """How many processes there are."""

    @property
    def leads(self) -> bool:
        """Whether the word of this process counts; it also writes the files."""

    @property
    def whole(self) -> bool:
        """Whether all tensors of the model are here between events too."""

    def live(self, model: nn.Module) -> nn.Module:
        """What a training step calls in place of the model."""

    def meet(self, what: str, plan: Plan | None, sizes: Mapping[str, int]) -> None:
        """Before an edit of a network of these sizes: raise ParallelError everywhere unless all mean the same one."""

    def settle(self, what: str, error: Exception | None) -> None:
        """At the end of a piece of work: raise ParallelError everywhere if it failed in some processes only."""

    def rebind(self) -> None:
        """After the tensors have changed: have gradients synchronised again."""

    def looking(self) -> AbstractContextManager[None]:
        """While it lasts all tensors of the model are here."""

    def agreed(self, what: str, value: T) -> T:
        """What the process that leads has found: a plan, numbers, names."""

    def mean(self, what: str, value: float | None) -> float | None:
        """The mean over all processes that found one; None if none did."""

    def joined(self, batch: Any) -> Any:
        """The batch of all processes together."""

    def same(self, what: str, found: Mapping[str, Any]) -> None:
        """Raise ParallelError everywhere unless all have the same things under these names."""


class Alone:
    """One process. Refuses to edit a network that is in a live wrapper which would not know of it."""

    size = 1
    leads = True
    whole = True

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def live(self, model: nn.Module) -> nn.Module:
        """The model."""
        return model

    def meet(self, what: str, plan: Plan | None, sizes: Mapping[str, int]) -> None:
        """Raise ParallelError where gradients would not be synchronised any more."""
        refuse_wrapped(self._model)

    def settle(self, what: str, error: Exception | None) -> None:
        """There is nobody else."""

    def rebind(self) -> None:
        """There is nothing to bind."""

    def looking(self) -> AbstractContextManager[None]:
        """They always are."""
        return nullcontext()

    def agreed(self, what: str, value: T) -> T:
        """The value."""
        return value

    def mean(self, what: str, value: float | None) -> float | None:
        """The value."""
        return value

    def joined(self, batch: Any) -> Any:
        """The batch."""
        return batch

    def same(self, what: str, found: Mapping[str, Any]) -> None:
        """There is nobody else."""


def refuse_wrapped(model: nn.Module, known: nn.Module | None = None) -> None:
    """Raise ParallelError if the model is in a DistributedDataParallel other than the known one.

    Such a wrapper leaves no trace in the model, so that all objects are looked through; only in distributed processes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if _wraps(model, known):
        gc.collect()  # it may be one that nobody holds any more
    if _wraps(model, known):
        raise ParallelError(
            "the model is in a DistributedDataParallel that does not know of this edit: its replicas would go on with "
            "gradients that are not synchronised. Give the wrapper to espalier.attach (or espalier.load) in place of "
            "the model; then it is rebuilt after every edit."
        )


def _wraps(model: nn.Module, known: nn.Module | None) -> bool:
    wrappers = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    return any(other is model for one in wrappers if one is not known for other in one.modules())


def check_whole(peers: Peers, what: str) -> None:
    """Raise ParallelError for a network that is sharded: what reads its parameters would find no numbers."""
    if not peers.whole:
        raise ParallelError(
            f"{what} reads parameters, of which no process has all in a network that is sharded; call espalier.save on "
            "all ranks, load the checkpoint into a plain model in one process, and do it there."
        )


__all__ = ["Alone", "Peers", "check_whole", "refuse_wrapped"]
