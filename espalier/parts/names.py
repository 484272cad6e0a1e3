"""What became of names when layers came or went: those of layers that follow an inserted one change, for one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from espalier.record import Edit

Now = Mapping[str, str | None]
"""Name before -> name now, of those that changed; None for what is gone."""
V = TypeVar("V")


@dataclass(frozen=True)
class Names:
    """What one edit, in which layers came or went, did to names."""

    axes: Now
    tensors: Now
    """Parameters and buffers."""
    modules: Now

    @classmethod
    def of(cls, edit: Edit) -> Names:
        """What an edit did."""
        return cls(edit.renamed, edit.paths, edit.modules)


def carried(table: Mapping[str, V], now: Now) -> dict[str, V]:
    """What was kept by name, by the names of now; where two things have become one, what was kept of the first."""
    found: dict[str, V] = {}
    for name, value in table.items():
        new = now.get(name, name)
        if new is not None:
            found.setdefault(new, value)
    return found


def renamed(names: Iterable[str], now: Now) -> tuple[str, ...]:
    """The names of now, in the same order, of what is still there; each once."""
    return tuple(carried(dict.fromkeys(names), now))


__all__ = ["Names", "Now", "carried", "renamed"]
