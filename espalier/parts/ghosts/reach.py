"""Axes between linear layers or convolutions, and what reaches a new unit of theirs through the weights that read it.

What lies between is taken for the identity (activations, norms) or for means over windows (pooling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.named_tensors import tensor_table
from espalier.graph.topology import Topology
from espalier.measure.stats import without_a_trace
from espalier.parts.ghosts.ghosts import INCOMING, OUTGOING
from espalier.parts.ghosts.products import Product, Watched
from espalier.parts.score import Context, seed_random_numbers

_POOLS: Mapping[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


@dataclass(frozen=True)
class Between:
    """An axis between the weights that make its units and those that read them."""

    maker: str
    readers: tuple[str, ...]
    places: tuple[int, ...]
    """How many inputs of each reader belong to one unit: as many as there are positions, where they are flattened."""


def between(topology: Topology, axis: str) -> Between | str:
    """The weights around an axis, or why they are not of a kind that can be looked at."""
    record = topology.by_name[axis]
    makers = [(name, dim, role) for name, dim, role in record.slots if role in INCOMING]
    readers = [(name, dim, role) for name, dim, role in record.slots if role in OUTGOING]
    if len(makers) != 1 or makers[0][1:] != (0, "produce"):
        return f"{len(makers)} weights make its units together" if len(makers) > 1 else "no weights make its units"
    if not readers or any(dim != 1 for _, dim, _ in readers):
        return "it is not read by the columns of weights"
    at = [topology.slot(record.number, *slot).positions[0] for slot in (*makers, *readers)]
    if len(at[0]) > 1:
        return "each of its units is several outputs of the weights that make it"
    return Between(makers[0][0], tuple(name for name, _, _ in readers), tuple(map(len, at[1:])))


def tried(context: Context, axes: Mapping[str, Between], batch: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Axes whose weights are not used as they would have to be on this batch, and why; weights -> their biases."""
    table = tensor_table(context.structure.model).names
    products, _, problems = _run(context, axes, batch)
    biases = {name: one.bias for name, one in products.items()}
    return problems, {name: table[id(one)] for name, one in biases.items() if one is not None and id(one) in table}


def looked_at(
    context: Context, axes: Mapping[str, Between], batch: Any
) -> tuple[dict[str, Product], dict[str, Tensor]]:
    """The products with the weights around axes, as the network trains, and dL/dz for the outputs of the readers.

    Raises:
        MethodError: some weights are not used as they have to be.
    """
    products, gradients, problems = _run(context, axes, batch)
    if problems:
        axis, why = next(iter(problems.items()))
        raise MethodError(f"{axis} cannot be looked at on all batches: {why}; leave it out of axes=[...].")
    return products, gradients


def _run(
    context: Context, axes: Mapping[str, Between], batch: Any
) -> tuple[dict[str, Product], dict[str, Tensor], dict[str, str]]:
    model = context.structure.model
    table = tensor_table(model).tensors
    readers = tuple(dict.fromkeys(name for one in axes.values() for name in one.readers))
    watched = Watched({name: table[name] for name in (*readers, *(one.maker for one in axes.values()))})
    with without_a_trace(model), torch.enable_grad():
        seed_random_numbers(context.seed)
        with watched:
            loss = context.loss(batch)
        outputs = {name: watched.found[name][0].output for name in readers if watched.found[name]}
        outputs = {name: output for name, output in outputs.items() if output.requires_grad}
        found = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True) if outputs else ()
    gradients = {name: one for name, one in zip(outputs, found, strict=True) if one is not None}
    known = {id(tensor) for tensor in table.values()}
    problems = {axis: _problem(one, watched, gradients, known) for axis, one in axes.items()}
    products = {name: one[0] for name, one in watched.found.items() if one}
    return products, gradients, {axis: why for axis, why in problems.items() if why is not None}


def _problem(one: Between, watched: Watched, gradients: Mapping[str, Tensor], known: Collection[int]) -> str | None:
    """Why the products around an axis cannot be looked at; None if they can."""
    for name in (one.maker, *one.readers):
        found = watched.only(name)
        if isinstance(found, str):
            return found
        if name in one.readers and name not in gradients:
            return f"the loss does not depend on what {name} makes"
        if found.bias is not None and id(found.bias) not in known:
            return f"the bias that goes with {name} is no parameter"
    maker = watched.found[one.maker][0]
    for name, places in zip(one.readers, one.places, strict=True):
        reader = watched.found[name][0]
        if reader.samples != maker.samples:
            return f"{name} is given {reader.samples} samples where {one.maker} has {maker.samples}"
        if _grid(maker, reader, places) is None:
            return f"what lies between {one.maker} and {name} is not known to be a mean over windows"
    return None


def crossed(maker: Product, reader: Product, places: int, rows: Tensor, left: Tensor) -> Tensor:
    """Sum of left x' over what the maker is given, x: one row per entry of the weights that read a unit.

    Args:
        maker: the product that makes the units.
        reader: one that reads them.
        places: how many of the reader's inputs belong to one unit.
        rows: x, as the maker gives it.
        left: of the shape of the reader's outputs.
    """
    grid = _grid(maker, reader, places)
    assert grid is not None
    given = rows.reshape(maker.samples, *maker.positions, -1)
    if grid != maker.positions:
        given = _POOLS[len(grid)](given.movedim(-1, 1), grid).movedim(1, -1)
    if places > 1:  # an entry reads one position only
        return torch.einsum("no,npd->pod", left, given.flatten(1, -2)).flatten(0, 1)
    return reader.crossed(left, given.movedim(-1, 1) if reader.is_convolution else given)


def _grid(maker: Product, reader: Product, places: int) -> tuple[int, ...] | None:
    """The positions at which the reader sees a unit, laid out like those at which it is made; None if unclear."""
    made = maker.positions
    seen = tuple(reader.inputs.shape[2:] if reader.is_convolution else reader.inputs.shape[1:-1])
    if seen == made and places == 1:
        return seen
    if len(made) not in _POOLS or (seen and places > 1):
        return None
    if not seen:
        seen = _factors(places, made) or ()
    fits = len(seen) == len(made) and all(one <= other for one, other in zip(seen, made, strict=True))
    return seen if fits else None


def _factors(count: int, sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The number as a product of sizes in about the same proportions, none of them larger."""
    choices = [[one for one in range(1, size + 1) if count % one == 0] for size in sizes]
    found = [one for one in product(*choices) if math.prod(one) == count]

    def unevenness(one: tuple[int, ...]) -> float:
        ratios = [math.log(part / size) for part, size in zip(one, sizes, strict=True)]
        return max(ratios) - min(ratios)

    return min(found, key=unevenness, default=None)


__all__ = ["Between", "between", "crossed", "looked_at", "tried"]
