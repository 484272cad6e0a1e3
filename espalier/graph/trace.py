"""What a forward pass was, as values: its operators in order, the tensors by number."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from espalier.graph.decisions import Decisions
from espalier.graph.tracking import Link
from espalier.graph.visits import Visit

Shape = tuple[int, ...]


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
