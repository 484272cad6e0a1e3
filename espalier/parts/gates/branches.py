"""Gates on layers and cells: on the branch that a residual block adds to what it gets.

The gate multiplies the tensors that silence the branch (`espalier.graph.silence`): shut, the block hands on its input,
as if it were not there. Only blocks that leave their input where they are removed can have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from espalier.edit.depth_edits import Remove
from espalier.graph.regions import Boundaries, Refusal
from espalier.graph.silence import silenced
from espalier.parts.candidate import Candidate
from espalier.parts.gates.places import GatePlace


@dataclass(frozen=True)
class Whole:
    """One gate for a whole tensor."""

    tensor: str

    def spread(self, values: Tensor, shape: Sequence[int], /) -> Tensor:
        """The gate itself, shape (1,)."""
        return values.view([1] * len(shape))


def branch_place(boundaries: Boundaries, name: str, candidate: Candidate) -> GatePlace | str:
    """The gate on a layer or cell, or why there is none."""
    if len(candidate.edits) > 1:
        return "it is a run of several modules, without a branch that could be silenced"
    (edit,) = candidate.edits
    if not isinstance(edit, Remove) or edit.leaves != "entry":
        return "zero takes its place where it is removed, not its input"
    found = silenced(boundaries, edit.module)
    if isinstance(found, Refusal):
        return f"it {found.reason}"
    if not found.tensors:
        return "it has no parameters that could silence it"
    return GatePlace(name, 1, tuple(map(Whole, found.tensors)))


__all__ = ["Whole", "branch_place"]
