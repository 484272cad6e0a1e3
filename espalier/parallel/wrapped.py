"""What a model is wrapped in when it is attached, and the processes that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from espalier.compiled import uncompiled
from espalier.edit.store import Here, Store
from espalier.errors import ParallelError
from espalier.parallel.fully_shard import FullyShard
from espalier.parallel.replicas import Replicas, check_parallel_optimizer
from espalier.peers import Alone, Peers
from espalier.structure import Structure

Model = nn.Module | FullyShard


@dataclass(frozen=True)
class Unwrapped:
    """The model itself, the processes that train it together, and where its entries are."""

    model: nn.Module
    peers: Peers
    store: Store
    fully: FullyShard | None = None
    compiled: nn.Module | None = None
    """What `torch.compile` made of it, or of its wrapper, if that was given."""

    def bind(self, structure: Structure) -> Structure:
        """The structure of the model, which from now on is edited together with the other processes."""
        structure.surgery.peers, structure.surgery.store = self.peers, self.store
        return structure


def unwrapped(model: Model, optimizer: Optimizer | None, follow: Sequence[nn.Module]) -> Unwrapped:
    """What is inside of a wrapper, or the model itself.

    Raises:
        ParallelError: the wrapper does what could not be done again after an edit, the optimizer shares its state out
            among the ranks, the network inside is compiled, or copies are to follow a model that is shared out.
    """
    if isinstance(model, FullyShard):
        from espalier.parallel.shards import Shards  # slow to import

        if follow:
            raise ParallelError(
                "follow: copies of a network that is sharded cannot follow its edits; make them from session.model "
                "after an edit."
            )
        peers = Shards(model)
        return Unwrapped(model.plain, peers, peers.store, model)
    found = uncompiled(model)
    compiled = None if found is model else model
    if isinstance(found, DistributedDataParallel):
        check_parallel_optimizer(optimizer)
        if uncompiled(found.module) is not found.module:
            raise ParallelError(
                "expected a plain network inside of DistributedDataParallel, found a compiled one; compile the "
                "wrapper: torch.compile(DistributedDataParallel(model))."
            )
        return Unwrapped(found.module, Replicas(found), Here(), compiled=compiled)
    return Unwrapped(found, Alone(found), Here(), compiled=compiled)


__all__ = ["Model", "Unwrapped", "unwrapped"]
