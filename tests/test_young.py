"""New entries have second moments of their own age: of their own gradients, whatever the optimizer has seen before."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

import espalier as esp
from espalier.edit.young import AGE, YOUTH

KINDS = {
    "adam": (lambda p: torch.optim.Adam(p, 1e-3, foreach=False), "exp_avg_sq"),
    "adamw foreach": (lambda p: torch.optim.AdamW(p, 1e-3, betas=(0.9, 0.95), foreach=True), "exp_avg_sq"),
    "adam fused": (lambda p: torch.optim.Adam(p, 1e-3, fused=True), "exp_avg_sq"),
    "nadam": (lambda p: torch.optim.NAdam(p, 1e-3), "exp_avg_sq"),
    "radam": (lambda p: torch.optim.RAdam(p, 1e-3), "exp_avg_sq"),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, 1e-3), "square_avg"),
    "adadelta": (lambda p: torch.optim.Adadelta(p, 1.0), "square_avg"),
    "adagrad": (lambda p: torch.optim.Adagrad(p, 1e-2), "sum"),
}


def normaliser(optimizer: Optimizer, step: int) -> tuple[float, float, float]:
    """d, e and N of v <- d v + e g^2, as each paper has them."""
    group = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.Adagrad):
        return 1.0, 1.0, float(step)
    if "betas" in group:
        return group["betas"][1], 1 - group["betas"][1], 1 - group["betas"][1] ** step
    d = group["alpha"] if isinstance(optimizer, torch.optim.RMSprop) else group["rho"]
    return d, 1 - d, 1.0


def trained(model: nn.Module, optimizer: Optimizer, steps: int, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 5, generator=drawn)
        optimizer.zero_grad()
        F.mse_loss(model(x), x[:, :2].sin()).backward()
        optimizer.step()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("before", [1, 7, 250])
@pytest.mark.parametrize("name", KINDS)
def test_second_moments_are_of_their_own_gradients(name: str, before: int) -> None:
    build, key = KINDS[name]
    model = network()
    optimizer = build(model.parameters())
    trained(model, optimizer, before, seed=1)
    structure = esp.attach(model, torch.zeros(2, 5), optimizer=optimizer)
    structure.grow("0", by=3)
    weight, drawn = model[2].weight, torch.Generator().manual_seed(2)
    mean, v = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    squares = []
    for k in range(1, 131):
        optimizer.zero_grad()
        x = torch.randn(16, 5, generator=drawn)
        F.mse_loss(model(x), x[:, :2].sin()).backward()
        d, e, n = normaliser(optimizer, before + k)
        remembered = optimizer.state[weight][key][:, :4].double() / normaliser(optimizer, before + k - 1)[2]
        stale = remembered.mean() / weight.grad[:, :4].double().square().mean()
        square = weight.grad[:, 4:].double().square()
        squares.append(stale * square)
        optimizer.step()
        if k <= YOUTH:
            mean = mean + max(1 / k, e / n) * (stale * square - mean)
            v = torch.maximum(n * mean, e * square)  # the optimizer's own update adds that in any case
            mean = v / n
        else:
            v = d * v + e * square
        found = optimizer.state[weight][key][:, 4:].double()
        torch.testing.assert_close(found, v, rtol=2e-4, atol=1e-12)
        if (
            before == 250
            and k <= 30
            and bool((v > e * square).all())
            and name in ("adam", "adam fused", "nadam", "radam")
        ):  # simply the mean
            torch.testing.assert_close(found / n, torch.stack(squares).mean(0), rtol=2e-4, atol=1e-12)
    assert AGE not in optimizer.state[weight]


@pytest.mark.parametrize("name", KINDS)
def test_old_entries_and_the_function_are_as_without_growth(name: str) -> None:
    build, key = KINDS[name]
    alone = network().double()
    grown = copy.deepcopy(alone)
    optimizers = [build(alone.parameters()), build(grown.parameters())]
    for model, optimizer in zip((alone, grown), optimizers, strict=True):
        trained_double(model, optimizer)
    structure = esp.attach(grown, torch.zeros(2, 5, dtype=torch.float64), optimizer=optimizers[1])
    structure.grow("0", by=3)
    x = torch.randn(16, 5, dtype=torch.float64)
    for model, optimizer in zip((alone, grown), optimizers, strict=True):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(grown[2].weight[:, :4], alone[2].weight, rtol=1e-12, atol=1e-14)
    mine, theirs = optimizers[1].state[grown[2].weight][key][:, :4], optimizers[0].state[alone[2].weight][key]
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


def trained_double(model: nn.Module, optimizer: Optimizer) -> None:
    drawn = torch.Generator().manual_seed(3)
    for _ in range(20):
        x = torch.randn(16, 5, generator=drawn, dtype=torch.float64)
        optimizer.zero_grad()
        F.mse_loss(model(x), x[:, :2].sin()).backward()
        optimizer.step()


def test_new_units_are_not_starved() -> None:
    """What makes new units gets small gradients at first, since nothing reads them yet; it has to learn as well."""

    def moved(keep_age: bool) -> float:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        trained(model, optimizer, 400, seed=1)
        structure = esp.attach(model, torch.zeros(2, 5), optimizer=optimizer)
        structure.grow("0", by=4, seed=0)
        if not keep_age:
            for state in optimizer.state.values():
                state.pop(AGE, None)
        before = model[0].weight.detach()[4:].clone()
        trained(model, optimizer, 60, seed=2)
        return float((model[0].weight.detach()[4:] - before).norm())

    assert moved(keep_age=True) > 2 * moved(keep_age=False)


def test_ages_follow_edits_and_checkpoints(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    trained(model, optimizer, 30, seed=1)
    structure = esp.attach(model, torch.zeros(2, 5), optimizer=optimizer)
    structure.grow("0", by=3, seed=0)
    trained(model, optimizer, 10, seed=2)
    structure.prune("0", units=[0, 5])
    structure.grow("0", by=1, seed=1)
    assert optimizer.state[model[0].bias][AGE].tolist() == [YOUTH] * 3 + [10, 10, 0]
    structure.undo()
    assert optimizer.state[model[0].bias][AGE].tolist() == [YOUTH] * 3 + [10, 10]
    esp.save(structure, tmp_path)
    again = network()
    other = torch.optim.AdamW(again.parameters(), 3e-3)
    esp.load(tmp_path, again, torch.zeros(2, 5), optimizer=other)
    for one, optimizer_of in ((model, optimizer), (again, other)):
        trained(one, optimizer_of, 95, seed=3)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert AGE not in other.state[again[0].bias]
    assert not other._optimizer_step_pre_hooks or all(AGE not in state for state in other.state.values())


def test_steps_that_a_scaler_skips_do_not_count() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    trained(model, optimizer, 5, seed=1)
    esp.attach(model, torch.zeros(2, 5), optimizer=optimizer).grow("0", by=2, seed=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    age = optimizer.state[model[0].bias][AGE]
    x = torch.randn(8, 5)
    for factor, expected in ((1.0, 1.0), (float("inf"), 1.0), (1.0, 2.0)):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert age[4:].tolist() == [expected] * 2
    v = optimizer.state[model[2].bias]["exp_avg_sq"]
    assert bool(v.isfinite().all())
    newest = optimizer.state[model[2].weight]["exp_avg_sq"][:, 4:]
    assert bool((newest < 1).all())  # not of scaled gradients
