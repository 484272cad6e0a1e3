"""esp.shrink: what everything on data takes is counted, and stays within what was allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_shrink import CLASSES, EXAMPLE, HELD_OUT, TRAIN, Net, accuracy
from test_shrink_blocks import HALF, Residual, deep
from torch import Tensor, nn

import espalier as esp
from espalier.errors import ShrinkError
from espalier.oneshot.meter import TRAINED, Meter

__all__ = ["deep"]
BATCH = 16


@pytest.fixture(scope="module")
def trained() -> Net:
    torch.manual_seed(0)
    return Net().eval()


class Fit:
    """Trains for as long as may be, and notes on what it was called with."""

    def __init__(self, too_much: int = 0) -> None:
        self.seen: list[tuple[esp.Tuning, int]] = []
        self._too_much = too_much

    def __call__(self, model: nn.Module, tuning: esp.Tuning) -> None:
        assert tuning.samples is not None
        self.seen.append((tuning, sum(one.numel() for one in model.parameters())))
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(tuning.samples // BATCH + self._too_much):
            x, y = TRAIN[0][:BATCH], TRAIN[1][:BATCH]
            outputs = model(x)
            loss = tuning.loss(outputs, x, F.cross_entropy(outputs, y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


class Counted:
    """Notes every sample that a kind of network is given, in samples trained on with the network as it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], whole: nn.Module) -> None:
        self.total, self.before = 0.0, kind.forward
        most = self._flops(whole)

        def forward(net: nn.Module, x: Tensor) -> Tensor:
            if type(x) is Tensor and len(x) > len(EXAMPLE):  # no capture, and no timed pass
                self.total += len(x) * self._flops(net) / most * (1 if torch.is_grad_enabled() else 1 / 3)
            return self.before(net, x)

        monkeypatch.setattr(kind, "forward", forward)

    @staticmethod
    def _flops(net: nn.Module) -> int:
        return sum(2 * one.weight.numel() for one in net.modules() if isinstance(one, nn.Linear))


def held_out(model: nn.Module) -> float:
    with torch.no_grad():
        return accuracy(model)


@pytest.mark.parametrize("teaches", [False, True])
def test_all_that_runs_on_data_is_counted_and_stays_within_the_limit(
    monkeypatch: pytest.MonkeyPatch, trained: Net, teaches: bool
) -> None:
    counted, fit, limit = Counted(monkeypatch, Net, trained), Fit(), 12_000
    found = esp.shrink(
        trained, EXAMPLE, target=esp.Parameters(0.5, of="initial"), train=fit, evaluate=held_out, max_drop=1.0,
        max_training=limit, teacher=trained if teaches else None, rounds=2,
    )  # fmt: skip
    assert found.spent is not None
    assert counted.total == pytest.approx(found.spent, rel=1e-6), "what it says is what was run"
    assert 0.97 * limit < found.spent <= limit, "and nearly all of what was allowed"
    assert f"{found.spent:,.0f} samples" in str(found)
    assert not any(module._forward_pre_hooks for net in (trained, found.model) for module in net.modules())
    (first, _), (last, _) = fit.seen
    assert first.samples is not None
    assert last.samples is not None
    assert last.samples > first.samples, "a smaller network trains on more for as much"


def test_trials_are_within_it_too_and_the_best_is_trained_on(
    monkeypatch: pytest.MonkeyPatch,
    deep: Residual,
) -> None:
    counted, fit, limit = Counted(monkeypatch, Residual, deep), Fit(), 20_000
    found = esp.shrink(
        deep, EXAMPLE, target=HALF, train=fit, evaluate=held_out, max_drop=1.0, max_training=limit, rounds=1, round_to=1
    )
    assert found.outcome == "reached", found
    assert found.spent is not None
    assert counted.total <= found.spent, "blocks that are left out to be judged count as if they were there"
    assert 0.97 * limit < found.spent <= limit
    (trial, of_trial), (last, of_last) = fit.seen
    assert (trial.number, last.number) == (0, 1)
    assert of_trial == of_last
    assert trial.samples is not None
    assert last.samples is not None
    assert 0 < trial.samples < 0.1 * last.samples
    assert trial.share + last.share == pytest.approx(1)


def test_one_round_goes_on_from_the_weights_of_the_trial(deep: Residual) -> None:
    heads: list[Tensor] = []

    def marked(model: Any, tuning: esp.Tuning) -> None:
        heads.append(model.head.bias.detach().clone())
        with torch.no_grad():
            model.head.bias.fill_(7.0)

    esp.shrink(deep, EXAMPLE, target=HALF, train=marked, evaluate=held_out, max_drop=1.0, rounds=1, round_to=1)
    assert not torch.equal(heads[0], torch.full((CLASSES,), 7.0))
    assert torch.equal(heads[1], torch.full((CLASSES,), 7.0))


def test_longer_training_is_refused_and_what_was_spent_is_kept(trained: Net, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "target": esp.Parameters(0.5, of="initial"), "evaluate": held_out, "max_drop": 1.0, "max_training": 12_000,
        "folder": tmp_path, "rounds": 2,
    }  # fmt: skip
    with pytest.raises(ShrinkError, match=r"train failed in round 1 of 2: .* more than `tuning.samples` samples"):
        esp.shrink(trained, EXAMPLE, train=Fit(too_much=1), **given)
    fit = Fit()
    found = esp.shrink(trained, EXAMPLE, train=fit, **given)
    again = esp.shrink(trained, EXAMPLE, train=fit, **given)
    assert len(fit.seen) == 2
    assert found.spent is not None
    assert again.spent == pytest.approx(found.spent + len(HELD_OUT[0]) / 3), "with the score that it begins with"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_what_is_counted_stays_a_number_while_a_network_is_traced(trained: Net) -> None:
    meter, batch = Meter(esp.attach(trained, EXAMPLE), 100, None), TRAIN[0][:BATCH]
    with meter.watching(trained, TRAINED):
        torch.jit.trace(trained, batch, check_trace=False)
    assert type(meter.spent) is float
    assert meter.spent == pytest.approx(BATCH / 3)


def test_a_training_that_is_not_seen_to_run_is_counted_in_full(trained: Net) -> None:
    def inside(model: Any, tuning: esp.Tuning) -> None:
        assert tuning.samples is not None
        for _ in range(tuning.samples // BATCH):
            model.head(F.relu(model.second(F.relu(model.first(TRAIN[0][:BATCH])))))

    found = esp.shrink(
        trained, EXAMPLE, target=esp.Parameters(0.5, of="initial"), train=inside, evaluate=held_out, max_drop=1.0,
        max_training=12_000, rounds=1,
    )  # fmt: skip
    assert found.spent == pytest.approx(12_000)


@pytest.mark.parametrize(
    ("most", "message"),
    [(100, "max_training=100: nothing is left to train with"), (-1, "max_training: expected a number from 0 to inf")],
)
def test_a_limit_that_leaves_nothing_is_refused(trained: Net, most: float, message: str) -> None:
    with pytest.raises(ShrinkError, match=message):
        esp.shrink(
            trained, EXAMPLE, target=esp.Parameters(0.5, of="initial"), train=Fit(), evaluate=held_out,
            max_training=most,
        )  # fmt: skip
