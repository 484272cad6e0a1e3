"""Writes down every operator of a pass, with the places in the model and in the user's code at which it ran."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from espalier.graph.named_tensors import StandIns
from espalier.graph.results import Layout, Results, layout_of
from espalier.graph.trace import Call, Ref, Shape, Trace
from espalier.graph.tracking import links_of
from espalier.graph.trees import map_tensors

_TORCH = str(Path(torch.__file__).parent) + os.sep
_HERE = str(Path(__file__).parent) + os.sep
_LAYERS = str(Path(nn.__file__).parent) + os.sep


class Evaluator(Protocol):
    """Carries out the operators of a capture where fake tensors alone do not get through: see `graph.values`."""

    def begin(
        self, mode: FakeTensorMode, data: Mapping[int, torch.Tensor], constants: Mapping[int, torch.Tensor]
    ) -> None:
        """Called once, with the real tensors by `id` of their fake ones: parameters, buffers and inputs; others."""

    def run(self, func: Any, args: Any, kwargs: Any, modules: tuple[str, ...], frame: tuple[str, int]) -> Any:
        """The result of an operator on fake tensors."""


class Divergence(Exception):
    """Raised by an `Observer` to stop a capture at the call that is not as predicted."""


Observer = Callable[[Trace, Call], None]


class Recorder(TorchDispatchMode):
    def __init__(
        self,
        trace: Trace,
        stand_ins: StandIns,
        observer: Observer | None,
        evaluator: Evaluator | None,
        outermost: CodeType,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self.stack: list[str] = []
        self.serials: list[int] = []
        self._stand_ins = stand_ins
        self._observer = observer
        self._evaluator = evaluator
        self._outermost = outermost
        self._refs: dict[int, Ref] = {}
        self._layouts: dict[int, Layout | None] = {}
        self._results = Results(stand_ins.fakes, self._layouts)
        self._alive: list[torch.Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper around every operator takes its time

    def ref(self, tensor: torch.Tensor) -> Ref:
        """The number of `tensor` in the trace; a tensor seen for the first time is a constant or a parameter."""
        found = self._refs.get(id(tensor))
        return self._numbered(tensor) if found is None else found

    def known(self, tensor: torch.Tensor) -> int | str | None:
        """The name of a parameter or buffer, the number of another value of the trace."""
        name = self._stand_ins.names.get(id(tensor))
        if name is not None:
            return name
        found = self._refs.get(id(tensor))
        return None if found is None else found.index

    def number(self, tensor: torch.Tensor) -> int:
        """The number of a value of the trace; -1 for a tensor that no operator has read or made yet."""
        found = self._refs.get(id(tensor))
        return -1 if found is None else found.index

    def link(self, first: int, last: int, given: Sequence[Sequence[Any]], partly: bool) -> None:
        """Note where arguments of the calls from `first` to before `last` come from: see `Tracker`."""
        for call in self.trace.calls[first:last]:
            found = tuple(links_of(call.arguments(), given, partly))
            if found:
                self.trace.links[call.index] = found

    def _known(self, tensor: torch.Tensor) -> Ref:
        if type(tensor) is not FakeTensor:
            raise _NotFake
        return self.ref(tensor)

    def _numbered(self, tensor: torch.Tensor) -> Ref:
        trace = self.trace
        ref = self._refs[id(tensor)] = _numbered(len(trace.shapes))
        layout = self._layouts[id(tensor)] = layout_of(tensor)
        shape, stride = (tuple(tensor.shape), _stride(tensor)) if layout is None else layout[:2]
        trace.shapes.append(shape)
        trace.strides.append(stride)
        trace.dtypes.append(tensor.dtype)
        self._alive.append(tensor)
        name = self._stand_ins.names.get(id(tensor))
        if name is not None:
            trace.tensors.setdefault(name, ref)
        return ref

    def _result(self, tensor: Any) -> Ref | None:
        """The number of a result. A tensor that an operator has turned in place (`unsqueeze_`) is a new value."""
        if not isinstance(tensor, torch.Tensor):
            return None
        found = self._refs.get(id(tensor))
        if found is None:
            return self._numbered(tensor)
        known = self.trace.shapes[found.index], self.trace.strides[found.index]
        return found if known == (tensor.shape, _stride(tensor)) else self._numbered(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return args[0].fake_device if func is _DEVICE and type(args[0]) is FakeTensor else func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and _is_composite(func):
            # Inference mode hands these over whole. Taken apart, they are what is recorded outside of it.
            with self:
                return func.decompose(*args, **kwargs)
        if func is _ITEM:
            real = self._stand_ins.values.get(id(args[0]), args[0])
            if not isinstance(real, FakeTensor):
                with _disable_current_modes():
                    return real.item()
        try:
            recorded, recorded_by_name = map_tensors(args, self._known), map_tensors(kwargs, self._known)
        except _NotFake:
            if func is not _LIFT:
                args, kwargs = map_tensors(args, self._stand_ins.of_any), map_tensors(kwargs, self._stand_ins.of_any)
            recorded, recorded_by_name = map_tensors(args, self.ref), map_tensors(kwargs, self.ref)
        if func is _LIFT and args[0].dim() == 0 and not isinstance(args[0], FakeTensor):
            with _disable_current_modes():
                recorded = (args[0].item(),)
        modules = tuple(self.stack)
        frame = _user_frame(self._outermost) if self._observer is None or self._evaluator is not None else _NOWHERE
        if self._evaluator is None:
            result = self._results.of(func, args, kwargs)
        else:
            result = self._evaluator.run(func, args, kwargs, modules, frame)
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        call = Call(
            len(self.trace.calls),
            func,
            recorded,
            recorded_by_name,
            tuple([self._result(one) for one in outputs]),
            modules,
            frame,
        )
        self.trace.calls.append(call)
        if self._observer is not None:
            self._observer(self.trace, call)
        return result


def _stride(tensor: torch.Tensor) -> Shape:
    return tensor.stride() if tensor.layout is torch.strided else ()


_numbered = cache(Ref)
_NOWHERE = ("", 0)
_DEVICE = torch.ops.prim.device.default
_ITEM = torch.ops.aten._local_scalar_dense.default
_LIFT = torch.ops.aten.lift_fresh.default


class _NotFake(Exception):
    """A real tensor is among the arguments of an operator."""


@cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _user_frame(outermost: CodeType) -> tuple[str, int]:
    """The innermost frame within `outermost` that is not torch's; that of the layer where only layers of torch run."""
    frame: FrameType | None = sys._getframe(2)
    layer = None
    while frame is not None and frame.f_code is not outermost:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _HERE, "<")):
            return file, frame.f_lineno
        if layer is None and file.startswith(_LAYERS):
            layer = file, frame.f_lineno
        frame = frame.f_back
    return layer or (__file__, 0)
