"""Where layers and cells may go or come, and what comes: the candidates among which a method of layers chooses.

A block is a cell (`Structure.sites`); or, where a stage has but one block left, the innermost module that could be
repeated without a change of what the network computes; or another module of the class of one of these. Where a network
has none of them, its blocks are the outermost layers that could go and that compute something. Blocks of one container
that follow each other and give results of one size are a stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Literal, Protocol, get_args

from torch import nn

from espalier.edit.depth_edits import DepthEdit, Insert, Remove
from espalier.edit.layers import Inserted
from espalier.edit.recipes.base import Recipe
from espalier.edit.recipes.copies import CopyOf
from espalier.edit.recipes.defaults import default_layer
from espalier.edit.recipes.edges import edge
from espalier.edit.recipes.identity import Identity
from espalier.edit.recipes.redrawn import Redrawn
from espalier.edit.recipes.residual import ResidualLayer
from espalier.edit.steps import lookup
from espalier.errors import MethodError, PlanError
from espalier.graph.dims import size_of
from espalier.graph.regions import Boundaries, Region
from espalier.graph.silence import settled
from espalier.graph.sites import Site
from espalier.parts.candidate import Candidate, Catalogue, module_of
from espalier.structure import Structure

Start = Literal["zero", "copy", "random"]
New = Literal["suited", "identity", "residual"]
Virtual = Literal["residual", "identity", "suited", "copy"]

_GENERAL = frozenset({nn.Sequential, nn.ModuleList, nn.ModuleDict, Inserted})
"""Classes that say nothing of what is in them."""


class Places(Protocol):
    """Lists candidates."""

    def __call__(self, structure: Structure, asked: Sequence[str] | None, /) -> Catalogue:
        """Those of the modules that names or patterns ask for; None: of all blocks.

        Raises:
            MethodError: a name or pattern fits no module that could be one.
        """


@dataclass(frozen=True)
class Removable:
    """The blocks that may go; at least `kept` of each stage stay."""

    kept: int = 1
    leaves: Literal["entry"] | None = None
    """``entry``: only those that leave what went in; None: branches that leave zero as well. None of those that leave
    all their inputs."""

    def __post_init__(self) -> None:
        if type(self.kept) is not int or self.kept < 0:
            raise MethodError(f"kept: expected a number of blocks, found {self.kept!r}.")

    def __call__(self, structure: Structure, asked: Sequence[str] | None, /) -> Catalogue:
        blocks = Blocks(structure, asked)
        allowed = ("entry", "zero") if self.leaves is None else (self.leaves,)
        able = [one for one in blocks.sites if one.removal in allowed]
        return Catalogue(
            {
                one.name: Candidate(_removal(one), one.parameters, one.flops, blocks.stage(one), one.modules)
                for one in able
            },
            blocks.stages,
            self.kept,
        )


@dataclass(frozen=True)
class Copies:
    """A copy of each block right after it; of those at the boundary of a stage, which cannot be repeated, none."""

    init: Start = "zero"
    """``zero``: parts of it are zero, so that it hands on what it gets; ``copy``; ``random``: initialised anew."""

    def __post_init__(self) -> None:
        if self.init not in get_args(Start):
            raise MethodError(f"init: expected one of {', '.join(get_args(Start))}, found {self.init!r}.")

    def __call__(self, structure: Structure, asked: Sequence[str] | None, /) -> Catalogue:
        blocks = Blocks(structure, asked)
        found = {}
        for one in blocks.sites:
            if _repeats(one, self.init):
                found[f"{one.name} + copy"] = copied(one, one, self.init, blocks.stage(one))
        return Catalogue(found, blocks.stages)


@dataclass(frozen=True)
class StageEnds:
    """A block more at the end of each stage: a copy of its last one that can be repeated, else a residual layer.

    The residual layer, where a stage consists of blocks at its boundary, is like its neighbours
    (`espalier.edit.recipes.defaults.default_layer`) and begins at zero whatever `init` says.
    """

    init: Start = "random"

    def __post_init__(self) -> None:
        Copies(self.init)

    def __call__(self, structure: Structure, asked: Sequence[str] | None, /) -> Catalogue:
        blocks = Blocks(structure, asked)
        found: dict[str, Candidate] = {}
        for stage in blocks.stages:
            members = [one for one in blocks.sites if blocks.stage(one) == stage]
            last = next((one for one in reversed(members) if one.insert_after), None)
            source = next((one for one in reversed(members) if _repeats(one, self.init)), None)
            if last is None:
                continue
            if source is not None:
                found[f"{last.name} + copy"] = copied(source, last, self.init, stage)
            else:
                found |= {name: replace(one, layers=1) for name, one in _suited(structure, last.name, stage).items()}
        return Catalogue(found, blocks.stages)


@dataclass(frozen=True)
class NewLayers:
    """New layers that change nothing at first: identities where an activation allows it, else residual branches.

    ``identity``: only after results of an activation that leaves its own results as they are, with that activation.
    ``residual``: after blocks, with a norm and an activation as their neighbours have. ``suited``: both.
    What counts are linear layers, convolutions and the like, of which a residual branch has two.
    """

    new: New = "suited"

    def __post_init__(self) -> None:
        if self.new not in get_args(New):
            raise MethodError(f"new: expected one of {', '.join(get_args(New))}, found {self.new!r}.")

    def __call__(self, structure: Structure, asked: Sequence[str] | None, /) -> Catalogue:
        blocks = Blocks(structure, asked)
        found: dict[str, Candidate] = {}
        if self.new != "residual":
            for one in _ends(blocks, structure, asked):
                activations = settled(blocks.boundaries, one.name, "exit")
                if activations:
                    found |= _identity(structure, one.name, activations[0], blocks.stage(one))
        if self.new != "identity":
            for one in blocks.sites:
                if one.insert_after and f"{one.name} + identity" not in found and not blocks.is_output(one):
                    found |= _suited(structure, one.name, blocks.stage(one))
        places = [one.name for one in blocks.every]
        ordered = sorted(found, key=lambda name: places.index(module_of(name)))
        return Catalogue({name: found[name] for name in ordered}, {"layers": blocks.count_layers()})


def virtual_layers(new: Virtual) -> Places:
    """Layers that begin as nothing: `NewLayers`, or copies of blocks. Raises MethodError for another word."""
    if new not in get_args(Virtual):
        raise MethodError(f"new: expected one of {', '.join(get_args(Virtual))}, found {new!r}.")
    return Copies("zero") if new == "copy" else NewLayers(new)


class Blocks:
    """The blocks of a network in the order in which they run."""

    def __init__(self, structure: Structure, asked: Sequence[str] | None) -> None:
        self.every = structure.sites()
        self.boundaries = Boundaries(structure.topology)
        self._topology = structure.topology
        chosen = _blocks(self.every, structure) if asked is None else _matching(structure, self.every, asked)
        self.sites = _apart(chosen)
        self._stages = self._in_stages()
        self.stages: dict[str, int] = {}
        for stage in self._stages.values():
            self.stages[stage] = self.stages.get(stage, 0) + 1

    def stage(self, site: Site) -> str:
        """The stage that a block is in; of other modules the container."""
        return self._stages.get(site.name, site.modules[0].rpartition(".")[0])

    def count_layers(self) -> int:
        """The number of modules with weights that multiply, and no module in them."""
        return sum(
            bool(one.parameters and one.flops)
            and not any(other.name.startswith(f"{one.name}.") for other in self.every)
            for one in self.every
        )

    def is_output(self, site: Site) -> bool:
        """Whether its result is an output of the model."""
        return self.exit(site.modules[-1]) in self._topology.predictions[0].outputs

    def exit(self, path: str) -> int:
        """The value that a module gives back, in the first pass that runs it; -1 for none."""
        region = self.boundaries.region(path)
        for one in self._topology.predictions:
            for visit in one.visits:
                if visit.module == path and isinstance(region, Region):
                    return next(leaf.value for leaf in visit.exits if leaf.place == region.exit)
        return -1

    def _in_stages(self) -> dict[str, str]:
        """Block -> stage: its container, and a number where several sizes follow each other in it."""
        sizes: dict[str, list[tuple[tuple[int, ...], list[str]]]] = {}
        prediction = self._topology.predictions[0]
        for one in self.sites:
            exit = self.exit(one.modules[-1])
            dims = prediction.dims.get(exit, ())
            shape = tuple(size_of(dim, self._topology.sizes) for dim in dims)
            runs = sizes.setdefault(one.modules[0].rpartition(".")[0], [])
            if not runs or runs[-1][0] != shape:
                runs.append((shape, []))
            runs[-1][1].append(one.name)
        return {
            name: container or "model" if len(runs) == 1 else f"{container or 'model'}:{number}"
            for container, runs in sizes.items()
            for number, (_, names) in enumerate(runs)
            for name in names
        }


def copied(source: Site, last: Site, init: Start, stage: str) -> Candidate:
    """A copy of a block, to come after another one."""
    layer: Recipe
    if init == "random":
        layer = Redrawn(source.name)
    else:
        silent = source.silence if init == "zero" else ()
        assert silent is not None
        layer = CopyOf(source.name, tuple(one.removeprefix(f"{source.name}.") for one in silent))
    return Candidate((Insert(last.name, layer),), source.parameters, source.flops, stage, (last.name,))


def inserted(structure: Structure, at: str, layer: Identity | ResidualLayer, stage: str) -> Candidate:
    """A new layer after a module. Raises PlanError if it does not fit there."""
    found = edge(structure.topology, at, before=False)
    modules = lookup(structure.model)
    layer.promise(structure.topology, modules, at, before=False)
    weights = list(layer.build(modules, at).parameters())
    products = sum(one.numel() for one in weights if one.dim() > 1)
    flops = 2 * products * (prod(found.shape) // layer.features)
    layers = sum(one.dim() > 1 for one in weights)
    return Candidate((Insert(at, layer),), sum(one.numel() for one in weights), flops, stage, (at,), layers)


def _suited(structure: Structure, at: str, stage: str) -> dict[str, Candidate]:
    try:
        layer = default_layer(structure.topology, at)
        if not isinstance(layer, ResidualLayer):
            return {}
        return {f"{at} + residual": inserted(structure, at, layer, stage)}
    except PlanError:
        return {}


def _identity(structure: Structure, at: str, activation: str, stage: str) -> dict[str, Candidate]:
    try:
        suited = default_layer(structure.topology, at)
        if isinstance(suited, ResidualLayer):
            layer = Identity(suited.features, suited.kernel, activation)
        elif isinstance(suited, Identity):
            layer = suited
        else:
            return {}
        return {f"{at} + identity": inserted(structure, at, layer, stage)}
    except PlanError:
        return {}


def _ends(blocks: Blocks, structure: Structure, asked: Sequence[str] | None) -> list[Site]:
    """One module for every result after which a layer may come: a cell if there is one, else the innermost."""
    found: dict[int, Site] = {}
    for one in blocks.every if asked is None else blocks.sites:
        if not one.insert_after or len(one.modules) > 1 or blocks.is_output(one):
            continue
        exit = blocks.exit(one.name)
        known = found.get(exit)
        if known is None or (known.kind != "cell" and (one.kind == "cell" or len(one.name) > len(known.name))):
            found[exit] = one
    return list(found.values())


def _removal(site: Site) -> tuple[DepthEdit, ...]:
    assert site.removal is not None
    *first, last = site.modules
    return (*(Remove(path) for path in first), Remove(last, site.removal))


def _repeats(site: Site, init: Start) -> bool:
    return site.copyable and (init != "zero" or site.silence is not None)


def _blocks(found: Sequence[Site], structure: Structure) -> list[Site]:
    cells = [one for one in found if one.kind == "cell"]
    single = [one for one in found if one.kind == "layer" and one.copyable and one.silence]
    inner = [one for one in single if not any(_inside(other, one) for other in (*single, *cells) if other is not one)]
    blocks = [*cells, *(one for one in inner if not any(_inside(one, other) for other in cells))]
    kinds = {type(structure.model.get_submodule(one.modules[0])) for one in blocks} - _GENERAL
    blocks += [
        one
        for one in found
        if one not in blocks
        and len(one.modules) == 1
        and one.insert_after
        and type(structure.model.get_submodule(one.modules[0])) in kinds
    ]
    if not blocks:
        able = [one for one in found if one.removal is not None and one.parameters and one.flops]
        blocks = [one for one in able if len(one.modules) == 1] or able
    return sorted(blocks, key=lambda one: one.position)


def _matching(structure: Structure, found: Sequence[Site], asked: Sequence[str]) -> list[Site]:
    able = [one for one in found if one.may]
    for pattern in asked:
        if not structure.layers_moved and not any(fnmatchcase(one.name, pattern) for one in able):
            known = ", ".join(one.name for one in able[:6])
            raise MethodError(f"axes: no layer that may change fits {pattern!r}; those there are: {known}.")
    return [one for one in able if any(fnmatchcase(one.name, pattern) for pattern in asked)]


def _apart(found: Iterable[Site]) -> tuple[Site, ...]:
    """Those that are in no other one; of those that share a module, the first."""
    every, kept = list(found), list[Site]()
    for one in every:
        if not any(_inside(one, other) for other in every if other is not one):
            shared = {path for other in kept for path in other.modules}
            if shared.isdisjoint(one.modules):
                kept.append(one)
    return tuple(kept)


def _inside(one: Site, other: Site) -> bool:
    """Whether all modules of a site are in those of another one."""
    return all(any(f"{path}.".startswith(f"{holder}.") for holder in other.modules) for path in one.modules)


__all__ = [
    "Blocks", "Copies", "New", "NewLayers", "Places", "Removable", "StageEnds", "Start", "Virtual", "copied",
    "inserted", "virtual_layers",
]  # fmt: skip
