"""Norms, means and their like across a gated axis, which leave out what gates shut: how each is known when it runs.

A norm is known by its scale, which is the tensor that it is handed. What has none, or belongs to a norm that is written
by hand, is known by the module in whose own forward it runs and by the sizes that it runs over. What it computes then
is in `espalier.parts.gates.left_out`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.edit.norms import REDUCED, NormSite, reduced_dims
from espalier.graph.dims import Fixed, axes_of, labels, size_of
from espalier.graph.flow import operator_name
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.trace import Call

_NORMS = frozenset({"native_layer_norm", "native_group_norm", "_fused_rms_norm", "rms_norm"})


@dataclass(frozen=True)
class Form:
    """What tells the norms, means and their like in one module apart."""

    kind: str
    """``layer``, ``group``, or the name of a reduction, such as ``mean``."""
    sizes: tuple[int, ...]
    """Of a group norm the groups and channels, else of the dimensions over which it runs; 0 for any."""
    rank: int = 0
    dims: tuple[int, ...] = ()
    """Of reductions: of how many dimensions they run over which."""

    def fits(self, other: Form) -> bool:
        """Whether both may be of one call."""
        if (self.kind, self.rank, self.dims, len(self.sizes)) != (
            other.kind, other.rank, other.dims, len(other.sizes)
        ):  # fmt: skip
            return False
        return all(0 in (one, two) or one == two for one, two in zip(self.sizes, other.sizes, strict=True))


@dataclass(frozen=True)
class Mark:
    """What a norm is known by."""

    name: str
    """Of its scale, or of the module that runs it."""
    form: Form | None = None
    """None if it is known by its scale."""


@dataclass(frozen=True, eq=False)
class NormGate:
    """A norm, mean or the like that leaves out what gates shut."""

    mark: Mark
    units: tuple[Tensor, ...]
    """For every dimension over which it runs the unit of each position, -1 for none; one entry for any size."""
    over: frozenset[str]
    """The axes of the dimensions over which it runs."""
    module: str
    """The module in whose own forward it runs."""
    always: bool
    """Whether it runs whenever that does."""

    def factor(self, values: Tensor) -> Tensor:
        """What the positions count under gates of the units: shape of the dimensions over which the norm runs."""
        found = values.new_ones(())
        for units in self.units:
            found = found[..., None] * torch.cat([values, values.new_ones(1)])[units.to(values.device)]
        return found


def norm_gates(
    topology: Topology, number: int, sites: Sequence[tuple[TracePrediction, NormSite]]
) -> tuple[NormGate, ...] | str:
    """How the norms across an axis are known when they run, or why one of them is not."""
    found: dict[Mark, NormGate] = {}
    own: dict[int, set[int]] = {id(one): set() for one in topology.predictions}
    for prediction, site in sites:
        own[id(prediction)] |= site.calls
    for prediction, site in sites:
        (index,) = site.calls
        call = prediction.calls[index]
        mark = _mark(topology, prediction, call)
        gate = NormGate(mark, _units(topology, number, site), _over(topology, site), site.module, True)
        known = found.setdefault(mark, gate)
        if known.module != gate.module or not _equal(known.units, gate.units) or _is_ambiguous(topology, own, mark):
            return f"the {operator_name(call)} {call.where} cannot be told from another one there"
    return tuple(
        NormGate(one.mark, one.units, one.over, one.module, _always(topology, own, one)) for one in found.values()
    )


def norm_modules(topology: Topology) -> frozenset[str]:
    """The modules in whose own forwards norms, means and their like run."""
    known = _NORMS | REDUCED
    return frozenset(call.module for one in topology.predictions for call in one.calls if operator_name(call) in known)


def _units(topology: Topology, number: int, site: NormSite) -> tuple[Tensor, ...]:
    free = site.kind == "reduced"
    return tuple(
        torch.tensor([-1]) if free and isinstance(dim, Fixed) else torch.from_numpy(labels(dim, topology.sizes, number))
        for dim in site.normal
    )


def _over(topology: Topology, site: NormSite) -> frozenset[str]:
    return frozenset(topology.axes[axis].name for dim in site.normal for axis in axes_of(dim))


def _always(topology: Topology, own: Mapping[int, set[int]], gate: NormGate) -> bool:
    """Whether every pass that runs the module runs the norm."""
    for one in topology.predictions:
        visited = gate.module == "" or any(visit.module == gate.module for visit in one.visits)
        marks = (_mark(topology, one, one.calls[index]) for index in own[id(one)])
        if visited and gate.mark not in marks:
            return False
    return True


def _is_ambiguous(topology: Topology, own: Mapping[int, set[int]], mark: Mark) -> bool:
    """Whether something looks like this norm and is another one."""
    if mark.form is None:
        return False
    for prediction in topology.predictions:
        for call in prediction.calls:
            other = call.module == mark.name and call.index not in own[id(prediction)]
            if other and operator_name(call) in _NORMS | REDUCED and _form(topology, prediction, call).fits(mark.form):
                return True
    return False


def _mark(topology: Topology, prediction: TracePrediction, call: Call) -> Mark:
    weight = call.arguments().get("weight")
    name = None if weight is None else prediction.flow.names.get(weight.index)
    return Mark(call.module, _form(topology, prediction, call)) if name is None else Mark(name)


def _form(topology: Topology, prediction: TracePrediction, call: Call) -> Form:
    name, a = operator_name(call), call.arguments()
    dims = prediction.dims[call.args[0].index]
    sizes = [size_of(one, topology.sizes) for one in dims]
    if name == "native_group_norm":
        groups = next((dim for key, dim in prediction.expectations.get(call.index, ()) if key == "group"), None)
        return Form("group", (a["group"] if groups is None else size_of(groups, topology.sizes), sizes[1]))
    if name == "native_layer_norm":
        return Form("layer", tuple(sizes[-len(a["normalized_shape"]) :]))
    if name in REDUCED:
        over = reduced_dims(prediction, call)
        lengths = (0 if isinstance(dims[dim], Fixed) else sizes[dim] for dim in over)
        return Form(name.removeprefix("_"), tuple(lengths), len(dims), over)
    over = tuple(range(len(dims))[-len(a["normalized_shape"]) :])
    return Form("mean", tuple(sizes[dim] for dim in over), len(dims), over)


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


__all__ = ["Form", "Mark", "NormGate", "norm_gates", "norm_modules"]
