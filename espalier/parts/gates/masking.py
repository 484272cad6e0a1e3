"""Gates that are shut, as masks of a plan: for gates on what is no unit of an axis."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from espalier.edit.changes import changes_of
from espalier.edit.plan import Plan, Remask
from espalier.edit.tensors import gather
from espalier.structure import Structure


def masked_too(structure: Structure, plan: Plan, shut: Mapping[str, Tensor]) -> tuple[Remask, ...]:
    """The masks with which a plan also holds at zero what gates have shut.

    Args:
        structure: of the live network, with the masks that it has.
        plan: the resizes, if any, that come in the same plan; new entries are live.
        shut: first name of a parameter -> of booleans, of its present shape, True where a gate is shut.

    Returns only masks that hold more than the present ones. Raises PlanError as `Structure.check` for the resizes.
    """
    changes = changes_of(plan, structure.topology, {}) if plan.edits else None
    found = []
    for name, closed in shut.items():
        present = structure.masks.get(name)
        live = ~closed if present is None else present.cpu() & ~closed
        if bool(live.all()) or (present is not None and torch.equal(live, present.cpu())):
            continue
        sources = None if changes is None else changes.sources(name)
        found.append(Remask.of(name, live if sources is None else gather(live, sources, 1)))
    return tuple(found)


__all__ = ["masked_too"]
