"""Repeated blocks: cells, which come and go as wholes."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from espalier.errors import PlanError
from espalier.graph.dims import Concat, Dim, Fixed, Leaf, Product
from espalier.graph.flow import operator_name
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.trace import Call, Ref
from espalier.graph.visits import Visit


@dataclass(frozen=True)
class Cells:
    """The blocks of one class that one container holds, at least two, in the order in which it holds them."""

    container: str
    """Path of the `nn.Sequential`, `nn.ModuleList`, `nn.ModuleDict` or other module whose children they are."""
    kind: str
    """Name of their class."""
    members: tuple[str, ...]
    """Their paths."""
    alike: tuple[tuple[str, ...], ...]
    """The same paths, those together that run the same operators on the same dimensions, but for inner sizes."""


def cells(topology: Topology, modules: Mapping[str, nn.Module]) -> tuple[Cells, ...]:
    """The groups of repeated blocks: children of one module, of one class, that have modules of their own.

    An `nn.Sequential` is nobody's block but its container's; two of them are cells only if they run alike.
    """
    found: dict[tuple[str, type[nn.Module]], list[str]] = defaultdict(list)
    ran = {visit.module for one in topology.predictions for visit in one.visits}
    for path, module in modules.items():
        if path and path in ran and any(True for _ in module.children()):
            found[path.rpartition(".")[0], type(module)].append(path)
    groups = []
    members = {path for paths in found.values() if len(paths) > 1 for path in paths}
    signatures = _signatures(topology, members)
    for (container, kind), paths in found.items():
        if len(paths) > 1:
            alike = _together(paths, signatures)
            if kind is nn.Sequential:
                alike = tuple(one for one in alike if len(one) > 1)
                paths = [path for path in paths if any(path in one for one in alike)]
            if paths:
                groups.append(Cells(container, kind.__name__, tuple(paths), alike))
    return tuple(groups)


def named_cells(modules: Iterable[str], patterns: Sequence[str]) -> frozenset[str]:
    """The paths that match patterns such as ``layers.*.block``, in which `*` stands for anything but a dot.

    Raises PlanError for a pattern that no module matches.
    """
    found: set[str] = set()
    for pattern in patterns:
        parts = pattern.split(".")
        matching = {path for path in modules if path and _matches(path.split("."), parts)}
        if not matching:
            raise PlanError(f"no module of the model is named {pattern!r}: expected paths such as 'layers.*'.")
        found |= matching
    return frozenset(found)


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(path) == len(pattern) and all(map(fnmatch.fnmatchcase, path, pattern))


def _together(paths: Sequence[str], signatures: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    found: dict[Any, list[str]] = defaultdict(list)
    for path in paths:
        found[signatures[path]].append(path)
    return tuple(map(tuple, found.values()))


def _signatures(topology: Topology, paths: set[str]) -> dict[str, tuple[Any, ...]]:
    """What each module runs, in every pass, with names of its own for values and axes: equal for blocks alike."""
    found: dict[str, tuple[Any, ...]] = dict.fromkeys(paths, ())
    for number, prediction in enumerate(topology.predictions):
        for visit in prediction.visits:
            if visit.module in paths:
                found[visit.module] += (number, _Signature(prediction, visit).found)
    return found


class _Signature:
    """The operators of one run of a module; values and axes are numbered in the order in which they occur there."""

    def __init__(self, prediction: TracePrediction, visit: Visit) -> None:
        self._dims = prediction.dims
        self._values: dict[int, int] = {}
        self._axes: dict[int, int] = {}
        self.found = tuple(self._of(call) for call in prediction.calls[visit.first : visit.last])

    def _of(self, call: Call) -> tuple[Any, ...]:
        operands = tuple(
            self._value(one.index)
            for argument in (*call.args, *call.kwargs.values())
            for one in (argument if isinstance(argument, (tuple, list)) else (argument,))
            if isinstance(one, Ref)
        )
        outputs = tuple(None if out is None else self._value(out.index) for out in call.outputs)
        numbers = tuple(one for one in call.args if isinstance(one, (float, bool)))
        return operator_name(call), operands, numbers, outputs

    def _value(self, index: int) -> Any:
        """The number of a value; where it is new, its dimensions as well."""
        known = self._values.get(index)
        if known is not None:
            return known
        number = self._values[index] = len(self._values)
        return number, tuple([self._dim(dim) for dim in self._dims[index]])

    def _dim(self, dim: Dim) -> Any:
        match dim:
            case Fixed(size):
                return size
            case Leaf(axis):
                return "axis", self._axes.setdefault(axis, len(self._axes))
            case Product(parts) | Concat(parts):
                return type(dim).__name__, tuple(map(self._dim, parts))


__all__ = ["Cells", "cells", "named_cells"]
