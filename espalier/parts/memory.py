"""Memory: what a method keeps between steps, such as averages over batches or parameters of its own.

A method is a frozen value and keeps nothing. Where it has to remember, it names in `Method.memory` what makes a fresh
memory; the session holds one for each of its methods, shows it in `Context.memory`, and saves it with its own state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from espalier.graph.dims import IntArray
from espalier.parts.names import Names
from espalier.parts.score import Context


class Memory(Protocol):
    """What one method remembers in one session."""

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        """Called once for every edit, whoever made it, before anything else is asked of the memory.

        `units`: every axis that changed -> for each unit after the edit the old unit that it was; -1 for a new one. An
        edit that is undone is undone here too, through `state` and `restore`.
        """

    def rename(self, names: Names, /) -> None:
        """Called after `follow` for an edit in which layers came or went: axes, parameters and modules have other names
        since, and some are gone. What is new has no name before; the memory meets it later."""

    def after_step(self, context: Context, /) -> None:
        """Called after every optimizer step, before events."""

    def state(self) -> dict[str, Any]:
        """All of it as what JSON can hold, and tensors, which are saved beside it; nothing that later changes reach."""

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Become what `state` gave. Raises KeyError, TypeError or ValueError for anything else."""


__all__ = ["Memory"]
