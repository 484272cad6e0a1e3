"""What an edit promises about the network's function, in its shortest form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_ORDER = ("exact", "bounded", "changing")


@dataclass(frozen=True)
class Promise:
    """How close the outputs stay, and why."""

    kind: str
    """``exact`` (outputs equal up to rounding), ``bounded`` or ``changing``."""
    why: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}"


def weakest(promises: Iterable[Promise]) -> Promise:
    """The one that promises least; of several such the first."""
    return max(promises, key=lambda one: _ORDER.index(one.kind))


__all__ = ["Promise", "weakest"]
