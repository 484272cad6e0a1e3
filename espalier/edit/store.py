"""Where the entries of a network's tensors are, and how an edit gets at them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from espalier.edit.apply import Ready, commit
from espalier.edit.journal import Journal
from espalier.edit.plan import Plan
from espalier.graph.named_tensors import TensorTable


class Store(Protocol):
    """Gives an edit the entries of tensors, and has them replaced."""

    def check(self, plan: Plan) -> None:
        """Raise PlanError for a plan of a kind that cannot be carried out here."""

    def values(self, table: TensorTable) -> Mapping[str, Tensor]:
        """The tensors of a table with their entries."""

    def commit(self, journal: Journal, ready: Ready) -> None:
        """See `espalier.edit.apply.commit`."""


class Here:
    """In the tensors themselves."""

    def check(self, plan: Plan) -> None:
        """Every plan can be carried out."""

    def values(self, table: TensorTable) -> Mapping[str, Tensor]:
        """The tensors."""
        return table.tensors

    commit = staticmethod(commit)


__all__ = ["Here", "Store"]
