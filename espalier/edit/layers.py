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

    def __init__(self, places: tuple[Place, ...]) -> None:
        super().__init__()
        self.places = places
        """Where that tensor is; it may be several arguments at once."""

    def extra_repr(self) -> str:
        """Where they run, if that is not the only tensor there is."""
        return f"places={self.places}" if self.places != ((),) else ""

    def put_into(self, tree: Any) -> Any:
        """Results or arguments with the outcome of these layers in place of what they run on."""
        outcome = self(at(tree, self.places[0]))
        for place in self.places:
            tree = put(tree, place, outcome)
        return tree


def run_after(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
    """The forward hook of a module with layers inserted after it."""
    layers = module._modules[AFTER]
    assert isinstance(layers, Inserted)
    return layers.put_into(result)


def run_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """The forward pre-hook of a module with layers inserted before it."""
    layers = module._modules[BEFORE]
    assert isinstance(layers, Inserted)
    found = layers.put_into({**dict(enumerate(args)), **kwargs})
    return tuple(found[position] for position in range(len(args))), {key: found[key] for key in kwargs}


def at(tree: Any, place: Place) -> Any:
    """What is at a place among results or arguments."""
    for key in place:
        tree = tree[key]
    return tree


def put(tree: Any, place: Place, outcome: Any) -> Any:
    """Results or arguments with something else at a place."""
    if not place:
        return outcome
    here, inside = place[0], place[1:]
    if isinstance(tree, dict):
        return {**tree, here: put(tree[here], inside, outcome)}
    items = [put(item, inside, outcome) if position == here else item for position, item in enumerate(tree)]
    return type(tree)(items)


_PLAIN = (bool, int, float, str, type(None))


class Bypass(nn.Module):
    """What is left of a removed module: it gives back, in the module's form, what went in, or zero.

    It has the plain attributes of the module, which code around it may ask for.
    """

    def __init__(
        self, entry: Place, exit: Place, items: int, kind: str, order: tuple[int, ...], *, zero: bool, copied: bool
    ) -> None:
        super().__init__()
        self.entry, self.exit, self.items, self.kind = entry, exit, items, kind
        self.order, self.zero, self.copied = order, zero, copied

    def remember(self, module: nn.Module) -> None:
        """Take over the plain attributes of the module whose place it takes."""
        for name, value in vars(module).items():
            if isinstance(value, _PLAIN) and name not in self.__dict__:
                self.__dict__[name] = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The tensor at the place `entry` among the arguments, or zeros like it, laid out as the result was."""
        found = at({**dict(enumerate(args)), **kwargs}, self.entry)
        if not isinstance(found, Tensor):
            raise SurgeryError(f"a removed module expected a tensor at {self.entry}, found {type(found).__name__}.")
        if self.zero:
            found = torch.zeros_like(found)
        elif self.copied:
            found = found.clone()
        result = laid_out(found, self.order)
        if self.kind == "tensor":
            return result
        items: list[Any] = [None] * self.items
        assert isinstance(self.exit[0], int)
        items[self.exit[0]] = result
        return tuple(items) if self.kind == "tuple" else items

    def extra_repr(self) -> str:
        """Whether it gives zero."""
        return "zero" if self.zero else ""


def laid_out(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """A tensor with its dimensions in that order in memory, from the slowest to the fastest."""
    if len(order) != tensor.dim():
        return tensor
    back = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)


__all__ = ["AFTER", "BEFORE", "Bypass", "Inserted", "at", "laid_out", "put", "run_after", "run_before"]
