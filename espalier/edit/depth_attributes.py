"""Attributes that repeat how many layers there are, or which one a layer is, follow when layers come or go."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from espalier.edit.attributes import AttributeChange

_COUNTS = frozenset(
    """
    depth n_block n_blocks n_layer n_layers num_block num_blocks num_decoder_layers num_encoder_layers
    num_hidden_layers num_layer num_layers encoder_layers decoder_layers
    """.split()
)
"""Names of attributes that count the layers of a list."""
_LISTS = frozenset("depths layers num_blocks num_layers stage_depths".split())
"""Names of attributes that hold such counts for several lists."""
_CONTAINERS = (nn.Sequential, nn.ModuleList)


def following(
    model: nn.Module, before: Mapping[str, tuple[nn.Module, ...]], modules: Mapping[str, nn.Module]
) -> list[AttributeChange]:
    """What has to follow, at the present paths.

    Args:
        model: whose lists have changed.
        before: path, as it was, of every list -> its entries then.
        modules: path, as it was, of every module that is still there -> the module.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[tuple[str, tuple[str, ...]], AttributeChange] = {}
    for path, entries in before.items():
        now = tuple(modules[path].children()) if path in modules else entries
        if [*map(id, now)] == [*map(id, entries)]:
            continue
        here = paths[id(modules[path])]
        changes = (
            *_counts(model, here, len(entries), len(now)),
            *_lists(model, path, here, before, modules),
            *_positions(here, entries, now),
        )
        found.update({(one.module, one.path): one for one in changes})
    return list(found.values())


def lists_of(model: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """Path of every list of modules -> its entries."""
    return {path: tuple(one.children()) for path, one in model.named_modules() if isinstance(one, _CONTAINERS)}


def _counts(model: nn.Module, path: str, old: int, new: int) -> Iterator[AttributeChange]:
    """Attributes above a list that count its entries."""
    for above, owner in _above(model, path):
        for names, value in _numbers(owner):
            if names[-1] in _COUNTS and type(value) is int and value == old != new:
                yield AttributeChange(above, names, old, new)


def _lists(
    model: nn.Module,
    path: str,
    here: str,
    before: Mapping[str, tuple[nn.Module, ...]],
    modules: Mapping[str, nn.Module],
) -> Iterator[AttributeChange]:
    """Attributes above a list that hold the numbers of entries of all lists like it, in order."""
    alike = [other for other in before if _pattern(other) == _pattern(path) and other in modules]
    old = [len(before[other]) for other in alike]
    new = [len(tuple(modules[other].children())) for other in alike]
    for above, owner in _above(model, here):
        for names, value in _numbers(owner):
            if names[-1] in _LISTS and isinstance(value, (list, tuple)) and list(value) == old != new:
                yield AttributeChange(above, names, value, type(value)(new))


def _positions(path: str, old: tuple[nn.Module, ...], new: tuple[nn.Module, ...]) -> Iterator[AttributeChange]:
    """Attributes by which every entry of a list, or something in it, knows its position."""
    if len(old) < 2:
        return
    knowing = [
        (inner, name)
        for inner, module in old[-1].named_modules()
        for name, value in vars(module).items()
        if type(value) is int and value == len(old) - 1
    ]
    for inner, name in knowing:
        if [_value(entry, inner, name) for entry in old] != list(range(len(old))):
            continue
        for position, entry in enumerate(new):
            value = _value(entry, inner, name)
            if type(value) is int and value != position:
                yield AttributeChange(".".join(filter(None, (path, str(position), inner))), (name,), value, position)


def _value(entry: nn.Module, inner: str, name: str) -> Any:
    try:
        return vars(entry.get_submodule(inner)).get(name)
    except AttributeError:
        return None


def _above(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    while path:
        path = path.rpartition(".")[0]
        yield path, model.get_submodule(path)


def _numbers(owner: nn.Module) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Attributes of a module, and of its configuration."""
    for name, value in vars(owner).items():
        if name in _COUNTS or name in _LISTS:
            yield (name,), value
        elif name == "config" and type(getattr(value, "__dict__", None)) is dict:
            for inside, item in vars(value).items():
                yield (name, inside), item


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "*", path)


__all__ = ["following", "lists_of"]
