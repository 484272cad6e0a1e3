"""Removal by a rotated singular value decomposition, which destroys networks with activations, kept as a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.dims import IntArray, source
from espalier.graph.named_tensors import tensor_table
from espalier.graph.topology import Topology
from espalier.method import Method, register
from espalier.methods.common import Pruning, pruning
from espalier.parts.ghosts.ghosts import INCOMING, OUTGOING
from espalier.parts.goal import Scores, Selection
from espalier.parts.init import Beginning
from espalier.parts.score import Context, GroupNorm
from espalier.parts.units.refit import kept_units

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Rotated:
    """What stays are the leading right singular directions of what makes the units, instead of units.

    With A (units x inputs, the bias b apart) = V S U^T and V_r its r leading left columns, A becomes V_r^T A, b becomes
    V_r^T b, and every W that reads the units W V_r. Between linear layers that is exact if A and b are of rank r. The
    code of the paper has V b in the place of V^T b, which is wrong there too, and corrected here.

    Axes that more than one weight makes, or of which not every entry of what makes and reads them is one unit (groups,
    flattened maps), are left as they are: their units just go.
    """

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Beginning:
        topology = context.structure.topology
        tensors = tensor_table(context.structure.model).tensors
        kept = kept_units(topology, chosen)
        now: dict[str, Tensor] = {}
        for axis in chosen:
            sides = _sides(topology, tensors, axis)
            if sides is None:
                continue
            weight, biases, readers = sides
            for name in (weight, *biases, *readers):
                now.setdefault(name, tensors[name].detach().double())
            directions, _, _ = torch.linalg.svd(now[weight].flatten(1), full_matrices=True)
            rotation = directions[:, : len(kept[topology.by_name[axis].number])]
            for name in (weight, *biases):
                now[name] = torch.tensordot(rotation, now[name], dims=([0], [0]))
            for name in readers:
                now[name] = torch.tensordot(now[name], rotation, dims=([1], [0])).movedim(-1, 1)
        return Beginning(deltas=_changes(topology, tensors, kept, now))


def _sides(
    topology: Topology, tensors: Mapping[str, Tensor], axis: str
) -> tuple[str, tuple[str, ...], tuple[str, ...]] | None:
    """The weight that makes the units of an axis, its bias, and the weights that read them; None if it is not so."""
    record = topology.by_name[axis]
    size, slots = topology.sizes[record.number], record.slots
    makers = [(name, dim) for name, dim, role in slots if role in INCOMING and name in topology.parameters]
    readers = [(name, dim) for name, dim, role in slots if role in OUTGOING and name in topology.parameters]
    if len(makers) != 1 or not readers:
        return None
    if any(dim != 0 or len(tensors[name]) != size for name, dim in makers):
        return None
    if any(dim != 1 or tensors[name].shape[1] != size for name, dim in readers):
        return None
    (weight, _), module = makers[0], makers[0][0].rpartition(".")[0]
    biases = (name for name, _, role in slots if role == "shift" and name.rpartition(".")[0] == module)
    return weight, tuple(biases), tuple(name for name, _ in readers)


def _changes(
    topology: Topology, tensors: Mapping[str, Tensor], kept: Mapping[int, IntArray], now: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What is added to the entries that stay, so that they become the new ones."""
    found = {}
    for name, new in now.items():
        old = tensors[name].detach()
        for at, dim in enumerate(topology.tensors[name]):
            places = torch.from_numpy(source(dim, topology.sizes, kept)).to(old.device)
            old = old.index_select(at, places)
            if new.shape[at] != old.shape[at]:  # an axis that shrinks too, and is not rotated
                new = new.index_select(at, places)
        found[name] = (new - old).to(old)
    return found


@register
def rotated_svd(**options: Unpack[Pruning]) -> Method:
    """Replace units by the leading singular directions of what makes them: a baseline that is meant to fail.

    An activation acts on units one by one and does not commute with a rotation, so that a network with activations
    computes something else even if nothing is lost of its weights. On digits, a perceptron 64-64-64-10 with ReLU falls
    from 0.97 to 0.44 of the test samples by the rotation alone, with half of the units removed or with next to none;
    to choose units and refit what reads them (``refit=True`` in every other pruning method) leaves 0.97 at half.

    Raises MethodError for an option that is not what `espalier.methods.common.Pruning` says, and for `refit`.
    """
    if options.get("refit"):
        raise MethodError("rotated-svd: expected no refit, since it sets what reads the units itself; leave refit out.")
    return pruning(
        "rotated-svd",
        GroupNorm(),  # says whose places are given up, which makes no difference
        init=Rotated(),
        paper="the removal of neurons in Schiessler et al. 2021, Neural Network Surgery "
        "(doi:10.1016/j.neunet.2021.08.034), with the bias corrected",
        description="baseline that fails: rotates units onto singular directions, through their activation",
        **options,
    )
