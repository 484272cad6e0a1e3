"""Records the ATen operators of one forward pass, on fake tensors: no arithmetic, no memory, any Python code.

The model runs once under `FakeTensorMode` with a `TorchDispatchMode` on top that writes down every operator, its
arguments, the sizes of its results, the modules in whose forward it ran and the user's line of code. Parameters and
buffers are exchanged for fake ones of any wanted size meanwhile, which is how a planned edit is tried out before
anything real is touched. Nothing of a capture remains: modes, module attributes (what lists and dictionaries
among them hold included), buffers, gradients and random state are as before. What the model's code does outside of its
modules, such as printing or a forward hook that appends to a list, does happen: hooks can be part of the computation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from espalier.errors import CaptureError
from espalier.graph.caches import drop_caches
from espalier.graph.named_tensors import StandIns, TensorTable, tensor_table
from espalier.graph.recorder import Divergence, Evaluator, Observer, Recorder
from espalier.graph.trace import Shape, Trace
from espalier.graph.tracking import Tracker, track_attributes
from espalier.graph.trees import call_arguments, flatten_tensors, map_tensors
from espalier.graph.undisturbed import noticing_calls, noticing_mode, undisturbed
from espalier.graph.visits import Visits


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
        recorder = Recorder(trace, stand_ins, observer, evaluator, capture.__code__)
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


def _tracker(model: nn.Module, recorder: Recorder) -> Tracker:
    during = time.perf_counter_ns()
    track_attributes(model, during)
    calls = recorder.trace.calls
    return Tracker(recorder.known, recorder.stack, recorder.serials, during, lambda: len(calls), recorder.link)


def _input_paths(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for position, item in enumerate(args):
        yield from flatten_tensors(item, f"input {position}" if len(args) > 1 else "the input")
    for key, item in kwargs.items():
        yield from flatten_tensors(item, f"input {key!r}")


def _output_paths(result: Any, trace: Trace) -> list[tuple[str, Tensor]]:
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
