"""Gates on random networks: every axis that may change has gates under which masked is removed, or says why not."""

import copy

import pytest
import torch
from effort import FACTOR
from grammar import network
from networks import build
from oracles import FixedDropout, FixedDropout2d
from torch import Tensor, nn

import espalier as esp
from espalier.edit.plan import Plan, Resize
from espalier.errors import EspalierError
from espalier.graph.trees import flatten_tensors
from espalier.parts.gates.places import Gates
from espalier.parts.gates.units import gate_problem, unit_place
from espalier.structure import Structure

SEEDS = 8 * FACTOR
_CHANCE = ("dropout", "bernoulli", "rand")
_NO_WEIGHTED_FORM = ("is reduced", "the var", "the std")
"""A median and a product are not evaluated over some of the units; calls that look alike are not told apart."""


def without(axis: str, size: int) -> Plan:
    return Plan((Resize(axis, tuple(range(0, size, 2))),), hold_norms=False)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [one for _, one in flatten_tensors(model(x), "output")]


def draws(model: nn.Module, structure: Structure) -> bool:
    if any(isinstance(one, (FixedDropout, FixedDropout2d)) for one in model.modules()):
        return True
    return any(word in call.name for one in structure.topology.predictions for call in one.calls for word in _CHANCE)


def check(model: nn.Module, x: Tensor) -> tuple[int, list[str]]:
    """How many axes have gates, and why others have none."""
    structure = esp.attach(model, x)
    modes = (False,) if draws(model, structure) else (False, True)
    count, refused = 0, []
    for axis in [one for one in structure.axes.values() if one.growable]:
        problem = gate_problem(structure, axis.name)
        if problem is None:
            count += 1
        elif not problem.startswith(_NO_WEIGHTED_FORM):
            with pytest.raises(EspalierError):  # then the axis could not lose units either
                structure.check(Plan((Resize(axis.name, (0,)),)))
        if problem is not None:
            refused.append(problem)
        if problem is not None or axis.size == 1:
            continue
        small = copy.deepcopy(model)
        try:
            esp.attach(small, x).apply(without(axis.name, axis.size))
        except EspalierError:
            continue  # one unit alone may be another program
        gates = Gates(structure, [unit_place(structure, axis.name)])
        z = torch.ones(axis.size)
        z[::2] = 0
        for training in modes:
            model.train(training)
            small.train(training)
            with gates.applied({axis.name: z}):
                found = outputs(model, x)
            for one, other in zip(found, outputs(small, x), strict=True):
                error = (one - other).abs().max() / other.abs().max().clamp_min(1e-30)
                assert float(error) < 1e-9, f"{axis.name} of\n{model!r}"
    return count, refused


@pytest.mark.parametrize("seed", range(SEEDS))
def test_masked_is_removed(seed):
    count, refused = check(*build(seed, 5))
    assert count
    assert refused == []


@pytest.mark.parametrize("seed", range(SEEDS))
def test_masked_is_removed_in_networks_as_people_write_them(seed):
    written = network(seed)
    count, refused = check(written.model, written.x)
    assert count or refused
