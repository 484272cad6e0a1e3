"""Random beginnings of new units, wired so that the outputs stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.parts.ghosts.amplitude import part_norms, row_norm, unit_rows, widths, with_norms
from espalier.parts.ghosts.ghosts import INCOMING, Ghosts, Side, Tensors
from espalier.parts.ghosts.passes import Passes
from espalier.parts.ghosts.rows import orthonormal
from espalier.parts.ghosts.wiring import Wired, Wiring, allows, is_normed, written
from espalier.parts.goal import Scores, Selection
from espalier.parts.init import Beginning, Init
from espalier.parts.score import Context

Distribution = Literal["gaussian", "orthogonal"]


@dataclass(frozen=True)
class Drawn:
    """Rows of random directions: incoming ones of the mean length of old ones, outgoing ones of a part of it.

    Zero incoming weights are used only where no norm sees the units and where they get a gradient; else the units are
    wired ``out``. Axes that allow neither begin as surgery lets them begin.
    """

    wiring: Wiring = "out"
    distribution: Distribution = "gaussian"
    outgoing: float = 0.5
    """Length of outgoing rows, as a part of the mean length of old ones (Evci et al. 2022)."""
    narrower: bool = False
    """Whether lengths follow what fan-ins grow to, so that each sum keeps its variance (Yuan et al. 2023)."""

    def __post_init__(self) -> None:
        if self.distribution not in get_args(Distribution):
            raise MethodError(f"distribution: expected 'gaussian' or 'orthogonal', found {self.distribution!r}.")
        if self.wiring not in get_args(Wiring):
            raise MethodError(f"wiring: expected 'out', 'in' or 'pairs', found {self.wiring!r}.")

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Beginning:
        ghosts = Ghosts(context, {axis: len(units) for axis, units in chosen.items()})
        tensors: Tensors = ghosts.tensors
        for axis, wiring in wirings(context, ghosts, self.wiring).items():
            sides = ghosts.sides[axis]
            incoming = self._rows(context, f"{axis} incoming", sides.incoming.read(ghosts.tensors))
            outgoing = self._rows(context, f"{axis} outgoing", sides.outgoing.read(ghosts.tensors))
            lengths = part_norms(sides.incoming, ghosts.tensors)
            length = self.outgoing * row_norm(sides.outgoing, ghosts.tensors)
            if self.narrower:
                lengths = lengths * fan_ratio(sides.incoming, ghosts) ** 0.5
                length *= size_ratio(context, ghosts, axis) ** 0.5
            incoming = with_norms(incoming, widths(sides.incoming, ghosts.tensors), lengths)
            wired = Wired(wiring, incoming, unit_rows(outgoing) * length)
            tensors = written(ghosts, context.structure, tensors, axis, wired)
        return Beginning(values=written_ones(ghosts, tensors))

    def _rows(self, context: Context, name: str, like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=context.generator(name), dtype=torch.float64)
        return (orthonormal(drawn) if self.distribution == "orthogonal" else drawn).to(like)


def wirings(context: Context, ghosts: Ghosts, asked: Wiring) -> dict[str, Wiring]:
    """For every axis the wiring asked for where it is safe, else ``out``; axes that allow neither are left out."""
    first = {axis: asked for axis in ghosts.counts if asked == "out" or allows(ghosts, context, axis, asked)}
    if asked == "in":
        able = [axis for axis in first if not is_normed(context.structure, axis)]
        able = [axis for axis in able if row_norm(ghosts.sides[axis].outgoing, ghosts.tensors) > 0]
        first = dict.fromkeys(Passes(context, ghosts, silent=able).alive(able) if able else (), asked)
    found: dict[str, Wiring] = {axis: first.get(axis, "out") for axis in ghosts.counts}
    return {axis: one for axis, one in found.items() if one != "out" or allows(ghosts, context, axis, "out")}


def written_ones(ghosts: Ghosts, tensors: Tensors) -> dict[str, Tensor]:
    """Those of the tensors that are no longer what surgery fills in."""
    return {name: one for name, one in tensors.items() if one is not ghosts.tensors[name]}


def fan_ratio(incoming: Side, ghosts: Ghosts) -> float:
    """How many weights produce a unit now, over how many there will be: below 1 where what they read grows as well."""
    now = sum(widths(incoming, ghosts.tensors))
    then = sum(
        ghosts.tensors[part.tensor].numel() // ghosts.tensors[part.tensor].shape[part.dim] * part.new.shape[1]
        for part in incoming.parts
    )
    return now / then


def size_ratio(context: Context, ghosts: Ghosts, axis: str) -> float:
    """The size of an axis now, over that which it will have."""
    size = context.structure.axes[axis].size
    return size / (size + ghosts.counts[axis])


@dataclass(frozen=True)
class Rescaled:
    """Another beginning, and the weights that read grown axes made smaller.

    A sum over n units that becomes one over n' keeps its variance if old weights are multiplied by sqrt(n/n'), or by
    n/n' where it is an output of the network (Yuan et al. 2023, table 1). This changes the outputs.
    """

    init: Init

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Beginning:
        begun = self.init(context, chosen, scores)
        ghosts = Ghosts(context, {axis: len(units) for axis, units in chosen.items()})
        outward = _outward(context)
        tensors: Tensors = ghosts.tensors
        for axis, sides in ghosts.sides.items():
            for part in sides.outgoing.parts:
                factor = size_ratio(context, ghosts, axis) ** (1.0 if part.tensor in outward else 0.5)
                old = Side((replace(part, new=part.old),))
                tensors = old.write(tensors, old.read(tensors) * factor)
        deltas = {name: one - ghosts.tensors[name] for name, one in written_ones(ghosts, tensors).items()}
        return Beginning(begun.values, {**begun.deltas, **deltas})


def _outward(context: Context) -> set[str]:
    """Tensors that produce outputs of the model."""
    records = context.structure.topology.axes.values()
    outputs = [one for one in records if any(reason.kind == "output" for reason in one.reasons)]
    return {name for record in outputs for name, _, role in record.slots if role in INCOMING}


__all__ = ["Distribution", "Drawn", "Rescaled", "wirings", "written_ones"]
