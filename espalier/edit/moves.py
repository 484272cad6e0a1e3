"""Operators that only rearrange, read backwards: which part of an operand a part of the result comes from.

A `Region` is a part of a value: for every dimension which positions belong to it, None for the whole value. Sizes are
those that dimensions would have if every edited axis had one unit, so that a region says which q of a fused qkv, and
never which units of an edited axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from espalier.graph.dims import Dim, Sizes, axes_of, size_of
from espalier.graph.flow import operator_name
from espalier.graph.rules.registry import positive, refs_in
from espalier.graph.topology import TracePrediction
from espalier.graph.trace import Call, Ref

Mask: TypeAlias = npt.NDArray[np.bool_]
Region: TypeAlias = tuple[Mask, ...] | None

_AS_IT_IS = frozenset("clone alias detach _to_copy contiguous lift_fresh".split())
_REGROUPED = frozenset("view _unsafe_view _reshape_alias unsqueeze squeeze".split())
_SHUFFLED = frozenset("index _unsafe_index index_select gather roll flip repeat".split())
"""Operators whose results hold positions of the operand, in an order that is not followed: the whole operand counts."""


class LostError(Exception):
    """What a result comes from cannot be followed; says why."""


@dataclass(frozen=True)
class Part:
    """A part of a value: new units of an axis along one of its dimensions, or (`dim` None) all of it."""

    value: int
    dim: int | None
    region: Region


class Moves:
    """Follows parts of values backwards through the moving operators of one trace.

    Args:
        prediction: the trace.
        sizes: the present size of every axis.
        edited: axes that change, which regions leave out.
        axis: the axis whose dimension is followed; None to follow regions alone.
    """

    def __init__(self, prediction: TracePrediction, sizes: Sizes, edited: frozenset[int], axis: int | None) -> None:
        self._dims = prediction.dims
        self._expectations = prediction.expectations
        self._sizes = sizes
        self._single: Mapping[int, int] = {**sizes, **dict.fromkeys(edited, 1)}
        self._axis = axis

    def shape(self, value: int) -> tuple[int, ...]:
        """The sizes of a value, counting one unit of every edited axis."""
        return tuple(size_of(dim, self._single) for dim in self._dims[value])

    def whole(self, value: int) -> tuple[Mask, ...]:
        """The region of a whole value, written out."""
        return tuple(np.ones(size, dtype=np.bool_) for size in self.shape(value))

    def holds(self, value: int, dim: int) -> bool:
        """Whether the axis is part of a dimension of a value."""
        return self._axis is not None and self._axis in axes_of(self._dims[value][dim])

    def back(self, call: Call, part: Part) -> list[Part] | None:
        """The parts of the operands that make up a part of a result; None if the operator does more than move.

        Raises:
            LostError: a dimension cannot be followed.
        """
        name = operator_name(call)
        if name in _AS_IT_IS:
            return [Part(call.args[0].index, part.dim, part.region)]
        if name == "copy":
            return [self.aligned(part, call.args[1])]
        if name in _SHUFFLED:
            source = call.args[0].index
            return [Part(source, self._only_dim(source, part.dim), None)]
        if name in _REGROUPED:
            return [self._regrouped(call.args[0].index, part)]
        if name == "expand":
            return [self.aligned(part, call.args[0])]
        found = _HANDLERS.get(name)
        return None if found is None else found(self, call, part)

    def aligned(self, part: Part, ref: Ref) -> Part:
        """The part of an operand that is broadcast to a part of the result; `dim` is None if it has no such axis."""
        offset = len(self._dims[part.value]) - len(self._dims[ref.index])
        dim = None if part.dim is None or part.dim < offset else part.dim - offset
        if dim is not None and self._axis is not None and not self.holds(ref.index, dim):
            dim = None
        if part.region is None:
            return Part(ref.index, dim, None)
        masks = [
            mask if len(mask) == size else np.ones(size, dtype=np.bool_)
            for mask, size in zip(part.region[offset:], self.shape(ref.index), strict=True)
        ]
        return Part(ref.index, dim, tuple(masks))

    def _only_dim(self, value: int, dim: int | None) -> int | None:
        if dim is None or self._axis is None:
            return None
        found = [position for position in range(len(self._dims[value])) if self.holds(value, position)]
        if len(found) != 1:
            raise LostError("its dimension is not followed through a change of shape")
        return found[0]

    def _regrouped(self, source: int, part: Part) -> Part:
        before, after = self._dims[source], self._dims[part.value]
        dim = None if part.dim is None or self._axis is None else self._dim_before(before, after, part.dim)
        if part.region is None:
            return Part(source, dim, None)
        masks: list[Mask] = [np.ones(size, dtype=np.bool_) for size in self.shape(source)]
        for left, right in self._runs(before, after):
            flat = np.ones(1, dtype=np.bool_)
            for position in right:
                flat = (flat[:, None] & part.region[position][None, :]).reshape(-1)
            sizes = [len(masks[position]) for position in left]
            if prod(sizes) != len(flat):
                raise LostError("a view is not followed at the new sizes")
            try:
                separated = _separated(flat.reshape(sizes))
            except LostError:
                if self._axis is None:
                    raise
                continue  # what is asked of units may be asked of more than a part
            for position, mask in zip(left, separated, strict=True):
                masks[position] = mask
        return Part(source, dim, tuple(masks))

    def _dim_before(self, before: Sequence[Dim], after: Sequence[Dim], dim: int) -> int:
        candidates = [
            position for position, term in enumerate(before) if self._axis is not None and self._axis in axes_of(term)
        ]
        if len(candidates) > 1:
            near = {position for left, right in self._runs(before, after) if dim in right for position in left}
            candidates = [position for position in candidates if position in near]
        if len(candidates) != 1:
            raise LostError("its dimension is not followed through a view")
        return candidates[0]

    def _runs(self, before: Sequence[Dim], after: Sequence[Dim]) -> Iterator[tuple[list[int], list[int]]]:
        """Shortest runs of dimensions of equal product; dimensions of size one are left out."""
        left = [(position, size) for position, dim in enumerate(before) if (size := size_of(dim, self._sizes)) != 1]
        right = [(position, size) for position, dim in enumerate(after) if (size := size_of(dim, self._sizes)) != 1]
        while left and right:
            ours, theirs = [left.pop(0)], [right.pop(0)]
            while (m := prod(size for _, size in ours)) != (n := prod(size for _, size in theirs)):
                if not (left if m < n else right):
                    raise LostError("a view is not followed at the present sizes")
                (ours if m < n else theirs).append((left if m < n else right).pop(0))
            yield [position for position, _ in ours], [position for position, _ in theirs]

    # --- Operators by name -------------------------------------------------------------------------------------------

    def _permute(self, call: Call, part: Part) -> list[Part]:
        return [self._reordered(call, part, [positive(dim, len(call.args[1])) for dim in call.args[1]])]

    def _transpose(self, call: Call, part: Part) -> list[Part]:
        rank = len(self._dims[call.args[0].index])
        order = list(range(rank))
        if rank:
            a, b = (positive(dim, rank) for dim in call.args[1:3])
            order[a], order[b] = b, a
        return [self._reordered(call, part, order)]

    def _t(self, call: Call, part: Part) -> list[Part]:
        return [self._reordered(call, part, list(reversed(range(len(self._dims[call.args[0].index])))))]

    def _reordered(self, call: Call, part: Part, order: list[int]) -> Part:
        dim = None if part.dim is None else order[part.dim]
        region = None if part.region is None else tuple(part.region[order.index(n)] for n in range(len(order)))
        return Part(call.args[0].index, dim, region)

    def _select(self, call: Call, part: Part) -> list[Part]:
        source = call.args[0].index
        dim = positive(call.args[1], len(self._dims[source]))
        size = self.shape(source)[dim]
        return [self._inserted(source, part, dim, positive(call.args[2], size), size)]

    def _unbind(self, call: Call, part: Part) -> list[Part]:
        arguments = call.arguments()
        source = arguments["self"].index
        dim = positive(arguments["dim"], len(self._dims[source]))
        return [self._inserted(source, part, dim, _number(call, part.value), self.shape(source)[dim])]

    def _inserted(self, source: int, part: Part, dim: int, position: int, size: int) -> Part:
        one = np.zeros(size, dtype=np.bool_)
        one[position] = True
        region = self.whole(part.value) if part.region is None else part.region
        axis_dim = part.dim if part.dim is None or part.dim < dim else part.dim + 1
        return Part(source, axis_dim, (*region[:dim], one, *region[dim:]))

    def _slice(self, call: Call, part: Part) -> list[Part]:
        a = call.arguments()
        source = a["self"].index
        dim = positive(a["dim"], len(self._dims[source]))
        size, count = self.shape(source)[dim], self.shape(part.value)[dim]
        if a["step"] != 1:
            return [Part(source, part.dim, None)]
        if self._dims[source][dim] == self._dims[part.value][dim]:
            return [Part(source, part.dim, part.region)]
        expected = [one for key, one in self._expectations.get(call.index, ()) if key == "start"]
        start = size_of(expected[0], self._single) if expected else positive(a["start"] or 0, size)
        return [self._embedded(source, part, dim, min(max(start, 0), size), size, count)]

    def _split(self, call: Call, part: Part) -> list[Part]:
        a = call.arguments()
        source = a["self"].index
        dim = positive(a["dim"], len(self._dims[source]))
        number = _number(call, part.value)
        counts = [self.shape(out.index)[dim] for out in call.outputs if out is not None]
        start = sum(counts[:number])
        return [self._embedded(source, part, dim, start, self.shape(source)[dim], counts[number])]

    def _embedded(self, source: int, part: Part, dim: int, start: int, size: int, count: int) -> Part:
        if start + count > size:
            raise LostError("a slice is not followed at the new sizes")
        region = self.whole(part.value) if part.region is None else part.region
        mask = np.zeros(size, dtype=np.bool_)
        mask[start : start + count] = region[dim]
        return Part(source, part.dim, (*region[:dim], mask, *region[dim + 1 :]))

    def _cat(self, call: Call, part: Part) -> list[Part]:
        a = call.arguments()
        rank = len(self._dims[part.value])  # an empty tensor of one dimension, the cache of keys at first, is left out
        refs = [ref for ref in refs_in(a["tensors"]) if len(self._dims[ref.index]) == rank]
        dim = positive(a["dim"], rank)
        region = self.whole(part.value) if part.region is None else part.region
        found, start = [], 0
        for ref in refs:
            count = self.shape(ref.index)[dim]
            mask = region[dim][start : start + count]
            start += count
            if not mask.any():
                continue
            axis_dim = part.dim
            if axis_dim is not None and self._axis is not None and not self.holds(ref.index, axis_dim):
                if axis_dim == dim:
                    continue  # this piece has no units of the axis
                axis_dim = None
            whole = part.region is None or all(one.all() for one in (*region[:dim], mask, *region[dim + 1 :]))
            found.append(Part(ref.index, axis_dim, None if whole else (*region[:dim], mask, *region[dim + 1 :])))
        return found

    def _stack(self, call: Call, part: Part) -> list[Part]:
        a = call.arguments()
        dim = positive(a["dim"], len(self._dims[part.value]))
        if part.dim == dim:
            raise LostError("it is stacked along its own dimension")
        found = []
        for number, ref in enumerate(refs_in(a["tensors"])):
            if part.region is None or part.region[dim][number]:
                region = None if part.region is None else (*part.region[:dim], *part.region[dim + 1 :])
                axis_dim = part.dim if part.dim is None or part.dim < dim else part.dim - 1
                found.append(Part(ref.index, axis_dim, region))
        return found


_HANDLERS: Mapping[str, Callable[[Moves, Call, Part], list[Part]]] = {
    "permute": Moves._permute,
    "transpose": Moves._transpose,
    "t": Moves._t,
    "select": Moves._select,
    "unbind": Moves._unbind,
    "slice": Moves._slice,
    "split": Moves._split,
    "split_with_sizes": Moves._split,
    "unsafe_split": Moves._split,
    "cat": Moves._cat,
    "stack": Moves._stack,
}


def _number(call: Call, value: int) -> int:
    return next(number for number, out in enumerate(call.outputs) if out is not None and out.index == value)


def _separated(array: Mask) -> list[Mask]:
    """Masks per dimension whose outer product is an array.

    Raises:
        LostError: there are none.
    """
    masks: list[Mask] = []
    product: Mask = np.ones((), dtype=np.bool_)
    for dim in range(array.ndim):
        others = tuple(other for other in range(array.ndim) if other != dim)
        masks.append(np.asarray(array.any(axis=others), dtype=np.bool_))
        product = product[..., None] & masks[-1]
    if not bool((product == array).all()):
        raise LostError("a part of a view is no block of what is viewed")
    return masks


__all__ = ["LostError", "Mask", "Moves", "Part", "Region"]
