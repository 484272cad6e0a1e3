"""What users ask of whole layers and cells, as plans. Pure: nothing is changed here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from torch import nn

from espalier.edit.depth_edits import Insert, Leaves, Remove
from espalier.edit.plan import Plan
from espalier.edit.recipes.base import Recipe
from espalier.edit.recipes.copies import CopyOf
from espalier.edit.recipes.defaults import default_layer
from espalier.edit.steps import known_region
from espalier.errors import PlanError
from espalier.graph.regions import Boundaries, Refusal
from espalier.graph.shifts import shift, states
from espalier.graph.silence import silencing
from espalier.graph.topology import Topology
from espalier.graph.visits import Place

Modules = Mapping[str, nn.Module]


def removal(
    topology: Topology, modules: Modules, paths: Sequence[str], leaves: Leaves | None, entry: Place | None
) -> Plan:
    """Leave modules out; what that leaves is found by whether the result of the last one is only added to something."""
    if not paths:
        raise PlanError("which layer? Give the path of a module, or those of a run of them.")
    first = tuple(Remove(path) for path in paths[:-1])
    last = Remove(paths[-1], leaves or "entry", entry)
    check_path(modules, paths[-1])
    if leaves is None and entry is None:
        if known_region(topology, paths[-1]).beside:
            last = Remove(paths[-1], "zero")
        elif states(Boundaries(topology), paths[-1], _listed(modules, paths[-1])):
            last = Remove(paths[-1], "inputs")
    return Plan((), depth=(*first, last))


def insertion(
    topology: Topology, modules: Modules, after: str | None, before: str | None, layer: Recipe | None
) -> Plan:
    """Put a new layer right after, or right before, a module. Raises PlanError unless one of both is given."""
    match after, before:
        case str(), None:
            check_path(modules, after)
            return Plan((), depth=(Insert(after, layer or default_layer(topology, after)),))
        case None, str():
            check_path(modules, before)
            new = layer or default_layer(topology, before, before=True)
            return Plan((), depth=(Insert(before, new, before=True),))
    raise PlanError("where does the layer come? Give the path of a module, either after=... or before=....")


def addition(
    topology: Topology, modules: Modules, container: str, position: int | None, of: str | None, init: str
) -> Plan:
    """Add a copy of one of the cells of a container to it.

    Raises PlanError: there is no such list of cells, the position is not in it, or no cell in it can be copied.
    """
    if init not in ("zero", "copy"):
        raise PlanError(f"init: expected 'zero' (changes nothing at first) or 'copy' (as it is), found {init!r}.")
    entries = _entries(modules, container)
    place = len(entries) if position is None else position
    if not 0 <= place <= len(entries):
        raise PlanError(
            f"{container} has {len(entries)} cells: position is from 0 to {len(entries)}, found {position}."
        )
    boundaries = Boundaries(topology)
    source = _source(boundaries, modules, entries, place, of)
    layer = copied(boundaries, modules, source, init)
    after, before = (entries[place - 1], None) if place else (None, entries[0])
    return insertion(topology, modules, after, before, layer)


def copied(boundaries: Boundaries, modules: Modules, path: str, init: str) -> CopyOf:
    """A copy of a module; with init="zero" one that changes nothing at first. Raises PlanError if there is none."""
    why = _no_copy(boundaries, modules, path)
    if why:
        raise PlanError(f"{path} cannot be copied: it {why}.")
    if init == "copy":
        return CopyOf(path)
    silence = silencing(boundaries.topology, path)
    if isinstance(silence, Refusal):
        raise PlanError(
            f"a copy of {path} cannot begin as one that changes nothing: it {silence.reason}. Ask for init='copy'."
        )
    return CopyOf(path, tuple(name.removeprefix(f"{path}.") for name in silence.tensors))


def check_path(modules: Modules, path: str) -> None:
    """Raise PlanError, with names that are like it, if there is no module of that path."""
    if path not in modules:
        like = difflib.get_close_matches(path, [one for one in modules if one], n=3)
        hint = f" Did you mean {' or '.join(map(repr, like))}?" if like else ""
        raise PlanError(f"there is no module {path!r} in the model.{hint}")


def _entries(modules: Modules, container: str) -> list[str]:
    found = modules.get(container)
    if not isinstance(found, (nn.Sequential, nn.ModuleList)) or not len(found):
        what = "no such module" if found is None else f"a {type(found).__name__} of {len([*found.children()])} modules"
        raise PlanError(
            f"{container}: expected an nn.Sequential or nn.ModuleList of cells, found {what}. For a cell with a name "
            "of its own use insert_layer(CopyOf(name), after=name)."
        )
    return [f"{container}.{key}" if container else key for key in found._modules]


def _source(boundaries: Boundaries, modules: Modules, entries: list[str], place: int, of: str | None) -> str:
    """The cell to copy: the one asked for, else the nearest that can be, those before the new one first."""
    if of is not None:
        return of
    reasons: dict[str, str] = {}
    for path in (*reversed(entries[:place]), *entries[place:]):
        reasons[path] = _no_copy(boundaries, modules, path)
        if not reasons[path]:
            return path
    shown = "; ".join(f"{path} {why}" for path, why in reasons.items())
    raise PlanError(f"no cell here gives back what it gets in its own size, so none can be repeated: {shown}.")


def _no_copy(boundaries: Boundaries, modules: Modules, path: str) -> str:
    """Why a cell cannot be repeated, in words that follow its name; empty if it can."""
    region, listed = boundaries.region(path), _listed(modules, path)
    if isinstance(region, Refusal):
        return region.reason
    if states(boundaries, path, listed):
        return ""
    return region.no_removal or shift(boundaries, path, listed)


def _listed(modules: Modules, path: str) -> list[str]:
    """The paths of all entries of the `nn.ModuleList` that a module is in; none if it is in no such list."""
    parent = path.rpartition(".")[0]
    found = modules.get(parent)
    return [f"{parent}.{key}" if parent else key for key in found._modules] if isinstance(found, nn.ModuleList) else []


__all__ = ["addition", "check_path", "copied", "insertion", "removal"]
