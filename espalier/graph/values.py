"""Captures on values: where they decide sizes or what runs next, or where fake tensors have no rule for an operator.

`Deciding` runs every operator twice, on the fake tensors that are recorded and on real ones beside them, and writes
down what only the real ones could tell: how many positions a mask chose, which number `.item()` gave. `Following` takes
these decisions again, in order, on fake tensors alone: so a planned edit is tried out along the very same course
through the code, whatever the new weights would choose, and without arithmetic.

Values that no parameter, no input and no random number went into (`torch.ones(n).sum()`) follow from sizes. They are
computed both times, so that what code makes of a size is never held at an old one.

Nothing real is written to: a tensor that an operator changes in place is copied first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import _disable_current_modes

from espalier.graph.decisions import Chosen, Decision, Given, Made, OnZeros
from espalier.graph.results import tensors_in
from espalier.graph.trees import map_tensors

_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
_MASKS = (torch.bool, torch.uint8)
_VALUE_FREE = frozenset(
    "empty_like full_like new_empty new_empty_strided new_full new_ones new_zeros ones_like zeros_like".split()
)
"""Operators whose results do not depend on the values of their tensors."""
_INDEXING = frozenset("index index_put index_put_ _index_put_impl_ _unsafe_index _unsafe_index_put".split())
_ASKING = frozenset({"any", "nonzero"})
_NOTHING = object()


class OtherCourseError(RuntimeError):
    """A pass asks for a decision that was not made there."""


class Evaluation:
    """What deciding and following share: the real tensors beside fake ones, and which of them hold data."""

    def __init__(self) -> None:
        self._real: dict[int, torch.Tensor] = {}
        self._constants: Mapping[int, torch.Tensor] = {}
        self._data: set[int] = set()
        """Storages of fake tensors into whose values parameters, inputs or random numbers went."""
        self._borrowed: set[int] = set()
        """Storages of real tensors that belong to others."""

    def begin(
        self, mode: FakeTensorMode, data: Mapping[int, torch.Tensor], constants: Mapping[int, torch.Tensor]
    ) -> None:
        """Start a pass: `data` are parameters, buffers and inputs, `constants` what code brings along, as it does."""
        self._mode = mode
        self._inputs, self._constants = data, constants

    def run(self, func: Any, args: Any, kwargs: Any, modules: tuple[str, ...], frame: tuple[str, int]) -> Any:
        """The result of an operator on fake tensors; what they cannot tell is decided, or was."""
        inputs = list(tensors_in((args, kwargs)))
        name = _name(func)
        of_data = name not in _VALUE_FREE and (_is_random(func) or any(self._holds_data(one) for one in inputs))
        real_args, real_kwargs, real = (), {}, _NOTHING
        if self._computes(of_data):
            real_args, real_kwargs = map_tensors(args, self._twin), map_tensors(kwargs, self._twin)
            if self._written(func, real_args, real_kwargs):
                real_args, real_kwargs = map_tensors(args, self._twin), map_tensors(kwargs, self._twin)
            if of_data:
                real_args = self._wanted(name, real_args)
            with _disable_current_modes():
                real = func(*real_args, **real_kwargs)
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            place = func, modules, frame
            outcome = self._outcome(error, place, of_data, (real_args, real_kwargs), real)
            result = self._built(outcome, func, args, kwargs)
        if of_data:
            changed = (one for one, argument in _by_schema(func, args, kwargs) if _is_written(argument))
            self._data.update(_storage(one) for one in (*tensors_in(result), *changed))
        if real is not _NOTHING:
            for fake, twin in zip(tensors_in(result), tensors_in(real), strict=False):
                self._real[id(fake)] = twin
        return result

    def _computes(self, of_data: bool) -> bool:
        """Whether to run an operator on real tensors."""
        raise NotImplementedError

    def _outcome(self, error: Exception, place: tuple[Any, ...], of_data: bool, given: Any, real: Any) -> Any:
        """What takes the place of a result that fake tensors cannot give."""
        raise NotImplementedError

    def _wanted(self, name: str, args: Any) -> Any:
        return args

    # Real tensors beside fake ones.

    def _holds_data(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._inputs or _storage(tensor) in self._data

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, FakeTensor):
            return tensor
        found = self._real.get(id(tensor))
        if found is not None:
            return found
        with _disable_current_modes():
            original = self._constants.get(id(tensor), self._inputs.get(id(tensor)))
            if original is None or tuple(original.shape) != tuple(tensor.shape):
                # Only operators that look at no value get here.
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            found = self._real[id(tensor)] = original.detach()
            self._borrowed.add(_storage(found))
        return found

    def _written(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Copy what an operator is going to change, where it belongs to others; whether anything was copied."""
        copied = False
        for tensor, argument in _by_schema(func, args, kwargs):
            if not _is_written(argument) or _storage(tensor) not in self._borrowed:
                continue
            storage = tensor.untyped_storage()
            with _disable_current_modes():
                copy = storage.clone()  # type: ignore[no-untyped-call]
                for key, twin in self._real.items():
                    if _storage(twin) == storage._cdata:
                        empty = torch.empty(0, dtype=twin.dtype, device=twin.device)
                        self._real[key] = empty.set_(copy, twin.storage_offset(), twin.size(), twin.stride())
            copied = True
        return copied

    # Fake results from outcomes.

    def _built(self, outcome: Any, func: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(outcome, Chosen):
            return func(*self._with_positions(args, outcome.counts), **kwargs)
        if isinstance(outcome, OnZeros):
            outcome = _on_zeros(func, args, kwargs)
        inputs = list(tensors_in((args, kwargs)))

        def build(tree: Any) -> Any:
            if isinstance(tree, Made):
                empty = torch.empty_strided(tree.shape, tree.stride, dtype=tree.dtype, device="meta")
                return FakeTensor(self._mode, empty, tree.device)
            if isinstance(tree, Given):
                return inputs[tree.number]
            return type(tree)(build(one) for one in tree) if isinstance(tree, (tuple, list)) else tree

        with _disable_current_modes():
            return build(outcome)

    def _with_positions(self, args: Any, counts: Sequence[int]) -> Any:
        """Arguments of `x[mask]` with the numbers of the chosen positions in place of every mask."""
        left, indices = iter(counts), []
        for one in args[1]:
            if one is None or one.dtype not in _MASKS:
                indices.append(one)
                continue
            count = next(left)
            with _disable_current_modes():
                for _ in range(one.dim()):
                    empty = torch.empty(count, dtype=torch.int64, device="meta")
                    indices.append(FakeTensor(self._mode, empty, one.device))
        return (args[0], indices, *args[2:])


class Deciding(Evaluation):
    """Runs on real values beside the fake tensors and writes down what only they can tell.

    With `everything` set, masks of data choose all positions: a course that no values may lead to, but in which every
    expert of a mixture gets something to do.

    Attributes:
        decisions: what was decided, in order.
    """

    def __init__(self, everything: bool = False) -> None:
        super().__init__()
        self._everything = everything
        self.decisions: list[Decision] = []

    def _computes(self, of_data: bool) -> bool:
        return True

    def _wanted(self, name: str, args: Any) -> Any:
        if not self._everything:
            return args
        with _disable_current_modes():
            if name in _ASKING:
                return (torch.ones_like(args[0]), *args[1:])
            if name in _INDEXING:
                return (args[0], [_all(one) for one in args[1]], *args[2:])
        return args

    def _outcome(self, error: Exception, place: tuple[Any, ...], of_data: bool, given: Any, real: Any) -> Any:
        outcome = _description(error, place[0], given, real)
        if of_data:
            self.decisions.append(Decision(place[0], place[1], place[2], outcome))
        return outcome


class Following(Evaluation):
    """Takes the decisions of an earlier pass again, on fake tensors alone.

    Raises:
        OtherCourseError: (during the pass) something else is to be decided than it was then.
    """

    def __init__(self, decisions: Sequence[Decision]) -> None:
        super().__init__()
        self._left: Iterator[Decision] = iter(decisions)

    def _computes(self, of_data: bool) -> bool:
        return not of_data

    def _outcome(self, error: Exception, place: tuple[Any, ...], of_data: bool, given: Any, real: Any) -> Any:
        func, modules, frame = place
        if not of_data:
            return _description(error, func, given, real)
        decision = next(self._left, None)
        if decision is None or (decision.operator, decision.modules, decision.frame) != (func, modules, frame):
            if isinstance(error, (*_NEEDS_VALUES, UnsupportedOperatorException)):
                raise OtherCourseError("values decide here what they did not decide when the model was read") from error
            raise error
        return decision.outcome


def _description(error: Exception, func: Any, given: tuple[Any, Any], real: Any) -> Any:
    """An outcome from which the fake result can be made: of the real one as little as has to be remembered."""
    args, kwargs = given
    if isinstance(error, _NEEDS_VALUES) and _name(func) in _INDEXING:
        masks = [one for one in args[1] if one is not None and one.dtype in _MASKS]
        with _disable_current_modes():
            return Chosen(tuple(int(mask.count_nonzero()) for mask in masks))
    made = _made(given, real)
    if not isinstance(error, _NEEDS_VALUES) and func.namespace == "aten" and _on_zeros(func, args, kwargs) == made:
        return OnZeros()
    return made


def _made(given: tuple[Any, Any], result: Any) -> Any:
    """The result of an operator without its values."""
    inputs = [id(one) for one in tensors_in(given)]

    def describe(tensor: torch.Tensor) -> Any:
        if id(tensor) in inputs:
            return Given(inputs.index(id(tensor)))
        return Made(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)

    return map_tensors(result, describe)


def _on_zeros(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator on zeros of the sizes of its arguments, without its values."""

    def zeros(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    with _disable_current_modes():
        given = map_tensors(args, zeros), map_tensors(kwargs, zeros)
        return _made(given, func(*given[0], **given[1]))


def _name(func: Any) -> str:
    return str(func._schema.name).partition("::")[2]


def _all(index: torch.Tensor | None) -> torch.Tensor | None:
    return index if index is None or index.dtype not in _MASKS else torch.ones_like(index)


def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _storage(tensor: torch.Tensor) -> int:
    """What says whether two tensors share memory."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _by_schema(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[torch.Tensor, Any]]:
    """Every tensor among the arguments of an operator, with the argument of its schema."""
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        for tensor in tensors_in(value):
            yield tensor, argument


__all__ = ["Deciding", "Evaluation", "Following", "OtherCourseError"]
