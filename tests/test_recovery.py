"""What follows an event: new units that learn at rates of their own, statistics taken anew, events that are undone."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from loops import Run, loss_of, start
from snapshots import differences, snapshot
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from zoo_small import ZOO

import espalier as esp
from espalier.edit.young import Youth
from espalier.errors import EspalierWarning, MethodError
from espalier.method import Method
from espalier.parts.goal import Scores, Selection
from espalier.parts.init import Beginning
from espalier.parts.score import Context
from espalier.train.events import Event

Make = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1),
    "momentum": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: Adam(parameters, lr=0.01),
}


class Random(nn.Module):
    """Two layers of random weights; the second is read by nothing that is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Normal:
    """New units that start from random weights on both sides."""

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Beginning:
        draw = context.generator("start")
        shapes = {"first.weight": (8, 4), "last.weight": (2, 8)}
        return Beginning({name: torch.randn(shape, generator=draw) for name, shape in shapes.items()})


def grower(recovery: esp.Recovery, **more: Any) -> Method:
    method = esp.grow.Random(
        amount=0.3, every=esp.steps(100), start=esp.steps(2), until=1.0, axes=["first"], recovery=recovery
    )
    return replace(method, **more)


def started(recovery: esp.Recovery, make: Make, **more: Any) -> Run:
    torch.manual_seed(0)
    model, batch = Random().double(), (torch.randn(8, 4).double(),)
    optimizer = make(model.parameters())
    structure = esp.attach(model, batch, optimizer=optimizer)
    session = esp.Session(structure, [grower(recovery, **more)], loss=loss_of, total_steps=100)
    return Run(structure, optimizer, batch, session)


def twin_of(run: Run, make: Make) -> tuple[nn.Module, Optimizer]:
    """A plain copy of the network and its optimizer as they are now, without any session."""
    model = Random().double()
    sizes = run.structure.model.first.out_features
    model.first, model.last = nn.Linear(4, sizes).double(), nn.Linear(sizes, 2).double()
    model.load_state_dict(run.structure.model.state_dict())
    optimizer = make(model.parameters())
    optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    Youth(optimizer).look()
    return model, optimizer


def stepped(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


# --- Learning rates of new units -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_new_units_warm_up_and_the_others_step_as_ever(make: Make) -> None:
    """Against the optimizer's own step from the same state, step by step: p + f (p' - p) with f = age / 4."""
    run = started(esp.Recovery(warm=esp.steps(4)), make).train(2)
    assert run.structure.births["first"].tolist() == [0] * 6 + [2] * 2
    for age in range(1, 7):
        model, optimizer = twin_of(run, make)
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        stepped(model, optimizer, run.batch)
        run.train(1)
        factor = min(1.0, age / 4)
        for name, parameter in run.structure.model.named_parameters():
            full = model.get_parameter(name).detach()
            slow = before[name] + factor * (full - before[name])
            expected = full.clone()
            if name == "last.weight":
                expected[:, 6:] = slow[:, 6:]
                assert torch.equal(parameter[:, :6], full[:, :6])
            elif name.startswith("first"):
                expected[6:] = slow[6:]
                assert torch.equal(parameter[:6], full[:6])
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-15)
        for one, two in zip(run.optimizer.state.values(), optimizer.state.values(), strict=True):
            assert one.keys() == two.keys()
        assert bool(run.optimizer._optimizer_step_pre_hooks) == (age < 3)  # the fourth step is an ordinary one


def test_warm_up_by_hand() -> None:
    """One SGD step of a new weight, from its gradient."""
    run = started(esp.Recovery(warm=esp.steps(4)), OPTIMIZERS["sgd"]).train(2)
    before = run.structure.model.first.weight.detach().clone()
    loss = loss_of(run.structure.model, run.batch)
    (gradient,) = torch.autograd.grad(loss, [run.structure.model.last.weight])
    outgoing = run.structure.model.last.weight.detach().clone()
    run.train(1)
    expected = outgoing - 0.1 * gradient * torch.tensor([1.0] * 6 + [0.25] * 2)
    torch.testing.assert_close(run.structure.model.last.weight.detach(), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(run.structure.model.first.weight[6:].detach(), before[6:])  # no gradient: outgoing zero


def test_stages_learn_at_the_rate_of_their_norms() -> None:
    run = started(esp.Recovery(rates="norm"), OPTIMIZERS["sgd"], init=Normal()).train(2)
    for _ in range(3):
        model, optimizer = twin_of(run, OPTIMIZERS["sgd"])
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        stepped(model, optimizer, run.batch)
        run.train(1)
        for name, new in (("first.weight", slice(6, None)), ("last.weight", (slice(None), slice(6, None)))):
            old, full = before[name], model.get_parameter(name).detach()
            mask = torch.zeros_like(old, dtype=torch.bool)
            mask[new] = True
            ratio = old[mask].norm() / old[~mask].norm()
            assert abs(float(ratio) - 1) > 0.05
            expected = torch.where(mask, old + ratio * (full - old), full)
            torch.testing.assert_close(run.structure.model.get_parameter(name).detach(), expected, rtol=0, atol=1e-15)


def test_weights_that_start_from_zero_keep_the_full_rate() -> None:
    run = started(esp.Recovery(rates="norm"), OPTIMIZERS["sgd"]).train(2)
    assert not run.structure.model.last.weight[:, 6:].any()
    run.train(1)
    assert bool((run.structure.model.last.weight[:, 6:] != 0).all())


@pytest.mark.parametrize("name", ["mlp", "vgg_batch_norm", "resnet"])
def test_variance_transfer_learns_stage_by_stage(name: str) -> None:
    method = esp.grow.VarianceTransfer(
        width=2.0, shape="exponential", every=esp.steps(4), start=0.0, until=1.0, max_events=2,
        recovery=esp.Recovery(rates="norm", warm=esp.steps(3)),
    )  # fmt: skip
    run = start(name, [method], total_steps=20).train(20)
    stages = run.session.state_dict()["stages"]
    assert [one["step"] for one in stages] == [4, 8]
    weights = {name for name, one in run.structure.model.named_parameters() if one.dim() > 1}
    assert any(weights & set(one["normed"]) for one in stages)
    assert all(bool(one.isfinite().all()) for one in run.structure.model.parameters())


def test_rates_follow_further_edits() -> None:
    run = started(esp.Recovery(warm=esp.steps(50)), OPTIMIZERS["sgd"]).train(3)
    run.structure.prune("first", [0, 6])
    run.structure.grow("first", by=1)
    model, optimizer = twin_of(run, OPTIMIZERS["sgd"])
    old = model.last.weight.detach().clone()
    stepped(model, optimizer, run.batch)
    run.train(1)
    full, now = model.last.weight.detach(), run.structure.model.last.weight.detach()
    assert torch.equal(now[:, :5], full[:, :5])
    torch.testing.assert_close(now[:, 5], old[:, 5] + 2 / 50 * (full - old)[:, 5], rtol=0, atol=1e-15)
    assert torch.equal(now[:, 6], full[:, 6])  # added by hand, with no recovery


def test_nothing_is_left_on_the_optimizer() -> None:
    run = started(esp.Recovery(warm=esp.steps(4)), OPTIMIZERS["sgd"]).train(1)
    assert not run.optimizer._optimizer_step_pre_hooks
    run.train(2)
    assert len(run.optimizer._optimizer_step_pre_hooks) == 1
    optimizer, model, batch = run.optimizer, run.structure.model, run.batch
    gone = weakref.ref(run.session)
    del run
    gc.collect()
    assert gone() is None
    stepped(model, optimizer, batch)


# --- Statistics ------------------------------------------------------------------------------------------------------


def test_all_norms_take_their_statistics_anew_after_pruning() -> None:
    method = esp.prune.Magnitude(
        amount=0.4, every=esp.steps(100), start=esp.steps(3), until=1.0, axes=["0"], recovery=esp.Recovery(calibrate=2)
    )
    _, (x,) = ZOO["mlp_batch_norm"]()
    probe = [(x + 1.0,), (x * 2.0,), (x * 99,)]
    run = start("mlp_batch_norm", [method], total_steps=9, probe=probe).train(3)
    norms = [module for module in run.structure.model if isinstance(module, nn.BatchNorm1d)]
    assert len(norms) == 2
    inputs: list[Tensor] = []
    norms[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    for one in probe[:2]:
        run.structure.model.eval()(*one)
    mean = torch.stack([one.mean(0) for one in inputs]).mean(0)
    torch.testing.assert_close(norms[0].running_mean, mean)
    untouched = start("mlp_batch_norm", [replace(method, recovery=esp.Recovery())], total_steps=9, probe=probe).train(3)
    assert not torch.allclose(untouched.structure.model[1].running_mean, mean)


# --- Accept or take back ---------------------------------------------------------------------------------------------


def judged(name: str, method: Method, tolerance: float, probe: Any = None) -> tuple[Run, Any]:
    """A run up to before its first event, and its held-out batches."""
    _, batch = ZOO[name]()
    probe = probe or [tuple(one + 0.1 for one in batch), tuple(one * 1.1 for one in batch)]
    run = start(name, [replace(method, accept=esp.Accept(tolerance))], total_steps=30, probe=probe)
    return run.train(3), probe


def held_out(run: Run, probe: Any) -> float:
    model = run.structure.model
    modes = [module.training for module in model.modules()]
    model.eval()
    with torch.no_grad():
        found = math.fsum(float(loss_of(model, one)) for one in probe) / len(probe)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return found


def at_step_four(make: Any, **options: Any) -> Method:
    return make(amount=0.5, every=esp.steps(100), start=esp.steps(4), until=1.0, **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["mlp", "vgg_batch_norm", "mlp_batch_norm", "vit"])
@pytest.mark.parametrize("recovery", [esp.Recovery(), esp.Recovery(calibrate=2)])
def test_what_is_rejected_leaves_everything_as_it_was_bit_for_bit(name: str, recovery: esp.Recovery) -> None:
    run, probe = judged(name, at_step_four(esp.prune.Random, recovery=recovery), tolerance=0.0)
    heard: list[Event] = []
    run.session._on_event = heard.append
    run.optimizer.zero_grad()
    run.session.loss(run.batch).backward()
    run.optimizer.step()
    before, births = snapshot(run.structure.model, run.optimizer, run.structure), run.structure.births
    loss = held_out(run, probe)
    run.session.step()
    assert [event.action for event in heard] == ["rejected"]
    assert differences(before, snapshot(run.structure.model, run.optimizer, run.structure)) == []
    assert run.structure.births is births
    assert heard[0].sizes == {}
    assert heard[0].cost_before == heard[0].cost_after == run.structure.cost()
    assert f"from {loss:.6g} to" in heard[0].why
    run.train(2)


def test_the_tolerance_decides() -> None:
    first, probe = judged("mlp", at_step_four(esp.prune.Random), tolerance=0.0)
    first.optimizer.zero_grad()
    first.session.loss(first.batch).backward()
    first.optimizer.step()
    before = held_out(first, probe)
    first.session.step()
    why = first.session.events[0].why
    after = float(why.rpartition(" ")[2])
    assert after > before
    needed = (after - before) / before
    for tolerance, action in ((needed * 0.99, "rejected"), (needed * 1.01, "prune")):
        run, _ = judged("mlp", at_step_four(esp.prune.Random), tolerance)
        run.train(1)
        assert [event.action for event in run.session.events] == [action]


def test_exact_growth_is_accepted() -> None:
    run, _ = judged("mlp", at_step_four(esp.grow.Random), tolerance=1e-6)
    run.train(1)
    assert [event.action for event in run.session.events] == ["grow"]


def test_a_budget_that_is_missed_by_rejections_is_reported() -> None:
    method = esp.prune.Random(
        budget=esp.Parameters(0.4, of="initial"), every=esp.steps(2), start=esp.steps(4), until=0.3
    )
    run, _ = judged("mlp", method, tolerance=0.0)
    with pytest.warns(EspalierWarning, match="random ended at"):
        run.train(7)
    assert {event.action for event in run.session.events} == {"rejected"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: esp.Recovery(warm=5), r"warm: expected steps\(n\) or None, found 5"),
        (lambda: esp.Recovery(rates="slow"), "rates: expected 'base' or 'norm', found 'slow'"),
        (lambda: esp.Recovery(calibrate=-1), "calibrate: expected a number of batches, found -1"),
        (lambda: esp.Accept(-0.1), "tolerance: expected a fraction of at least 0, found -0.1"),
    ],
)
def test_wrong_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make()  # type: ignore[operator]
