"""What is permissible: which layers and cells may go, be copied, be joined by others or change form; else why not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal

from torch import nn

from espalier.graph.branches import is_beside
from espalier.graph.cells import cells, named_cells
from espalier.graph.chains import following, prime_runs
from espalier.graph.dims import size_of
from espalier.graph.forms import factorisable, folding
from espalier.graph.peeking import read_attributes
from espalier.graph.regions import Boundaries, Refusal, Region
from espalier.graph.shifts import shift, states
from espalier.graph.silence import silenced
from espalier.graph.topology import Topology
from espalier.graph.visits import Place
from espalier.table import text_table

Kind = Literal["layer", "cell"]
Removal = Literal["entry", "zero", "inputs"]


@dataclass(frozen=True)
class Site:
    """A layer or a cell, or a run of layers that only together are one, and what may be done to it."""

    modules: tuple[str, ...]
    """Path of the module; of several that run one after the other, where none of them could go without the others."""
    kind: Kind
    """A cell is one of several blocks of one class that a container holds, or what the user named; all else a layer."""
    position: int
    """Number of the operator with which it begins, in the first pass that runs it."""
    parameters: int
    """That go with it; those that others use as well stay."""
    flops: int
    """Of one eval-mode forward on the example inputs."""
    removal: Removal | None
    """What takes the place of its result if it goes: its entry, or zero where that is added to something of the same
    origin, or, in a list that hands on its last results, all of these that it got; None: it may not go."""
    insert_after: bool
    insert_before: bool
    copyable: bool
    """Whether a copy may run right after it, on its result."""
    silence: tuple[str, ...] | None
    """Parameters which have to be zero in a copy for it to begin as nothing; None: there are none such."""
    factorisable: bool
    """Whether it may be replaced by two thinner layers."""
    folds_into: str | None
    """The neighbouring layer with which it could be one."""
    alike: tuple[str, ...] = ()
    """The other cells of its container that run the same operators."""
    why_not: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Field -> why it is None or False, in words that follow the name."""

    @property
    def name(self) -> str:
        """Its path, or those of the first and the last module."""
        return self.modules[0] if len(self.modules) == 1 else f"{self.modules[0]} to {self.modules[-1]}"

    @property
    def may(self) -> tuple[str, ...]:
        """What may be done, in words."""
        found = [] if self.removal is None else ["remove"]
        found += ["copy"] if self.copyable else []
        found += ["insert"] if self.insert_after or self.insert_before else []
        found += ["factorise"] if self.factorisable else []
        return (*found, "fold") if self.folds_into is not None else tuple(found)


def sites(topology: Topology, modules: Mapping[str, nn.Module], named: Sequence[str] = ()) -> tuple[Site, ...]:
    """Every module of a network as a site, and the runs of modules that are one together, in the order they run.

    Args:
        topology: what is known of the network.
        modules: its modules by path, itself by the empty one.
        named: patterns of paths such as ``layers.*`` that the user calls cells, beside those found.

    Raises:
        PlanError: a pattern that no module matches.
    """
    return _Survey(topology, modules, named).found()


class _Survey:
    def __init__(self, topology: Topology, modules: Mapping[str, nn.Module], named: Sequence[str]) -> None:
        self._topology = topology
        self._modules = modules
        self._boundaries = Boundaries(topology)
        self._paths = [path for path in modules if path]
        self._after = following(self._boundaries, self._paths)
        self._before = {after: path for path, after in self._after.items()}
        self._alike = {
            path: tuple(other for other in group if other != path)
            for one in cells(topology, modules)
            for group in one.alike
            for path in group
        }
        self._named = named_cells(modules, named)

    def found(self) -> tuple[Site, ...]:
        """All sites."""
        found = [self._single(path) for path in self._paths]
        for run in prime_runs(self._boundaries, self._after):
            if not any(map(self._read, run)) and not self._is_parent(run):
                found.append(self._run(run))
        return tuple(sorted(found, key=lambda site: site.position))

    def _single(self, path: str) -> Site:
        region = self._boundaries.region(path)
        if isinstance(region, Region) and path in self._other_names:
            region = Refusal(f"is known as {self._other_names[path]} too")
        is_cell = path in self._alike or path in self._named
        refused = region.reason if isinstance(region, Refusal) else ""
        read, closed = self._read(path), self._closed(region, is_cell)
        held = read or self._tied(path)
        handed = self._handed(path)
        not_copyable = "" if handed else closed or self._not_alone(path, region)
        silence = (
            Refusal(closed or not_copyable)
            if closed or not_copyable
            else silenced(self._boundaries, path, copied_after=path)
        )
        fold = folding(self._modules, path, self._before.get(path), self._after.get(path))
        why = {
            "removal": read if handed else closed or read,
            "insert_after": region.no_layer_after if isinstance(region, Region) else refused,
            "insert_before": region.no_layer_before if isinstance(region, Region) else refused,
            "copyable": not_copyable,
            "silence": silence.reason if isinstance(silence, Refusal) else "",
            "factorisable": refused or held or factorisable(self._modules[path]),
            "folds_into": refused or held or (fold.reason if isinstance(fold, Refusal) else ""),
        }
        return Site(
            modules=(path,),
            kind="cell" if is_cell else "layer",
            position=self._positions.get(path, len(self._topology.predictions[0].calls)),
            parameters=self._parameters[path],
            flops=self._flops[path],
            removal=None if why["removal"] else "inputs" if handed else self._left(region),
            insert_after=not why["insert_after"],
            insert_before=not why["insert_before"],
            copyable=not not_copyable,
            silence=None if isinstance(silence, Refusal) else silence.tensors,
            factorisable=not why["factorisable"],
            folds_into=None if why["folds_into"] or isinstance(fold, Refusal) else fold,
            alike=self._alike.get(path, ()),
            why_not={key: reason for key, reason in why.items() if reason},
        )

    def _closed(self, region: Region | Refusal, is_cell: bool) -> str:
        """Why nothing that goes in could take the place of what comes out; empty if something could."""
        if isinstance(region, Refusal):
            return region.reason
        is_boundary = is_cell and region.no_removal.startswith("turns")
        return f"{region.no_removal}: a boundary between stages" if is_boundary else region.no_removal

    def _read(self, path: str) -> str:
        """Whether code reads what only this very module has; empty if it is not known to."""
        parent, _, key = path.rpartition(".")
        attribute = read_attributes(self._modules[parent]).get(key)
        return "" if attribute is None else f"has its attribute {attribute} read by the code of {parent or 'the model'}"

    def _tied(self, path: str) -> str:
        """Whether others hold tensors of its own, from which a layer in its place would be untied."""
        inside = f"{path}."
        for pair in self._topology.aliases.items():
            for own, other in (pair, pair[::-1]):
                if own.startswith(inside) and not other.startswith(inside):
                    return f"shares {own} with {other.rpartition('.')[0] or 'the model'}"
        return ""

    def _not_alone(self, path: str, region: Region | Refusal) -> str:
        """Why its result would not do for a copy to run on; empty if it would, or if code goes through a list."""
        if isinstance(region, Refusal):
            return ""
        if self._listed(path):
            return shift(self._boundaries, path, self._listed(path))
        if not region.lone:
            return "gets more than its first tensor, which is all that a copy after it would get"
        return "" if region.result == "tensor" else f"gives back a {region.result}, of which a copy would get one item"

    def _listed(self, path: str) -> list[str]:
        """The entries of the list that a module is in; none if it is in no `nn.ModuleList`."""
        parent = path.rpartition(".")[0]
        if not isinstance(self._modules.get(parent), nn.ModuleList):
            return []
        return [one for one in self._paths if one.rpartition(".")[0] == parent]

    def _handed(self, path: str) -> bool:
        """Whether it is in a list that hands on its last results, all of them of the size of its own."""
        return path not in self._other_names and bool(states(self._boundaries, path, self._listed(path)))

    def _left(self, region: Region | Refusal) -> Removal:
        return "zero" if isinstance(region, Region) and region.beside else "entry"

    def _run(self, run: tuple[str, ...]) -> Site:
        together = "is a run of several modules"
        return Site(
            modules=run,
            kind="layer",
            position=self._positions[run[0]],
            parameters=sum(self._parameters[path] for path in run),
            flops=sum(self._flops[path] for path in run),
            removal="zero" if self._is_beside(run) else "entry",
            insert_after=False,
            insert_before=False,
            copyable=False,
            silence=None,
            factorisable=False,
            folds_into=None,
            why_not=dict.fromkeys(
                ("insert_after", "insert_before", "copyable", "silence", "factorisable", "folds_into"), together
            ),
        )

    def _is_beside(self, run: tuple[str, ...]) -> bool:
        first, last = (self._boundaries.region(path) for path in (run[0], run[-1]))
        assert isinstance(first, Region)
        assert isinstance(last, Region)
        asked = []
        for one in self._boundaries.passes:
            for begin, end in zip(one.visits.get(run[0], ()), one.visits.get(run[-1], ()), strict=True):
                entry = next(leaf.value for leaf in begin.entries if leaf.place == first.takes[0])
                exit = next(leaf.value for leaf in end.exits if leaf.place == last.exit)
                asked.append(is_beside(self._topology, one.prediction, entry, exit, begin.first, end.last))
        return bool(asked) and all(asked)

    def _is_parent(self, run: tuple[str, ...]) -> bool:
        """Whether the parent does nothing but a run of its children: it is the site then."""
        parent = run[0].rpartition(".")[0]
        region, first = self._boundaries.region(parent), self._boundaries.region(run[0])
        if not isinstance(region, Region) or region.entry is None or not isinstance(first, Region):
            return False
        if parent in self._other_names:
            return False
        return all(
            _values(whole.entries, region.entry) == _values(begin.entries, first.takes[0])
            and {leaf.value for leaf in whole.exits} == {leaf.value for leaf in end.exits}
            for one in self._boundaries.passes
            for whole, begin, end in zip(*(one.visits.get(path, ()) for path in (parent, run[0], run[-1])), strict=True)
        )

    @cached_property
    def _other_names(self) -> Mapping[str, str]:
        """Path -> another path of the same module, which would keep it."""
        first = {id(module): path for path, module in self._modules.items()}
        found: dict[str, str] = {}
        for path, module in self._modules[""].named_modules(remove_duplicate=False):
            known = first[id(module)]
            if path != known and not any(path.startswith(f"{other}.") for other in found.values()):
                found.setdefault(known, path)
        return found

    @cached_property
    def _positions(self) -> Mapping[str, int]:
        found: dict[str, int] = {}
        for one in self._boundaries.passes:
            for path, visits in one.visits.items():
                found.setdefault(path, min(visit.first for visit in visits))
        return found

    @cached_property
    def _parameters(self) -> Mapping[str, int]:
        found: dict[str, int] = defaultdict(int)
        known_as: dict[str, list[str]] = defaultdict(list)
        for alias, name in self._topology.aliases.items():
            known_as[name].append(alias)
        for name in self._topology.parameters:
            size = prod(size_of(dim, self._topology.sizes) for dim in self._topology.tensors[name])
            for path in _holders(name):
                if all(alias.startswith(f"{path}.") for alias in known_as.get(name, ())):
                    found[path] += size
        return found

    @cached_property
    def _flops(self) -> Mapping[str, int]:
        found: dict[str, int] = defaultdict(int)
        prediction = self._topology.predictions[0]
        for call, factor, dims in prediction.costs:
            cost = factor * prod(size_of(dim, self._topology.sizes) for dim in dims)
            for path in set(prediction.calls[call].modules):
                found[path] += cost
        return found


def _values(leaves: Sequence[object], place: Place) -> list[int]:
    return [leaf.value for leaf in leaves if leaf.place == place]  # type: ignore[attr-defined]


def _holders(name: str) -> Iterator[str]:
    """The modules that a tensor is in, innermost first, without the model itself."""
    path = name.rpartition(".")[0]
    while path:
        yield path
        path = path.rpartition(".")[0]


def site_table(found: Sequence[Site], most: int = 20) -> list[str]:
    """A short table of the cells and of the removable layers with parameters, and how many others there are."""
    shown = [one for one in found if one.kind == "cell" and one.may]
    shown += [one for one in found if one.kind == "layer" and one.removal is not None and one.parameters]
    rows = []
    for one in shown[:most]:
        leaves = "-" if one.removal is None else one.removal if one.removal == "zero" else f"its {one.removal}"
        rows.append((one.name, one.kind, ", ".join(one.may), leaves, f"{one.parameters:,}", f"{one.flops:,}"))
    lines = text_table(("site", "kind", "may", "leaves", "parameters", "FLOPs"), rows, right=(4, 5)) if rows else []
    counts = {
        "more of these": len(shown) - len(rows),
        "where a layer may be inserted": sum(one.insert_after or one.insert_before for one in found),
        "that may be factorised": sum(one.factorisable for one in found),
        "that may be folded": sum(one.folds_into is not None for one in found),
        "where nothing may be done": sum(not one.may for one in found),
    }
    return [*lines, "; ".join(f"{count} {words}" for words, count in counts.items() if count)]


__all__ = ["Kind", "Removal", "Site", "site_table", "sites"]
