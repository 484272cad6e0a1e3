"""Replicas of a network under DistributedDataParallel: edited alike, and wrapped anew after every edit.

What a wrapper knows of its parameters, the buckets above all, is fixed when it is made. So a new one is made, with the
settings of the old one, and the old object takes over all that is in it: whoever holds the wrapper goes on with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from espalier.edit.plan import Plan
from espalier.errors import ParallelError
from espalier.parallel.ranks import Ranks
from espalier.peers import refuse_wrapped

_MEBI = 1024 * 1024
_KEPT_FLAGS = (
    "find_unused_parameters", "gradient_as_bucket_view", "static_graph", "skip_all_reduce_unused_params",
    "batched_grad_copy",
)  # fmt: skip
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
"""What `nn.Module` keeps for its users, and a wrapper does not use itself."""


class Replicas(Ranks):
    """One replica per process; see `espalier.peers.Peers`."""

    whole = True

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        """Raises ParallelError if the wrapper does what could not be done again after an edit."""
        check_wrapper(wrapper)
        group = wrapper.process_group
        super().__init__(dist.get_process_group_ranks(group), group, wrapper.device)
        self._wrapper = wrapper

    def live(self, model: nn.Module) -> nn.Module:
        """The wrapper."""
        return self._wrapper

    def meet(self, what: str, plan: Plan | None, sizes: Mapping[str, int]) -> None:
        """Raise ParallelError unless all are about to do the same, and the wrapper can be made anew."""
        check_wrapper(self._wrapper)
        refuse_wrapped(self._wrapper.module, self._wrapper)
        super().meet(what, plan, sizes)

    def rebind(self) -> None:
        """Make the wrapper anew."""
        parameters = tuple(self._wrapper.module.parameters())
        # making it sends the values of rank 0 to all, which are what they have already: no change that ends an undo
        with warnings.catch_warnings(), _unsafe_preserve_version_counter(parameters):
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for broadcast_buffers
            fresh = DistributedDataParallel(self._wrapper.module, **_settings(self._wrapper))
        for hook, state in _comm_hooks(self._wrapper):
            fresh.register_comm_hook(state, hook)
        old = vars(self._wrapper)
        kept = {name: old[name] for name in (*_HOOKS, "training") if name in old}
        old.clear()
        old.update(vars(fresh), **kept)

    def looking(self) -> AbstractContextManager[None]:
        """All tensors are here."""
        return nullcontext()


def check_wrapper(wrapper: DistributedDataParallel) -> None:
    """Raise ParallelError, by name, for what a wrapper does that could not be done again after an edit."""
    known: Mapping[str, Any] = vars(wrapper)
    for name, why in (
        ("mixed_precision", "it keeps copies of the parameters; use torch.autocast in its place"),
        ("_delay_all_reduce_params", "they are named one by one"),
        ("parameters_to_ignore", "they are named one by one; freeze them with requires_grad_(False) in its place"),
        ("_use_python_reducer", "compiled autograd reduces gradients in a way of its own"),
        ("buffer_hook", "it was registered for the buffers that there were"),
    ):
        if known.get(name):
            raise ParallelError(
                f"the DistributedDataParallel wrapper has {name.strip('_')}, which cannot follow an edit: {why}."
            )
    if wrapper._join_config.enable:
        raise ParallelError(
            "the DistributedDataParallel wrapper was given to join(): ranks that have run out of batches do not come "
            "to edits. Give every rank the same number of batches (DistributedSampler with drop_last=True, for one)."
        )
    for hook, state in _comm_hooks(wrapper):
        if state is not None and not isinstance(state, dist.ProcessGroup):
            raise ParallelError(
                f"the communication hook {hook.__name__} keeps a {type(state).__name__} of the buckets that there "
                "were, which cannot follow an edit; use a hook without a state, such as fp16_compress_hook."
            )


def check_parallel_optimizer(optimizer: Optimizer | None) -> None:
    """Raise ParallelError for an optimizer of which every process has only a part of the state."""
    if "ZeroRedundancyOptimizer" in {kind.__name__ for kind in type(optimizer).__mro__}:  # importing it is slow
        raise ParallelError(
            "ZeroRedundancyOptimizer shares its state out among the ranks by parameters of the present sizes, which "
            "cannot follow an edit; use the optimizer inside it, or fully_shard."
        )


def _settings(wrapper: DistributedDataParallel) -> dict[str, Any]:
    """What the constructor needs for an equal wrapper. Flags that are off are left out: older torch lacks some."""
    known: Mapping[str, Any] = vars(wrapper)
    found: dict[str, Any] = {name: True for name in _KEPT_FLAGS if known.get(name)}
    found |= {"dim": wrapper.dim, "device_ids": wrapper.device_ids, "output_device": wrapper.output_device}
    if "device_mesh" in known:
        found["device_mesh"] = wrapper.device_mesh
    else:
        found["process_group"] = wrapper.process_group
    if not wrapper.broadcast_buffers:
        found["broadcast_buffers"] = False
    if known.get("bucket_bytes_cap_list"):
        found["bucket_cap_mb_list"] = [cap / _MEBI for cap in known["bucket_bytes_cap_list"]]
    elif not wrapper.bucket_bytes_cap_default:
        found["bucket_cap_mb"] = wrapper.bucket_bytes_cap / _MEBI
    return found


def _comm_hooks(wrapper: DistributedDataParallel) -> list[tuple[Callable[..., Any], object]]:
    return list(wrapper._comm_hooks)


__all__ = ["Replicas", "check_parallel_optimizer", "check_wrapper"]
