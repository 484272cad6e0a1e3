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
from espalier.edit.tensors import gather
from espalier.errors import PlanError
from espalier.graph.dims import NEW, IntArray

_STARTS = {"contract": "zero", "produce": "random", "filter": "random", "group": "random", "lookup": "random"}
"""Role -> how new positions start; every other role starts at the mean of the old positions."""

Sources = tuple[IntArray | None, ...]


def fill(
    name: str, tensor: Tensor, sources: Sources, changes: Changes, contract: Contract, seed: int
) -> Tensor | float:
    """Values for the new positions of one tensor: a tensor of its new shape, or one number.

    Raises:
        PlanError: the tensor holds values that are not finite, so that nothing sensible can be drawn from them.
    """
    starts = _starts(name, sources, changes, contract)
    if not starts or not tensor.is_floating_point() or set(starts.values()) == {"zero"}:
        return 0.0
    noise: Tensor | float = 0.0
    if "random" in starts.values() and tensor.dim() > 1:
        noise = _gaussian(name, tensor, sources, seed)
    result = gather(tensor, sources, noise)
    for dim, start in starts.items():
        source = sources[dim]
        assert source is not None
        new = torch.from_numpy((source == NEW).nonzero()[0]).to(tensor.device)
        if start == "zero":
            result.index_fill_(dim, new, 0.0)
        elif start == "mean" or tensor.dim() == 1:
            old = torch.from_numpy((source != NEW).nonzero()[0]).to(tensor.device)
            mean = result.index_select(dim, old).mean(dim, keepdim=True)
            size = [len(new) if other == dim else n for other, n in enumerate(result.shape)]
            result.index_copy_(dim, new, mean.expand(size))
    return result


def _starts(name: str, sources: Sources, changes: Changes, contract: Contract) -> dict[int, str]:
    """Dimension -> how its new positions start; zeros come last, so that they win where two dimensions are new."""
    found: dict[int, str] = {}
    for number in changes.grown():
        for tensor, dim, role in changes.before.axes[number].slots:
            source = sources[dim] if tensor == name else None
            if source is not None and (source == NEW).any() and found.get(dim) != "zero":
                found[dim] = contract.start_at(name, dim) or _STARTS.get(role, "mean")
    return dict(sorted(found.items(), key=lambda item: item[1] == "zero"))


def _gaussian(name: str, tensor: Tensor, sources: Sources, seed: int) -> Tensor:
    shape = [n if source is None else len(source) for n, source in zip(tensor.shape, sources, strict=True)]
    spread = tensor.detach().float().std(correction=0) if tensor.numel() > 1 else tensor.detach().float().abs().mean()
    if tensor.device.type != "meta" and not bool(torch.isfinite(spread)):
        raise PlanError(
            f"{name} holds values that are not finite, so new units cannot be given values of its size; "
            "mend the training (a smaller learning rate, gradient clipping) or go back to a checkpoint before growing."
        )
    if tensor.device.type != "meta" and not bool(spread):  # a tensor of equal values: as large as a fresh layer's
        spread = spread.new_tensor(1.0 / max(1, tensor[0].numel()) ** 0.5)
    generator = torch.Generator().manual_seed(_mixed(seed, name))
    noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(device=tensor.device, dtype=tensor.dtype)
    return noise * spread.to(tensor)


def _mixed(seed: int, name: str) -> int:
    """A seed that differs between tensors and is the same in every process (FNV-1a)."""
    value = 14695981039346656037
    for byte in f"{seed}:{name}".encode():
        value = ((value ^ byte) * 1099511628211) % (1 << 64)
    return value >> 1
