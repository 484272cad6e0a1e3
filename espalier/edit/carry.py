"""What is known of the axes of a network, carried over to its topology after layers came or went."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from espalier.edit.births import Births
from espalier.graph.dims import IntArray, labels
from espalier.graph.topology import AxisRecord, Topology


def same_axes(before: Topology, after: Topology, tensors: Mapping[str, str]) -> dict[str, str]:
    """Axis before -> axis after: the one that has its units where it had them, in a tensor that is still there.

    Two axes may have become one, where the layer between them went.
    """
    places: dict[tuple[str, int], list[AxisRecord]] = {}
    for record in after.axes.values():
        for tensor, dim, _ in record.slots:
            places.setdefault((tensor, dim), []).append(record)
    found: dict[str, str] = {}
    for old in before.axes.values():
        for tensor, dim, _ in old.slots:
            if tensor not in tensors:
                continue
            where = labels(before.tensors[tensor][dim], before.sizes, old.number)
            name = _with_units(after, places.get((tensors[tensor], dim), []), tensors[tensor], dim, where)
            if name is not None:
                found[old.name] = name
                break
    return found


def _with_units(after: Topology, records: list[AxisRecord], tensor: str, dim: int, where: IntArray) -> str | None:
    for record in records:
        if np.array_equal(labels(after.tensors[tensor][dim], after.sizes, record.number), where):
            return record.name
    return None


def kept(before: Topology, after: Topology, axes: Mapping[str, str]) -> Topology:
    """The topology after with what the user asked to be kept as it is."""
    reasons = {}
    for old, new in axes.items():
        for reason in before.by_name[old].reasons:
            if reason.kind == "keep" and reason not in after.by_name[new].reasons:
                reasons[after.by_name[new].number] = reason
    return after.frozen(reasons)


def with_births(known: Births, after: Topology, axes: Mapping[str, str], now: int) -> Births:
    """When every unit came; units of axes that are new came now."""
    found = {record.name: np.full(after.sizes[number], now, np.int64) for number, record in after.axes.items()}
    for old, new in reversed([*axes.items()]):
        found[new] = known[old]
    return found


__all__ = ["kept", "same_axes", "with_births"]
