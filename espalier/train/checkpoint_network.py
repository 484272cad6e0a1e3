"""What a checkpoint says of a network in JSON, apart from the values in its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from espalier.edit.attributes import AttributeChange
from espalier.edit.changes import Limits
from espalier.edit.steps import Step
from espalier.edit.tensors import memory_order
from espalier.edit.verify import in_sizes
from espalier.errors import CheckpointError, PlanError
from espalier.graph.dims import axes_of, size_of
from espalier.graph.named_tensors import TensorTable
from espalier.graph.solver import Reason
from espalier.graph.topology import Topology
from espalier.graph.trees import map_tensors
from espalier.version import __version__

Shape: TypeAlias = tuple[int, ...]
AttributeValue: TypeAlias = int | float | list[int] | None

_FOUND_LATER: Final = ("keep", "code")
"""Kinds of reasons that a capture does not tell."""


@dataclass(frozen=True)
class SavedTensor:
    """A parameter or buffer."""

    dtype: str
    original: Shape
    """Shape before all edits."""
    shape: Shape
    order: tuple[int, ...]
    """Dimensions from the outermost to the innermost in memory."""

    @classmethod
    def of(cls, tensor: Tensor, original: Shape) -> SavedTensor:
        """The record of a live tensor."""
        return cls(str(tensor.dtype).removeprefix("torch."), original, tuple(tensor.shape), memory_order(tensor))

    @classmethod
    def parsed(cls, data: Mapping[str, Any]) -> SavedTensor:
        """Raises KeyError or TypeError for anything else than a record."""
        return cls(_typed(data["dtype"], str), _shape(data["original"]), _shape(data["shape"]), _shape(data["order"]))


@dataclass(frozen=True)
class SavedAxis:
    """The sizes of an axis."""

    original: int
    size: int
    """Now."""


@dataclass(frozen=True)
class SavedAttribute:
    """A module attribute, or an entry of a module's config, that edits changed."""

    module: str
    path: tuple[str, ...]
    original: AttributeValue
    value: AttributeValue


@dataclass(frozen=True)
class SavedNetwork:
    """The contents of ``network.json``."""

    tensors: Mapping[str, SavedTensor]
    aliases: Mapping[str, str]
    """Further names of tied tensors -> the first name."""
    axes: Mapping[str, SavedAxis]
    frozen: Mapping[str, Sequence[Reason]]
    """Axis -> why it may not change besides what a capture tells: kept as asked for, or found to be held by code."""
    attributes: Sequence[SavedAttribute]
    limits: Mapping[str, Limits]
    followers: Sequence[Mapping[str, SavedTensor]]
    """The tensors of every copy that shares the edits, by its own names; `original` is not used."""
    depth: tuple[tuple[Step, ...], ...]
    """The plans in which layers came or went, in order."""
    interface: Sequence[tuple[int, int, int]]
    """Which input, which dimension, and the size that it has now: all those that edits may change."""

    def to_json(self) -> dict[str, Any]:
        """As JSON, with the versions that wrote it for whoever reads it."""
        depth = [[step.to_json() for step in steps] for steps in self.depth]
        plain = replace(self, depth=())
        return {"espalier": __version__, "torch": str(torch.__version__), **asdict(plain), "depth": depth}

    @classmethod
    def parsed(cls, data: Mapping[str, Any]) -> SavedNetwork:
        """What `to_json` wrote. Raises CheckpointError for anything else."""
        try:
            return cls(
                {name: SavedTensor.parsed(one) for name, one in data["tensors"].items()},
                {name: _typed(first, str) for name, first in data["aliases"].items()},
                {name: SavedAxis(_units(one["original"]), _units(one["size"])) for name, one in data["axes"].items()},
                {name: [_reason(one) for one in found] for name, found in data["frozen"].items()},
                [_attribute(one) for one in data["attributes"]],
                {name: _limits(one) for name, one in data["limits"].items()},
                [{name: SavedTensor.parsed(one) for name, one in found.items()} for found in data["followers"]],
                tuple(tuple(Step.from_json(one) for one in steps) for steps in data["depth"]),
                [(_typed(a, int), _typed(b, int), _units(c)) for a, b, c in data["interface"]],
            )
        except (KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
            raise CheckpointError(f"network.json is damaged: {type(error).__name__}: {error}.") from error

    def check_tensors(self, table: TensorTable) -> None:
        """Raise CheckpointError unless a fresh model has the tensors that the saved one had before all edits."""
        hint = "Build the model with the code and at the sizes that it had when it was first attached to."
        for name, saved in self.tensors.items():
            tensor = table.tensors.get(name)
            if tensor is None:
                raise CheckpointError(f"the checkpoint is of another model: it has {name}, this model has not. {hint}")
            if tuple(tensor.shape) != saved.original and not self.depth:
                raise CheckpointError(
                    f"{name}: expected the original shape {saved.original}, found {tuple(tensor.shape)}. {hint}"
                )
            if str(tensor.dtype) != f"torch.{saved.dtype}":
                raise CheckpointError(
                    f"{name}: expected dtype torch.{saved.dtype}, found {tensor.dtype}; convert the model first."
                )
        more = [name for name in table.tensors if name not in self.tensors]
        if more:
            raise CheckpointError(f"the checkpoint is of another model: this one also has {more[0]}. {hint}")
        for name in sorted(set(self.aliases) ^ set(table.aliases)):
            expected = f"a tie to {self.aliases[name]}" if name in self.aliases else "no tie"
            raise CheckpointError(f"{name}: expected {expected}, found otherwise. {hint}")

    def check_axes(self, initial_sizes: Mapping[str, int]) -> None:
        """Raise CheckpointError unless the axes of a freshly built model are those of the saved one."""
        for name, saved in self.axes.items():
            found = initial_sizes.get(name)
            if found != saved.original and not self.depth:
                raise CheckpointError(
                    f"the checkpoint has an axis {name} of {saved.original} units originally, this model has "
                    f"{'no such axis' if found is None else found}; build the model, and give example inputs, as when "
                    "it was first attached to."
                )
        more = [name for name in initial_sizes if name not in self.axes]
        if more:
            raise CheckpointError(f"this model has an axis {more[0]} that the checkpoint does not know.")

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raise CheckpointError unless these are the saved axes and their sizes."""
        saved = {name: one.size for name, one in self.axes.items()}
        for name in sorted(set(saved) | set(sizes)):
            if saved.get(name) != sizes.get(name):
                raise CheckpointError(
                    f"axis {name}: expected {saved.get(name, 'no such axis')}, found "
                    f"{sizes.get(name, 'no such axis')}; build the model, and give example inputs, as when it was "
                    "first attached to."
                )

    def resized(self, example: Any) -> Any:
        """Example inputs of the original sizes in those that the saved network takes; new positions hold zeros."""
        position = -1

        def resize(tensor: Tensor) -> Tensor:
            nonlocal position
            position += 1
            sizes = list(tensor.shape)
            for number, dim, size in self.interface:
                if number == position and dim < len(sizes):
                    sizes[dim] = size
            return in_sizes(tensor, tuple(sizes))

        return map_tensors(example, resize)

    def with_findings(self, topology: Topology) -> Topology:
        """The topology at the saved sizes with the reasons that were found, or given, since `attach`.

        Raises CheckpointError if they do not fit it.
        """
        try:
            records = [(topology.by_name[name], reasons) for name, reasons in self.frozen.items()]
        except KeyError as error:
            raise CheckpointError(f"network.json is damaged: {type(error).__name__}: {error}.") from error
        for record, reasons in records:
            for reason in reasons:
                if reason not in record.reasons:
                    topology = topology.frozen({record.number: reason})
        return topology

    def attribute_changes(self, model: nn.Module) -> list[AttributeChange]:
        """The changes that bring a freshly built model to the saved one's attributes. Raises CheckpointError."""
        changes: list[AttributeChange] = []
        for saved in self.attributes:
            place = f"{saved.module or 'the model'}.{'.'.join(saved.path)}"
            try:
                old = attribute_value(model, saved.module, saved.path)
                found = _plain(old)
            except (AttributeError, KeyError, TypeError):
                raise CheckpointError(f"the checkpoint sets {place}, which is no number in this model.") from None
            if found != saved.original and not self.depth:
                raise CheckpointError(f"{place}: expected the original value {saved.original!r}, found {old!r}.")
            new = tuple(saved.value) if isinstance(old, tuple) and isinstance(saved.value, list) else saved.value
            changes.append(AttributeChange(saved.module, saved.path, old, new))
        return changes


def found_since_attach(topology: Topology) -> dict[str, list[Reason]]:
    """Axis -> its reasons that no capture tells."""
    found = {
        record.name: [one for one in record.reasons if one.kind in _FOUND_LATER] for record in topology.axes.values()
    }
    return {name: reasons for name, reasons in found.items() if reasons}


def interface_of(topology: Topology) -> list[tuple[int, int, int]]:
    """See `SavedNetwork.interface`."""
    prediction = topology.predictions[0]
    return [
        (number, dim, size_of(term, topology.sizes))
        for number, value in enumerate(prediction.inputs.values())
        for dim, term in enumerate(prediction.dims[value])
        if any(axis in topology.axes for axis in axes_of(term))
    ]


def saved_attributes(model: nn.Module, changes: Sequence[AttributeChange]) -> list[SavedAttribute]:
    """What all changes together did: the value before the first, and the live one. Raises CheckpointError."""
    first: dict[tuple[str, tuple[str, ...]], AttributeChange] = {}
    for change in changes:
        first.setdefault((change.module, change.path), change)
    found: list[SavedAttribute] = []
    for change in first.values():
        try:
            now = attribute_value(model, change.module, change.path)
            old_and_now = _plain(change.old), _plain(now)
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{change} was made by an edit but cannot be saved: {error}.") from error
        if old_and_now[0] != old_and_now[1]:
            found.append(SavedAttribute(change.module, change.path, *old_and_now))
    return found


def attribute_value(model: nn.Module, module: str, path: Sequence[str]) -> object:
    """The value of an attribute; a path of two names is an entry of a config. Raises AttributeError or KeyError."""
    value = vars(model.get_submodule(module))[path[0]]
    return vars(value)[path[1]] if len(path) > 1 else value


def _plain(value: object) -> AttributeValue:
    if value is None or type(value) is int or type(value) is float:
        return value
    if isinstance(value, (tuple, list)):
        return [_typed(item, int) for item in value]
    raise TypeError(f"expected a number or numbers, found {value!r}")


def _attribute(data: Mapping[str, Any]) -> SavedAttribute:
    path = tuple(_typed(name, str) for name in data["path"])
    if len(path) not in (1, 2):
        raise ValueError(f"{path} is no path of an attribute")
    return SavedAttribute(_typed(data["module"], str), path, _plain(data["original"]), _plain(data["value"]))


def _units(value: object) -> int:
    units: int = _typed(value, int)
    if units < 1:
        raise ValueError(f"{units} is no number of units")
    return units


def _reason(data: Mapping[str, Any]) -> Reason:
    if data["kind"] not in _FOUND_LATER:
        raise ValueError(f"{data['kind']!r} is no kind of reason that is saved")
    return Reason(data["kind"], _typed(data["text"], str))


def _limits(data: Mapping[str, Any]) -> Limits:
    return Limits(_bound(data["at_least"]), _bound(data["at_most"]), _typed(data["multiple_of"], int))


def _bound(value: object) -> int | None:
    return None if value is None else _typed(value, int)


def _shape(value: Any) -> Shape:
    return tuple(_typed(size, int) for size in value)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {value!r}")
    return value


__all__ = [
    "SavedAttribute", "SavedAxis", "SavedNetwork", "SavedTensor", "found_since_attach",
    "interface_of", "saved_attributes",
]  # fmt: skip
