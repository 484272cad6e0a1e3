"""What lies around an operator that is not as predicted: attributes that may repeat a size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from espalier.edit.attributes import AttributeChange
from espalier.edit.verify import Mismatch, attributes_set
from espalier.graph.dims import Concat, Dim, Product, size_of
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.trace import Call, Ref

_NEIGHBOURS = 6
_SCORES = ("_scaled_dot_product_flash_attention_for_cpu", "bmm")


def candidates(
    model: nn.Module, before: Topology, after: Topology, changes: Sequence[AttributeChange], mismatch: Mismatch
) -> Iterator[AttributeChange]:
    """Attributes of the modules around the mismatch that equal an old size, with the new one; innermost first."""
    new_sizes = _changed_sizes(before, after, mismatch)
    with attributes_set(model, changes):
        for path in dict.fromkeys([*reversed(mismatch.modules), ""]):
            module = _submodule(model, path)
            if module is None:
                continue
            for attribute, value in integers(module):
                if any(one.module == path and one.path == attribute for one in changes):
                    continue
                for old, new in new_sizes:
                    replaced = _replaced(value, old, new)
                    if replaced is not None:
                        yield AttributeChange(path, attribute, value, replaced)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _replaced(value: Any, old: int, new: int) -> Any:
    if isinstance(value, int):
        return new if value == old else None
    if old not in value:
        return None
    return type(value)(new if item == old else item for item in value)


def integers(module: nn.Module) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in list(module.__dict__.items()):
        if name.startswith("_") or name == "training":
            continue
        if _is_size(value):
            yield (name,), value
        elif name == "config":
            for key, item in list(vars(value).items()):
                if _is_size(item) and not key.startswith("_"):
                    yield (name, key), item


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)) and value and type(value) in (tuple, list):
        return all(type(item) is int for item in value)
    return type(value) is int and value > 0


def _changed_sizes(before: Topology, after: Topology, mismatch: Mismatch) -> list[tuple[int, int]]:
    """(old, new) of everything whose size changes around the mismatch: dimensions of values and their parts."""
    prediction = before.predictions[mismatch.trace]
    near: dict[tuple[int, int], None] = {}
    for call in _around(prediction, mismatch):
        for ref in call.outputs:
            if ref is not None and ref.index in prediction.dims:
                for dim in prediction.dims[ref.index]:
                    for part in _parts(dim):
                        old, new = size_of(part, before.sizes), size_of(part, after.sizes)
                        if old != new:
                            near[old, new] = None
    return list(near)


def _around(prediction: TracePrediction, mismatch: Mismatch) -> list[Call]:
    """The calls that may share an attribute with the one at fault, nearest first: its module's, and neighbours."""
    module = mismatch.modules[-1] if mismatch.modules else ""
    chosen = [
        call
        for call in prediction.calls
        if abs(call.index - mismatch.call) <= _NEIGHBOURS or (module and module in call.modules)
    ]
    return sorted(chosen, key=lambda call: abs(call.index - mismatch.call))


def _parts(dim: Dim) -> Iterator[Dim]:
    yield dim
    match dim:
        case Product(parts) | Concat(parts):
            for part in parts:
                yield from _parts(part)
        case _:
            return


def attention_sizes(before: Topology, after: Topology) -> dict[str, dict[str, set[tuple[int, int]]]]:
    """Module -> ``heads`` and ``head_dim`` -> (old, new) sizes of its attention that change."""
    found: dict[str, dict[str, set[tuple[int, int]]]] = {}
    prediction = before.predictions[0]
    for call in prediction.calls:
        if call.name.removeprefix("aten::") not in _SCORES or not call.modules or not call.modules[-1]:
            continue
        for ref in (one for one in call.args[:2] if isinstance(one, Ref)):
            dims = prediction.dims[ref.index]
            heads, last = (dims[1], dims[3]) if len(dims) == 4 else (dims[0], dims[-1])
            for kind, dim in (("heads", heads), ("head_dim", last)):
                for part in _parts(dim):
                    old, new = size_of(part, before.sizes), size_of(part, after.sizes)
                    if old != new:
                        found.setdefault(call.modules[-1], {}).setdefault(kind, set()).add((old, new))
    return found
