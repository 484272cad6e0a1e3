"""The courses that a model's forward takes: one pass in eval mode, one in train mode if that may differ, and where
values decide what runs, further ones until every parameter has been read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from espalier.errors import CaptureError
from espalier.graph.capture import capture
from espalier.graph.decisions import Decisions
from espalier.graph.named_tensors import TensorTable
from espalier.graph.trace import Shape, Trace
from espalier.graph.trees import map_tensors
from espalier.graph.values import Deciding, Following

_OTHER_EXAMPLES = 6


@dataclass(frozen=True)
class Course:
    """What one pass can be taken again by."""

    training: bool
    decisions: Decisions


@dataclass(frozen=True)
class Passes:
    """The traces of a model, and what has to be known of how they were made."""

    traces: Sequence[Trace]
    notes: tuple[str, ...] = ()


def passes(model: nn.Module, example: Any, table: TensorTable, shapes: Mapping[str, Shape]) -> Passes:
    """Find the courses of a model and record them.

    Fake tensors are tried first. Where they do not get through, since values decide sizes or what runs, or since an
    operator has no rule for them, the pass is recorded on real values.

    Raises:
        CaptureError: the forward failed in eval mode, or in train mode though no values decide anything.
    """
    traces = [_recorded(model, example, table, shapes, training=False)]
    notes = []
    if traces[0].mode_matters:
        try:
            traces.append(_recorded(model, example, table, shapes, training=True))
        except CaptureError as problem:
            if traces[0].decisions is None:
                raise
            notes.append(
                f"only the eval-mode pass is known, since in train mode {type(problem.__cause__).__name__}: "
                f"{problem.__cause__} (edits are not checked in train mode; example inputs that it takes as well, "
                "targets for one, would have it read)"
            )
    if any(depends_on_values(trace) for trace in traces):
        traces += _further(model, example, table, shapes, traces)
    return Passes(traces, (*notes, *_notes(traces)))


def followed(
    model: nn.Module, example: Any, table: TensorTable, shapes: Mapping[str, Shape], courses: Sequence[Course]
) -> Passes:
    """Record known courses again, for tensors of other sizes. Raises CaptureError as `capture`."""
    traces = []
    for course in courses:
        evaluator = follower(course.decisions)
        trace = capture(
            model, example, training=course.training, table=table, shapes=shapes, evaluator=evaluator, tracked=True
        )
        trace.decisions = course.decisions
        traces.append(trace)
    return Passes(traces)


def follower(decisions: Decisions) -> Following | None:
    """What takes these decisions in a capture."""
    return None if decisions is None else Following(decisions)


def depends_on_values(trace: Trace) -> bool:
    """Whether other values might have led elsewhere."""
    return any(decision.is_of_values for decision in trace.decisions or ())


def has_other_courses(traces: Sequence[Trace]) -> bool:
    """Whether the forward may do what none of the traces shows."""
    all_modes = any(trace.training for trace in traces) or not any(trace.mode_matters for trace in traces)
    return not all_modes or any(depends_on_values(trace) for trace in traces)


def _recorded(
    model: nn.Module, example: Any, table: TensorTable, shapes: Mapping[str, Shape], *, training: bool
) -> Trace:
    try:
        return capture(model, example, training=training, table=table, shapes=shapes, tracked=True)
    except CaptureError as problem:
        if not isinstance(problem.__cause__, (RuntimeError, NotImplementedError)) or _is_without_values(table, example):
            raise
    return _decided(model, example, table, shapes, training=training)


def _decided(
    model: nn.Module,
    example: Any,
    table: TensorTable,
    shapes: Mapping[str, Shape],
    *,
    training: bool,
    everything: bool = False,
) -> Trace:
    deciding = Deciding(everything)
    trace = capture(model, example, training=training, table=table, shapes=shapes, evaluator=deciding, tracked=True)
    trace.decisions = tuple(deciding.decisions)
    return trace


def _further(
    model: nn.Module, example: Any, table: TensorTable, shapes: Mapping[str, Shape], known: Sequence[Trace]
) -> list[Trace]:
    """Passes along other courses that read parameters which no pass has read so far."""
    sized = {name for name, tensor in table.tensors.items() if tensor.dim()}  # a mere counter has nothing to learn
    unread = sized.difference(*(trace.tensors for trace in known))
    found: list[Trace] = []
    for other, everything in ((example, True), *((other, False) for other in _other_examples(example))):
        if not unread:
            break
        try:
            trace = _decided(model, other, table, shapes, training=False, everything=everything)
            if unread.isdisjoint(trace.tensors):
                continue
            found.append(trace)
            if trace.mode_matters and len(known) > 1:
                found.append(_decided(model, other, table, shapes, training=True, everything=everything))
        except CaptureError:
            continue  # not every course that is tried is one that the code can take
        unread.difference_update(trace.tensors)
    return found


def _other_examples(example: Any) -> Iterator[Any]:
    """The example with other values: shifted and spread otherwise at random, integers from the same range."""
    for seed in range(_OTHER_EXAMPLES):
        generator = torch.Generator().manual_seed(seed)
        shift, spread = torch.randn(2, generator=generator, dtype=torch.float64).tolist()
        yield map_tensors(example, partial(_redrawn, generator=generator, shift=shift, spread=spread))


def _redrawn(tensor: torch.Tensor, generator: torch.Generator, shift: float, spread: float) -> torch.Tensor:
    if tensor.numel() == 0 or tensor.dtype is torch.bool or tensor.is_complex():
        return tensor
    if tensor.is_floating_point():
        values = tensor.double()
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        return (values.mean() + (values.std(correction=0) + 1e-3) * (shift + 2**spread * drawn)).to(tensor.dtype)
    low, high = int(tensor.min()), int(tensor.max())
    return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor)


def _is_without_values(table: TensorTable, example: Any) -> bool:
    found = list(table.tensors.values())
    map_tensors(example, found.append)
    return any(tensor.device.type == "meta" for tensor in found)


def _notes(traces: Sequence[Trace]) -> Iterator[str]:
    decisions = [one for trace in traces for one in trace.decisions or ()]
    if not decisions:
        return
    of_values = [one for one in decisions if one.is_of_values]
    places = dict.fromkeys(one.where for one in of_values or decisions)
    shown = "; ".join([*places][:3]) + (f" and at {len(places) - 3} more places" if len(places) > 3 else "")
    if of_values:
        yield (
            f"recorded on real values, since they decide what runs or how large it is {shown}: edits are checked along "
            f"the {len(traces)} passes through the code that were recorded, other values may lead elsewhere"
        )
    else:
        yield f"recorded on real values, since an operator has no rule for fake tensors {shown}"


__all__ = ["Course", "Passes", "depends_on_values", "followed", "follower", "has_other_courses", "passes"]
