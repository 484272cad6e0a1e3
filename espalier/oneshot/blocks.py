"""Whole blocks that a network could go without, those first whose absence changes the outputs least.

Calling an operator takes time however narrow it is, which only fewer operators save: where small networks spend half
of their time so, widths alone would have to shrink to almost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from espalier.edit.depth_edits import DepthEdit
from espalier.edit.plan import Plan
from espalier.errors import PlanError, SurgeryError
from espalier.measure.runtimes import for_inference
from espalier.oneshot.meter import FORWARD, Meter
from espalier.oneshot.worth import Inputs
from espalier.parts.depth.places import Removable
from espalier.structure import Structure

TRIAL = 0.03
"""The part of the whole training that each number of blocks is tried with."""


@dataclass(frozen=True)
class Block:
    """A block that hands on what it gets where it is left out."""

    name: str
    edits: tuple[DepthEdit, ...]


def droppable(structure: Structure, keep: Iterable[str], inputs: Sequence[Inputs], meter: Meter) -> list[Block]:
    """Blocks that may go together, in the order in which they had better; one of each stage stays.

    The order is by the squared change of the outputs on these inputs, each block by itself. Blocks with something in
    them that is to be kept, and those that surgery refuses to remove, are left out.
    """
    cells = {site.name for site in structure.sites() if site.kind == "cell"}
    catalogue = Removable(kept=1, leaves="entry")(structure, None)
    before = _outputs(structure.model, inputs)
    meter.charge(inputs, FORWARD)
    changes: dict[str, float] = {}
    for name, one in catalogue.candidates.items():
        if name not in cells or any(_touch(path, kept) for path in one.modules for kept in keep):
            continue
        try:
            with structure.tried(Plan((), depth=one.edits)):
                after = _outputs(structure.model, inputs)
        except (PlanError, SurgeryError):
            continue
        meter.charge(inputs, FORWARD)
        changes[name] = sum(
            float((new.double() - old.double()).square().sum()) for old, new in zip(before, after, strict=True)
        )
    spare, order = dict(catalogue.spare), []
    for name in sorted(changes, key=lambda name: changes[name]):
        one = catalogue.candidates[name]
        if spare[one.stage] > 0:
            spare[one.stage] -= 1
            order.append(Block(name, one.edits))
    return order


def plan_without(blocks: Sequence[Block]) -> Plan:
    """The plan that leaves these blocks out."""
    return Plan((), depth=tuple(edit for block in blocks for edit in block.edits))


def _touch(path: str, kept: str) -> bool:
    return f"{path}.".startswith(f"{kept}.") or f"{kept}.".startswith(f"{path}.")


def _outputs(model: nn.Module, inputs: Sequence[Inputs]) -> list[Tensor]:
    found: list[Tensor] = []
    with for_inference(model), torch.no_grad():
        for args, kwargs in inputs:
            leaves = tree_leaves(model(*args, **kwargs))
            found += [one for one in leaves if isinstance(one, Tensor) and torch.is_floating_point(one)]
    return found


__all__ = ["TRIAL", "Block", "droppable", "plan_without"]
