"""Lets a model's forward run without leaving a trace in the model, in torch or in the generators of random numbers."""

from __future__ import annotations

import logging
import random
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from espalier.graph.eager import eagerly
from espalier.graph.visits import Visits

_Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]
_CONTAINERS = frozenset({dict, OrderedDict, list, set, deque})
_PLAIN = frozenset({bool, int, float, str, type(None), torch.Tensor, nn.Parameter})


class Attributes:
    """What the attributes of modules hold, parameters, lists, sets and dictionaries included, to be put back.

    An attribute that is some other object (a configuration, a cache) is looked into as well, but only this far.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._saved: list[tuple[_Container, _Container | None]] = []
        self._seen: set[int] = set()
        for module in modules:
            self._save(module.__dict__, into_objects=True)

    def _save(self, container: _Container, into_objects: bool = False) -> None:
        if id(container) in self._seen:
            return
        self._seen.add(id(container))
        self._saved.append((container, container.copy() if container else None))
        for item in container.values() if isinstance(container, dict) else container:
            kind = type(item)
            if kind in _PLAIN:
                continue
            if kind in _CONTAINERS and not item:
                self._saved.append((item, None))
            elif isinstance(item, (dict, list, set, deque)):
                self._save(item)
            elif into_objects and not isinstance(item, (nn.Module, torch.Tensor, type)):
                inside = getattr(item, "__dict__", None)
                if type(inside) is dict:
                    self._save(inside)

    def restore(self) -> None:
        """Give every container the items that it had, with the methods of the plain types: subclasses may refuse."""
        for container, before in self._saved:
            if not container and not before:
                continue
            items = before or ()
            if isinstance(container, dict):
                kind = OrderedDict if isinstance(container, OrderedDict) else dict  # which keeps an order of its own
                kind.clear(container)
                kind.update(container, items)
            elif isinstance(container, list):
                container[:] = items
            elif isinstance(container, deque):
                container.clear()
                container.extend(items)
            else:
                container.clear()
                container.update(items)


@contextmanager
def undisturbed(modules: Collection[nn.Module], training: bool) -> Iterator[None]:
    """Run the body with all modules of a model in the given mode, without gradients; then everything is as it was.

    Code that draws from Python's or NumPy's generator (to drop layers, for one) draws the same in every capture.
    Warnings of the forward are not shown: they will be when the model runs for the user. Nor is what torch logs when
    sizes do not fit: it raises that as well.
    """
    snapshot = Attributes(modules)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logged = logger.disabled
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings(), torch.no_grad(), eagerly():
            warnings.simplefilter("ignore")
            random.seed(0)
            np.random.seed(0)
            logger.disabled = True
            torch.backends.mha.set_fastpath_enabled(False)
            for module in modules:
                module.__dict__["training"] = training and has_two_modes(module)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        logger.disabled = logged
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        snapshot.restore()


@contextmanager
def noticing_mode(notice: Callable[[], None]) -> Iterator[None]:
    """Call `notice` whenever a module whose mode `undisturbed` sets reads `training` during the body.

    `training` is an ordinary instance attribute; a property of the same name on `nn.Module` takes precedence over it.
    """

    def read(module: nn.Module) -> bool:
        if has_two_modes(module):
            notice()
        return bool(module.__dict__["training"])

    def write(module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value

    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training


@contextmanager
def noticing_calls(
    paths: Mapping[int, str], stack: list[str], serials: list[int], visits: Visits | None
) -> Iterator[None]:
    """Keep on `stack` the paths of the modules that are running, outermost first, their hooks included.

    `paths` are those of the model's modules by `id`; others go by the name of their class. `serials` gets a number of
    its own for each of their calls, which no other capture uses. `visits` gets those of the model's modules.
    """
    call = nn.Module.__call__

    def noticed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = paths.get(id(module))
        stack.append(type(module).__name__ if path is None else path)
        serials.append(time.perf_counter_ns())
        try:
            if visits is None or path is None:
                return call(module, *args, **kwargs)
            with visits.noted(path, args, kwargs) as result:
                result.append(call(module, *args, **kwargs))
            return result[0]
        finally:
            stack.pop()
            serials.pop()

    nn.Module.__call__ = noticed  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]


def has_two_modes(module: nn.Module) -> bool:
    """Whether a module is captured in train mode too.

    A batch norm whose example has one value per channel refuses to run in train mode; its operator is the same in both
    modes, so nothing is lost by capturing it in eval mode.
    """
    return not isinstance(module, nn.modules.batchnorm._BatchNorm)
