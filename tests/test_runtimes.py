"""What is measured: runtimes, memory by counting, and noisy times until their median is known."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import espalier as esp
from espalier.errors import MethodError
from espalier.measure.repeated import Reading, repeated


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 10))


class Counting:
    """A clock that is a second further at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


class Mode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[bool, bool]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add((self.training, torch.is_grad_enabled()))
        return x


def test_eager_times_passes_in_eval_mode_by_its_clock_and_leaves_modes() -> None:
    model = Mode().train()
    assert esp.measure.Eager(Counting())(model, torch.zeros(1)) == 1.0
    assert model.seen == {(False, False)}
    assert model.training


@pytest.mark.filterwarnings("ignore")  # the exporter has many
def test_onnx_runtime_runs_the_exported_network() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = net().eval(), torch.randn(4, 64)
    run = esp.measure.OnnxRuntime().ready(model, x)
    (found,) = run()  # type: ignore[misc]
    assert torch.allclose(torch.from_numpy(found), model(x), atol=1e-5)


@pytest.mark.slow
def test_more_networks_than_the_limit_of_recompilations_are_still_compiled() -> None:
    for width in range(1, 12):
        model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2)).eval()
        run = esp.measure.Compiled().ready(model, torch.zeros(2, 4))
        with torch.no_grad():
            run()
            with torch._dynamo.config.patch(error_on_recompile=True):
                run()
    counted = torch._dynamo.utils.counters["frames"]
    assert counted["ok"] == counted["total"] >= 11


def test_peak_memory_counts_weights_and_what_is_alive_at_once() -> None:
    model, x = net(), torch.zeros(32, 64)
    weights = sum(one.numel() for one in model.parameters())
    hidden = 32 * 256
    # the first layer's result is alive while that of the ReLU is written; dropout hands it on
    assert esp.measure.peak_memory(model, x) == 4 * (weights + 2 * hidden)
    assert esp.measure.peak_memory(model.half(), x.half()) == 2 * (weights + 2 * hidden)


def test_the_interval_of_a_median_is_between_order_statistics() -> None:
    six = Reading.of([3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
    assert (six.low, six.value, six.high) == (1.0, 3.5, 6.0)
    many = Reading.of(list(range(1, 101)))
    assert (many.low, many.high) == (40, 61), "as tables of the sign test have it for 100 values"
    assert six.within(6.0) is True
    assert six.within(0.5) is False
    assert six.within(3.5) is None
    with pytest.raises(ValueError, match="at least 6 finite values"):
        Reading.of([1.0] * 5)


def test_it_is_measured_until_it_is_enough_or_too_much() -> None:
    values = itertools.cycle([1.0, 2.0])
    assert repeated(lambda: next(values), lambda found: found.narrow(0.1), most=40).count == 40
    assert repeated(lambda: 1.0, lambda found: found.narrow(0.1)).count == 6
    assert repeated(lambda: next(values), lambda found: False, seconds=0.0).count == 6


def test_the_intervals_hold_the_median_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400, 15, generator=generator).exp()  # median 1
    held = sum(Reading.of(row.tolist()).within(1.0) is None for row in draws)
    assert held / 400 > 0.94


def test_latency_in_milliseconds_and_by_a_function() -> None:
    assert esp.Latency(ms=12) == esp.Latency(0.012)
    for wrong in ({"value": 1.0, "ms": 3}, {"ms": "12"}, {"measure": 3, "value": 1.0}, {}):
        with pytest.raises(MethodError, match="Latency"):
            esp.Latency(**wrong)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match=r"is a target of espalier\.shrink"):
        esp.scaled_plan(esp.attach(net(), torch.zeros(2, 64)), esp.Memory(1000))


def test_a_session_measures_with_the_function_of_its_budget() -> None:
    model, calls = net(), []

    def run(network: nn.Module, example: Tensor) -> float:
        calls.append(network is model)
        return 1e-6 * sum(one.numel() for one in network.parameters())

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    structure = esp.attach(model, torch.zeros(2, 64), optimizer=optimizer)
    budget = esp.Latency(0.5, of="initial", measure=run)
    method = esp.prune.Magnitude(budget=budget, shape="constant", every=esp.steps(1), start=0.0, until=1.0)
    before = sum(one.numel() for one in model.parameters())
    session = esp.Session(structure, [method], loss=lambda net, x: net(x).square().mean(), total_steps=1)
    session.step()
    assert calls
    assert all(calls)
    assert sum(one.numel() for one in model.parameters()) <= 0.5 * before
