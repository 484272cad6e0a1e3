"""Which module ran when in a forward pass, what tensors it got and what it gave back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Place = tuple[int | str, ...]
"""Where a tensor is among arguments or results: position or keyword first, then positions and keys inside of that;
empty for a result that is the tensor itself."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor among the arguments or results of a module."""

    place: Place
    value: int
    """Number of the value in the trace; -1 for one that no operator has read or made yet."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One run of a module's forward, hooks included."""

    module: str
    first: int
    """Number of the first call that ran in it."""
    last: int
    """Number of the first call after it: equal to `first` if no operator ran."""
    entries: tuple[Leaf, ...]
    """The tensors among its arguments, at their versions before `first`."""
    exits: tuple[Leaf, ...]
    """The tensors among its results, at their versions before `last`."""
    result: str
    """``tensor``, ``tuple`` or ``list`` (of tensors and None), or ``other``."""
    items: int = 1
    """Number of items of that tuple or list."""


def leaves(tree: Any, place: Place = ()) -> Iterator[tuple[Place, torch.Tensor]]:
    """The tensors in nested tuples, lists and mappings, each with its place."""
    if isinstance(tree, torch.Tensor):
        yield place, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from leaves(item, (*place, str(key)))
    elif isinstance(tree, (tuple, list)):
        for position, item in enumerate(tree):
            yield from leaves(item, (*place, position))


def result_kind(result: Any) -> str:
    """What a module gave back: see `Visit.result`."""
    if isinstance(result, torch.Tensor):
        return "tensor"
    if type(result) in (tuple, list) and all(one is None or isinstance(one, torch.Tensor) for one in result):
        return type(result).__name__
    return "other"


class Visits:
    """Collects the visits of a capture."""

    def __init__(self, found: list[Visit], number: Callable[[torch.Tensor], int], calls: Callable[[], int]) -> None:
        self._found = found
        self._number = number
        self._calls = calls

    @contextmanager
    def noted(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[list[Any]]:
        """Note the visit that the body is; it is to put the result into the list that it gets."""
        first, result = self._calls(), list[Any]()
        entries = self._leaves((*args, kwargs) if kwargs else args, len(args))
        yield result
        for one in result:
            exits = self._leaves(one, -1)
            items = len(one) if isinstance(one, (tuple, list)) else 1
            self._found.append(Visit(module, first, self._calls(), entries, exits, result_kind(one), items))

    def _leaves(self, tree: Any, keywords: int) -> tuple[Leaf, ...]:
        """The leaves of a tree; those of the mapping of keywords that is at some position go by keyword."""
        return tuple(
            Leaf(place[1:] if place and place[0] == keywords else place, self._number(tensor))
            for place, tensor in leaves(tree)
        )


__all__ = ["Leaf", "Place", "Visit", "Visits", "leaves", "result_kind"]
