"""Kinds of gates other than Bernoulli ones: hard-concrete gates and dropout, in closed form and in training."""

import itertools
import math

import pytest
import torch
from test_npn import Plain

import espalier as esp
from espalier.errors import MethodError
from espalier.parts.gates.decay import GroupDecay
from espalier.parts.gates.dropout import Dropout
from espalier.parts.gates.expected import PerUnit
from espalier.parts.gates.hard_concrete import HardConcrete
from espalier.parts.gates.kinds import Rows
from espalier.parts.gates.rows import parted
from espalier.parts.gates.stages import DECIDED, Stages

KIND = HardConcrete()
LOGITS = torch.linspace(-4, 4, 9, dtype=torch.float64)
SEARCH = Stages(start=0.0, until=0.5)


def uniforms(count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- Hard concrete ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KIND, HardConcrete(0.3, -0.2, 1.3)], ids=repr)
def test_the_probability_of_an_open_gate_is_that_of_samples(kind):
    count = 40_000
    u = uniforms(count)
    for phi in LOGITS:
        p = float(kind.probability(phi, 1.0))
        found = float((kind.sample(phi.expand(count), u) > 0).double().mean())
        assert abs(found - p) < 5 * math.sqrt(p * (1 - p) / count) + 1e-9
    assert torch.allclose(
        torch.tensor([kind.logit(float(p), 1.0) for p in kind.probability(LOGITS, 1.0)]).double(), LOGITS
    )


def test_samples_are_the_inverse_of_the_papers_distribution_function():
    """Q(s < x) = sigmoid((log x - log(1 - x)) beta - log alpha), of the stretched variable before it is rectified."""
    u = uniforms(200)
    for phi in LOGITS:
        z = KIND.sample(phi.expand(200), u)
        inside = (z > 0) & (z < 1)
        s = (z[inside] - KIND.gamma) / (KIND.zeta - KIND.gamma)
        torch.testing.assert_close(torch.sigmoid(torch.logit(s) * KIND.beta - phi), u[inside])


def test_gradients_of_gates_are_finite_differences_and_zero_where_gates_are_rectified():
    u, step = uniforms(len(LOGITS)), 1e-6
    phi = LOGITS.clone().requires_grad_()
    z = KIND.sample(phi, u)
    (found,) = torch.autograd.grad(z.sum(), phi)
    differences = (KIND.sample(LOGITS + step, u) - KIND.sample(LOGITS - step, u)) / (2 * step)
    torch.testing.assert_close(found, differences, rtol=1e-6, atol=1e-9)
    assert bool((found[(z == 0) | (z == 1)] == 0).all())
    assert bool((z == 0).any())
    assert bool((z == 1).any())
    p = KIND.probability(phi, 1.0)
    (slope,) = torch.autograd.grad(p.sum(), phi)
    torch.testing.assert_close(slope, (p * (1 - p)).detach())


def test_judged_gates_are_those_of_the_paper_and_decided_ones_have_no_slope():
    for phi, z in zip(LOGITS.tolist(), KIND.judged(LOGITS, 1.0).tolist(), strict=True):
        assert z == pytest.approx(min(1, max(0, 1.2 / (1 + math.exp(-phi)) - 0.1)))
    phi = LOGITS.clone().requires_grad_()
    p = KIND.probability(phi, DECIDED)
    assert set(p.tolist()) == {0.0, 1.0}
    assert not torch.autograd.grad(p.sum(), phi)[0].any()


def test_the_gradient_by_logits_in_a_network_is_that_of_finite_differences():
    """At given uniforms, with the penalty, in double precision."""
    run = Plain(esp.prune.L0(SEARCH, PerUnit({"*": 0.3}), axes=["0", "2"]))
    run.model.double()
    run.batch = tuple(one.double() for one in run.batch)
    context = run.session._context(run.session._gated)

    def value(move: dict[str, torch.Tensor]) -> float:
        memory = context.memory
        kept = dict(memory.table.logits)
        memory.table.logits = {key: one + move.get(key, 0.0) for key, one in kept.items()}
        found = float(run.session.loss(run.batch).detach())
        memory.table.logits = kept
        return found

    run.session.loss(run.batch)  # meets the network
    memory = context.memory
    loss = run.session.loss(run.batch)
    loss.backward()
    slopes, leaves = parted(memory.table._slope, memory.logits), dict(memory.table._leaves)
    step, compared = 1e-6, 0
    for key, one in memory.logits.items():
        for unit in range(len(one)):
            move = torch.zeros_like(one)
            move[unit] = step
            difference = (value({key: move}) - value({key: -move})) / (2 * step)
            found = float(slopes[key][unit] + leaves[key].grad[unit])
            assert found == pytest.approx(difference, rel=1e-4, abs=1e-6)
            compared += 1
    assert compared == 11


def test_gates_that_are_left_become_part_of_the_weights_when_the_search_ends():
    method = esp.prune.L0(Stages(start=0.0, until=0.2), None, every=esp.steps(1))
    run = Plain(method, total=40).train(5)
    run.memory.logits["0"][[1, 4]] = -5.0
    run.memory.logits["2"][:] = torch.tensor([-1.0, -0.5, 0.0, 1.0, 5.0]).double()
    run.train(2)
    run.session._batch = run.batch
    run.model.eval()
    with torch.no_grad():
        with run.session.decided():
            before = run.model(run.batch[0])
        assert not torch.allclose(run.model(run.batch[0]), before, atol=1e-4)
        run.session.step()
        assert run.sizes() == [4, 5]
        torch.testing.assert_close(run.model(run.batch[0]), before)
        with run.session.decided():
            assert torch.equal(run.model(run.batch[0]), run.model(run.batch[0]))
    assert run.memory.logits == {}
    assert run.memory.folding.done
    plain = Plain(None, model=run.model)
    assert float(run.session.loss(run.batch).detach()) == float(plain.loss(run.model, run.batch).detach())
    run.train(8)
    assert run.sizes() == [4, 5]


def test_an_edit_that_is_refused_or_undone_leaves_the_gates():
    run = Plain(esp.prune.L0(Stages(start=0.0, until=0.2), None, every=esp.steps(1)), total=40).train(8)
    assert run.memory.folding.done
    run.structure.undo()
    run.session.state_dict()
    assert not run.memory.folding.done
    assert len(run.memory.logits["0"]) == 6


@pytest.mark.parametrize("strength", [0.0, 30.0])
def test_l0_trains_and_its_penalty_prunes(strength):
    penalty = esp.prune.L0().memory.settings.penalty
    method = esp.prune.L0(
        Stages(start=0.0, until=0.8), type(penalty)(strength), rate=0.05, every=esp.steps(10)
    )  # fmt: skip
    run = Plain(method, total=200).train(200)
    assert (sum(run.sizes()) < 9) == (strength > 0)
    assert all(bool(one.isfinite().all()) for one in run.model.parameters())


# --- Dropout ---------------------------------------------------------------------------------------------------------


class Counting:
    """An evaluation that notes the gates it is asked about."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, gates: Rows, /) -> torch.Tensor:
        self.seen.append(gates["x"])
        return torch.zeros(())

    def aside(self, gates: Rows, /) -> torch.Tensor:
        raise AssertionError("dropout has no twin")


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("inverted", [True, False])
def test_dropout_has_its_rate_and_the_mean_that_it_is_judged_by(rate, inverted):
    kind, at, logits = Dropout(rate, inverted), Counting(), {"x": torch.zeros(50).double()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        drawn = kind.loss(logits, 1.0, at, generator)
        assert not drawn.slopes
        assert not drawn.leaves
    z = torch.stack(at.seen).double()
    count = z.numel()
    assert abs(float((z == 0).double().mean()) - rate) <= 5 * math.sqrt(rate * (1 - rate) / count)
    judged = float(kind.judged(logits["x"], 1.0)[0])
    assert judged == (1.0 if inverted else pytest.approx(1 - rate))
    assert abs(float(z.mean()) - judged) <= 5 * float(z.std()) / math.sqrt(count)


def test_dropout_of_rate_zero_is_plain_training_to_the_bit():
    run, plain = Plain(esp.prune.Dropout(0.0)).train(20), Plain(None).train(20)
    for one, other in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert run.calls <= 20 + 5


def test_dropout_of_a_half_is_gates_at_k_of_zero_but_for_the_twin():
    """The same expected loss: dropout with p = 1/2 is what k = 0 makes of any gates."""
    means = []
    for method in (
        esp.prune.Dropout(0.5, inverted=False, during=(0.0, 0.9)),
        esp.prune.NPN(Stages(0.0, 0.0, 1.0), None),
    ):
        run = Plain(method, total=10**6)
        losses = []
        for _ in range(2000):
            losses.append(float(run.session.loss(run.batch).detach()))
            run.session._step += 1
        means.append(torch.tensor(losses).double())
    difference = means[0].mean() - means[1].mean()
    assert abs(float(difference)) < 5 * math.sqrt(sum(float(one.var()) / len(one) for one in means))
    assert float(means[0].std()) > 0


def test_nothing_leaves_and_the_original_is_part_of_the_weights_at_last():
    method = esp.prune.Dropout(0.95, inverted=False, during=(0.0, 0.5), every=esp.steps(1))
    run = Plain(method, total=40).train(19)
    assert run.sizes() == [6, 5]
    run.model.eval()
    with torch.no_grad():
        with run.session.decided():
            before = run.model(run.batch[0])
        run.session.step()
        torch.testing.assert_close(run.model(run.batch[0]), before)
    assert run.memory.folding.done
    assert run.sizes() == [6, 5]


def test_wrong_settings_say_so():
    with pytest.raises(MethodError, match="rate"):
        Dropout(1.0)
    with pytest.raises(MethodError, match="zeta"):
        HardConcrete(zeta=0.9)
    with pytest.raises(MethodError, match="between 0 and 1"):
        KIND.logit(1.0, 1.0)


@pytest.mark.parametrize("every", [None, esp.steps(7)], ids=repr)
@pytest.mark.parametrize(
    "method",
    [
        lambda **options: esp.prune.Dropout(0.3, inverted=False, **options),
        lambda **options: esp.prune.L0(Stages(start=0.0, until=1.0), None, begin=0.6, **options),
        lambda **options: esp.prune.NPN(Stages(1.0, 0.0, 1.0), None, begin=0.6, **options),
    ],
    ids=["dropout", "l0", "npn"],
)
def test_a_search_to_the_end_leaves_the_network_that_it_decided_on(method, every):
    """Whatever the schedule: an event is due after the last step."""
    run = Plain(method(**({} if every is None else {"every": every})), total=39).train(38)
    for key, one in run.memory.logits.items():
        run.memory.logits[key] = torch.where(torch.arange(len(one)) == 2, -4.0, one)
    loss = run.session.loss(run.batch)
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.session.step()
    run.model.eval()
    with torch.no_grad():
        plain = run.model(run.batch[0])
        with run.session.decided():
            assert torch.equal(run.model(run.batch[0]), plain)
    assert len(run.session.events) >= 1
    assert run.session.events[-1].step == 39


# --- Group decay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learnt", [False, True])
def test_group_decay_is_the_expected_square_of_gated_weights(learnt):
    """Against enumeration, with gates on both dimensions of one parameter; and its gradients."""
    decay = GroupDecay(0.7, learnt)
    run = Plain(esp.prune.NPN(Stages(1.0, 0.0, 1.0), None, axes=["0", "2"], begin=0.6, decay=decay), total=10**6)
    run.model.double()
    run.batch = tuple(one.double() for one in run.batch)
    run.session.loss(run.batch)
    memory, table = run.memory, run.memory.table
    gates = memory.gates(run.session._context(run.session._gated))
    p = table.probabilities(0.0)
    assert not torch.equal(p["0"], torch.full((6,), 0.6).double())
    total = 0.0
    for chosen in itertools.product((0.0, 1.0), repeat=5):
        z = torch.tensor(chosen).double()
        chance = float(torch.where(z > 0, p["2"], 1 - p["2"]).prod())
        total += chance * float((run.model[4].weight.detach() * z).square().sum())
    total += float((run.model[2].weight.detach().square() * p["0"]).sum())  # by linearity
    chances = gates.factors(p)
    assert set(chances) == {"2.weight", "4.weight"}
    tensors = {name: run.model.get_parameter(name).detach() for name in chances}
    assert float(decay(tensors, chances)) == pytest.approx(0.35 * total)

    def value(key: str, unit: int, step: float) -> float:
        logits = {name: one.clone() for name, one in table.logits.items()}
        logits[key][unit] += step
        moved = {name: table.settings.kind.probability(one, 1.0) for name, one in logits.items()}
        return float(decay(tensors, gates.factors(moved)).detach())

    before = run.model[4].weight.detach().clone()
    losses = []
    for strength in (0.0, 0.7):
        method = esp.prune.NPN(
            Stages(1.0, 0.0, 1.0), None, axes=["0", "2"], begin=0.6, decay=GroupDecay(strength, learnt)
        )  # fmt: skip
        other = Plain(method, total=10**6)
        other.model.double()
        other.batch = run.batch
        loss = other.session.loss(run.batch)
        loss.backward()
        slope = other.memory.table._slope
        losses.append((float(loss.detach()), other.model[4].weight.grad.clone(), slope))
    assert torch.equal(before, other.model[4].weight.detach())
    assert losses[1][0] - losses[0][0] == pytest.approx(0.35 * total)
    torch.testing.assert_close(losses[1][1] - losses[0][1], 0.7 * chances["4.weight"] * before)
    slopes = parted(losses[1][2] - losses[0][2], table.logits)
    for key, row in slopes.items():
        for unit in range(len(row)):
            expected = (value(key, unit, 1e-6) - value(key, unit, -1e-6)) / 2e-6 if learnt else 0.0
            assert float(row[unit]) == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_the_network_is_judged_without_group_decay():
    run = Plain(esp.prune.NPN(Stages(1.0, 0.0, 1.0), None, decay=GroupDecay(0.7)))
    run.model.eval()
    with torch.no_grad():
        value = float(run.session.loss(run.batch))
        with run.session.decided():
            assert value == pytest.approx(float(run.loss(run.model, run.batch)))
    with pytest.raises(MethodError, match="strength"):
        GroupDecay(-1.0)
