"""Layers and cells as a method sees them: what may go, or come, and what each costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from espalier.edit.depth_edits import DepthEdit, Insert
from espalier.edit.plan import Resize
from espalier.edit.recipes.redrawn import Redrawn
from espalier.edit.recipes.residual import ResidualLayer


@dataclass(frozen=True)
class Candidate:
    """A layer or cell that may go, or one that may come."""

    edits: tuple[DepthEdit, ...]
    """What is done if it is chosen."""
    parameters: int
    flops: int
    """What goes, or comes, with it; costs of several add up."""
    stage: str
    """The blocks of one size in a row that it is, or will be, one of."""
    modules: tuple[str, ...] = ()
    """Paths of what would go; of new ones, the module that they come after."""
    layers: int = 1
    """What it counts as in a budget of `Units`."""
    resizes: tuple[Resize, ...] = ()
    """Units that come instead, where a method chooses between widths and layers."""


@dataclass(frozen=True)
class Catalogue:
    """All candidates of a method in a network as it is."""

    candidates: Mapping[str, Candidate]
    """Name -> candidate, in the order in which the network runs. A name is the path of a module; of new ones that of
    the module that they come after, and what comes: ``layers.3 + copy``."""
    stages: Mapping[str, int]
    """Stage -> number of layers or cells in it now, those that may not go included."""
    kept: int = 0
    """How many of each stage stay at least."""

    @property
    def spare(self) -> dict[str, int]:
        """Stage -> how many of its layers may go."""
        return {stage: max(0, count - self.kept) for stage, count in self.stages.items()}

    @property
    def present(self) -> int:
        """The number of layers or cells that there are."""
        return sum(self.stages.values())


def seeded(candidate: Candidate, seed: int) -> tuple[DepthEdit, ...]:
    """What is done for a candidate, where new layers draw their weights with this seed."""
    return tuple(
        replace(edit, layer=replace(edit.layer, seed=seed))
        if isinstance(edit, Insert) and isinstance(edit.layer, (ResidualLayer, Redrawn))
        else edit
        for edit in candidate.edits
    )


def module_of(name: str) -> str:
    """The path in the name of a candidate."""
    return name.partition(" + ")[0]


__all__ = ["Candidate", "Catalogue", "module_of", "seeded"]
