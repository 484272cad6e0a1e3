"""One budget for widths and depth: the choice between a wider axis and a new layer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from test_method_contracts import TOTAL, Training, asking, drawn_plan, once, same_plan, same_tensors
from torch import Tensor, nn

import espalier as esp
from espalier.method import Entry, methods

pytestmark = pytest.mark.filterwarnings("ignore::espalier.errors.EspalierWarning")
NETWORKS = ["blocks", "resnet", "vit"]


def entry() -> Entry:
    return next(one for one in methods("grow", "layers") if one.method.name == "wider-or-deeper")


def trained(model: nn.Module, inputs: Tensor, targets: Tensor, steps: int = 400) -> esp.Session:
    """A network at its best, at which the method then chooses once."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    structure = esp.attach(model, inputs, optimizer=optimizer)
    at = esp.steps(steps)
    method = esp.grow.WiderOrDeeper(every=at, start=at, until=at, budget=esp.Parameters(10_000))

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (net(batch[0]) - batch[1]).square().mean()

    session = esp.Session(structure, [method], loss=loss, total_steps=steps)
    for _ in range(steps):
        error = session.loss((inputs, targets))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        session.step()
    return session


def test_a_bottleneck_is_made_wider() -> None:
    """Ten numbers have to pass through one: no layer behind it knows the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 1), nn.Linear(1, 10), nn.Linear(10, 10))
    inputs = torch.randn(256, 10)
    (event,) = trained(model, inputs, inputs).events
    assert event.sizes == {"0": (1, 2)}
    assert not event.layers


def test_a_linear_network_gets_a_layer_with_an_activation() -> None:
    """Widths help nothing where all is linear and wide enough: at its best, new units get no gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 4))
    inputs = torch.randn(256, 4)
    (event,) = trained(model, inputs, inputs.abs()).events
    assert not event.sizes
    assert len(event.layers) == 1
    assert event.contract == "exact"


@pytest.mark.parametrize("name", NETWORKS)
def test_proposals_repeat(name: str) -> None:
    method = once(entry())
    run = Training(name, asking(method)).train(2)
    context, goal = run.asked()
    plan, _ = drawn_plan(method, context, goal)
    assert len(plan.edits) + len(plan.depth) == 1
    run.structure.check(plan)
    again, _ = drawn_plan(method, context, goal)
    assert same_plan(plan, again)
    assert plan.depth == again.depth
    other, _ = drawn_plan(method, dataclasses.replace(context, seed=context.seed + 1), goal)
    assert other.seed == context.seed + 1


@pytest.mark.parametrize("kind", [esp.Parameters, esp.FLOPs])
@pytest.mark.parametrize("name", NETWORKS)
def test_its_budget_is_kept(name: str, kind: type[esp.Parameters]) -> None:
    budget = kind(1.3, of="initial")
    run = Training(name, entry().make(every=esp.steps(1), start=0.0, until=1.0, budget=budget))
    key = "parameters" if kind is esp.Parameters else "flops"
    before = getattr(run.structure.cost(), key)
    run.train(TOTAL)
    assert run.session.events
    assert all(getattr(event.cost_after, key) <= 1.3 * before for event in run.session.events)
    assert {event.contract for event in run.session.events} == {"exact"}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_that_is_interrupted_goes_on_to_the_same_weights(name: str, tmp_path: Path) -> None:
    method = entry().make(every=esp.steps(4), start=0.0, until=1.0)
    through = Training(name, method, seed=3).train(5)
    esp.save(through.structure, tmp_path)
    state, noise = json.dumps(through.session.state_dict()), torch.get_rng_state()
    through.train(TOTAL - 5)
    rest = Training(name, method, seed=3, kept=tmp_path)
    rest.session.load_state_dict(json.loads(state))
    torch.set_rng_state(noise)
    rest.train(TOTAL - 5)
    assert len(through.session.events) == 2
    assert [str(event) for event in through.session.events] == [str(event) for event in rest.session.events]
    assert same_tensors(through.structure.model.state_dict(), rest.structure.model.state_dict())
