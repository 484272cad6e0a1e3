"""Where gates act in a live network: every place of them is multiplied by a number of its own, most often 0 or 1.

A gate acts on tensors of the network, never in its code: while the loss is evaluated, tensors are replaced by their
products with the gates, and are themselves again afterwards. What a place is (a unit of an axis, a column of one
reader, a weight, a branch) only says which tensors it multiplies, and how its gates are spread over each of them:

    units       espalier.parts.gates.units
    columns     espalier.parts.gates.columns

Gradients reach tensors and gates through the product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from espalier.graph.capture import TensorTable, tensor_table
from espalier.graph.topology import Topology
from espalier.structure import Structure


class Spread(Protocol):
    """How the gates of a place multiply one tensor; `espalier.parts.scales.Place` is one."""

    @property
    def tensor(self) -> str:
        """Name of a parameter or buffer."""

    def spread(self, values: Tensor, shape: Sequence[int], /) -> Tensor:
        """What the tensor, of this shape, is multiplied by: broadcasts to the shape, 1 where no gate acts.

        `values` are the gates, shape (gates,), in the tensor's type and on its device.
        """


@dataclass(frozen=True, eq=False)
class GatePlace:
    """Some gates that have a name together, and what they do. Valid for the topology that it was made from."""

    key: str
    """The name by which logits, probabilities and samples are kept."""
    count: int
    """Number of gates."""
    multiplied: tuple[Spread, ...]
    """The tensors that the gates multiply."""


class Gates:
    """The gates of some places in a network as it is; to be made anew after every edit.

    Args:
        structure: of the live network.
        places: where gates act.
    """

    def __init__(self, structure: Structure, places: Iterable[GatePlace]) -> None:
        self.topology: Topology = structure.topology
        self.sizes: dict[str, int] = {}
        """Key -> number of its gates."""
        self._table = tensor_table(structure.model)
        self._multiplied: dict[str, list[tuple[str, Spread]]] = {}
        for place in places:
            self.sizes[place.key] = place.count
            for one in place.multiplied:
                self._multiplied.setdefault(one.tensor, []).append((place.key, one))

    @contextmanager
    def applied(self, gates: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the body with the network multiplied by these numbers, one per gate of every named key; others by 1.

        Gates of 1 everywhere, or of no key, leave the network as it is, to the last bit.
        """
        held: list[tuple[dict[str, Any], str, Any]] = []
        try:
            _put(held, self._table, self._gated(gates))
            yield
        finally:
            for store, key, before in reversed(held):
                store[key] = before

    def _gated(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that gates change, multiplied by them."""
        moved = {key for key, z in gates.items() if z.requires_grad or not bool((z == 1).all())}
        found: dict[str, Tensor] = {}
        for name, spreads in self._multiplied.items():
            tensor = before = self._table.tensors[name]
            for key, one in spreads:
                if key in moved:
                    tensor = tensor * one.spread(gates[key].to(tensor), tensor.shape)
            if tensor is not before:
                found[name] = tensor
        return found


def _put(held: list[tuple[dict[str, Any], str, Any]], table: TensorTable, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors where modules look for them, and note what was there."""
    recurrent: dict[nn.RNNBase, None] = {}
    for name, tensor in tensors.items():
        for module, key, is_parameter in table.places[name]:
            store: dict[str, Any] = module._parameters if is_parameter else module._buffers
            held.append((store, key, store[key]))
            store[key] = tensor
            if isinstance(module, nn.RNNBase):
                recurrent[module] = None
    for module in recurrent:  # they keep their weights in a second place
        held.append((module.__dict__, "_flat_weights", module._flat_weights))
        module.__dict__["_flat_weights"] = [module._parameters.get(key) for key in module._flat_weights_names]


__all__ = ["GatePlace", "Gates", "Spread"]
