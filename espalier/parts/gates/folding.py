"""Gates that become part of the weights: what they multiply is multiplied for good, and there are no gates any more.

Needed once the search is over where gates that are left are judged as something else than 1: numbers between 0 and 1,
or what is shut and cannot leave. Else the network without its gates would be another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from espalier.edit.tensors import gather
from espalier.graph.dims import IntArray
from espalier.graph.named_tensors import tensor_table
from espalier.parts.gates.subnetwork import SubNetwork
from espalier.record import Preview
from espalier.structure import Structure

Left = Mapping[str, Sequence[int]]
"""Axis -> the old units that are left of it, in a plan that changes it."""


def folded(
    structure: Structure, gates: SubNetwork, judged: Mapping[str, Tensor], preview: Preview
) -> dict[str, Tensor]:
    """What a plan adds to tensors (`Plan.deltas`) for gates to be part of them.

    Args:
        structure: of the live network.
        gates: where they act in it.
        judged: key -> what each multiplies by.
        preview: what the plan makes of the network otherwise.
    """
    tensors, found = tensor_table(structure.model).tensors, {}
    for name, factor in gates.factors(judged).items():
        sources = preview.changes.sources(name)
        whole = factor.detach().expand(tensors[name].shape)
        new = preview.tensors.get(name, tensors[name].detach())
        found[name] = new * ((whole if sources is None else gather(whole, sources, 1.0)) - 1)
    return found


class Folding:
    """Whether the gates of a session have become part of the weights."""

    def __init__(self) -> None:
        self.done = False
        self._noted: dict[str, tuple[int, ...]] | None = None

    def note(self, left: Left) -> None:
        """A plan folds them, which leaves these units."""
        self._noted = {axis: tuple(units) for axis, units in left.items()}

    def forget(self) -> None:
        """No plan is under way."""
        self._noted = None

    def follow(self, units: Mapping[str, IntArray]) -> bool:
        """An edit was made; whether it was that plan."""
        found = self._noted == {axis: tuple(one.tolist()) for axis, one in units.items()}
        self.done, self._noted = self.done or found, None
        return found


__all__ = ["Folding", "Left", "folded"]
