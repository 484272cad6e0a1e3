"""Verifies an edit before anything real is touched: operators are compared, not output shapes.

The changed model is captured again, with fake tensors of the new shapes and the new attributes in place, and every
operator's sizes and size-like arguments must equal what the algebra predicts. A `view(B, T, 3, self.heads, -1)` whose
`heads` is stale runs, gives the right output shape, and is wrong; only this comparison sees it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from espalier.edit.attributes import AttributeChange
from espalier.errors import CaptureError
from espalier.graph.capture import capture
from espalier.graph.courses import follower
from espalier.graph.dims import axes_of, size_of
from espalier.graph.flow import constants
from espalier.graph.named_tensors import TensorTable
from espalier.graph.recorder import Divergence
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.trace import Call, Shape, Trace
from espalier.graph.trees import map_tensors


@dataclass(frozen=True)
class Subject:
    """What is edited, and what was learnt of its code."""

    model: nn.Module
    example: Any
    table: TensorTable
    sizes: Mapping[int, int]
    """The present size of every axis."""
    learnt: set[tuple[type, tuple[str, ...]]] = field(default_factory=set)
    """Attributes, by class of module, that had to follow a size before: tried first."""


@dataclass(frozen=True)
class Mismatch:
    """The first operator that is not as predicted."""

    trace: int
    """Which of the topology's predictions: traces before it are as predicted."""
    call: int
    """Number of the call; everything before it is as predicted."""
    modules: tuple[str, ...]
    where: str
    text: str
    other_operator: bool = False
    """Whether another operator ran than the one predicted."""

    @property
    def progress(self) -> tuple[int, int]:
        """How far the verification came: larger is later."""
        return self.trace, self.call


class _Comparison:
    """Compares a capture with its prediction call by call and stops it at the first difference."""

    def __init__(self, prediction: TracePrediction, topology: Topology) -> None:
        self._prediction = prediction
        self._sizes = topology.sizes
        self._seen = 0
        self.call = 0
        self.modules: tuple[str, ...] = ()
        self.other_operator = False
        self.scalars: list[tuple[int, float, float]] = []

    def __call__(self, trace: Trace, call: Call) -> None:
        self.call, self.modules = call.index, call.modules
        calls = self._prediction.calls
        if call.index >= len(calls) or call.op is not calls[call.index].op:
            expected = calls[call.index].name if call.index < len(calls) else "the end"
            self.other_operator = True
            raise Divergence(f"expected {expected}, found {call.name}")
        for number in range(self._seen, len(trace.shapes)):
            dims = self._prediction.dims.get(number)
            expected_shape = None if dims is None else tuple(size_of(dim, self._sizes) for dim in dims)
            if expected_shape is not None and trace.shapes[number] != expected_shape:
                raise Divergence(f"expected sizes {expected_shape}, found {trace.shapes[number]}")
        self._seen = len(trace.shapes)
        for argument, dim in self._prediction.expectations.get(call.index, ()):
            found, size = call.arguments()[argument], size_of(dim, self._sizes)
            if _number(found) != size:
                raise Divergence(f"expected {argument}={size}, found {argument}={found}")
        known = self._prediction.constants.get(call.index)
        for old, new in zip(known, constants(call), strict=False) if known else ():
            if differ(old, new):
                self.scalars.append((call.index, old, new))


def _number(argument: Any) -> int:
    """An argument that repeats a size: a number or none for zero, or the shift by one dimension, to either side."""
    return abs(argument[0]) if isinstance(argument, list) else argument or 0


def differ(old: float, new: float) -> bool:
    """Whether two constants are other numbers; one that is none equals itself here."""
    return old != new and not (old != old and new != new)


@dataclass(frozen=True)
class Verification:
    """What a verification found."""

    mismatch: Mismatch | None
    scalars: Sequence[tuple[int, int, float, float]] = ()
    """(trace, call, old, new): numbers of the forward that are others than those recorded."""
    anew: Topology | None = None
    """What was read of the changed model, if it runs other operators that state the same."""


def verify(subject: Subject, after: Topology, changes: Sequence[AttributeChange]) -> Verification:
    """Capture the model as it will be and compare every operator with what `after` predicts.

    A pass that is part of another one is verified with it.
    """
    return _compared(subject, after, changes, changed_shapes(subject, after))


def changed_shapes(subject: Subject, after: Topology) -> dict[str, Shape]:
    """The shapes of the tensors that will have others than now."""
    tensors = subject.table.tensors
    return {name: shape for name in after.tensors if (shape := after.shape(name)) != tuple(tensors[name].shape)}


def _compared(
    subject: Subject, after: Topology, changes: Sequence[AttributeChange], shapes: Mapping[str, Shape]
) -> Verification:
    scalars: list[tuple[int, int, float, float]] = []
    for number, prediction in enumerate(after.predictions):
        if number in after.covered:
            continue
        comparison = _Comparison(prediction, after)
        with attributes_set(subject.model, changes):
            try:
                capture(
                    subject.model,
                    resized_example(subject.example, prediction, after),
                    training=prediction.training,
                    table=subject.table,
                    shapes=shapes,
                    observer=comparison,
                    evaluator=follower(prediction.decisions),
                )
            except Divergence as problem:
                place = prediction.calls[min(comparison.call, len(prediction.calls) - 1)]
                mismatch = Mismatch(
                    number, comparison.call, comparison.modules, place.where, str(problem), comparison.other_operator
                )
                return Verification(mismatch)
            except CaptureError as problem:
                at = min(comparison.call + 1, len(prediction.calls) - 1)
                place = prediction.calls[at]
                cause = problem.__cause__
                text = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}"
                return Verification(Mismatch(number, at, place.modules, place.where, text))
        if comparison.call + 1 < len(prediction.calls):
            place = prediction.calls[comparison.call + 1]
            return Verification(
                Mismatch(number, comparison.call + 1, place.modules, place.where, "the forward ended early")
            )
        scalars += [(number, *one) for one in comparison.scalars]
    return Verification(None, sorted([*scalars, *_of_covered(after, scalars)]))


def _of_covered(
    after: Topology, scalars: Sequence[tuple[int, int, float, float]]
) -> Iterator[tuple[int, int, float, float]]:
    """The numbers of passes that are part of another one."""
    for number, cover in after.covered.items():
        for trace, call, old, new in scalars:
            if trace == cover.by and call in cover.calls:
                yield number, cover.calls[call], old, new


def resized_example(example: Any, prediction: TracePrediction, after: Topology) -> Any:
    """The example inputs in the sizes that they will have: new positions of the interface hold zeros."""
    wanted = [
        tuple(size_of(dim, after.sizes) for dim in prediction.dims[index]) for index in prediction.inputs.values()
    ]
    if not any(axes_of_any(prediction, index) for index in prediction.inputs.values()):
        return example
    position = -1

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal position
        position += 1
        return in_sizes(tensor, wanted[position])

    return map_tensors(example, resize)


def in_sizes(tensor: torch.Tensor, sizes: Shape) -> torch.Tensor:
    """A tensor cut, or filled up with zeros, to other sizes; itself if it has them."""
    if tuple(tensor.shape) == sizes:
        return tensor
    result = tensor.new_zeros(sizes)
    common = tuple(slice(0, min(a, b)) for a, b in zip(tensor.shape, sizes, strict=True))
    result[common] = tensor[common]
    return result


def axes_of_any(prediction: TracePrediction, index: int) -> bool:
    """Whether any axis of the model is a dimension of this value."""
    return any(True for dim in prediction.dims[index] for _ in axes_of(dim))


@contextmanager
def attributes_set(model: nn.Module, changes: Sequence[AttributeChange]) -> Iterator[None]:
    """Run the body with the attributes changed, and put them back."""
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for change in changes:
            module, name, value = changed_attribute(model, change)
            attributes = module.__dict__
            undo.append((attributes, name, attributes[name]))
            attributes[name] = value
        yield
    finally:
        for attributes, name, value in reversed(undo):
            attributes[name] = value


def changed_attribute(model: nn.Module, change: AttributeChange) -> tuple[nn.Module, str, Any]:
    """What an attribute change sets: (module, name of its attribute, new value); nothing is set here.

    For an entry of a configuration object, which modules may share, the new value is a copy of it for this module.
    """
    module = model
    for part in change.module.split(".") if change.module else ():
        module = module._modules[part]  # type: ignore[assignment]
    name = change.path[0]
    if len(change.path) == 1:
        return module, name, change.new
    config = copy.copy(module.__dict__[name])
    setattr(config, change.path[1], change.new)
    return module, name, config


__all__ = [
    "Mismatch", "Subject", "Verification", "attributes_set", "changed_attribute", "changed_shapes", "differ",
    "in_sizes", "resized_example", "verify",
]  # fmt: skip
