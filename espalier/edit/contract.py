"""What an edit promises about the network's function: exact, bounded or changing, and why.

Derived from what the operators do along the edited axes. Growing is exact if every reader of the new units sums over
them with weights of zero, and whatever else combines units is blind to them (`neutral`). Removing is exact if what the
removed units contribute is zero already. Constants that code computes from a size, such as the softmax scale
1/sqrt(head_dim), are held by parameters that take the change (`scales`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from espalier.edit.changes import Changes
from espalier.edit.neutral import PER_UNIT, WORDS, Invisible, invisible_growth, invisible_removal
from espalier.edit.norms import NormSite
from espalier.edit.scales import Constant, Scaled, UnheldError, held, size_scales
from espalier.edit.starts import Start
from espalier.graph.dims import size_of
from espalier.graph.topology import AxisRecord, Tap, Topology

_MOST_PROBLEMS = 4
"""As many are named in a contract."""


@dataclass(frozen=True)
class Contract:
    """The promise of an edit."""

    kind: str
    """``exact`` (outputs equal up to rounding), ``bounded`` or ``changing``."""
    why: str
    starts: Mapping[int, Mapping[tuple[str, int], tuple[Start, ...]]] = field(default_factory=dict)
    """Axis -> (tensor, dimension) -> how its new units start there, where their role alone does not say it."""
    norms: tuple[tuple[NormSite, float], ...] = ()
    """Norms that are compensated, and the ratio of old to new size of what each runs over."""
    scaled: tuple[Scaled, ...] = ()
    """Parts of parameters that hold a constant of the forward which follows a size."""
    unheld: str | None = None
    """A constant of the forward that follows a size and that nothing holds; None if there is none."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}"

    def starts_at(self, axis: int, tensor: str, dim: int) -> tuple[Start, ...]:
        """How new units of an axis start there, where something asked for it."""
        return self.starts.get(axis, {}).get((tensor, dim), ())

    def scale_for(self, name: str, topology: Topology, changes: Changes) -> Scale | None:
        """What the entries of a tensor are multiplied by, at the sizes of a topology."""
        if not self.norms and not self.scaled:
            return None
        factor, offset = torch.ones((), dtype=torch.float64), 0.0
        for site, ratio in {site.weight: (site, ratio) for site, ratio in self.norms}.values():
            if site.weight == name and ratio != 1.0:
                factor, offset = factor * ratio**0.5, site.offset * (ratio**0.5 - 1)
        for one in self.scaled:
            if one.tensor == name:
                factor = factor * one.factors(topology, frozenset(changes.axes))
        return None if bool((factor == 1.0).all()) else Scale(factor, offset)


@dataclass(frozen=True)
class Scale:
    """x becomes x * factor + offset, with a factor that broadcasts."""

    factor: Tensor
    offset: float


def contract_of(
    changes: Changes, tensors: Mapping[str, Tensor], constants: Sequence[Constant] = (), *, hold_norms: bool = True
) -> Contract:
    """The promise of a checked plan, from the roles along its axes and, for removals, from the weights.

    `constants` are the numbers of the forward that the edit changes; `hold_norms` as in a plan.
    """
    problems: list[str] = []
    starts: dict[int, Mapping[tuple[str, int], tuple[Start, ...]]] = {}
    sites: dict[NormSite, None] = {}
    pruned, grown, edited = changes.pruned(), changes.grown(), frozenset(changes.axes)
    for number in dict.fromkeys((*grown, *pruned)):
        record = changes.before.axes[number]
        if len(problems) >= _MOST_PROBLEMS and number not in grown and not _blocking(record):
            continue  # whatever its removal does, neither the promise nor a norm depends on it any more
        answers = []
        if number in grown:
            answers.append(_growth(changes, record, edited, tensors))
        if number in pruned:
            answers.append(_removal(changes, record, pruned[number], edited, tensors))
        words = [one for one in answers if isinstance(one, str)]
        problems += [f"{record.name} {one}" for one in words]
        if not words:
            for one in answers:
                assert isinstance(one, Invisible)
                starts.setdefault(number, one.starts)
                sites.update(dict.fromkeys(one.sites))
    scaled: tuple[Scaled, ...] = ()
    unheld: str | None = None
    try:
        scaled = held(changes, size_scales(changes, constants))
    except UnheldError as problem:
        unheld = str(problem)
        problems.append(unheld)
    norms = tuple((site, _ratio(site, changes)) for site in sites)
    if not hold_norms:
        problems += [
            f"the norm in {one.module or 'the model'} is over other units" for one, ratio in norms if ratio != 1
        ]
        norms = ()
    if problems:
        return Contract("changing", "; ".join(problems[:_MOST_PROBLEMS]), starts, norms, scaled, unheld)
    why = []
    outward = [number for number in grown if _is_output(changes.before.axes[number])]
    if len(outward) < len(grown):
        why.append("new units contribute nothing")
    if outward:
        why.append("the outputs that there were stay as they are")
    if norms:
        why.append("norms across them are compensated by scale and eps")
    if pruned:
        why.append("the removed units contributed nothing")
    if scaled:
        why.append("constants that follow the size are held by weights")
    return Contract("exact", ", ".join(why), starts, norms, scaled)


_NOTHING = Invisible({}, ())


def _ratio(site: NormSite, changes: Changes) -> float:
    before, after = 1.0, 1.0
    for dim in site.normal:
        before, after = before * size_of(dim, changes.before.sizes), after * size_of(dim, changes.after.sizes)
    return before / after


def _growth(
    changes: Changes, record: AxisRecord, edited: frozenset[int], tensors: Mapping[str, Tensor]
) -> Invisible | str:
    """What makes new units invisible, or why nothing does."""
    blocking = _blocking(record)
    if _is_unseen(changes, record):
        return _UNSEEN
    if _is_output(record):
        return _NOTHING if not blocking else f"{WORDS[blocking[0].role]} {blocking[0].where}"
    return invisible_growth(changes.before, record.number, edited, tensors) if blocking else _NOTHING


def _removal(
    changes: Changes, record: AxisRecord, units: np.ndarray, edited: frozenset[int], tensors: Mapping[str, Tensor]
) -> Invisible | str:
    if _is_unseen(changes, record):
        return _UNSEEN
    if _is_output(record):
        return "is an output of the model"
    found = invisible_removal(changes.before, record.number, units, edited, tensors)
    return found if isinstance(found, Invisible) else f"contributes: {found}"


_UNSEEN = "is not told from a single unit in what was recorded, so that its operators are not known"


def _is_unseen(changes: Changes, record: AxisRecord) -> bool:
    """Whether no recorded operator has the axis: it had one unit when the network was read anew."""
    return not any(record.number in one.flow.touching for one in changes.before.predictions)


def _blocking(record: AxisRecord) -> list[Tap]:
    return [tap for tap in record.taps if tap.role not in PER_UNIT]


def _is_output(record: AxisRecord) -> bool:
    return any(reason.kind == "output" for reason in record.reasons)
