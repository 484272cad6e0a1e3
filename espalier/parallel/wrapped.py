"""Which wrapper a model is in when it is attached, and the processes that go with it."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from espalier.parallel.replicas import Replicas, check_parallel_optimizer
from espalier.peers import Alone, Peers


def unwrapped(model: nn.Module, optimizer: Optimizer | None) -> tuple[nn.Module, Peers]:
    """The model itself, and the processes that train it together.

    Raises:
        ParallelError: the wrapper does what could not be done again after an edit, or the optimizer shares its state
            out among the ranks.
    """
    if not isinstance(model, DistributedDataParallel):
        return model, Alone(model)
    check_parallel_optimizer(optimizer)
    return model.module, Replicas(model)


__all__ = ["unwrapped"]
