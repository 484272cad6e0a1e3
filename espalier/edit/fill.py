"""What new units start from, by the role of the slot: neutral for the function, ready to learn.

What is summed over (``contract``) starts at zero, so that new units contribute nothing: the outgoing side, never the
incoming one, which under batch norm would be amplified by 1/sqrt(eps). What produces the units starts at Gaussian
values as large as the tensor's own; scales, shifts and running statistics at the mean of their neighbours.
"""

from __future__ import annotations


import torch
from torch import Tensor

from espalier.edit.changes import Changes
from espalier.edit.contract import Contract
from espalier.edit.tensors import neighbours_mean
from espalier.errors import PlanError
from espalier.graph.dims import NEW, IntArray

_RANDOM = frozenset({"produce", "filter", "group", "lookup"})

Sources = tuple[IntArray | None, ...]


def fill(name: str, tensor: Tensor, sources: Sources, changes: Changes, contract: Contract, seed: int) -> Tensor | float:
    """Values for the new positions of one tensor: a tensor of its new shape, or one number.

    Raises:
        PlanError: the tensor holds values that are not finite, so that nothing sensible can be drawn from them.
    """
    roles = _roles(name, sources, changes)
    if not roles or tensor.numel() == 0:
        return 0.0
    if not tensor.is_floating_point():
        return 0.0
    compensation = contract.compensation_for(name)
    kinds = set(roles.values())
    zero_dims = [dim for dim, role in roles.items() if role == "contract"]
    if compensation == "random":
        zero_dims, kinds = [], {"produce"}
    if compensation == "zero" or (zero_dims and len(zero_dims) == len(roles)):
        return 0.0
    if compensation != "mean" and kinds & _RANDOM and tensor.dim() > 1:
        result = _gaussian(name, tensor, sources, seed)
    else:
        result = neighbours_mean(tensor, sources)
    for dim in zero_dims:
        source = sources[dim]
        assert source is not None
        new = torch.from_numpy((source == NEW).nonzero()[0]).to(tensor.device)
        result.index_fill_(dim, new, 0.0)
    return result


def _roles(name: str, sources: Sources, changes: Changes) -> dict[int, str]:
    """Dimension -> role of the grown axis there; summed-over wins where two axes grow in one dimension."""
    found: dict[int, str] = {}
    for number in changes.grown():
        for tensor, dim, role in changes.before.axes[number].slots:
            source = sources[dim] if tensor == name else None
            if source is not None and (source == NEW).any() and found.get(dim) != "contract":
                found[dim] = role
    return found


def _gaussian(name: str, tensor: Tensor, sources: Sources, seed: int) -> Tensor:
    shape = [n if source is None else len(source) for n, source in zip(tensor.shape, sources, strict=True)]
    spread = tensor.detach().float().std(correction=0) if tensor.numel() > 1 else tensor.detach().float().abs().mean()
    if tensor.device.type != "meta" and not bool(torch.isfinite(spread)):
        raise PlanError(
            f"{name} holds values that are not finite, so new units cannot be given values of its size; "
            "mend the training (a smaller learning rate, gradient clipping) or go back to a checkpoint before growing."
        )
    generator = torch.Generator().manual_seed(_mixed(seed, name))
    noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(device=tensor.device, dtype=tensor.dtype)
    return noise * spread.to(tensor)


def _mixed(seed: int, name: str) -> int:
    """A seed that differs between tensors and is the same in every process."""
    value = 1469598103934665603
    for byte in f"{seed}:{name}".encode():
        value = ((value ^ byte) * 1099511628211) % (1 << 63)
    return value


