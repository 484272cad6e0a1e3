"""New units as copies of old ones, which then share what reads them (Chen et al. 2016, Net2Net, section 2.2)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from espalier.errors import EspalierWarning, MethodError
from espalier.parts.ghosts.ghosts import Ghosts, Side, Tensors
from espalier.parts.goal import Scores, Selection
from espalier.parts.init import Beginning
from espalier.parts.score import Context

Originals = Literal["random", "largest"]


@dataclass(frozen=True)
class Copied:
    """Every new unit is an old one again, all its weights and statistics included; what reads the two is shared.

    With r copies a unit that was read with w is read with w/(r + 1) + e_0, ..., w/(r + 1) + e_r, where the e sum to
    zero and tell copies apart that would otherwise learn the same for ever. Several axes are copied at once: copies of
    rows are made of rows whose columns are shared already. An axis on which the outputs would change, as where dropout
    tells copies apart or a LayerNorm runs over the units, begins as surgery lets it begin, with a warning.
    """

    originals: Originals = "random"
    """Which units are copied: ``random`` ones or those of the ``largest`` norm; none twice before all are."""
    noise: float = 0.1
    """Length of the e, as a part of that of w/(r + 1)."""

    def __post_init__(self) -> None:
        if self.originals not in get_args(Originals):
            raise MethodError(f"originals: expected 'random' or 'largest', found {self.originals!r}.")
        if not 0 <= self.noise < 1:
            raise MethodError(f"noise: expected a number from 0 to below 1, found {self.noise!r}.")

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Beginning:
        ghosts = Ghosts(context, {axis: len(units) for axis, units in chosen.items()})
        originals = {axis: self._originals(context, scores, axis, count) for axis, count in ghosts.counts.items()}
        able: dict[str, Tensor] = {}
        for axis, units in originals.items():
            values, deltas = self._copied(context, ghosts, {axis: units})
            problem = ghosts.seen(axis, values, deltas)
            if problem is None:
                able[axis] = units
            else:
                warnings.warn(f"net2net adds fresh units instead of copies: {problem}.", EspalierWarning, stacklevel=2)
        values, deltas = self._copied(context, ghosts, able)
        changed = {name: one for name, one in values.items() if one is not ghosts.tensors[name]}
        return Beginning(changed, deltas)

    def _originals(self, context: Context, scores: Scores, axis: str, count: int) -> Tensor:
        """The unit that each new one is a copy of."""
        size = context.structure.axes[axis].size
        if self.originals == "largest":
            order = torch.argsort(scores.found[axis], descending=True, stable=True)
        else:
            order = torch.randperm(size, generator=context.generator(axis))
        return order.repeat(-(-count // size))[:count]

    def _copied(
        self, context: Context, ghosts: Ghosts, originals: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The grown tensors without the deltas of old entries, and these deltas."""
        tensors: dict[str, Tensor] = dict(ghosts.tensors)
        for axis, units in originals.items():
            tensors = self._shared(context, tensors, axis, _everywhere(ghosts.sides[axis].outgoing), units)
        deltas: dict[str, Tensor] = {}
        for name, before in ghosts.tensors.items():
            if tensors[name] is not before:
                deltas[name] = torch.where(ghosts.is_old(name), tensors[name] - before, torch.zeros_like(before))
                # rounded as they will be, so that copies equal their originals bit by bit
                tensors[name] = torch.where(ghosts.is_old(name), before + deltas[name], tensors[name])
        for axis, units in originals.items():
            for side in (ghosts.sides[axis].incoming, ghosts.sides[axis].rest):
                for part in _everywhere(side).parts:
                    tensor = tensors[part.tensor]
                    tensors[part.tensor] = part.written(tensor, part.read(tensor, part.old[units]))
        for name in deltas:
            tensors[name] = torch.where(ghosts.is_old(name), ghosts.tensors[name], tensors[name])
        return tensors, deltas

    def _shared(
        self, context: Context, tensors: Tensors, axis: str, outgoing: Side, units: Tensor
    ) -> dict[str, Tensor]:
        """The tensors in which originals and their copies share what reads the originals."""
        result = dict(tensors)
        old = torch.unique(units)
        sharing, place = 1.0 + torch.bincount(units)[old], torch.searchsorted(old, units)
        generator = context.generator(f"{axis}, the noise of copies")
        for part in outgoing.parts:
            read = part.read(result[part.tensor], part.old[old])
            whole = read / sharing[:, None].to(read)
            drawn = torch.randn(len(units), read.shape[1], generator=generator).to(read)
            at = place.to(read.device)
            copies = whole[at] + self.noise * whole.square().mean(1, keepdim=True).sqrt()[at] * drawn
            rest = read.index_add(0, at, copies, alpha=-1)
            shared = part.written(result[part.tensor], copies)
            result[part.tensor] = replace(part, new=part.old[old]).written(shared, rest)
        return result


def _everywhere(side: Side) -> Side:
    """A side with the entries that belong to new units of other axes as well."""
    return Side(tuple(replace(part, others=(None,) * len(part.others)) for part in side.parts))


__all__ = ["Copied", "Originals"]
