"""Recipes: frozen descriptions of layers that do not exist yet, from which they can be built at any time.

A plan and a checkpoint hold recipes and never modules or import paths: a recipe is its registered kind and fields that
JSON can hold. When a checkpoint is loaded, it is built once more on the fresh model; its values and sizes are then
overwritten by those saved.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import nn

from espalier.edit.promise import Promise
from espalier.errors import PlanError
from espalier.graph.topology import Topology

Lookup = Callable[[str], nn.Module]
"""The live module at a path. Raises PlanError if there is none."""


class Recipe(ABC):
    """One way to make a layer; subclasses are frozen dataclasses of numbers, strings, booleans and tuples of them."""

    kind: ClassVar[str]
    """The name that it goes by in plans and checkpoints."""

    @abstractmethod
    def build(self, module: Lookup, at: str) -> nn.Module:
        """A new module with its initial values, on the devices and in the mode of the modules around it.

        The same at every call for the same modules. Raises PlanError if they do not fit.

        Args:
            module: the modules of the network as it is.
            at: path of the module beside which it comes, or which it replaces.
        """

    @abstractmethod
    def promise(self, topology: Topology, module: Lookup, at: str, *, before: bool) -> Promise:
        """What comes of the network's outputs if the layer comes after (`before`: before) the module `at`, or replaces
        it, according to the kind of recipe."""

    def silent(self) -> tuple[str, ...] | None:
        """Parameters at zero on which alone its promise rests, whatever values the others have; None: on all of them.

        What a plan gives to the others (`Plan.starts`) leaves the promise as it is.
        """
        return None

    def origins(self) -> Mapping[str, str]:
        """Paths of modules in the new one (empty for itself) -> paths in the network that they are copies of."""
        return {}

    def absorbed(self) -> tuple[str, ...]:
        """Paths of modules whose work it does besides that of the one it replaces; they go in the same plan."""
        return ()

    def __str__(self) -> str:
        fields = ", ".join(f"{one.name}={getattr(self, one.name)}" for one in dataclasses.fields(self))  # type: ignore[arg-type]
        return f"{self.kind}({fields})"

    def to_json(self) -> dict[str, Any]:
        """The recipe as what JSON can hold."""
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind, **fields}


_KINDS: dict[str, type[Recipe]] = {}
R = TypeVar("R", bound=type[Recipe])


def recipe(cls: R) -> R:
    """Decorator: register a kind of recipe. Raises PlanError if its name is taken."""
    if cls.kind in _KINDS:
        raise PlanError(f"there is a kind of layer {cls.kind!r} already, from {_KINDS[cls.kind].__module__}.")
    _KINDS[cls.kind] = cls
    return cls


def recipe_of(data: Mapping[str, Any]) -> Recipe:
    """The recipe that `Recipe.to_json` wrote. Raises PlanError if it is none, or of a kind that is not registered."""
    fields = dict(data)
    kind = _KINDS.get(fields.pop("kind", None))
    if kind is None:
        known = ", ".join(sorted(_KINDS))
        raise PlanError(f"there is no kind of layer {data.get('kind')!r}; known are {known}.")
    try:
        return kind(**{name: _frozen(value) for name, value in fields.items()})
    except TypeError as error:
        raise PlanError(f"this is not a {kind.kind} layer: {error}.") from error


def _frozen(value: Any) -> Any:
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else value


__all__ = ["Lookup", "Recipe", "recipe", "recipe_of"]
