"""Records the ATen operators of one forward pass, on fake tensors: no arithmetic, no memory, any Python code.

The model runs once under `FakeTensorMode` with a `TorchDispatchMode` on top that writes down every operator, its
arguments, the sizes of its results, the modules in whose forward it ran and the user's line of code. Parameters and
buffers are exchanged for fake ones of any wanted size meanwhile, which is how a planned edit is tried out before
anything real is touched. Nothing of a capture remains: modes, module attributes, buffers, gradients and random state
are as before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.errors import CaptureError

Shape = tuple[int, ...]

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent.parent)


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
    """File and line of the innermost code that belongs neither to torch nor to this package."""

    @property
    def name(self) -> str:
        """The operator's name without namespace of its overload: ``aten::addmm``."""
        return str(self.op._schema.name)

    @property
    def where(self) -> str:
        """The place in words, for errors and reasons."""
        module = next((path for path in reversed(self.modules) if path), "the model itself")
        file, line = self.frame
        return f"in {module} ({Path(file).name}:{line}, {self.name.removeprefix('aten::')})"

    def arguments(self) -> dict[str, Any]:
        """All arguments by the names of the operator's schema, defaults included."""
        bound: dict[str, Any] = {}
        for position, argument in enumerate(self.op._schema.arguments):
            if position < len(self.args):
                bound[argument.name] = self.args[position]
            elif argument.name in self.kwargs:
                bound[argument.name] = self.kwargs[argument.name]
            else:
                bound[argument.name] = argument.default_value
        return bound


@dataclass(slots=True)
class Trace:
    """One forward pass: values by number, calls in order."""

    training: bool
    mode_matters: bool = False
    """Whether a module other than a batch norm (see `_trains`) asked for its mode: train and eval passes may differ."""
    shapes: list[Shape] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    inputs: dict[str, Ref] = field(default_factory=dict)
    tensors: dict[str, Ref] = field(default_factory=dict)
    """Parameters and buffers that were read, by qualified name."""
    outputs: dict[str, Ref] = field(default_factory=dict)


class Divergence(Exception):
    """Raised by an `Observer` to stop a capture at the call that is not as predicted."""


Observer = Callable[[Trace, Call], None]


def flatten_tensors(tree: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested tuples, lists, mappings and dataclasses, each with a readable path.

    Opaque objects (a key/value cache) are not looked into: what they hold is no interface of the model.
    """
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from flatten_tensors(item, f"{path}.{key}")
    elif isinstance(tree, (tuple, list)):
        for position, item in enumerate(tree):
            yield from flatten_tensors(item, f"{path}[{position}]")


def map_tensors(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """`tree` with every tensor in tuples, lists and dicts replaced by `change(tensor)`."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, tuple) and type(tree) is tuple:
        return tuple(map_tensors(item, change) for item in tree)
    if isinstance(tree, list):
        return [map_tensors(item, change) for item in tree]
    if isinstance(tree, dict):
        return {key: map_tensors(item, change) for key, item in tree.items()}
    return tree


def call_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments: a tensor, a tuple or list, or a dict of keywords."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}


class _Recorder(TorchDispatchMode):
    def __init__(
        self, trace: Trace, known: dict[int, torch.Tensor], names: dict[int, str], mode: FakeTensorMode,
        real: Mapping[int, torch.Tensor], observer: Observer | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.trace = trace
        self.stack: list[str] = []
        self._mode = mode
        self._observer = observer
        self._known = known
        self._names = names
        self._real = real
        self._refs: dict[int, Ref] = {}
        self._alive: list[torch.Tensor] = []
        self._fakes: dict[int, torch.Tensor] = {}

    def ref(self, tensor: torch.Tensor) -> Ref:
        """The number of `tensor` in the trace; a tensor seen for the first time is a constant or a parameter."""
        found = self._refs.get(id(tensor))
        if found is not None:
            return found
        ref = Ref(len(self.trace.shapes))
        self.trace.shapes.append(tuple(tensor.shape))
        self.trace.dtypes.append(tensor.dtype)
        self._refs[id(tensor)] = ref
        self._alive.append(tensor)
        if id(tensor) in self._names:
            self.trace.tensors[self._names[id(tensor)]] = ref
        return ref

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A stand-in for a real tensor that the model's code brought along."""
        if isinstance(tensor, FakeTensor):
            return tensor
        known = self._known.get(id(tensor))
        if known is not None:
            return known
        if id(tensor) not in self._fakes:
            self._fakes[id(tensor)] = self._mode.from_tensor(tensor)
            self._alive.append(tensor)
        return self._fakes[id(tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            real = self._real.get(id(args[0]), args[0])
            if not isinstance(real, FakeTensor):
                return real.item()
        if func is not torch.ops.aten.lift_fresh.default:
            args, kwargs = map_tensors(args, self._fake), map_tensors(kwargs, self._fake)
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        call = Call(
            len(self.trace.calls),
            func,
            map_tensors(args, self.ref),
            map_tensors(kwargs, self.ref) if kwargs else {},
            tuple(self.ref(one) if isinstance(one, torch.Tensor) else None for one in outputs),
            tuple(self.stack),
            _user_frame(),
        )
        self.trace.calls.append(call)
        if self._observer is not None:
            self._observer(self.trace, call)
        return result


def _user_frame() -> tuple[str, int]:
    frame = sys._getframe(2)
    first = frame
    while True:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _HERE, "<")):
            return file, frame.f_lineno
        if frame.f_back is None:
            return first.f_code.co_filename, first.f_lineno
        frame = frame.f_back


@dataclass(frozen=True)
class TensorTable:
    """The parameters and buffers of a model, each object once, with the other names that it has."""

    tensors: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]
    """Second and further names of tied tensors -> the first name."""
    places: Mapping[str, tuple[tuple[nn.Module, str, bool], ...]]
    """First name -> every (module, attribute, is parameter) at which it is registered."""


def tensor_table(model: nn.Module) -> TensorTable:
    """Find the parameters and buffers of `model`, persistent or not, and where they are registered."""
    first: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    places: dict[str, list[tuple[nn.Module, str, bool]]] = {}
    for path, module in model.named_modules():
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
    return TensorTable(tensors, aliases, {name: tuple(found) for name, found in places.items()})


@contextmanager
def _undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    """Run the body with every module in the given mode and put every module's attributes back afterwards."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    inner = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.backends.mha.set_fastpath_enabled(False)
            if training:
                for module in model.modules():
                    module.training = _trains(module)
            else:
                for module in model.modules():
                    module.training = False
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, parameters, buffers in inner:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)


@contextmanager
def _noticing_mode(trace: Trace) -> Iterator[None]:
    """Note in the trace whether any module whose mode a capture sets reads `training` during the body.

    `training` is an ordinary instance attribute; a property of the same name on `nn.Module` takes precedence over it.
    """

    def read(module: nn.Module) -> bool:
        if _trains(module):
            trace.mode_matters = True
        return bool(module.__dict__["training"])

    def write(module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value

    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training


def _trains(module: nn.Module) -> bool:
    # A batch norm whose example has one value per channel refuses to run in train mode; its operator is the same in
    # both modes, so nothing is lost by capturing it in eval mode.
    return not isinstance(module, nn.modules.batchnorm._BatchNorm)


def capture(
    model: nn.Module,
    example: Any,
    *,
    training: bool = False,
    table: TensorTable | None = None,
    shapes: Mapping[str, Shape] | None = None,
    observer: Observer | None = None,
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

    Raises:
        CaptureError: the model's forward failed; the message holds its error and the place.
    """
    table = table or tensor_table(model)
    shapes = shapes or {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    trace = Trace(training)
    paths = {id(module): path for path, module in model.named_modules()}
    args, kwargs = call_arguments(example)
    with ExitStack() as context:
        context.enter_context(_undisturbed(model, training))
        context.enter_context(torch.no_grad())
        fakes: dict[str, torch.Tensor] = {}
        with mode:
            for name, tensor in table.tensors.items():
                fakes[name] = torch.empty(shapes.get(name, tensor.shape), dtype=tensor.dtype, device=tensor.device)
                if isinstance(tensor, nn.Parameter):
                    fakes[name]._is_param = True  # type: ignore[attr-defined]
            for name, found in table.places.items():
                for module, key, is_parameter in found:
                    (module._parameters if is_parameter else module._buffers)[key] = fakes[name]  # type: ignore[assignment]
            substitute: dict[int, torch.Tensor] = {}

            def faked(tensor: torch.Tensor) -> torch.Tensor:
                if id(tensor) not in substitute:
                    substitute[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                return substitute[id(tensor)]

            fake_args, fake_kwargs = map_tensors(args, faked), map_tensors(kwargs, faked)
        recorder = _Recorder(
            trace,
            {id(table.tensors[name]): fake for name, fake in fakes.items()},
            {id(fake): name for name, fake in fakes.items()},
            mode,
            {id(fake): table.tensors[name] for name, fake in fakes.items() if name not in shapes},
            observer,
        )
        for path, tensor in _input_paths(fake_args, fake_kwargs):
            trace.inputs[path] = recorder.ref(tensor)

        def entered(module: nn.Module, _: Any) -> None:
            recorder.stack.append(paths.get(id(module), type(module).__name__))

        def left(module: nn.Module, _: Any, __: Any) -> None:
            recorder.stack.pop()

        enter = register_module_forward_pre_hook(entered)
        context.callback(enter.remove)
        leave = register_module_forward_hook(left, always_call=True)
        context.callback(leave.remove)
        try:
            with mode, recorder, _noticing_mode(trace):
                result = model(*fake_args, **fake_kwargs)
        except Divergence:
            raise
        except Exception as error:
            raise CaptureError(_failure(trace, recorder.stack, training, error)) from error
        for path, tensor in flatten_tensors(result, "output"):
            trace.outputs[path] = recorder.ref(tensor)
    return trace


def _input_paths(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for position, item in enumerate(args):
        yield from flatten_tensors(item, f"input {position}" if len(args) > 1 else "the input")
    for key, item in kwargs.items():
        yield from flatten_tensors(item, f"input {key!r}")


def _failure(trace: Trace, stack: Sequence[str], training: bool, error: Exception) -> str:
    place = trace.calls[-1].where if trace.calls else "before the first operator"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"the model's forward failed in {'train' if training else 'eval'} mode while it ran on fake tensors: "
        f"{type(error).__name__}: {first} (last operator that worked: {place}). Expected: that "
        "model(*example_inputs) runs as it stands. Check the example inputs (a tensor, a tuple of positional or a dict "
        "of keyword arguments) and that model and inputs are on the same device."
    )
