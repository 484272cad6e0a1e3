"""What training loops consist of goes on over edits: mixed precision, gradient accumulation, clipping, groups,
schedules, averages, memory formats, every way in which an optimizer steps; and combinations of these."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import espalier as esp

STEPS, EVERY = 8, 2
X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(1))

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "plain": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True, foreach=False),
}

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda one: lr_scheduler.LambdaLR(one, [lambda step: 0.9**step, lambda step: 0.8**step]),
    "one cycle": lambda one: lr_scheduler.OneCycleLR(one, max_lr=[0.1, 0.05], total_steps=STEPS + 1),
    "cosine": lambda one: lr_scheduler.CosineAnnealingLR(one, T_max=STEPS),
    "plateau": lambda one: lr_scheduler.ReduceLROnPlateau(one, patience=0, threshold=10.0),
}

PRECISIONS = ("float32", "bfloat16", "float16 with a scaler")


class Network(nn.Module):
    """Convolutions with batch norms and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class Loop:
    """One training with all that a loop may have."""

    def __init__(self, optimizer: str, scheduler: str, precision: str, channels_last: bool, *, edits: bool) -> None:
        torch.manual_seed(0)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = Network().to(memory_format=self.format)
        decayed = [one for one in self.model.parameters() if one.dim() > 1]
        others = [one for one in self.model.parameters() if one.dim() < 2]
        self.optimizer = OPTIMIZERS[optimizer]([{"params": decayed, "weight_decay": 0.1}, {"params": others}])
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        self.precision = {"float32": None, "bfloat16": torch.bfloat16}.get(precision, torch.float16)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=self.precision is torch.float16)
        self.structure = esp.attach(self.model, X, optimizer=self.optimizer, follow=[self.average])
        self.edits = edits
        self.rates: list[list[float]] = []
        self.losses: list[float] = []

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=self.precision or torch.bfloat16, enabled=self.precision is not None):
            return nn.functional.cross_entropy(self.model(x.to(memory_format=self.format)).float(), y)

    def train(self) -> "Loop":
        for step in range(STEPS):
            if self.edits and step % EVERY == EVERY - 1:
                self.edit(step)
            total = 0.0
            for x, y in zip(X.chunk(2), Y.chunk(2), strict=True):  # two gradients for every step
                loss = self.loss(x, y) / 2
                self.scaler.scale(loss).backward()
                total += float(loss.detach())
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            squares = [one.grad.square().sum() for one in self.model.parameters() if one.grad is not None]
            assert float(sum(squares).sqrt()) <= min(0.5, float(norm)) + 1e-4  # type: ignore[union-attr, arg-type]
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.average.update_parameters(self.model)
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(1.0)
            else:
                self.scheduler.step()
            self.rates.append([group["lr"] for group in self.optimizer.param_groups])
            self.losses.append(total)
        return self

    def edit(self, step: int) -> None:
        groups = [[id(one) for one in group["params"]] for group in self.optimizer.param_groups]
        if step % (2 * EVERY) == EVERY - 1:
            self.structure.grow({"first": 2, "second": 3})
        else:
            self.structure.prune({"first": [1], "second": [0, 4]})
        assert groups == [[id(one) for one in group["params"]] for group in self.optimizer.param_groups]


def pairwise_cases() -> list[tuple[str, str, str, bool]]:
    """Few combinations in which every pair of settings of different kinds occurs."""
    kinds: list[tuple[Any, ...]] = [tuple(OPTIMIZERS), tuple(SCHEDULERS), PRECISIONS, (False, True)]
    left = {
        (a, one, b, other)
        for a, b in itertools.combinations(range(4), 2)
        for one, other in itertools.product(kinds[a], kinds[b])
    }
    found = []
    while left:
        best = max(itertools.product(*kinds), key=lambda case: len(left & pairs_of(case)))
        found.append(best)
        left -= pairs_of(best)
    return found  # type: ignore[return-value]


def pairs_of(case: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(range(4), 2)}


@pytest.mark.parametrize(("optimizer", "scheduler", "precision", "channels_last"), pairwise_cases())
def test_loops_go_on_over_edits(optimizer: str, scheduler: str, precision: str, channels_last: bool) -> None:
    loop = Loop(optimizer, scheduler, precision, channels_last, edits=True).train()
    model, average = loop.model, loop.average.module
    assert model.first.weight.shape[0] == 6 + 2 * 2 - 2
    # the schedule and the options of groups are those of a training without edits
    other = Loop(optimizer, scheduler, precision, channels_last, edits=False)
    for _ in range(STEPS):
        other.optimizer.step()
        other.scheduler.step(1.0) if scheduler == "plateau" else other.scheduler.step()
        other.rates.append([group["lr"] for group in other.optimizer.param_groups])
    assert loop.rates == other.rates
    assert [group["weight_decay"] for group in loop.optimizer.param_groups] == [
        group["weight_decay"] for group in other.optimizer.param_groups
    ]
    # everything trains, and state, averages and memory formats fit
    held = {id(one) for group in loop.optimizer.param_groups for one in group["params"]}
    assert held == {id(one) for one in model.parameters()}
    for (name, parameter), averaged in zip(model.named_parameters(), average.parameters(), strict=True):
        assert torch.isfinite(parameter).all(), name
        assert averaged.shape == parameter.shape
        assert averaged.stride() == parameter.stride()
        for state in loop.optimizer.state[parameter].values():
            assert not isinstance(state, Tensor) or state.dim() == 0 or state.shape == parameter.shape
    assert model.second.weight.is_contiguous(memory_format=loop.format)
    assert loop.losses[-1] < loop.losses[0]
    expected = [(a.detach() + b) / 2 for a, b in zip(average.parameters(), model.parameters(), strict=True)]
    loop.average.update_parameters(model)
    for one, other_value in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(one.detach(), other_value.detach())


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_leaves_out_are_no_steps_of_a_session(fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    structure = esp.attach(model, torch.zeros(2, 4), optimizer=optimizer)
    session = esp.Session(
        structure, [esp.grow.Random(width=1.5, every=esp.steps(2), until=0.5)],
        loss=lambda model, x: model(x).square().mean(), total_steps=8, scaler=scaler,
    )  # fmt: skip
    overflows = {0, 3, 4}
    for number in range(8 + len(overflows)):
        optimizer.zero_grad()
        scaler.scale(session.loss(torch.ones(2, 4))).backward()
        if number in overflows:
            model[0].weight.grad[0, 0] = torch.inf
        before, done = model[0].weight.detach().clone(), session.steps_done
        scaler.step(optimizer)
        assert torch.equal(model[0].weight, before) is (number in overflows)
        scaler.update()
        session.step()
        assert session.steps_done == done + (number not in overflows)
    assert session.steps_done == 8
    assert [one.step for one in session.events] == [1, 3]
    assert scaler.get_scale() == 16.0 / 2 ** len(overflows)


def test_a_scaler_that_is_off_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    structure = esp.attach(model, torch.zeros(2, 4), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    session = esp.Session(
        structure, [esp.grow.Random(width=1.5)], loss=lambda model, x: model(x).mean(), total_steps=8,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )  # fmt: skip
    session.step()
    assert session.steps_done == 1
