"""Tensors among whatever a model takes and gives: found by a readable path, exchanged one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


def flatten_tensors(tree: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested tuples, lists, mappings and dataclasses, each with a readable path.

    Other objects (a key/value cache) are not looked into.
    """
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from flatten_tensors(item, f"{path}.{key}")
    elif isinstance(tree, (tuple, list)):
        for position, item in enumerate(tree):
            yield from flatten_tensors(item, f"{path}[{position}]")
    elif is_dataclass(tree) and not isinstance(tree, type):
        for one in fields(tree):
            yield from flatten_tensors(getattr(tree, one.name), f"{path}.{one.name}")


def map_tensors(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """`tree` with every tensor that `flatten_tensors` finds replaced by `change(tensor)`, in the same order."""
    kind = type(tree)
    if kind in _ATOMS:
        return tree
    if kind is FakeTensor or isinstance(tree, torch.Tensor):
        return change(tree)
    if kind is tuple:
        return tuple([map_tensors(item, change) for item in tree])
    if kind is list:
        return [map_tensors(item, change) for item in tree]
    if kind is dict:
        return {key: map_tensors(item, change) for key, item in tree.items()}
    return _map_other(tree, change)


_ATOMS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})


def _map_other(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(tree, tuple):
        items = [map_tensors(item, change) for item in tree]
        return tree._make(items) if hasattr(tree, "_make") else tuple(items)
    if isinstance(tree, list):
        return [map_tensors(item, change) for item in tree]
    copied = tree
    if isinstance(tree, MutableMapping):
        copied = copy.copy(tree)
        for key, item in tree.items():
            copied[key] = map_tensors(item, change)
    elif is_dataclass(tree) and not isinstance(tree, type):
        copied = copy.copy(tree)
        for one in fields(tree):
            object.__setattr__(copied, one.name, map_tensors(getattr(tree, one.name), change))
    return copied


def call_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments: a tensor, a tuple or list, or a dict of keywords."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}
