"""Mends modules that keep sizes in attributes which no table knows.

Starts from the first operator that is not as predicted: the integer attributes (and entries of tuples, and of config
objects) of the modules in whose forward it ran that equal the old size of something that changed are set to its new
size, one at a time, and verified again. A change that lets the verification come further is kept. If nothing helps, the
edit is refused with the axis, the module and the line of code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import nn

from espalier.edit.attributes import AttributeChange, known_changes
from espalier.edit.verify import Mismatch, Verification, attributes_set, verify
from espalier.errors import SurgeryError
from espalier.graph.capture import Call, Ref, TensorTable
from espalier.graph.dims import Concat, Dim, Leaf, Product, axes_of, size_of
from espalier.graph.topology import Topology, TracePrediction

_CONVENTIONAL = frozenset(
    "num_heads num_attention_heads n_head n_heads nheads heads num_key_value_heads num_kv_heads n_kv_heads "
    "head_dim head_size attention_head_size all_head_size".split()
)
"""Names under which modules repeat the sizes of attention; they follow even where the forward does not read them."""


_NEIGHBOURS = 6


@dataclass(frozen=True)
class Tie:
    """An axis that the code ties to an expression over other axes: the same attribute sets both sizes."""

    axis: int
    to: Dim


class UnrepairedError(SurgeryError):
    """No attribute mends an edit."""

    def __init__(self, axes: str, finding: str, ties: Sequence[Tie], progress: tuple[int, int]) -> None:
        super().__init__(f"the edit of {axes} was refused and nothing was changed: {finding}")
        self.finding = finding
        self.ties = ties
        """Axes that may have to change together with the edited ones, likeliest first."""
        self.progress = progress


def repaired(
    model: nn.Module, example: Any, table: TensorTable, before: Topology, after: Topology
) -> tuple[list[AttributeChange], Verification]:
    """The attribute changes under which the edited model runs as predicted.

    Raises:
        UnrepairedError: no attribute mends the first difference; names the module, the line and the sizes.
    """
    changes = known_changes(model, before, after)
    verification = verify(model, example, table, after, changes)
    learnt: list[tuple[type, tuple[str, ...]]] = []
    while verification.mismatch is not None:
        mismatch = verification.mismatch
        step = _step(model, example, table, before, after, changes, mismatch, learnt)
        if step is None:
            ties = list(_ties(before, after, mismatch))
            raise UnrepairedError(_edited(before, after, mismatch), _finding(mismatch), ties, mismatch.progress)
        added, verification = step
        learnt.extend((type(model.get_submodule(one.module)), one.path) for one in added)
        changes.extend(added)
    return _with_conventional(model, example, table, before, after, changes, verification)


def _step(
    model: nn.Module,
    example: Any,
    table: TensorTable,
    before: Topology,
    after: Topology,
    changes: Sequence[AttributeChange],
    mismatch: Mismatch,
    learnt: Sequence[tuple[type, tuple[str, ...]]],
) -> tuple[list[AttributeChange], Verification] | None:
    candidates = list(_candidates(model, before, after, changes, mismatch))
    candidates.sort(key=lambda one: (type(model.get_submodule(one.module)), one.path) not in learnt)
    for count in (1, 2):
        best: tuple[list[AttributeChange], Verification] | None = None
        for chosen in combinations(candidates[:24], count):
            if len({(one.module, one.path) for one in chosen}) < count:
                continue
            found = verify(model, example, table, after, [*changes, *chosen])
            if found.mismatch is None:
                return list(chosen), found
            reached = best[1].mismatch.progress if best and best[1].mismatch else mismatch.progress
            if found.mismatch.progress > reached:
                best = (list(chosen), found)
                if all((type(model.get_submodule(one.module)), one.path) in learnt for one in chosen):
                    break
        if best is not None:
            return best
    return None


def _candidates(
    model: nn.Module, before: Topology, after: Topology, changes: Sequence[AttributeChange], mismatch: Mismatch
) -> Iterator[AttributeChange]:
    """Attributes of the modules around the mismatch that equal an old size, with the new one; innermost first."""
    new_sizes = _changed_sizes(before, after, mismatch)
    with attributes_set(model, changes):
        for path in dict.fromkeys([*reversed(mismatch.modules), ""]):
            module = _submodule(model, path)
            if module is None:
                continue
            for attribute, value in _integers(module):
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


def _integers(module: nn.Module) -> Iterator[tuple[tuple[str, ...], Any]]:
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
    """The calls that may share an attribute with the one at fault, nearest first: those of its module, and neighbours."""
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


def _ties(before: Topology, after: Topology, mismatch: Mismatch) -> Iterator[Tie]:
    """Axes near the mismatch that do not change but are as large as something that does, or the other way round."""
    prediction = before.predictions[mismatch.trace]
    parts: dict[Dim, None] = {}
    for call in _around(prediction, mismatch):
        for ref in call.outputs:
            for dim in prediction.dims.get(ref.index, ()) if ref is not None else ():
                parts.update(dict.fromkeys(_parts(dim)))
    changed = [part for part in parts if size_of(part, before.sizes) != size_of(part, after.sizes)]
    same = [part for part in parts if part not in changed and any(True for _ in axes_of(part))]
    for still in same:
        for moved in changed:
            if size_of(still, before.sizes) != size_of(moved, before.sizes):
                continue
            for leaf, other in ((still, moved), (moved, still)):
                if isinstance(leaf, Leaf) and leaf.axis in before.axes and _may_replace(leaf.axis, other, before):
                    yield Tie(leaf.axis, other)
                    break


def _may_replace(axis: int, other: Dim, topology: Topology) -> bool:
    inside = list(axes_of(other))
    return axis not in inside and bool(inside) and all(one in topology.axes for one in inside)


def _with_conventional(
    model: nn.Module,
    example: Any,
    table: TensorTable,
    before: Topology,
    after: Topology,
    changes: list[AttributeChange],
    verification: Verification,
) -> tuple[list[AttributeChange], Verification]:
    """Also follow attributes that repeat an attention size without being read, where that verifies."""
    extra: list[AttributeChange] = []
    for path, sizes in _attention_sizes(model, before, after).items():
        module = model.get_submodule(path)
        for attribute, value in _integers(module):
            if len(attribute) > 1 or attribute[0] not in _CONVENTIONAL or type(value) is not int:
                continue
            if any(one.module == path and one.path == attribute for one in changes):
                continue
            news = {new for old, new in sizes if old == value}
            if len(news) == 1:
                extra.append(AttributeChange(path, attribute, value, news.pop()))
    if not extra:
        return changes, verification
    together = [*changes, *extra]
    found = verify(model, example, table, after, together)
    return (together, found) if found.mismatch is None else (changes, verification)


def _attention_sizes(model: nn.Module, before: Topology, after: Topology) -> dict[str, set[tuple[int, int]]]:
    found: dict[str, set[tuple[int, int]]] = {}
    for prediction in before.predictions[:1]:
        for call in prediction.calls:
            if call.name.removeprefix("aten::") not in ("_scaled_dot_product_flash_attention_for_cpu", "bmm"):
                continue
            for ref in (one for one in call.args[:3] if isinstance(one, Ref)):
                for dim in prediction.dims[ref.index]:
                    for part in _parts(dim):
                        old, new = size_of(part, before.sizes), size_of(part, after.sizes)
                        if old != new and call.modules and call.modules[-1]:
                            found.setdefault(call.modules[-1], set()).add((old, new))
    return found


def _edited(before: Topology, after: Topology, mismatch: Mismatch) -> str:
    """The edited axes with their sizes, those around the mismatch first, five at most."""
    prediction = before.predictions[mismatch.trace]
    near: dict[int, None] = {}
    for ref in prediction.calls[mismatch.call].outputs:
        for dim in prediction.dims.get(ref.index, ()) if ref is not None else ():
            near.update(dict.fromkeys(axes_of(dim)))
    numbers = dict.fromkeys((*near, *before.axes))
    edited = [number for number in numbers if number in before.axes and after.sizes[number] != before.sizes[number]]
    return ", ".join(f"{before.axes[one].name} ({before.sizes[one]} -> {after.sizes[one]})" for one in edited[:5])


def _finding(mismatch: Mismatch) -> str:
    return (
        f"{mismatch.where} would not run as predicted: {mismatch.text}. Its code holds a size that no attribute of the "
        "modules around it mends. Read the size from an attribute or from a tensor's shape there, change the axes that "
        "this code ties together in one plan, or keep these axes."
    )
