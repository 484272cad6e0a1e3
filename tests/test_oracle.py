"""The removal oracle agrees with every prune of the small networks, and sees deliberate corruptions of the result."""

import copy
import random

import pytest
import torch
from effort import in_turn
from oracles import disturb
from torch import Tensor, nn
from zero_and_remove import TOLERANCE, RemovalOracle, corruptions, difference, emptied, held_outputs
from zoo_small import ZOO, Example

from espalier.attaching import attach
from espalier.graph.named_tensors import tensor_table
from espalier.graph.trees import map_tensors
from espalier.structure import Structure

CAUGHT = 0.99
"""The share of corruptions that have to be seen."""

WITHOUT_AXES = {"hard_coded_view"}
"""Networks in which nothing may change."""


def in_double(name: str) -> Example:
    model, x = ZOO[name]()
    model = model.double()
    x = map_tensors(x, lambda one: one.double() if one.is_floating_point() else one)
    disturb(model, x, seed=0)
    return model, x


def attached(name: str) -> Structure:
    return attach(*in_double(name))


def some_units(structure: Structure) -> dict[str, list[int]]:
    """About a third of the units of every axis that may shrink."""
    rng = random.Random(0)
    return {
        axis.name: sorted(rng.sample(range(axis.size), max(1, axis.size * 3 // 10)))
        for axis in structure.axes.values()
        if axis.prunable
    }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=in_turn(row))
        for row, name in enumerate([name for name in ZOO if name not in WITHOUT_AXES])
    ],
)
def test_every_axis_at_once_and_each_alone(name):
    structure = attached(name)
    units = some_units(structure)
    assert units
    for chosen in (units, *({axis: removed} for axis, removed in units.items())):
        oracle = RemovalOracle(structure, chosen)
        structure.prune(chosen)
        errors = oracle.errors(structure.model)
        assert max(errors.values()) <= TOLERANCE, (chosen, errors)
        structure.undo()


@pytest.mark.slow
def test_at_least_99_percent_of_corruptions_are_seen():
    caught, missed = 0, []
    for name in ZOO:
        structure = attached(name)
        units = some_units(structure)
        if not units:
            continue
        oracle = RemovalOracle(structure, units)
        structure.prune(units)
        assert oracle.error(structure.model) <= TOLERANCE, name
        model = copy.deepcopy(structure.model)
        tensors = tensor_table(model).tensors
        for tensor, dim in corruptions(structure):
            held = tensors[tensor].detach().clone()
            seen = [
                error_with(oracle, model, tensors[tensor], values) > TOLERANCE
                for values in (held.roll(1, dim), torch.randn_like(held))
            ]
            tensors[tensor].data.copy_(held)
            if seen[0]:
                caught += 1
            elif seen[1]:
                missed.append(f"{name}: {tensor}")  # not one that has no influence on the outputs at all
    assert caught > 200
    assert caught >= CAUGHT * (caught + len(missed)), missed


def error_with(oracle: RemovalOracle, model: nn.Module, tensor: Tensor, values: Tensor) -> float:
    """The oracle's verdict with other values in one tensor."""
    with torch.no_grad():
        tensor.copy_(values)
    return oracle.error(model)


class CentredByHand(nn.Module):
    """A LayerNorm in single operators: subtracting the mean fills the positions of removed units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x - x.mean(-1, keepdim=True)
        return self.second(x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt())


def test_positions_that_were_zero_before_are_not_empty_and_what_is_empty_stays_so():
    model, x = CentredByHand().double(), torch.randn(5, 4).double()
    structure = attach(model, x)
    oracle = RemovalOracle(structure, {"first": [1, 4]})
    structure.prune("first", [1, 4])
    assert oracle.error(structure.model) <= TOLERANCE
    structure.undo()
    structure.prune("first", [1, 3])
    assert oracle.error(structure.model) > 1e-3


def test_emptied_units_without_the_correction_of_norms_are_something_else():
    structure = attached("vit")
    units = {"patch_embed": [0, 5]}
    oracle = RemovalOracle(structure, units)
    plain = held_outputs(emptied(structure, units), structure.example, train=False)
    structure.prune(units)
    found = held_outputs(structure.model, structure.example, train=False)
    assert difference(found, plain) > 1e-3
    assert oracle.error(structure.model) <= TOLERANCE


def test_difference_sees_shapes_nans_and_infinities():
    one, infinite = torch.ones(2), torch.tensor([1.0, float("inf")])
    assert difference([one], [one.clone()]) == 0
    assert difference([one], [torch.ones(3)]) == float("inf")
    assert difference([one * float("nan")], [one]) == float("inf")
    assert difference([infinite], [infinite.clone()]) == 0
    assert difference([infinite], [one]) == float("inf")
    assert difference([one * 1.5], [one]) == pytest.approx(0.5)
