"""Applies the operator rules to traces: from recorded calls to solved dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from espalier.graph.code import CodeSizes
from espalier.graph.courses import has_other_courses
from espalier.graph.named_tensors import TensorTable
from espalier.graph.origins import Attribute
from espalier.graph.rules import Reading, freeze_all, rule_for
from espalier.graph.rules.registry import Dims, refs_in
from espalier.graph.solver import Reason, Solver, Term, size
from espalier.graph.trace import Call, Shape, Trace
from espalier.graph.unread import freeze_unread


@dataclass(frozen=True)
class Solved:
    """The equations of all traces, solved: terms are final, but not yet numbered."""

    solver: Solver
    tensors: Mapping[str, Dims]
    readings: Sequence[Reading]
    unknown: Mapping[str, int]
    """Operators without a rule -> how often they were met."""
    attributes: Mapping[Attribute, Term]
    """Attributes of modules that repeat a size."""


def read(model: nn.Module, table: TensorTable, traces: Sequence[Trace], shapes: Mapping[str, Shape]) -> Solved:
    """Read every trace with the operator rules, over one set of unknowns for the parameters.

    `shapes` are those that some tensors had in the traces, where they differ from the present ones.
    """
    solver = Solver()
    dims: dict[str, Dims] = {
        name: tuple(solver.new(n, solid=True) for n in shapes.get(name, tensor.shape))
        for name, tensor in table.tensors.items()
    }
    _tie_storage(solver, table, dims)
    unknown: dict[str, int] = {}
    code = CodeSizes(solver, dims)
    readings = [_read_trace(model, solver, trace, dims, unknown, code) for trace in traces]
    code.solve()
    for name, terms in dims.items():
        if not any(name in trace.tensors for trace in traces):
            freeze_unread(name, terms, readings, has_other_courses(traces))
    return Solved(solver, dims, readings, unknown, code.attributes)


def _read_trace(
    model: nn.Module,
    solver: Solver,
    trace: Trace,
    tensors: Mapping[str, Dims],
    unknown: dict[str, int],
    code: CodeSizes,
) -> Reading:
    reading = Reading(trace, solver)
    for name, ref in trace.tensors.items():
        reading.dims[ref.index] = tensors[name]
        reading.origins[ref.index] = frozenset((name,))
    for path, ref in trace.inputs.items():
        reading.dims[ref.index] = tuple(
            n
            if position == 0
            else solver.new(n, solid=False, reasons=[Reason("input", f"is dimension {position} of {path}")])
            for position, n in enumerate(trace.shapes[ref.index])
        )
    attention = _PackedAttention(model, reading)
    for call in trace.calls:
        known = {out.index for out in call.outputs if out is not None and out.index in reading.dims}
        _store(reading, call, _applied(reading, call, unknown), known)
        attention.visit(call)
        code.visit(reading, call)
    for path, ref in trace.outputs.items():
        for position, term in enumerate(reading.of(ref)):
            solver.freeze(term, Reason("output", f"is dimension {position} of the model's {path}"))
    return reading


def _applied(reading: Reading, call: Call, unknown: dict[str, int]) -> Sequence[Dims | None]:
    """What the rule of `call` says of its results. Without a rule, or if the rule fails, all that it touches is frozen.

    A rule that fails meets a call that its author has not thought of; like an unknown operator it is reported.
    """
    found = rule_for(call)
    name, problem = call.name, "is touched by the unknown operator"
    if found is not None:
        try:
            result = found(reading, call)
        except Exception as error:
            name, problem = f"{call.name} ({type(error).__name__}: {error})", "is used in a way that fails the rule of"
        else:
            return [result] if isinstance(result, tuple) else list(result)
    unknown[name] = unknown.get(name, 0) + 1
    return freeze_all(reading, call, "operator", f"{problem} {call.name}")


def _store(reading: Reading, call: Call, outputs: Sequence[Dims | None], known: set[int]) -> None:
    inputs = refs_in((call.args, call.kwargs))
    weights_alone = bool(inputs) and all(reading.is_weight(ref) for ref in inputs)
    origins = (
        frozenset().union(*(reading.origins.get(ref.index, frozenset()) for ref in inputs)) if inputs else frozenset()
    )
    for ref, dims in zip(call.outputs, outputs, strict=False):
        if ref is None or dims is None:
            continue
        if tuple(size(term) for term in dims) != reading.shape(ref):
            dims = _misread(reading, call, dims, reading.shape(ref))
        if ref.index in known:
            for old, new in zip(reading.dims[ref.index], dims, strict=True):
                reading.unify(old, new, call)
        else:
            reading.dims[ref.index] = dims
        if weights_alone or not inputs:
            reading.origins.setdefault(ref.index, origins)
        else:
            reading.origins.pop(ref.index, None)


def _misread(reading: Reading, call: Call, dims: Dims, shape: tuple[int, ...]) -> Dims:
    """A rule whose result has other sizes than the operator's does not understand this call: freeze, never guess."""
    for term in [*dims, *(term for ref in refs_in((call.args, call.kwargs)) for term in reading.of(ref))]:
        reading.freeze(term, "operator", "is used in a way that its rule does not cover", call)
    return shape


def _tie_storage(solver: Solver, table: TensorTable, dims: Mapping[str, Dims]) -> None:
    """Distinct tensor objects over the same memory are one tensor; partial overlaps may not change."""
    spans = []
    for name, tensor in table.tensors.items():
        if tensor.device.type == "meta" or tensor.numel() == 0 or tensor.layout != torch.strided:
            continue
        start = tensor.data_ptr()
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((start, start + extent * tensor.element_size(), name))
    spans.sort()
    end, name = 0, ""
    for other_start, other_end, other in spans:
        if other_start < end:
            text = f"{name} and {other} are different tensors over the same memory; tie them as one parameter object"
            for term in (*dims[name], *dims[other]):
                solver.freeze(term, Reason("storage", text))
        if other_end > end:
            end, name = other_end, other


class _PackedAttention:
    """nn.MultiheadAttention insists that heads x head_dim equals the width of its input.

    Its forward asserts this instead of computing with it, so no operator says it: the one module type whose code has to
    be known. The two are the same dimension.
    """

    def __init__(self, model: nn.Module, reading: Reading) -> None:
        self._reading = reading
        self._modules = {
            path: module for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
        }

    def visit(self, call: Call) -> None:
        """After a call: if it projects the output of such a module, tie its input and output widths."""
        if not self._modules:
            return
        path = next((path for path in reversed(call.modules) if path in self._modules), None)
        if path is None:
            return
        name = f"{path}.out_proj.weight" if path else "out_proj.weight"
        tensors = self._reading.trace.tensors
        if name in tensors and any(ref == tensors[name] for ref in refs_in(call.args)):
            out, inner = self._reading.of(tensors[name])
            self._reading.solver.unify(out, inner, f"in {path}, an nn.MultiheadAttention, by its own assertion")


__all__ = ["Solved", "read"]
