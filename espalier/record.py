"""The record of an edit, and what a plan would make of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from espalier.edit.attributes import AttributeChange
from espalier.edit.changes import Changes
from espalier.edit.contract import Contract
from espalier.edit.known import Renamed
from espalier.edit.plan import Plan
from espalier.edit.promise import Promise, weakest
from espalier.graph.dims import IntArray
from espalier.graph.topology import Topology
from espalier.measure.cost import Cost


@dataclass(frozen=True)
class Edit:
    """The record of one applied plan."""

    plan: Plan
    contract: str
    """``exact``, ``bounded`` or ``changing``."""
    why: str
    sizes: Mapping[str, tuple[int, int]]
    """Axis -> (size before, size after)."""
    cost_before: Cost
    cost_after: Cost
    attributes: tuple[AttributeChange, ...]
    """Module attributes that followed."""
    units: Mapping[str, tuple[int, ...]] = field(repr=False)
    """Axis -> for every unit after the edit the old unit that it was; -1 for a new one."""
    given: tuple[str, ...] = field(default=(), repr=False)
    """Tensors whose new entries the plan brought itself."""
    masks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Parameters whose mask the plan set or took away -> (live weights before, after), at the new shape."""
    renamed: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    """Axes whose names the plan changed -> their names since; None for those that went with a layer."""
    paths: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    """Parameters and buffers whose names the plan changed -> their names since; None for those that went."""
    modules: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    """Modules, of those that run, likewise."""

    @classmethod
    def nothing(cls, plan: Plan, cost: Cost) -> Edit:
        """The record of a plan of which nothing is done yet."""
        return cls(plan, "exact", "nothing changes", {}, cost, cost, (), {})

    def followed_by(
        self, promise: Promise, attributes: tuple[AttributeChange, ...], renamed: Renamed, cost: Cost
    ) -> Edit:
        """The record with the part of the plan in which layers came or went: the weaker promise holds."""
        weaker = weakest((promise, Promise(self.contract, self.why)))
        return replace(
            self,
            contract=weaker.kind,
            why=weaker.why,
            attributes=(*self.attributes, *attributes),
            renamed=renamed.axes,
            paths=renamed.tensors,
            modules=renamed.modules,
            cost_after=cost,
        )

    def __str__(self) -> str:
        sizes = [f"{name} {old} -> {new}" for name, (old, new) in self.sizes.items()]
        sizes += [f"{name} {old:,} -> {new:,} live" for name, (old, new) in self.masks.items()]
        sizes += [str(one) for one in self.plan.depth]
        return f"{', '.join(sizes)} ({self.contract}: {self.why})"


@dataclass(frozen=True)
class Preview:
    """What a plan would make of the network; nothing is changed."""

    tensors: Mapping[str, Tensor]
    """Parameters and buffers that would change -> new tensors, which share no memory with the old ones."""
    attributes: tuple[AttributeChange, ...]
    """Module attributes that would follow."""
    contract: Contract
    changes: Changes

    @property
    def before(self) -> Topology:
        """The topology as it is."""
        return self.changes.before

    @property
    def after(self) -> Topology:
        """The topology as it would be."""
        return self.changes.after

    @property
    def aliases(self) -> Mapping[str, str]:
        """Other names of shared tensors -> the names they go by."""
        return self.changes.before.aliases

    def sources(self, tensor: str) -> tuple[IntArray | None, ...]:
        """For every dimension of a tensor the old position of each new one, -1 for new; None where all stay."""
        return self.changes.sources(tensor) or (None,) * len(self.changes.before.tensors[tensor])


__all__ = ["Edit", "Preview"]
