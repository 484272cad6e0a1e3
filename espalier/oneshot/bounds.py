"""Which sizes a network may be given: the user's exclusions and limits, and the part of every axis that stays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from espalier.attaching import LimitLike, attach, attached
from espalier.edit.changes import Limits
from espalier.errors import PlanError
from espalier.structure import Structure


@dataclass(frozen=True)
class Bounds:
    """The user's exclusions and limits, and the part of every axis that stays."""

    keep: tuple[str, ...]
    limits: Mapping[str, LimitLike]
    min_fraction: float

    def attached(self, net: nn.Module, example: Any) -> Structure:
        """The structure of a network that nothing was removed from yet."""
        given = attach(net, example, keep=self.keep, limits=self.limits)
        return attached(net, example, given.topology, optimizer=None, keep=(), limits=self._tightened(given), follow=())

    def _tightened(self, given: Structure) -> dict[str, Limits]:
        found = {}
        for name, size in given.initial_sizes.items():
            own = given.limits.get(name, Limits())
            least = max(own.at_least or 1, math.ceil(self.min_fraction * size))
            try:
                found[name] = replace(own, at_least=least)
            except PlanError:  # the user's bounds leave less: they hold
                found[name] = own
        return found


__all__ = ["Bounds"]
