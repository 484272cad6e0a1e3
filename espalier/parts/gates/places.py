"""Where gates act in a live network: every place of them is multiplied by a number of its own, most often 0 or 1.

A gate acts on tensors of the network, never in its code: while the loss is evaluated, tensors are replaced by their
products with the gates, and are themselves again afterwards. What a place is (a unit of an axis, a column of one
reader, a weight, a branch) only says which tensors it multiplies, and how its gates are spread over each of them:

    units       espalier.parts.gates.units
    columns     espalier.parts.gates.columns

Gradients reach tensors and gates through the product.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from espalier.errors import MethodError
from espalier.graph.named_tensors import TensorTable, tensor_table
from espalier.graph.topology import Topology
from espalier.parts.gates.left_out import left_out
from espalier.parts.gates.norms import Mark, NormGate, norm_modules
from espalier.parts.gates.rows import joined, parted
from espalier.structure import Structure


class Spread(Protocol):
    """How the gates of a place multiply one tensor; `espalier.parts.units.scales.Place` is one."""

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
    norms: tuple[NormGate, ...] = ()
    """The norms and means whose statistics leave out what the gates shut."""
    plain: bool = False
    """Whether these are units of an axis that are only read with weights, each by itself: nothing that is computed
    from others knows how many there are."""


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
        self.plain: frozenset[str] = frozenset()
        """The keys of places that are plain, and of whose axes no norm knows that leaves units out."""
        self._model = structure.model
        self._table = tensor_table(structure.model)
        self._norms: dict[Mark, list[tuple[str, NormGate]]] = {}
        self._multiplied: dict[str, list[tuple[str, Spread]]] = {}
        for place in places:
            self.sizes[place.key] = place.count
            for one in place.multiplied:
                self._multiplied.setdefault(one.tensor, []).append((place.key, one))
            for norm in place.norms:
                self._norms.setdefault(norm.mark, []).append((place.key, norm))
            self.plain |= {place.key} if place.plain else set()
        self.plain -= {axis for norms in self._norms.values() for _, norm in norms for axis in norm.over}
        self._watched = norm_modules(structure.topology) if self._norms else frozenset()
        self._checked = False

    @contextmanager
    def applied(self, gates: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the body with the network multiplied by these numbers, one per gate of every named key; others by 1.

        What is multiplied is what stands in the modules then. Gates of 1 everywhere, or of no key, leave the network as
        it is, to the last bit.

        Raises:
            MethodError: a tensor has another shape than when this was made; a norm that is to leave units out was not
                seen to run; or the network runs parts of itself again in backward, when gates act no more.
        """
        held: list[tuple[dict[str, Any], str, Any]] = []
        moved = {key: z for key, z in gates.items() if z.requires_grad or not bool((z == 1).all())}
        try:
            tensors = self._gated(moved)
            _put(held, self._table, tensors)
            with self._left_out(moved, tensors), self._run_once(tensors):
                yield
        finally:
            for store, key, before in reversed(held):
                store[key] = before

    def factors(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What every tensor that these gates multiply is multiplied by, broadcasting to its shape."""
        found: dict[str, Tensor] = {}
        for name, spreads in self._multiplied.items():
            tensor = self._table.tensors[name]
            for key, one in spreads:
                if key in gates:
                    factor = one.spread(gates[key].to(tensor), tensor.shape)
                    found[name] = factor if name not in found else found[name] * factor
        return found

    def counting(self, key: str) -> bool:
        """Whether the statistics of a norm or a mean leave out what the gates of this key shut."""
        return any(key == other for norms in self._norms.values() for other, _ in norms)

    def _gated(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that gates change, multiplied by them."""
        found: dict[str, Tensor] = {}
        brought: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for name, spreads in self._multiplied.items():
            acting = [(key, one) for key, one in spreads if key in gates]
            if acting:
                tensor = self._present(name)
                at = tensor.device, tensor.dtype
                if at not in brought:  # all at once: every copy to a device costs a call
                    brought[at] = parted(joined(gates).to(tensor), gates)
                for key, one in acting:
                    tensor = tensor * one.spread(brought[at][key], tensor.shape)
                found[name] = tensor
        return found

    @contextmanager
    def _run_once(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Refuses checkpoints of activations: looked for in the first run that may have gradients."""
        if self._checked or not tensors or not torch.is_grad_enabled():
            yield
            return
        names = {*tensors, *(mark.name for mark in self._norms if mark.form is None)}
        modules = {place[0]: None for name in names for place in self._table.places[name]}
        modules |= {self._model.get_submodule(mark.name): None for mark in self._norms if mark.form is not None}
        hooks = [module.register_forward_pre_hook(_not_checkpointed) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._checked = True

    def _present(self, name: str) -> Tensor:
        """What stands for a tensor now: others put copies there whose gradients they want."""
        module, key, is_parameter = self._table.places[name][0]
        found: Tensor = (module._parameters if is_parameter else module._buffers)[key]  # type: ignore[assignment]
        if found.shape != self._table.tensors[name].shape:
            raise MethodError(
                f"{name} should have shape {tuple(self._table.tensors[name].shape)}, but has {tuple(found.shape)} "
                "while gates act: another method tries new units out, as gradmax and firefly do. Let it do so before "
                "the search of the gates, or after."
            )
        return found

    def _left_out(self, gates: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Makes the norms leave out what gates shut; the scales of some may be multiplied themselves."""
        factors: dict[Mark, Tensor] = {}
        scales: dict[int, Mark] = {}
        for mark, norms in self._norms.items():
            for key, norm in norms:
                if key in gates:
                    factor = norm.factor(gates[key])
                    factors[mark] = factors[mark] * factor if mark in factors else factor
            if mark in factors and mark.form is None:
                scales[id(tensors[mark.name] if mark.name in tensors else self._present(mark.name))] = mark
        if not factors:
            return nullcontext()
        norms_of = [norm for mark in factors for _, norm in self._norms[mark]]
        return left_out(self._model, self._watched, factors, scales, norms_of)


def _not_checkpointed(module: nn.Module, inputs: object) -> None:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename == checkpoint.__file__:
            raise MethodError(
                f"a {type(module).__name__} runs again in backward (torch.utils.checkpoint), when gates act no more; "
                "turn checkpoints of activations off while gates are trained."
            )


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
    for module in recurrent:  # they keep their weights in a second place, and look whether they are still the same
        weights = [module._parameters.get(key) for key in module._flat_weights_names]
        refs = [None if one is None else weakref.ref(one) for one in weights]
        for key, value in (("_flat_weights", weights), ("_flat_weight_refs", refs)):
            held.append((module.__dict__, key, module.__dict__[key]))
            module.__dict__[key] = value


__all__ = ["GatePlace", "Gates", "Spread"]
