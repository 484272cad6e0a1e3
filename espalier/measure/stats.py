"""Looks at a live network without leaving a trace, and sets running statistics of new units."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from espalier.graph.eager import eagerly
from espalier.graph.topology import Topology

_STATISTICS = frozenset({"mean", "variance"})
Places = Mapping[_BatchNorm, Mapping[str, Tensor]]
"""Batch norm -> name of a running statistic -> positions of new units in it."""


@contextmanager
def without_a_trace(model: nn.Module) -> Iterator[None]:
    """Run the body in eager mode without gradients; modes, buffers and random state are then as they were before."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    stores = [(module._buffers, dict(module._buffers)) for module in modules if module._buffers]
    buffers = list({id(one): one for _, kept in stores for one in kept.values() if one is not None}.values())
    values = [buffer.clone() for buffer in buffers]
    with _random_state_kept(modules), torch.no_grad(), eagerly():
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                if module.training != mode:
                    module.training = mode
            for store, tensors in stores:
                store.clear()
                store.update(tensors)
            if buffers:
                torch._foreach_copy_(buffers, values)  # always: batch norm changes its own without a new version


def eval_loss(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """The loss in eval mode. Leaves no trace in the model or in any random state."""
    with without_a_trace(model):
        for module in model.modules():
            module.training = False
        return float(loss())


def new_statistics(
    model: nn.Module, topology: Topology, grown: Mapping[str, int], *, given: Collection[str] = ()
) -> Places:
    """The running statistics of batch norms that belong to the last units of axes, those in `given` tensors left out.

    `grown`: axis -> how many of its units are new.
    """
    places: dict[_BatchNorm, dict[str, Tensor]] = defaultdict(dict)
    for name, count in grown.items():
        record = topology.by_name[name]
        size = topology.sizes[record.number]
        for tensor, dim, role in record.slots:
            path, _, buffer = tensor.rpartition(".")
            module = model.get_submodule(path)
            if role in _STATISTICS and isinstance(module, _BatchNorm) and tensor not in given:
                positions = topology.slot(record.number, tensor, dim, role).index(range(size - count, size))
                known = places[module].get(buffer, torch.empty(0, dtype=torch.int64))
                places[module][buffer] = torch.cat([known, torch.tensor(positions)])
    return places


def every_statistic(model: nn.Module) -> Places:
    """The running statistics of all batch norms, at all positions."""
    return {
        module: {name: torch.arange(len(buffer)) for name, buffer in module.named_buffers() if buffer.dim() == 1}
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def kept_statistics(places: Places) -> Callable[[], None]:
    """Remember the statistics of these batch norms; what is returned puts them back."""
    values = [(buffer, buffer.clone()) for module in places for buffer in module.buffers()]

    def restore() -> None:
        for buffer, value in values:
            buffer.copy_(value)

    return restore


def calibrate(model: nn.Module, places: Places, forwards: Sequence[Callable[[], object]]) -> None:
    """Set running statistics at the given positions to their mean over some forward passes in train mode.

    Everything else, the other entries included, stays as it is; statistics that are not finite are not set.

    Args:
        model: every module keeps its mode, but the batch norms concerned, which use the statistics of the batch.
        places: what `new_statistics` gave.
        forwards: each runs the model on one batch.
    """
    if not places or not forwards:
        return
    sums = {(module, name): torch.zeros(len(at)) for module, found in places.items() for name, at in found.items()}
    momenta = [(module, module.momentum) for module in places]
    with without_a_trace(model):
        try:
            for module in places:
                module.training, module.momentum = True, 1.0  # the running statistics are then those of the batch
            for forward in forwards:
                forward()
                for (module, name), total in sums.items():
                    total += module.get_buffer(name)[places[module][name].to(total.device)].cpu()
        finally:
            for module, momentum in momenta:
                module.momentum = momentum
    for (module, name), total in sums.items():
        buffer, mean = module.get_buffer(name), total / len(forwards)
        if bool(torch.isfinite(mean).all()):
            buffer[places[module][name].to(buffer.device)] = mean.to(buffer)


@contextmanager
def _random_state_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    devices = {tensor.device for module in modules for tensor in module._parameters.values() if tensor is not None}
    kind = next(iter(sorted({one.type for one in devices} - {"cpu", "meta"})), "cuda")
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(sorted({one.index or 0 for one in devices if one.type == kind}), device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
