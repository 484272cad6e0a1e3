"""One trace seen from its values: which calls write and read each of them, and which share memory."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from espalier.graph.dims import Dim, axes_of
from espalier.graph.rules.registry import refs_in
from espalier.graph.trace import Call, Ref

_VIEWS = frozenset(
    "view _unsafe_view _reshape_alias transpose permute t unsqueeze squeeze expand slice select split split_with_sizes "
    "unbind alias detach as_strided diagonal unfold view_as_real view_as_complex".split()
)


def operator_name(call: Call) -> str:
    """The name of an operator without namespace; in-place variants go by that of their functional form."""
    return _functional(call.op)


@cache
def _functional(op: Any) -> str:
    name = str(op._schema.name).removeprefix("aten::")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


_ARITHMETIC = frozenset(
    """
    add sub rsub mul div floor_divide remainder pow full full_like fill scalar_tensor lift_fresh clamp clamp_min
    clamp_max masked_fill
    """.split()
)
"""Operators whose whole numbers are values, not sizes or positions."""


def constants(call: Call) -> Iterator[float]:
    """The numbers that a call computes with."""
    kinds = (int, float) if operator_name(call) in _ARITHMETIC else (float,)
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, kinds) and not isinstance(value, bool):
            yield value


class Flow:
    """Writers and readers of every value of a trace. A value that is written in place has several versions."""

    def __init__(self, calls: Sequence[Call], dims: Mapping[int, tuple[Dim, ...]], tensors: Mapping[str, int]) -> None:
        self.calls = calls
        self.names = {index: name for name, index in tensors.items()}
        """Value number -> name of the parameter or buffer that it is."""
        self.operands = [refs_in((call.args, call.kwargs)) for call in calls]
        self.writers: dict[int, list[int]] = defaultdict(list)
        self.readers: dict[int, list[int]] = defaultdict(list)
        self.of_weights: set[int] = set(self.names)
        """Values computed from parameters, buffers and constants alone, with at least one parameter or buffer."""
        self.touching: dict[int, list[int]] = defaultdict(list)
        """Axis -> the calls that read or write a value that has it."""
        self._memory: dict[int, int] = {}
        self._changed: dict[int, list[tuple[int, int]]] = defaultdict(list)
        constants: set[int] = set()
        held = {index: tuple({axis for dim in terms for axis in axes_of(dim)}) for index, terms in dims.items()}
        for call, operands in zip(calls, self.operands, strict=True):
            outputs = [out.index for out in call.outputs if out is not None]
            self._link(call, operands, outputs)
            if all(ref.index in self.of_weights or ref.index in constants for ref in operands):
                from_weights = any(ref.index in self.of_weights for ref in operands)
                (self.of_weights if from_weights else constants).update(outputs)
            else:
                self.of_weights.difference_update(outputs)
                constants.difference_update(outputs)
            for axis in {
                axis for index in (*outputs, *(ref.index for ref in operands)) for axis in held.get(index, ())
            }:
                self.touching[axis].append(call.index)

    def _link(self, call: Call, operands: Iterable[Ref], outputs: Iterable[int]) -> None:
        for index in dict.fromkeys(ref.index for ref in operands):
            self.readers[index].append(call.index)
        in_place = operator_name(call) != call.name.removeprefix("aten::")
        view = operator_name(call) in _VIEWS
        for out in outputs:
            self.writers[out].append(call.index)
            if in_place and call.args and isinstance(call.args[0], Ref):
                # An in-place operator gives its operand back, as a new value where that was turned.
                self._memory.setdefault(out, self._root(call.args[0].index))
                self._changed[self._root(out)].append((call.index, out))
            elif view:
                self._memory.setdefault(out, self._root(call.args[0].index))

    def _root(self, index: int) -> int:
        return self._memory.get(index, index)

    def uses(self, index: int, since: int) -> list[int]:
        """The calls, from that one on, that read a value as it is then: a write in place reads it and ends it."""
        until = next((at for at in self.writers.get(index, ()) if at >= since), len(self.calls))
        return [at for at in self.readers.get(index, ()) if since <= at <= until]

    def changes(self, index: int) -> Sequence[tuple[int, int]]:
        """(call, value) for every write in place to the memory of a value."""
        return self._changed.get(self._root(index), ())

    def memory(self, index: int) -> int:
        """A number that values have in common which are known to share memory."""
        return self._root(index)

    def version(self, index: int, before: int) -> int:
        """How often a value was written before a call."""
        return bisect_left(self.writers.get(index, ()), before)

    def maker(self, index: int, before: int) -> Call | None:
        """The call that a value comes from, as another call finds it; None for tensors, inputs and constants."""
        version = self.version(index, before)
        return self.calls[self.writers[index][version - 1]] if version else None

    def is_stale(self, index: int, before: int, *, zeroed: bool = False) -> bool:
        """Whether memory of a value was written through another value since it was made.

        With `zeroed`, zeros do not count.
        """
        changed = self._changed.get(self._root(index))
        if not changed:
            return False
        version = self.version(index, before)
        made = self.writers[index][version - 1] if version else -1
        return any(
            made < at < before and by != index and not (zeroed and operator_name(self.calls[at]) == "zero")
            for at, by in changed
        )


__all__ = ["Flow", "constants", "operator_name"]
