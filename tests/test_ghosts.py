"""Ghost units: the grown network run without growing it, against the grown network itself."""

from functools import partial

import pytest
import torch
from oracles import disturb
from small_cases import CASES
from snapshots import differences, snapshot
from torch import Tensor, nn

from espalier import attach
from espalier.edit.plan import Plan, Resize
from espalier.parts.ghosts.ghosts import Ghosts
from espalier.parts.score import Context
from espalier.structure import Structure

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
BY = 2


def first(found) -> Tensor:
    if isinstance(found, Tensor):
        return found
    return sum(first(one).square().mean() for one in (found.values() if isinstance(found, dict) else found))


def loss(model: nn.Module, batch) -> Tensor:
    return first(model(*batch)).square().mean()


def context(structure: Structure, batch) -> Context:
    axes = tuple(structure.axes)
    return Context(structure, axes, 0, 0, 0.0, 1, partial(loss, structure.model), batch, ())


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].integers])
def test_ghosts_compute_what_the_grown_network_would(name):
    case = CASES[name]
    model, example = case.model(), case.example()
    disturb(model, example, seed=0)
    model.train()
    structure = attach(model, example)
    for axis in [one.name for one in structure.axes.values() if one.growable]:
        before = snapshot(structure.model)
        ghosts = Ghosts(context(structure, example), {axis: BY})
        tensors, sides = ghosts.tensors, ghosts.sides[axis]
        for side in (sides.incoming, sides.outgoing):
            if side.parts:
                drawn = torch.randn(side.read(tensors).shape, generator=torch.Generator().manual_seed(0))
                tensors = side.write(tensors, drawn)
                assert torch.equal(side.read(tensors), drawn.double())
                assert torch.equal(side.read_old(tensors), side.read_old(ghosts.tensors))
        named = [name for name in tensors if name in structure.topology.parameters]
        found = ghosts.gradients(tensors, example, named)
        assert differences(before, snapshot(structure.model)) == []

        grown = case.model().train()
        grown.load_state_dict(model.state_dict())
        other = attach(grown, example)
        other.apply(Plan((Resize(axis, add=BY),), values=tensors))
        grown.train()
        torch.manual_seed(1)
        value = loss(grown, example)
        torch.testing.assert_close(ghosts.loss(tensors, example).detach(), value.detach(), rtol=1e-12, atol=0)
        if value.requires_grad:
            value.backward()
        for one in named:
            if not grown.get_parameter(one).requires_grad:
                continue  # ghosts are asked for gradients of frozen weights as well
            grad = grown.get_parameter(one).grad
            torch.testing.assert_close(found[one], torch.zeros_like(found[one]) if grad is None else grad)


def test_several_axes_at_once_leave_what_is_new_to_both_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    structure = attach(model, x)
    ghosts = Ghosts(context(structure, (x,)), {"0": 2, "2": 3})
    first, second = ghosts.sides["0"], ghosts.sides["2"]
    assert first.outgoing.read(ghosts.tensors).shape == (2, 6)
    assert second.incoming.read(ghosts.tensors).shape == (3, 5)
    written = second.incoming.write(ghosts.tensors, torch.ones(3, 5))
    assert torch.equal(written["2.weight"][6:, 5:], ghosts.tensors["2.weight"][6:, 5:])
    assert bool((written["2.weight"][6:, :5] == 1).all())
