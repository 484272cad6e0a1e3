"""esp.shrink: from a trained network to a smaller one, by the user's own train, evaluate and measure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import espalier as esp
from espalier.errors import ShrinkError

FEATURES, HIDDEN, CLASSES = 8, 24, 3


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, HIDDEN, dtype=dtype)
        self.second = nn.Linear(HIDDEN, HIDDEN, dtype=dtype)
        self.head = nn.Linear(HIDDEN, CLASSES, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def points(seed: int, count: int = 256) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    return x, (x[:, :CLASSES] + 0.3 * x[:, CLASSES : 2 * CLASSES]).argmax(1)


TRAIN, HELD_OUT, EXAMPLE = points(0), points(1), torch.zeros(2, FEATURES)


def fit(model: nn.Module, tuning: esp.Tuning, steps: int = 60) -> None:
    x, y = TRAIN
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(max(1, round(steps * tuning.share))):
        outputs = model(x)
        loss = tuning.loss(outputs, x, F.cross_entropy(outputs, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accuracy(model: nn.Module) -> float:
    x, y = HELD_OUT
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


@pytest.fixture(scope="module")
def trained() -> Net:
    torch.manual_seed(0)
    model = Net()
    fit(model, esp.Tuning(1, 1, 1.0), steps=150)
    model.zero_grad()
    return model.eval()


def slow(model: nn.Module, example: Any) -> float:
    """Time that is a function of the sizes: an overhead, and the weights."""
    return 1e-3 + 1e-6 * sum(one.numel() for one in model.parameters())


def shrunk(model: nn.Module, target: Any, **options: Any) -> esp.Shrunk:
    given: dict[str, Any] = {"train": fit, "evaluate": accuracy, "max_drop": 0.05, "rounds": 2, **options}
    return esp.shrink(model, options.pop("example", EXAMPLE), target=target, **given)


def test_a_measured_target_is_met_and_the_model_stays_as_it_was(trained: Net) -> None:
    before = {name: one.clone() for name, one in trained.state_dict().items()}
    limit = 0.6 * slow(trained, None)
    found = shrunk(trained, esp.Latency(ms=limit * 1000, measure=slow), teacher=trained)
    assert found.outcome == "reached", found
    assert found.reached
    assert 0.93 * limit <= slow(found.model, None) <= limit, "just small enough"
    assert accuracy(found.model) >= accuracy(trained) - 0.05
    assert found.rounds[-1].score == accuracy(found.model)
    assert [one.number for one in found.rounds] == [0, 1, 2]
    assert found.model is not trained
    assert not found.model.training
    assert not trained.training
    assert all(torch.equal(one, before[name]) for name, one in trained.state_dict().items())
    assert all(one.grad is None for one in trained.parameters())
    assert type(found.model) is Net
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in found.model.modules())
    assert "reached" in str(found)
    assert "as given" in str(found)


@pytest.mark.parametrize(
    ("target", "cost"),
    [
        (esp.Parameters(400), lambda model: sum(one.numel() for one in model.parameters())),
        (esp.FLOPs(0.5, of="initial"), lambda model: esp.attach(model, EXAMPLE).cost().flops),
        (esp.Memory(0.7, of="initial"), lambda model: esp.measure.peak_memory(model, EXAMPLE)),
    ],
)
def test_other_targets_are_met_by_counting(trained: Net, target: Any, cost: Any) -> None:
    limit = target.value if target.of is None else target.value * cost(trained)
    found = shrunk(trained, target, rounds=1, max_drop=1.0)
    assert found.outcome == "reached", found
    assert 0.85 * limit <= cost(found.model) <= limit
    assert found.rounds[-1].cost.value == cost(found.model)


def test_limits_and_exclusions_are_kept(trained: Net) -> None:
    found = shrunk(
        trained,
        esp.Parameters(0.9, of="initial"),
        rounds=1,
        max_drop=1.0,
        keep=["first"],
        limits={"second": (20, None)},
    )
    sizes = found.rounds[-1].sizes
    assert (sizes["first"], sizes["second"]) == (HIDDEN, 20), found
    assert found.outcome == "reached"
    far = shrunk(trained, esp.Parameters(0.8, of="initial"), keep=["first"], limits={"second": (20, None)})
    assert far.outcome == "out of reach"
    frozen = "no axis of the network may shrink .*first: .*keep="
    with pytest.raises(ShrinkError, match=frozen):
        shrunk(trained, esp.Parameters(0.5, of="initial"), keep=["first", "second", "head"])


def untouched(model: nn.Module, tuning: esp.Tuning) -> None:
    raise AssertionError("nothing was to be trained")


def test_what_needs_no_training_gets_none(trained: Net) -> None:
    met = shrunk(trained, esp.Latency(1.0, measure=slow), train=untouched)
    assert met.outcome == "already met"
    assert met.reached
    assert met.model is not trained
    assert [one.number for one in met.rounds] == [0]
    far = shrunk(trained, esp.Latency(ms=1.01, measure=slow), train=untouched)
    assert far.outcome == "out of reach"
    assert not far.reached
    assert "nothing was trained" in far.why
    assert torch.equal(far.model(TRAIN[0]), trained(TRAIN[0]))
    wrong = shrunk(trained, esp.Latency(ms=1.01, measure=lambda m, e: 1e3 * slow(m, e)), train=untouched)
    assert "seconds, not milliseconds" in wrong.why


def harm(model: nn.Module, tuning: esp.Tuning) -> None:
    fit(model, tuning)
    if tuning.number == tuning.rounds:
        with torch.no_grad():
            model.head.weight.neg_()  # type: ignore[union-attr, operator]


def test_below_the_floor_the_best_network_before_is_what_comes_back(trained: Net) -> None:
    found = shrunk(trained, esp.Parameters(0.5, of="initial"), train=harm, teacher=trained)
    assert found.outcome == "accuracy missed", found
    assert found.chosen == 1
    assert accuracy(found.model) >= found.floor > accuracy(found.last)
    count = [sum(one.numel() for one in net.parameters()) for net in (trained, found.model, found.last)]
    assert count[0] > count[1] > count[2]
    assert count[1] == found.rounds[1].parameters


class Failing:
    """Trains, but not in the second round while it is broken."""

    def __init__(self) -> None:
        self.broken, self.calls = True, 0

    def __call__(self, model: nn.Module, tuning: esp.Tuning) -> None:
        self.calls += 1
        if self.broken and tuning.number == 2:
            raise RuntimeError("out of disk")
        fit(model, tuning)


def test_a_training_that_fails_loses_nothing_and_goes_on_from_the_folder(trained: Net, tmp_path: Path) -> None:
    train = Failing()
    target = esp.Parameters(0.6, of="initial")
    with pytest.raises(ShrinkError, match="train failed in round 2 of 2: RuntimeError: out of disk") as caught:
        shrunk(trained, target, train=train, folder=tmp_path)
    reached = caught.value.reached
    assert isinstance(reached, esp.Shrunk)
    assert reached.outcome == "interrupted"
    assert reached.chosen == 1
    train.broken = False
    found = shrunk(trained, target, train=train, folder=tmp_path)
    assert found.outcome == "reached", found
    assert train.calls == 3, "the first round was not trained again"
    assert found.rounds[:2] == reached.rounds
    again = shrunk(trained, target, train=untouched, folder=tmp_path)
    assert again.rounds == found.rounds
    assert torch.equal(again.model(TRAIN[0]), found.model(TRAIN[0]))
    with pytest.raises(ShrinkError, match="holds a shrinking with rounds=2, and this one has rounds=3"):
        shrunk(trained, target, rounds=3, folder=tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.nan, "expected a number for the network as it was given, found nan"),
     (torch.zeros(2), r"expected one number, found a tensor of shape \(2,\)"),
     ("good", "expected one number, found 'good'")],
)  # fmt: skip
def test_evaluations_that_are_no_number_are_refused(trained: Net, value: Any, message: str) -> None:
    with pytest.raises(ShrinkError, match=message):
        shrunk(trained, esp.Parameters(0.5, of="initial"), evaluate=lambda model: value)


def test_a_score_may_be_a_tensor_a_loss_or_nan_later(trained: Net) -> None:
    def loss(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(model(HELD_OUT[0]), HELD_OUT[1])

    found = shrunk(trained, esp.Parameters(0.7, of="initial"), evaluate=loss, mode="min", max_drop=0.2, rounds=1)
    assert found.outcome == "reached", found
    assert found.rounds[-1].score == float(loss(found.model)) <= found.floor
    scores = iter([0.9, math.nan])
    lost = shrunk(trained, esp.Parameters(0.7, of="initial"), evaluate=lambda model: next(scores), rounds=1)
    assert lost.outcome == "accuracy missed"
    assert lost.chosen == 0
    assert any("units are judged by their weights" in note for note in lost.notes)


class Keyed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x) * scale}


@pytest.mark.parametrize("by_name", [True, False])
def test_inputs_in_a_dict_or_a_tuple(trained: Net, by_name: bool) -> None:
    def given(x: Tensor) -> Any:
        return {"x": x, "scale": torch.ones(())} if by_name else (x, torch.ones(()))

    def call(model: nn.Module, x: Tensor) -> Tensor:
        return (model(**given(x)) if by_name else model(*given(x)))["logits"]

    def train(model: nn.Module, tuning: esp.Tuning) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x, y = TRAIN
        for _ in range(5):
            optimizer.zero_grad()
            logits = call(model, x)
            tuning.loss({"logits": logits}, given(x), F.cross_entropy(logits, y)).backward()
            optimizer.step()

    def good(model: nn.Module) -> float:
        return float((call(model, HELD_OUT[0]).argmax(1) == HELD_OUT[1]).float().mean())

    model = Keyed(trained)
    found = esp.shrink(
        model, given(EXAMPLE), target=esp.Parameters(0.7, of="initial"), train=train, evaluate=good, teacher=model,
        max_drop=0.2, rounds=1,
    )  # fmt: skip
    assert found.outcome == "reached", found


@pytest.mark.parametrize(("training", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_modes_and_low_precision(training: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Net(dtype).train(training)
    model.second.eval()
    x = 50 * HELD_OUT[0].to(dtype)  # sums of their products are beyond half precision

    def run(net: nn.Module) -> Tensor:
        assert not any(module.training for module in net.modules())
        return net(x).detach().float().abs().mean()

    def train(net: nn.Module, tuning: esp.Tuning) -> None:
        assert all(module.training for module in net.modules())

    target = esp.Parameters(0.6, of="initial")
    found = esp.shrink(
        model, EXAMPLE.to(dtype), target=target, train=train, evaluate=run, max_drop=1e3, rounds=1
    )  # fmt: skip
    assert found.outcome == "reached", found
    assert all(one.dtype == dtype and bool(one.isfinite().all()) for one in found.model.parameters())
    with torch.no_grad():
        near = (found.model(x) - model(x)).float().norm() / model(x).float().norm()
    assert near < 0.8, "refitted, the network still does much of what it did"
    for net in (model, found.model):
        assert [module.training for module in net.modules()] == [training, training, False, training]


def test_noise_is_measured_until_the_interval_says_or_said_to_be_noise(trained: Net) -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(model: nn.Module, example: Any) -> float:
        return slow(model, example) * (1 + 0.2 * float(torch.rand((), generator=generator) - 0.5))

    found = shrunk(trained, esp.Latency(0.7, of="initial", measure=noisy), rounds=1, max_drop=1.0, round_to=1)
    last = found.rounds[-1].cost
    assert last.low < last.value < last.high
    assert last.count > 6
    assert (found.outcome == "reached") == (last.high <= 0.7 * found.rounds[0].cost.value), found
    assert slow(found.model, None) <= 0.75 * slow(trained, None)


def test_a_plan_that_a_thorough_measurement_finds_too_slow_is_made_smaller(trained: Net) -> None:
    """Times look a tenth too short while little was measured of a network, as they may where a machine is noisy."""
    counts: dict[int, int] = {}

    def flattering(model: nn.Module, example: Any) -> float:
        size = sum(one.numel() for one in model.parameters())
        counts[size] = counts.get(size, 0) + 1
        return slow(model, example) * (0.9 if counts[size] <= 7 else 1.0)

    limit = 0.7 * slow(trained, None)
    found = shrunk(trained, esp.Latency(ms=1000 * limit, measure=flattering), rounds=1, max_drop=1.0, round_to=1)
    assert found.outcome == "reached", found
    assert 0.8 * limit <= slow(found.model, None) <= limit


def test_widths_are_rounded_to_what_is_measured_to_be_fast(trained: Net) -> None:
    def in_eights(model: nn.Module, example: Any) -> float:
        """Kernels that take as long as the next multiple of eight."""
        sizes = [-(-model.get_submodule(name).out_features // 8) * 8 for name in ("first", "second")]
        return 1e-6 * (FEATURES * sizes[0] + sizes[0] * sizes[1] + sizes[1] * CLASSES)

    found = shrunk(trained, esp.Latency(0.7, of="initial", measure=in_eights), rounds=1, max_drop=1.0)
    assert found.round_to == 8, found
    assert all(found.rounds[-1].sizes[name] % 8 == 0 for name in ("first", "second"))
    assert found.outcome == "reached"


def test_the_teacher_is_part_of_the_loss(trained: Net) -> None:
    x = TRAIN[0][:4]
    own = torch.tensor(2.0)
    assert esp.Tuning(1, 1, 1.0).loss(trained(x), x, own) is own
    tuning = esp.Tuning(1, 1, 1.0, trained, esp.Distillation(0.25, 2.0))
    assert torch.allclose(tuning.loss(trained(x), x, own), 0.75 * own, atol=1e-6), "no distance from itself"
    other = torch.zeros(4, CLASSES)
    soft = F.softmax(trained(x) / 2, -1)
    divergence = (soft * (soft.log() - math.log(1 / CLASSES))).sum(1).mean()
    assert torch.allclose(tuning.loss(other, x, own), 0.75 * own + 0.25 * 4 * divergence, rtol=1e-5)
    with pytest.raises(ShrinkError, match=r"found a tensor \(4, 1\); .*Distillation\(between=function\)"):
        tuning.loss(torch.zeros(4, 1), x, own)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rounds": 0}, "rounds: expected a whole number of at least 1, found 0"),
     ({"max_drop": -1}, "max_drop: expected a number from 0 to inf, found -1"),
     ({"mode": "best"}, "mode: expected 'max' or 'min', found 'best'"),
     ({"target": esp.Units(3)}, "target: expected Latency, FLOPs, Parameters or Memory, found Units"),
     ({"target": 0.5}, r"target: expected Latency, .* found 0.5; half of the FLOPs is FLOPs\(0.5, of='initial'\)"),
     ({"target": esp.Latency(1.0, measure=lambda m, e: 0.0)}, "a number above 0; it returned 0.0")],
)  # fmt: skip
def test_what_cannot_be_is_refused(trained: Net, options: dict[str, Any], message: str) -> None:
    target = options.pop("target", esp.Parameters(10))
    with pytest.raises(ShrinkError, match=message):
        shrunk(trained, target, **options)


def test_the_report_is_one_page_that_says_it_all(trained: Net, tmp_path: Path) -> None:
    found = shrunk(trained, esp.Parameters(0.7, of="initial"), rounds=1, max_drop=1.0)
    text = found.report(tmp_path / "report.html").read_text()
    assert found.why in text
    assert "default-src 'none'" in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert f"{found.rounds[-1].parameters:,}" in text


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("allocate", ["uniform", "gain"])
def test_an_expanded_copy_computes_the_same_and_trains_on(trained: Net, allocate: Any) -> None:
    before, outputs = sum(one.numel() for one in trained.parameters()), trained(HELD_OUT[0])
    found = esp.expand(trained, TRAIN, to_params=2.0, allocate=allocate, loss=loss_of, example=EXAMPLE)
    grown = sum(one.numel() for one in found.model.parameters())
    assert 1.9 * before <= grown <= 2 * before
    assert grown == found.after.parameters
    assert sum(one.numel() for one in trained.parameters()) == before, "a copy grew"
    assert torch.allclose(found.model(HELD_OUT[0]), outputs, atol=1e-5)
    assert found.change < 1e-6
    assert f"{grown:,} parameters" in str(found)
    optimizer = torch.optim.SGD(found.model.parameters(), 0.1)
    start = loss_of(found.model, TRAIN)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(found.model, TRAIN).backward()
        optimizer.step()
    assert loss_of(found.model, TRAIN) < start
    new = found.model.second.weight[:, HIDDEN:]  # type: ignore[index]
    assert bool((new.abs().amax(0) > 0).all()), "new units learn"


def test_with_an_optimizer_the_model_itself_grows_and_its_state_follows(trained: Net) -> None:
    model = Net()
    model.load_state_dict(trained.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    loss_of(model, TRAIN).backward()
    optimizer.step()
    outputs = model(HELD_OUT[0])
    found = esp.expand(model, EXAMPLE, to_flops=1.5, optimizer=optimizer, axes=["second"])
    assert found.model is model
    assert set(found.sizes) == {"second"}
    assert torch.allclose(model(HELD_OUT[0]), outputs, atol=1e-5)
    assert optimizer.state[model.second.weight]["exp_avg"].shape == model.second.weight.shape
    optimizer.zero_grad()
    loss_of(model, TRAIN).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "give either to_params= or to_flops="),
     ({"to_params": 2.0, "to_flops": 2.0}, "give either to_params= or to_flops="),
     ({"to_params": 0.5}, "to_params: expected a number above 1"),
     ({"to_params": 2.0, "allocate": "gain"}, "allocate='gain' compares losses"),
     ({"to_params": 2.0, "limits": {"first": (1, HIDDEN), "second": (1, HIDDEN)}}, "nothing grew")],
)  # fmt: skip
def test_what_cannot_be_expanded_is_refused(trained: Net, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ShrinkError, match=message):
        esp.expand(trained, EXAMPLE, **options)


class Drifting(nn.Module):
    """Computes something else at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) + self.calls


def test_growth_that_changes_the_outputs_is_taken_back() -> None:
    model = Drifting()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    shapes = [one.shape for one in model.parameters()]
    with pytest.raises(ShrinkError, match="is rounding, so the growth was taken back"):
        esp.expand(model, EXAMPLE, to_params=2.0, optimizer=optimizer)
    assert [one.shape for one in model.parameters()] == shapes
