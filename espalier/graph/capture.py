"""Records the ATen operators of one forward pass, on fake tensors: no arithmetic, no memory, any Python code.

The model runs once under `FakeTensorMode` with a `TorchDispatchMode` on top that writes down every operator, its
arguments, the sizes of its results, the modules in whose forward it ran and the user's line of code. Parameters and
buffers are exchanged for fake ones of any wanted size meanwhile, which is how a planned edit is tried out before
anything real is touched. Nothing of a capture remains: modes, module attributes (what lists and dictionaries
among them hold included), buffers, gradients and random state are as before. What the model's code does outside of its
modules, such as printing or a forward hook that appends to a list, does happen: hooks can be part of the computation.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from espalier.errors import CaptureError
from espalier.graph.caches import drop_caches
from espalier.graph.decisions import Decisions
from espalier.graph.fakes import Fakes
from espalier.graph.results import Layout, Results, layout_of
from espalier.graph.tracking import Link, Tracker, links_of, track_attributes
from espalier.graph.undisturbed import noticing_calls, noticing_mode, undisturbed
from espalier.graph.visits import Visit, Visits

Shape = tuple[int, ...]

_TORCH = str(Path(torch.__file__).parent) + os.sep
_HERE = str(Path(__file__).parent) + os.sep
_LAYERS = str(Path(nn.__file__).parent) + os.sep


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor value of the trace, by number."""

    index: int


@dataclass(frozen=True, slots=True)
class Call:
    """One recorded operator."""

    index: int
    op: Any
    """The `torch._ops.OpOverload`."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    """Arguments as given, with every tensor replaced by its `Ref`."""
    outputs: tuple[Ref | None, ...]
    modules: tuple[str, ...]
    """Paths of the modules in whose forward it ran, outermost first."""
    frame: tuple[str, int]
    """File and line of the innermost code that is not torch's; not looked for if an observer compares."""

    @property
    def name(self) -> str:
        """The operator's name without namespace of its overload: ``aten::addmm``."""
        return str(self.op._schema.name)

    @property
    def module(self) -> str:
        """Path of the innermost module in whose forward it ran; empty for the model itself."""
        return self.modules[-1] if self.modules else ""

    @property
    def where(self) -> str:
        """The place in words, for errors and reasons."""
        module = next((path for path in reversed(self.modules) if path), "the model itself")
        file, line = self.frame
        return f"in {module} ({os.path.basename(file)}:{line}, {self.name.removeprefix('aten::')})"

    def arguments(self) -> dict[str, Any]:
        """All arguments by the names of the operator's schema, defaults included."""
        bound = dict(_defaults(self.op))
        bound.update(zip(bound, self.args, strict=False))
        bound.update(self.kwargs)
        return bound


@cache
def _defaults(op: Any) -> Mapping[str, Any]:
    """The arguments of an operator, in order."""
    return {argument.name: argument.default_value for argument in op._schema.arguments}


@dataclass(slots=True)
class Trace:
    """One forward pass: values by number, calls in order."""

    training: bool
    mode_matters: bool = False
    """Whether a module with two modes asked for its mode: train and eval passes may differ."""
    shapes: list[Shape] = field(default_factory=list)
    strides: list[Shape] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    inputs: dict[str, Ref] = field(default_factory=dict)
    tensors: dict[str, Ref] = field(default_factory=dict)
    """Parameters and buffers that were read, by qualified name."""
    outputs: dict[str, Ref] = field(default_factory=dict)
    links: dict[int, tuple[Link, ...]] = field(default_factory=dict)
    """Call number -> where whole numbers among its arguments come from; only of a tracked capture."""
    visits: list[Visit] = field(default_factory=list)
    """Which module ran when, in the order in which they ended; not of a capture that an observer compares."""
    decisions: Decisions = None
    """What values decided, where fake tensors alone could not be run."""


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


def flatten_tensors(tree: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested tuples, lists, mappings and dataclasses, each with a readable path.

    Other objects (a key/value cache) are not looked into.
    """
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from flatten_tensors(item, f"{path}.{key}")
    elif isinstance(tree, (tuple, list)):
        for position, item in enumerate(tree):
            yield from flatten_tensors(item, f"{path}[{position}]")
    elif is_dataclass(tree) and not isinstance(tree, type):
        for one in fields(tree):
            yield from flatten_tensors(getattr(tree, one.name), f"{path}.{one.name}")


def map_tensors(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """`tree` with every tensor that `flatten_tensors` finds replaced by `change(tensor)`, in the same order."""
    kind = type(tree)
    if kind in _ATOMS:
        return tree
    if kind is FakeTensor or isinstance(tree, torch.Tensor):
        return change(tree)
    if kind is tuple:
        return tuple([map_tensors(item, change) for item in tree])
    if kind is list:
        return [map_tensors(item, change) for item in tree]
    if kind is dict:
        return {key: map_tensors(item, change) for key, item in tree.items()}
    return _map_other(tree, change)


_ATOMS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})


def _map_other(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(tree, tuple):
        items = [map_tensors(item, change) for item in tree]
        return tree._make(items) if hasattr(tree, "_make") else tuple(items)
    if isinstance(tree, list):
        return [map_tensors(item, change) for item in tree]
    copied = tree
    if isinstance(tree, MutableMapping):
        copied = copy.copy(tree)
        for key, item in tree.items():
            copied[key] = map_tensors(item, change)
    elif is_dataclass(tree) and not isinstance(tree, type):
        copied = copy.copy(tree)
        for one in fields(tree):
            object.__setattr__(copied, one.name, map_tensors(getattr(tree, one.name), change))
    return copied


def call_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments: a tensor, a tuple or list, or a dict of keywords."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}


class StandIns:
    """Fake tensors in place of real ones, the same for the same; those of parameters and buffers are put into place."""

    def __init__(self, table: TensorTable, shapes: Mapping[str, Shape]) -> None:
        self.fakes = table.fakes
        self.names: dict[int, str] = {}
        """id of the fake tensor of a parameter or buffer -> its name."""
        self.values: dict[int, torch.Tensor] = {}
        """id of a fake tensor -> the real one, where that has the same shape."""
        self.data: dict[int, torch.Tensor] = {}
        """id of the fake tensor of a parameter, a buffer or an input -> the real one."""
        self.constants: dict[int, torch.Tensor] = {}
        """id of the fake tensor of what some code brought along -> the real one."""
        self._fakes: dict[int, torch.Tensor] = {}
        self._alive: list[torch.Tensor] = []
        for name, tensor in table.tensors.items():
            fake = self._kept(tensor, table.fake(name, shapes.get(name, tensor.shape)), self.data)
            self.names[id(fake)] = name
            if name not in shapes:
                self.values[id(fake)] = tensor
            for module, key, is_parameter in table.places[name]:
                (module._parameters if is_parameter else module._buffers)[key] = fake  # type: ignore[assignment]

    def of_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stand-in of an example input."""
        found = self._fakes.get(id(tensor))
        return self._kept(tensor, self.fakes.like(tensor, tensor.shape), self.data) if found is None else found

    def of_any(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stand-in of a tensor that some code brought along; fake ones stand for themselves."""
        if isinstance(tensor, FakeTensor):
            return tensor
        found = self._fakes.get(id(tensor))
        return self._kept(tensor, self.fakes.mode.from_tensor(tensor), self.constants) if found is None else found

    def _kept(self, tensor: torch.Tensor, fake: torch.Tensor, kind: dict[int, torch.Tensor]) -> torch.Tensor:
        self._fakes[id(tensor)] = fake
        kind[id(fake)] = tensor
        self._alive.append(tensor)
        return fake


class _Recorder(TorchDispatchMode):
    def __init__(
        self, trace: Trace, stand_ins: StandIns, observer: Observer | None, evaluator: Evaluator | None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self.stack: list[str] = []
        self.serials: list[int] = []
        self._stand_ins = stand_ins
        self._observer = observer
        self._evaluator = evaluator
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
        frame = _user_frame() if self._observer is None or self._evaluator is not None else _NOWHERE
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


def _user_frame() -> tuple[str, int]:
    """The innermost frame that is not torch's; that of the layer where only layers of torch run."""
    frame: FrameType | None = sys._getframe(2)
    layer = None
    while frame is not None and frame.f_code is not capture.__code__:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _HERE, "<")):
            return file, frame.f_lineno
        if layer is None and file.startswith(_LAYERS):
            layer = file, frame.f_lineno
        frame = frame.f_back
    return layer or (__file__, 0)


@dataclass(frozen=True)
class TensorTable:
    """The parameters and buffers of a model, each object once, with the other names that it has."""

    tensors: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]
    """Second and further names of tied tensors -> the first name."""
    places: Mapping[str, tuple[tuple[nn.Module, str, bool], ...]]
    """First name -> every (module, attribute, is parameter) at which it is registered."""
    modules: Mapping[str, nn.Module]
    """By path, the model itself first."""
    fakes: Fakes = field(default_factory=Fakes, repr=False, compare=False)
    _made: dict[tuple[str, Shape], torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def fake(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The fake tensor of that shape which stands in for a tensor: made once, for all captures with this table."""
        key = name, tuple(shape)
        found = self._made.get(key)
        if found is None or found.shape != key[1]:
            tensor = self.tensors[name]
            found = self._made[key] = self.fakes.like(tensor, shape)
            if isinstance(tensor, nn.Parameter):
                found._is_param = True
        return found


def tensor_table(model: nn.Module) -> TensorTable:
    """Find the parameters and buffers of `model`, persistent or not, and where they are registered."""
    first: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    places: dict[str, list[tuple[nn.Module, str, bool]]] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        for store, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for key, tensor in store.items():
                if tensor is None:
                    continue
                name = first.setdefault(id(tensor), prefix + key)
                if name == prefix + key:
                    tensors[name] = tensor
                else:
                    aliases[prefix + key] = name
                places.setdefault(name, []).append((module, key, is_parameter))
    return TensorTable(tensors, aliases, {name: tuple(found) for name, found in places.items()}, modules)


def capture(
    model: nn.Module,
    example: Any,
    *,
    training: bool = False,
    table: TensorTable | None = None,
    shapes: Mapping[str, Shape] | None = None,
    observer: Observer | None = None,
    evaluator: Evaluator | None = None,
    tracked: bool = False,
) -> Trace:
    """Run `model` once on fake tensors and record it.

    Args:
        model: any module; it is left exactly as it was.
        example: example inputs: a tensor, a tuple of positional or a dict of keyword arguments. Only shapes, types and
            devices are used.
        training: capture the train-mode pass instead of the eval-mode one.
        table: the model's `tensor_table`, if it is at hand.
        shapes: other shapes for some parameters and buffers, by name: the pass is recorded as if they had these.
        observer: called after every recorded operator; may raise `Divergence` to stop.
        evaluator: carries out the operators instead of the fake tensors alone.
        tracked: find out where the whole numbers come from that code hands to operators.

    Raises:
        CaptureError: the model's forward failed; the message holds its error and the place.
    """
    table = table or tensor_table(model)
    trace = Trace(training)
    paths = {id(module): path for path, module in table.modules.items()}
    with ExitStack() as context:
        context.enter_context(undisturbed(table.modules.values(), training))
        stand_ins = StandIns(table, shapes or {})
        drop_caches(table.modules.values())
        args, kwargs = map_tensors(call_arguments(example), stand_ins.of_input)
        if evaluator is not None:
            evaluator.begin(table.fakes.mode, stand_ins.data, stand_ins.constants)
        recorder = _Recorder(trace, stand_ins, observer, evaluator)
        for path, tensor in _input_paths(args, kwargs):
            trace.inputs[path] = recorder.ref(tensor)

        def asked() -> None:
            trace.mode_matters = True

        try:
            visits = Visits(trace.visits, recorder.number, lambda: len(trace.calls)) if observer is None else None
            calls = noticing_calls(paths, recorder.stack, recorder.serials, visits)
            with (
                _tracker(model, recorder) if tracked else nullcontext(),
                stand_ins.fakes.mode,
                recorder,
                noticing_mode(asked) if observer is None else nullcontext(),
                calls,
            ):
                result = model(*args, **kwargs)
        except Divergence:
            raise
        except Exception as error:
            on = "fake tensors" if evaluator is None else "real values"
            raise CaptureError(_failure(trace, error, paths, on)) from error
        for path, tensor in _output_paths(result, trace):
            trace.outputs[path] = recorder.ref(tensor)
    return trace


def _tracker(model: nn.Module, recorder: _Recorder) -> Tracker:
    during = time.perf_counter_ns()
    track_attributes(model, during)
    calls = recorder.trace.calls
    return Tracker(recorder.known, recorder.stack, recorder.serials, during, lambda: len(calls), recorder.link)


def _input_paths(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for position, item in enumerate(args):
        yield from flatten_tensors(item, f"input {position}" if len(args) > 1 else "the input")
    for key, item in kwargs.items():
        yield from flatten_tensors(item, f"input {key!r}")


def _output_paths(result: Any, trace: Trace) -> list[tuple[str, torch.Tensor]]:
    """The tensors that a model returns, or that the attributes of the object that it returns hold."""
    found = list(flatten_tensors(result, "output"))
    if not found:
        found = list(flatten_tensors(getattr(result, "__dict__", None), "output"))
    if not found:
        raise CaptureError(
            f"the model's forward returned no tensor in {_mode(trace)} mode, but {type(result).__name__}: what it "
            "computes cannot be seen. Expected: a tensor, or tuples, lists, mappings or dataclasses of tensors. Wrap "
            "the model in a module whose forward returns them."
        )
    return found


def _failing_module(error: Exception, paths: Mapping[int, str]) -> str:
    """The innermost module of the model in whose code the error arose."""
    found, step = "the model itself", error.__traceback__
    while step is not None:
        owner = step.tb_frame.f_locals.get("self")
        found = paths.get(id(owner), "") or found
        step = step.tb_next
    return found


def _failure(trace: Trace, error: Exception, paths: Mapping[int, str], on: str) -> str:
    place = trace.calls[-1].where if trace.calls else "before the first operator"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    what = (
        f"the model's forward failed in {_failing_module(error, paths)}, in {_mode(trace)} mode on {on}: "
        f"{type(error).__name__}: {first} (last operator that worked: {place}). "
    )
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return what + (
            "Expected: code whose course and sizes do not depend on the values in tensors, since fake tensors hold "
            "none. Keep .item(), bool(tensor), nonzero() and x[mask] out of the forward, or attach where parameters "
            "and inputs hold values (not on the meta device)."
        )
    return what + (
        "Expected: that model(*example_inputs) runs as it stands. Check the example inputs (a tensor, a tuple of "
        "positional or a dict of keyword arguments) and that model and inputs are on the same device."
    )


def _mode(trace: Trace) -> str:
    return "train" if trace.training else "eval"
