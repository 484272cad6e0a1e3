"""A network whose parameters are shared out among processes by `fully_shard`, and the plain one that edits are made to.

`fully_shard` knows the sizes of parameters from when it was applied. So there are two networks: a plain one, which has
the sizes and the buffers but no entries of parameters, and the live one, in which they are shared out. An edit changes
the plain one; then a new live one is made of it, by the user's own function, and filled tensor by tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from espalier.edit.whole import is_sharded, whole
from espalier.errors import ParallelError
from espalier.graph.named_tensors import tensor_table

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Shard = Callable[[nn.Module], Any]


class FullyShard:
    """A model to give to `attach` in place of a plain one, so that its parameters are shared out among all ranks.

    `model` is the live one, with which training steps are taken: another object after every edit, as its parameters
    are. `plain` has its sizes, and no values: whatever reads a parameter of it by mistake finds NaN.
    """

    def __init__(self, model: nn.Module, shard: Shard) -> None:
        """Share the parameters of a model out.

        Args:
            model: with the same values on every rank; it becomes `plain`.
            shard: applies `fully_shard`, with its mesh, policies and settings, to the parts of a model that it is given
                and to the whole; it is called with a copy of the model now and after every edit.

        Raises:
            ParallelError: it leaves parameters that are not sharded, or parameters are on another device than the mesh
                (offloaded ones), are no floating-point numbers, or were sharded before.
        """
        self.plain = model
        self._shard = shard
        table = tensor_table(model)
        parameters = {name: one for name, one in table.tensors.items() if isinstance(one, nn.Parameter)}
        for name, one in parameters.items():
            if is_sharded(one) or not one.is_floating_point() or one.is_meta:
                raise ParallelError(
                    f"{name} is a {type(one).__name__} of {one.dtype} on {one.device}; expected a plain tensor of "
                    "floating-point numbers with values. Give FullyShard the model before fully_shard is applied."
                )
        live = copy.deepcopy(model, {id(one): one for one in table.tensors.values()})
        self.model = self._sharded(live)
        self._looking = False
        self.hide()

    def fresh(self) -> nn.Module:
        """A new live model of the sizes of the plain one, whose parameters have no values yet."""
        table = tensor_table(self.plain)
        memo: dict[int, Any] = {}
        for one in table.tensors.values():
            memo[id(one)] = one
            if isinstance(one, nn.Parameter):
                memo[id(one)] = nn.Parameter(torch.empty_like(one, device="meta").contiguous(), one.requires_grad)
        live = self._sharded(copy.deepcopy(self.plain, memo))
        modes = {path: module.training for path, module in self.model.named_modules()}
        stores = [(module._buffers, dict(module._buffers)) for module in live.modules()]
        live.to_empty(device=next(iter(table.tensors.values())).device)
        for store, buffers in stores:
            store.update(buffers)
        for path, module in live.named_modules():
            module.training = modes.get(path, module.training)
        return live

    def values(self, meet: Callable[[str], object] | None = None) -> Mapping[str, Tensor]:
        """Every tensor with its entries: a parameter is put together when it is asked for, by all ranks.

        `meet` is called with its name before, where not all ranks are sure to ask for the same one.
        """
        return _Gathered(tensor_table(self.model).tensors, meet)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """The plain model has all values while this lasts."""
        self._looking = True
        self.show()
        try:
            yield
        finally:
            self.hide()
            self._looking = False

    def show(self) -> None:
        """Give the plain model all values, if somebody is looking."""
        if not self._looking:
            return
        values = self.values()
        for name, one in tensor_table(self.plain).tensors.items():
            if isinstance(one, nn.Parameter):
                _put(one, values[name])

    def hide(self) -> None:
        """Take the values of the plain model away."""
        for one in tensor_table(self.plain).tensors.values():
            if isinstance(one, nn.Parameter):
                _put(one, empty(one, tuple(one.shape)))

    def _sharded(self, model: nn.Module) -> nn.Module:
        """A copy of the model, sharded by the user's function, and looked over."""
        from torch.distributed.tensor import DTensor  # slow to import

        self._shard(model)
        for name, one in model.named_parameters():
            if not isinstance(one, DTensor):
                raise ParallelError(
                    f"shard= leaves {name} as it is; have it call fully_shard on the whole model last, without "
                    "ignored_params."
                )
            if not one.to_local().is_meta and one.to_local().device.type != one.device_mesh.device_type:
                raise ParallelError(
                    f"{name} is kept on {one.to_local().device.type} by an offload policy, where it cannot be put "
                    f"together over the mesh of {one.device_mesh.device_type}; shard without offload_policy."
                )
        return model


class _Gathered(Mapping[str, Tensor]):
    """Tensors by name, each put together when it is asked for and kept by nobody."""

    def __init__(self, tensors: Mapping[str, Tensor], meet: Callable[[str], object] | None) -> None:
        self._tensors, self._meet = tensors, meet

    def __getitem__(self, name: str) -> Tensor:
        if self._meet is not None:
            self._meet(name)
        return whole(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _put(parameter: nn.Parameter, value: Tensor) -> None:
    """Have a parameter of the plain model hold other entries, which is no change of the network."""
    with torch.no_grad(), _unsafe_preserve_version_counter(parameter):
        parameter.set_(value)  # type: ignore[call-overload]


def shared_out(value: Tensor, like: DTensor) -> DTensor:
    """A tensor that every rank has as a whole, sharded as `like`."""
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def fill_shards(tensor: DTensor, value: Tensor) -> None:
    """Give a sharded tensor the entries of a whole one of its shape."""
    with torch.no_grad():
        tensor.to_local().copy_(shared_out(value, tensor).to_local())


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of that shape which takes no memory, and in which every entry is NaN."""
    return torch.full((), torch.nan, dtype=like.dtype, device=like.device).expand(shape)


__all__ = ["FullyShard", "empty", "fill_shards", "shared_out"]
