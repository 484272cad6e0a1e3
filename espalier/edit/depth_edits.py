"""What a plan does to whole layers and cells: a module comes, goes, or is replaced by another one.

Like all of a plan, these name modules as they are before the plan and hold nothing that is live.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from espalier.edit.recipes.base import Recipe, recipe_of
from espalier.errors import PlanError
from espalier.graph.visits import Place

Leaves: TypeAlias = Literal["entry", "zero", "inputs"]


@dataclass(frozen=True, slots=True)
class Insert:
    """A new layer right after a module, or right before it."""

    at: str
    """Path of the module."""
    layer: Recipe
    before: bool = False

    def __post_init__(self) -> None:
        _check_path(self.at)
        _check_recipe(self.layer, f"beside {self.at}")

    def __str__(self) -> str:
        return f"insert {self.layer} {'before' if self.before else 'after'} {self.at}"


@dataclass(frozen=True, slots=True)
class Remove:
    """A module is left out."""

    module: str
    """Its path."""
    leaves: Leaves = "entry"
    """What takes the place of its result: what went into it, or zero for a branch that is added to others. ``inputs``:
    what it got of the last results of its list goes on to the next one, as if the list had never had it."""
    entry: Place | None = None
    """Where among its arguments that is, if several of them have the size of its result."""

    def __post_init__(self) -> None:
        _check_path(self.module)
        if self.entry is not None and not (
            isinstance(self.entry, tuple) and self.entry and all(type(one) in (int, str) for one in self.entry)
        ):
            raise PlanError(f"{self.module}: expected a place among arguments, such as (1,), found {self.entry!r}.")
        if self.leaves not in get_args(Leaves):
            raise PlanError(f"{self.module}: expected leaves='entry', 'zero' or 'inputs', found {self.leaves!r}.")

    def __str__(self) -> str:
        left = "" if self.entry is None else f"argument {shown(self.entry)}"
        left = {"entry": left, "zero": "zero", "inputs": "its inputs"}[self.leaves]
        return f"remove {self.module}" + (f", which leaves {left}" if left else "")


@dataclass(frozen=True, slots=True)
class Replace:
    """A new layer in place of a module, of which it takes over what it needs."""

    module: str
    """Its path."""
    by: Recipe

    def __post_init__(self) -> None:
        _check_path(self.module)
        _check_recipe(self.by, f"in place of {self.module}")

    def __str__(self) -> str:
        return f"replace {self.module} by {self.by}"


DepthEdit: TypeAlias = Insert | Remove | Replace
Starts: TypeAlias = Mapping[int, Mapping[str, Tensor]]
"""Number of an edit -> parameters of the layer that it brings, by their names in it -> values that they start from."""
NO_STARTS: Starts = MappingProxyType({})


def _check_path(path: object) -> None:
    if not isinstance(path, str):
        raise PlanError(f"expected the path of a module, such as 'features.4', found {path!r}.")


def _check_recipe(layer: object, where: str) -> None:
    if not isinstance(layer, Recipe):
        raise PlanError(
            f"{where}: expected a recipe of a layer, such as espalier.layers.ResidualLayer(64, 64), found a "
            f"{type(layer).__name__}. For a layer of your own write a recipe (espalier.layers.Recipe), from which "
            "plans and checkpoints can build it."
        )


def to_json(edit: DepthEdit) -> dict[str, Any]:
    """An edit as what JSON can hold."""
    match edit:
        case Insert(at, layer, before):
            return {"edit": "insert", "at": at, "layer": layer.to_json(), "before": before}
        case Remove(module, leaves, entry):
            return {"edit": "remove", "module": module, "leaves": leaves, "entry": entry}
        case Replace(module, by):
            return {"edit": "replace", "module": module, "by": by.to_json()}


def from_json(data: Mapping[str, Any]) -> DepthEdit:
    """What `to_json` gave. Raises PlanError, KeyError or TypeError for anything else."""
    match data["edit"]:
        case "insert":
            return Insert(_text(data["at"]), recipe_of(data["layer"]), data["before"] is True)
        case "remove":
            entry = data["entry"]
            return Remove(_text(data["module"]), data["leaves"], None if entry is None else tuple(entry))
        case "replace":
            return Replace(_text(data["module"]), recipe_of(data["by"]))
    raise TypeError(f"expected an edit of layers, found {data['edit']!r}")


def shown(place: Place) -> str:
    """A place among arguments in words."""
    return ".".join(map(str, place))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected the path of a module, found {value!r}")
    return value


__all__ = ["NO_STARTS", "DepthEdit", "Insert", "Leaves", "Remove", "Replace", "Starts", "from_json", "shown", "to_json"]
