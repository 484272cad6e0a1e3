"""The few modules that surgery itself puts into a network, where a container cannot just lose or get an entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import SurgeryError
from espalier.graph.visits import Place

AFTER, BEFORE = "inserted_after", "inserted_before"
"""Children of a module that run right after and right before it."""


class Inserted(nn.Sequential):
    """Layers that run right after or right before the module that they are children of, on one tensor of its result or
    arguments; its own names stay as they are, for the code that uses them."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def extra_repr(self) -> str:
        """Where they run, if that is not the only tensor there is."""
        return f"place={self.place}" if self.place else ""


def run_after(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
    """The forward hook of a module with layers inserted after it."""
    layers = module._modules[AFTER]
    assert isinstance(layers, Inserted)
    return _changed(result, layers.place, layers)


def run_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """The forward pre-hook of a module with layers inserted before it."""
    layers = module._modules[BEFORE]
    assert isinstance(layers, Inserted)
    if isinstance(layers.place[0], str):
        return args, _changed(kwargs, layers.place, layers)
    return _changed(args, layers.place, layers), kwargs


def _changed(tree: Any, place: Place, layers: nn.Module) -> Any:
    if not place:
        return layers(tree)
    here, *inside = place
    if isinstance(tree, dict):
        return {**tree, here: _changed(tree[here], tuple(inside), layers)}
    items = list(tree)
    assert isinstance(here, int)
    items[here] = _changed(items[here], tuple(inside), layers)
    return type(tree)(items)


class Bypass(nn.Module):
    """What is left of a removed module: it gives back, in the module's form, what went in, or zero."""

    def __init__(
        self, entry: Place, exit: Place, items: int, kind: str, *, zero: bool = False, copied: bool = False
    ) -> None:
        super().__init__()
        self.entry, self.exit, self.items, self.kind, self.zero, self.copied = entry, exit, items, kind, zero, copied

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The tensor at the place `entry` among the arguments, or zeros like it."""
        found: Any = kwargs if isinstance(self.entry[0], str) else args
        for key in self.entry:
            found = found[key]
        if not isinstance(found, Tensor):
            raise SurgeryError(f"a removed module expected a tensor at {self.entry}, found {type(found).__name__}.")
        result = torch.zeros_like(found) if self.zero else found.clone() if self.copied else found
        if self.kind == "tensor":
            return result
        items: list[Any] = [None] * self.items
        assert isinstance(self.exit[0], int)
        items[self.exit[0]] = result
        return tuple(items) if self.kind == "tuple" else items

    def extra_repr(self) -> str:
        """Whether it gives zero."""
        return "zero" if self.zero else ""


__all__ = ["AFTER", "BEFORE", "Bypass", "Inserted", "run_after", "run_before"]
