"""Gates that every sample draws for itself: exact, unbiased, and refused where they cannot be."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from loops import loss_of
from torch import Tensor, nn
from zoo_small import ZOO

import espalier as esp
from espalier.errors import MethodError
from espalier.method import Method
from espalier.parts.gates.by_sample import BySample, sample_problem, samples_of
from espalier.parts.gates.dropout import Dropout
from espalier.parts.gates.estimators import AR, ARM, DisARM
from espalier.parts.gates.expected import ExpectedCost, PerUnit
from espalier.parts.gates.gating import mean_of
from espalier.parts.gates.memory import Gated, GateMemory
from espalier.parts.gates.places import Gates
from espalier.parts.gates.settings import GateSettings
from espalier.parts.gates.stages import Stages
from espalier.parts.gates.units import gate_problem, unit_place

ALWAYS = Stages(k=1.0, start=0.0, until=1.0)
HARD = Stages(k=3.0, start=0.9, until=0.95)
SAMPLES = 5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch_of(count: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(count, size, generator=generator, dtype=torch.float64) for size in (4, 2))  # type: ignore[return-value]


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean(1)


class Run:
    """A loop on a small perceptron, with a session or without."""

    def __init__(
        self,
        method: Method | None,
        loss: Callable[[nn.Module, Any], Tensor] = losses_of,
        model: nn.Module | None = None,
    ) -> None:
        self.model = network() if model is None else model
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.batch, self.loss = batch_of(), loss
        self.structure = esp.attach(self.model, self.batch[0], optimizer=self.optimizer)
        self.session = None
        if method is not None:
            self.session = esp.Session(
                self.structure, [method], loss=loss, probe=[batch_of()], total_steps=10**6, seed=5
            )

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            plain = self.session is None
            loss = self.loss(self.model, self.batch).mean() if plain else self.session.loss(self.batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.session is not None:
                self.session.step()
        return self

    @property
    def memory(self) -> GateMemory:
        assert self.session is not None
        found = self.session._controller.running[0].memory
        assert isinstance(found, GateMemory)
        return found


def by_sample(name: str) -> tuple[BySample, Gates, dict[str, int], nn.Module, Any]:
    """All axes of a network of the zoo that may have gates of every sample."""
    model, example = ZOO[name]()
    model = model.double()
    example = tuple(one.double() if one.is_floating_point() else one for one in example)
    structure = esp.attach(model, example)
    places = []
    for axis, record in structure.axes.items():
        if record.prunable and gate_problem(structure, axis) is None:
            place = unit_place(structure, axis)
            if sample_problem(structure, place) is None:
                places.append(place)
    return BySample(structure, places), Gates(structure, places), {one.key: one.count for one in places}, model, example


# --- Exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mlp", "lenet", "resnet", "vgg_batch_norm", "densenet", "mobilenet", "unet_transposed", "vit"]
)
def test_every_sample_sees_the_network_with_its_own_gates(name):
    evaluator, gates, sizes, model, example = by_sample(name)
    assert sizes
    model.eval()
    generator, samples = torch.Generator().manual_seed(1), len(example[0])
    drawn = {
        key: (torch.rand(samples, size, generator=generator, dtype=torch.float64) < 0.6).double()
        for key, size in sizes.items()
    }
    found = evaluator.losses(lambda: model(*example).flatten(1).square().mean(1), drawn, samples)
    for sample in range(samples):
        with gates.applied({key: one[sample] for key, one in drawn.items()}):
            alone = model(*(one[sample : sample + 1] for one in example)).square().mean()
        assert torch.allclose(found[sample], alone, rtol=1e-9)
    plain = model(*example).flatten(1).square().mean(1)
    assert not torch.allclose(found, plain)
    ones = {key: torch.ones_like(one) for key, one in drawn.items()}
    assert torch.equal(evaluator.losses(lambda: model(*example).flatten(1).square().mean(1), ones, samples), plain)


def test_weights_get_the_gradient_of_the_mean_over_the_samples_own_networks():
    run = Run(esp.prune.NPN(ALWAYS, per_sample=True)).train(1)
    context = run.session._context(run.session._gated)
    gates, evaluator = run.memory.gates(context), run.memory.by_sample(context)
    assert evaluator is not None
    drawn = {"0": torch.eye(5, 6).double(), "2": (torch.rand(5, 5) < 0.7).double()}
    parameters = list(run.model.parameters())
    found = torch.autograd.grad(
        evaluator.losses(lambda: losses_of(run.model, run.batch), drawn, SAMPLES).mean(), parameters
    )
    wanted = [torch.zeros_like(one) for one in parameters]
    for sample in range(SAMPLES):
        with gates.applied({key: one[sample] for key, one in drawn.items()}):
            loss = losses_of(run.model, tuple(one[sample : sample + 1] for one in run.batch)).mean() / SAMPLES
        for total, one in zip(wanted, torch.autograd.grad(loss, parameters), strict=True):
            total += one
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_decided_gates_are_plain_training_to_the_bit():
    run = Run(esp.prune.NPN(HARD, ExpectedCost(10.0), per_sample=True)).train(20)
    plain = Run(None).train(20)
    for one, other in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_losses_of_samples_are_averaged_for_everybody_else():
    run, mean = (
        Run(esp.prune.NPN(HARD)).train(3),
        Run(esp.prune.NPN(HARD), lambda *one: losses_of(*one).mean()).train(3),
    )
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), mean.model.parameters(), strict=True))
    magnitude = Run(esp.prune.Magnitude(amount=0.3, every=esp.steps(2), start=esp.steps(2), until=1.0))
    magnitude.train(4)
    assert magnitude.session.events
    run.model.eval()
    with torch.no_grad(), run.session.decided():
        assert run.session.loss(run.batch).dim() == 0
    with pytest.raises(MethodError, match=r"\(5, 2\)"):
        mean_of(torch.zeros(5, 2))


# --- Unbiased --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [AR(), ARM(), DisARM()], ids=repr)
def test_the_gradient_of_the_logits_is_that_of_enumeration(estimator):
    method = esp.prune.NPN(
        ALWAYS, PerUnit({"*": 0.1}), estimator=estimator, axes=["2"], begin=0.6, rate=1e-12, per_sample=True
    )
    run = Run(method)
    run.session.loss(run.batch)
    many = tuple(one.repeat(80, 1) for one in run.batch)
    memory, context = run.memory, run.session._context(run.session._gated)
    phi = memory.logits["2"].clone().requires_grad_()
    p = memory.table.settings.kind.probability(phi, 1.0)
    total, gates = 0.1 * p.sum(), memory.gates(context)
    with torch.no_grad():
        for z in (torch.tensor(one).double() for one in itertools.product((0, 1), repeat=5)):
            with gates.applied({"2": z}):
                value = losses_of(run.model, run.batch).mean()
            with torch.enable_grad():
                total = total + value * torch.where(z > 0, p, 1 - p).prod()
    exact = torch.autograd.grad(total, phi)[0]
    found = []
    for step in range(300):
        run.session._step = step  # another seed each time, of one network
        run.session.loss(many)
        found.append(memory.table._slope)
    drawn = torch.stack(found)
    error = (drawn.mean(0) - exact).abs() / (drawn.std(0) / len(found) ** 0.5)
    assert float(error.max()) < 5
    assert float(exact.abs().max()) > 10 * float((drawn.std(0) / len(found) ** 0.5).max())


def test_where_samples_are_alike_the_variance_falls_with_their_number():
    spread = {}
    for per_sample in (False, True):
        run = Run(esp.prune.NPN(ALWAYS, None, axes=["2"], begin=0.6, rate=1e-12, per_sample=per_sample))
        alike = tuple(one[:1].repeat(8, 1) for one in run.batch)
        found = []
        for step in range(400):
            run.session._step = step
            run.session.loss(alike)
            found.append(run.memory.table._slope)
        spread[per_sample] = float(torch.stack(found).var(0).sum())
    assert spread[False] / spread[True] == pytest.approx(8, rel=0.35)


def test_a_strong_penalty_prunes():
    method = esp.prune.NPN(
        Stages(k=1.0, start=0.0, until=0.9), ExpectedCost(20.0), rate=0.2, low=0.3, patience=1, begin=0.6,
        per_sample=True,
    )  # fmt: skip
    run = Run(method)
    before = run.structure.cost().parameters
    for _ in range(20):
        run.train(2)
        run.session.epoch_end()
    assert run.structure.cost().parameters < before
    assert all(bool(one.isfinite().all()) for one in run.model.parameters())


# --- Refused ---------------------------------------------------------------------------------------------------------


class Swapped(nn.Module):
    """Samples along the second dimension, as many as positions."""

    def __init__(self, fold: bool) -> None:
        super().__init__()
        self.first, self.second, self.fold = nn.Linear(4, 6), nn.Linear(6, 2), fold

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.fold:
            return self.second(hidden.flatten(0, 1)).unflatten(0, (len(x), -1)).mean(1)
        return self.second(hidden.transpose(0, 1)).mean(0)


class ByHand(nn.Module):
    """Reads its units by a product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) @ self.second.weight.t()


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))


def session_of(model: nn.Module, x: Tensor, method: Method, loss: Callable[[nn.Module, Any], Tensor]) -> esp.Session:
    structure = esp.attach(model, x, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    return esp.Session(structure, [method], loss=loss, total_steps=10)


def per_row(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).flatten(1).square().mean(1)


def test_readers_that_cannot_be_told_and_samples_that_lie_elsewhere_are_refused():
    method = esp.prune.NPN(ALWAYS, axes=["first"], per_sample=True)
    both, x = esp.prune.NPN(ALWAYS, axes=["0"], per_sample=True), torch.randn(3, 3, 4)
    with pytest.raises(MethodError, match="depends on gates of other samples"):
        session_of(Swapped(fold=False), x, method, per_row).loss(x)
    with pytest.raises(MethodError, match=r"activations of shape \(9, 6\)"):
        session_of(Swapped(fold=True), x, method, per_row).loss(x)
    with pytest.raises(MethodError, match=r"second.weight reads units with gates 1 times, of which 0"):
        session_of(ByHand(), x[0], method, per_row).loss(x[0])
    with pytest.raises(MethodError, match=r"one loss per sample, shape \(3,\), found \(\)"):
        session_of(layers(), x[0], both, lambda m, b: per_row(m, b).mean()).loss(x[0])
    with pytest.raises(MethodError, match="depends on gates of other samples"):
        session_of(layers(), x[0], both, lambda m, b: per_row(m, b).cumsum(0)).loss(x[0])


def test_axes_with_norms_or_groups_have_no_gates_of_samples():
    found = {}
    for name in ("vit", "resnext", "group_norm_resnet"):
        model, example = ZOO[name]()
        structure = esp.attach(model, example)
        for axis in structure.axes:
            if gate_problem(structure, axis) is None:
                found[f"{name} {axis}"] = sample_problem(structure, unit_place(structure, axis)) or ""
    reasons = set(found.values()) - {""}
    assert any("statistics a batch shares" in one for one in reasons)
    assert any("in groups" in one or "no reader" in one or "does not read" in one for one in reasons)
    model, example = ZOO["vit"]()
    refused = next(key for key, why in found.items() if key.startswith("vit") and "statistics" in why)
    method = esp.prune.NPN(axes=[refused.removeprefix("vit ")], per_sample=True)
    structure = esp.attach(model, example, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(MethodError, match="statistics a batch shares"):
        esp.Session(structure, [method], loss=loss_of, total_steps=5).loss(example)


def test_other_kinds_and_columns_are_of_the_batch():
    with pytest.raises(MethodError, match="leave out per_sample"):
        Gated(columns=["2.weight[1]"], per_sample=True)
    method = esp.prune.NPN(ALWAYS)
    settings = GateSettings(stages=ALWAYS, kind=Dropout(0.5))
    dropped = Run(_with(method, Gated(settings, per_sample=True)))
    dropped.model.train()
    with pytest.raises(MethodError, match="use Bernoulli gates"):
        dropped.session.loss(dropped.batch)


def _with(method: Method, gated: Gated) -> Method:
    return replace(method, memory=gated)


def test_the_number_of_samples_is_the_first_size_of_all_tensors():
    assert samples_of((torch.zeros(3, 2), {"y": torch.zeros(3)}, torch.zeros(()))) == 3
    with pytest.raises(MethodError, match=r"\[3, 4\]"):
        samples_of((torch.zeros(3), torch.zeros(4)))
    with pytest.raises(MethodError, match="none"):
        samples_of({})
