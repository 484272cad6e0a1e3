"""Gates on entries of parameters, single weights or whole columns: which there are, and what becomes of them.

What such a gate shuts never leaves the network: it is masked. A masked entry, whoever masked it, has its gate shut for
good, so that the penalty does not count it; when the mask goes the gate begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from espalier.graph.dims import IntArray
from espalier.graph.named_tensors import tensor_table
from espalier.graph.topology import Topology
from espalier.parts.gates.places import GatePlace
from espalier.parts.gates.table import SHUT, GateTable
from espalier.parts.gates.trail import Trail, Units
from espalier.parts.names import Names, carried
from espalier.structure import Structure


class Entries(Protocol):
    """The entries of a parameter that have gates together: `Weights` or `Columns`."""

    @property
    def key(self) -> str:
        """The name of their gates."""

    @property
    def tensor(self) -> str:
        """The parameter, by its first name."""

    def spread(self, values: Tensor, shape: Sequence[int], /) -> Tensor:
        """As `espalier.parts.gates.places.Spread`."""

    def count(self, shape: Sequence[int], /) -> int:
        """How many gates a parameter of that shape has."""

    def shut(self, shape: Sequence[int], gone: Iterable[int]) -> Tensor:
        """Of booleans, of the tensor's shape: what these gates, shut, hold at zero."""

    def followed(self, topology: Topology, units: Units) -> IntArray | None:
        """The gate before an edit of each one after it, -1 for a new one; None if nothing changes."""


Of = Callable[[str], Entries]
"""The entries that a key means."""


class EntryGates:
    """The gates on entries in one session, in a table that may hold others as well."""

    def __init__(self, table: GateTable, of: Of) -> None:
        self._table, self._of = table, of
        self.known: dict[str, Entries] = {}
        """Key -> what it means."""
        self._trail = Trail()

    def meet(self, structure: Structure, keys: Iterable[str], first: Callable[[str, int], Tensor]) -> None:
        """Follow all edits, take in keys that are not known yet, and what is masked.

        Args:
            structure: of the live network.
            keys: those that are to have gates.
            first: key and count -> logits of gates that begin.
        """
        for before, units in self._trail.walked(structure.topology):
            for key, one in self.known.items():
                origins = one.followed(before, units)
                if origins is not None:
                    self._table.follow(key, torch.from_numpy(origins), first(key, len(origins)))
        tensors = tensor_table(structure.model).tensors
        for key in keys:
            if key not in self.known:
                self.known[key] = self._of(key)
                one = self.known[key]
                self._table.add(key, first(key, one.count(tensors[one.tensor].shape)))
        for key, one in self.known.items():
            self._sync(key, one, tensors[one.tensor].shape, structure.masks.get(one.tensor), first)

    def places(self, structure: Structure) -> list[GatePlace]:
        """Where they act."""
        tensors = tensor_table(structure.model).tensors
        return [GatePlace(key, one.count(tensors[one.tensor].shape), (one,)) for key, one in self.known.items()]

    def shut(self, structure: Structure, ready: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        """Parameter -> what of it is to be held at zero, of its shape: what gates shut, all but one of every key.

        Args:
            structure: of the live network.
            ready: key -> which gates have been shut for long enough.
            progress: fraction of the training that is done.
        """
        tensors, found = tensor_table(structure.model).tensors, dict[str, Tensor]()
        probabilities = self._table.probabilities(progress)
        for key, one in self.known.items():
            gone = ready[key].clone()
            if bool(gone.all()):
                gone[int(probabilities[key].argmax())] = False
            if bool(gone.any()):
                closed = one.shut(tensors[one.tensor].shape, gone.nonzero().flatten().tolist())
                found[one.tensor] = found.get(one.tensor, torch.zeros_like(closed)) | closed
        return found

    def clear(self) -> None:
        """There are no gates any more."""
        self._table.rename(dict.fromkeys(self.known))
        self.known = {}

    def note(self, units: Units) -> None:
        """An edit was made."""
        self._trail.note(units)

    def rename(self, names: Names) -> None:
        """Gates stay with their parameters, or begin anew where nobody knows what became of these."""
        now = {key: self._renamed(key, one, names) for key, one in self.known.items()}
        if not self._trail.rename(names):
            now = dict.fromkeys(now)
        self._table.rename(now)
        self.known = {key: self._of(key) for key in carried(self.known, now)}

    def state(self) -> dict[str, Any]:
        """All of it as JSON, without the table."""
        return {"known": list(self.known), "trail": self._trail.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` gave."""
        self.known = {str(key): self._of(str(key)) for key in state["known"]}
        self._trail = Trail()
        self._trail.restore(state["trail"])

    def _renamed(self, key: str, one: Entries, names: Names) -> str | None:
        tensor = names.tensors.get(one.tensor, one.tensor)
        return None if tensor is None else tensor + key.removeprefix(one.tensor)

    def _sync(
        self, key: str, one: Entries, shape: Sequence[int], live: Tensor | None, first: Callable[[str, int], Tensor]
    ) -> None:
        """Shut the gates of what is masked, and open those that were shut for good and are not."""
        logits = self._table.logits[key]
        held = torch.zeros(len(logits), dtype=torch.bool)
        if live is not None:
            gates = one.spread(torch.arange(len(logits)), shape).expand(tuple(shape))
            held = torch.ones_like(held).index_fill_(0, gates[live.cpu()], False)
        opened = (logits == SHUT) & ~held
        if bool(opened.any()):
            self._table.follow(key, torch.where(opened, -1, torch.arange(len(logits))), first(key, len(logits)))
        if bool(held.any()):
            self._table.logits[key] = torch.where(held, SHUT, self._table.logits[key])


__all__ = ["Entries", "EntryGates", "Of"]
