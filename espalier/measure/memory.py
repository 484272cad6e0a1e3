"""How much memory a forward pass needs, by counting and not by asking a device."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from espalier.graph.trees import call_arguments
from espalier.measure.runtimes import for_inference


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves __init_subclass__ untyped
    """Adds up the storages that are alive, each once, and remembers the largest sum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: set[int] = set()

    def hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self.hold(one)
        return result


def peak_memory(model: nn.Module, example: Any) -> int:
    """Bytes that one eval-mode forward pass without gradients holds at most.

    Parameters and buffers, and of the results of operators those that are alive at once. Inputs are the caller's, and
    what kernels need for themselves (workspaces) is not seen.
    """
    args, kwargs = call_arguments(example)
    held = _Held()
    for tensor in (*model.parameters(), *model.buffers()):
        held.hold(tensor)
    given = held.now
    for one in tree_leaves((args, kwargs)):
        if isinstance(one, Tensor):
            held.hold(one)
    inputs = held.now - given
    held.most = held.now
    with for_inference(model), held:
        result = model(*args, **kwargs)
    del result
    return held.most - inputs


__all__ = ["peak_memory"]
