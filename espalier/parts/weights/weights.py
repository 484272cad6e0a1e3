"""The parameters whose single weights a method may change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from espalier.errors import MethodError
from espalier.graph.named_tensors import tensor_table
from espalier.graph.topology import Topology
from espalier.parts.goal import WeightTensor
from espalier.structure import Structure

_READING = frozenset({"contract", "filter"})


def choose_weights(structure: Structure, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The parameters that a method may mask: those that were asked for, or all matrices and filters.

    Those are parameters of two dimensions and more that multiply activations, whatever module has them; biases, norms
    and position tables are not among them.

    Raises:
        MethodError: a name or pattern fits no such parameter.
    """
    table = tensor_table(structure.model).tensors
    roles = _roles(structure.topology)
    able = [name for name, tensor in table.items() if _is_matrix(tensor, roles.get(name, ()))]
    if asked is None:
        return tuple(able)
    for pattern in asked:
        if not structure.layers_moved and not any(fnmatchcase(name, pattern) for name in able):
            known = ", ".join(able[:6])
            raise MethodError(f"axes: no parameter of weights fits {pattern!r}; those there are: {known}.")
    return tuple(name for name in able if any(fnmatchcase(name, pattern) for pattern in asked))


def weight_tensors(structure: Structure, names: Iterable[str]) -> dict[str, WeightTensor]:
    """What of these parameters is live, and how they lie."""
    table, roles, found = tensor_table(structure.model).tensors, _roles(structure.topology), {}
    for name in names:
        live = structure.masks.get(name)
        if live is None:
            live = torch.ones(table[name].shape, dtype=torch.bool, device=table[name].device)
        found[name] = WeightTensor(live, *_dims(roles[name], live.dim()))
    return found


def weight_dims(topology: Topology, name: str) -> tuple[int, int]:
    """The dimensions of the units that a parameter makes and of those that it reads."""
    return _dims(_roles(topology)[name], len(topology.tensors[name]))


def _dims(roles: Iterable[tuple[int, str]], rank: int) -> tuple[int, int]:
    makes = [dim for dim, role in roles if role in ("produce", "filter")]
    reads = [dim for dim, role in roles if role == "contract"]
    rows = makes[0] if makes else next(dim for dim in range(rank) if dim not in reads)
    return rows, reads[0] if reads else rows


def _is_matrix(tensor: Tensor, roles: Iterable[tuple[int, str]]) -> bool:
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or tensor.dim() < 2:
        return False
    return any(role in _READING for _, role in roles)


def _roles(topology: Topology) -> dict[str, list[tuple[int, str]]]:
    """Tensor -> (dimension, role) of all that axes do in it."""
    found: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for record in topology.axes.values():
        for tensor, dim, role in record.slots:
            found[tensor].add((dim, role))
    return {tensor: sorted(one) for tensor, one in found.items()}


__all__ = ["choose_weights", "weight_dims", "weight_tensors"]
