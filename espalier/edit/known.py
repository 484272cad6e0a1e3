"""All that a structure knows of a live network: replaced as a whole by every edit, and put back by undoing it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from espalier.edit.attributes import AttributeChange
from espalier.edit.births import Births
from espalier.edit.carry import kept, same_axes, with_births
from espalier.edit.changes import Limits
from espalier.edit.depth import Regrown
from espalier.edit.masks import NO_MASKS, Masks
from espalier.edit.steps import Step
from espalier.graph.topology import Topology


@dataclass(frozen=True)
class Known:
    """What holds of the network as it is now."""

    topology: Topology
    example: Any
    """Example inputs, in the sizes that the model takes now."""
    limits: Mapping[str, Limits]
    """Axis -> the sizes that the user allows."""
    births: Births
    initial_sizes: Mapping[str, int]
    """Axis -> its size when the network was attached, or when the layer came that it is in."""
    initial_shapes: Mapping[str, tuple[int, ...]]
    """Parameter or buffer -> likewise."""
    masks: Masks = field(default_factory=lambda: NO_MASKS)
    attributes: tuple[AttributeChange, ...] = ()
    """All changes of attributes by edits that hold, in order, at the present paths of the modules."""
    depth: tuple[tuple[Step, ...], ...] = ()
    """All plans in which layers came or went, in order."""
    settled: bool = False
    """Whether every axis was tried out."""

    @classmethod
    def first(cls, topology: Topology, example: Any, limits: Mapping[str, Limits]) -> Known:
        """What is known of a network to begin with."""
        sizes = {record.name: topology.sizes[record.number] for record in topology.axes.values()}
        shapes = {name: topology.shape(name) for name in topology.tensors}
        births = {name: np.zeros(size, np.int64) for name, size in sizes.items()}
        return cls(topology, example, dict(limits), births, sizes, shapes)

    def with_masks(self, masks: Masks) -> Known:
        """The same with other masks."""
        return replace(self, masks=MappingProxyType(dict(masks)))


@dataclass(frozen=True)
class Renamed:
    """What became of names when layers came or went."""

    axes: Mapping[str, str | None]
    """Axis before -> axis now, where that is another one; None if it went."""
    tensors: Mapping[str, str | None]
    """Parameter or buffer likewise."""
    modules: Mapping[str, str | None]
    """Path of a module, of those that run, likewise."""


def regrown(known: Known, found: Regrown, now: int) -> tuple[Known, Renamed]:
    """What is known after layers came or went; `now` is the optimizer step."""
    before = known.topology
    axes = same_axes(before, found.topology, found.tensors)
    after = kept(before, found.topology, axes)
    sizes = {record.name: after.sizes[number] for number, record in after.axes.items()}
    shapes = {name: after.shape(name) for name in after.tensors}
    for new, old in found.copies.items():
        shapes[new] = known.initial_shapes[old]
    shapes |= {new: known.initial_shapes[old] for old, new in found.tensors.items()}
    masks: dict[str, Tensor] = {found.tensors[old]: one for old, one in known.masks.items() if old in found.tensors}
    masks |= {new: known.masks[old].clone() for new, old in found.copies.items() if old in known.masks}
    standing = [
        replace(one, module=found.modules[one.module]) for one in known.attributes if one.module in found.modules
    ]
    copied = [
        replace(one, module=new)
        for new, old in found.copied.items()
        for one in known.attributes
        if one.module == old
    ]  # fmt: skip
    result = Known(
        after,
        known.example,
        {axes[name]: one for name, one in known.limits.items() if name in axes},
        with_births(known.births, after, axes, now),
        {**sizes, **{new: known.initial_sizes[old] for old, new in axes.items() if old in known.initial_sizes}},
        shapes,
        MappingProxyType(masks),
        (*standing, *copied, *found.attributes),
        (*known.depth, found.steps),
    )
    ran = dict.fromkeys(visit.module for one in before.predictions for visit in one.visits)
    return result, Renamed(
        _moved(before.by_name, axes), _moved(before.tensors, found.tensors), _moved(ran, found.modules)
    )


def _moved(names: Iterable[str], now: Mapping[str, str]) -> dict[str, str | None]:
    return {name: now.get(name) for name in names if now.get(name) != name}


__all__ = ["Known", "Renamed", "regrown"]
