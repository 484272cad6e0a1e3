"""Recommendations for whole networks: planted redundancy comes first, chance stays out, plans do what was predicted."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from snapshots import differences, snapshot
from torch import Tensor, nn
from zoo_small import ZOO

import espalier as esp
from espalier import attach
from espalier.edit.depth_edits import Remove, Replace
from espalier.edit.recipes.kinds import Factorised
from espalier.errors import MethodError
from espalier.parts.candidate import Candidate
from espalier.parts.ghosts.bottleneck import new_units
from espalier.parts.ghosts.ghosts import Ghosts
from espalier.parts.ghosts.reach import between, tried
from espalier.parts.ghosts.tiny import taken_apart, with_units
from espalier.parts.recommend.batches import halved
from espalier.parts.recommend.deepening import influences
from espalier.parts.recommend.growing import gain, slope
from espalier.parts.recommend.judging import PARTS
from espalier.parts.score import Context
from espalier.structure import Structure

Batch = tuple[Tensor, Tensor]


def entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def classes(*shape: int, count: int = 192, seed: int = 0, hidden: int = 24, noise: float = 1.0) -> Batch:
    """Inputs, and classes that a random network gives them, some of them wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = torch.randn(count, *shape)
        size = x[0].numel()
        layers = (nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, 4)) if hidden else (nn.Linear(size, 4),)
        scores = 4 * nn.Sequential(nn.Flatten(), *layers)(x).detach()
        return x, (scores + noise * torch.randn(count, 4)).argmax(1)


def trained(model: nn.Module, batch: Batch, steps: int = 150) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for step in range(steps):
        chosen = torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(step))[:64]
        optimizer.zero_grad()
        entropy(model, (batch[0][chosen], batch[1][chosen])).backward()
        optimizer.step()
    return model


def parts_of(batch: Batch, count: int = 3) -> list[Batch]:
    return list(zip(batch[0].tensor_split(count), batch[1].tensor_split(count), strict=True))


def advised(model: nn.Module, batch: Batch, **options: Any) -> tuple[Structure, esp.Recommendations]:
    structure = attach(model, batch[0][:4])
    return structure, esp.recommend(structure, loss=entropy, batches=parts_of(batch), **options)


def made(layers: Callable[[], nn.Module], batch: Batch, seed: int = 0, steps: int = 150) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return trained(layers(), batch, steps)


def perceptron(width: int = 10, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, 4))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(self.norm(x))))


def residual() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 10), *(Block(10) for _ in range(3)), nn.Linear(10, 4))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 4, 4),
    )  # fmt: skip


class Attending(nn.Module):
    """Attention with heads by view, and a feed-forward branch."""

    def __init__(self, width: int = 12, heads: int = 3, hidden: int = 16) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def attention(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).view(len(x), -1, self.heads, self.head_dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        found = F.scaled_dot_product_attention(query, key, value)
        return self.proj(found.transpose(1, 2).reshape(len(x), -1, self.heads * self.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(12, 4)
        self.blocks = nn.ModuleList([Attending() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


# -------------------------------------------------------------------------------------------- planted, and ranked first


def test_doubled_units_come_first() -> None:
    batch = classes(8)
    model = made(perceptron, batch)
    wide = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 17), nn.Tanh(), nn.Linear(17, 4))
    order = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 3, 0, 5, 7, 9, 1]
    with torch.no_grad():
        wide[0].load_state_dict(model[0].state_dict())
        wide[2].weight.copy_(model[2].weight[order])
        wide[2].bias.copy_(model[2].bias[order])
        shares = torch.tensor([1.0 / order.count(unit) for unit in order])
        wide[4].weight.copy_(model[4].weight[:, order] * shares)
        wide[4].bias.copy_(model[4].bias)
    structure, found = advised(wide, batch)
    first = found[0]
    assert (first.kind, first.site, first.is_free) == ("duplicates", "2", True)
    (edit,) = first.plan.edits
    assert len(edit.remove) == 7
    assert sorted(order[unit] for unit in range(17) if unit not in edit.remove) == list(range(10))
    before = model(batch[0])
    structure.apply(first.plan)
    torch.testing.assert_close(wide(batch[0]), before, atol=1e-3, rtol=1e-3)


def test_dead_and_unread_units_come_first() -> None:
    batch = classes(8)
    model = made(partial(perceptron, 12, nn.ReLU), batch)
    with torch.no_grad():
        model[0].weight[[2, 5]] = 0.0
        model[0].bias[[2, 5]] = torch.tensor([-1.0, 3.0])  # never on; always the same
        model[2].weight[:, 7] = 0.0
    _, found = advised(model, batch)
    first = next(one for one in found if one.site == "0")
    assert found[0].is_free
    assert (found[0].kind, first.kind) == ("dead", "dead")
    assert set(first.plan.edits[0].remove) >= {2, 5, 7}
    assert "never vary in 192 samples" in first.reason
    assert "read with weights of zero" in first.reason
    assert first.loss == pytest.approx(0.0, abs=1e-5)


def test_a_layer_of_low_rank_comes_first() -> None:
    batch = classes(8)
    thin = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 2, bias=False), nn.Linear(2, 24), nn.Tanh())
    model = made(lambda: nn.Sequential(*thin, nn.Linear(24, 4)), batch)
    whole = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))
    with torch.no_grad():
        whole[0].load_state_dict(model[0].state_dict())
        whole[2].weight.copy_(model[3].weight @ model[2].weight)
        whole[2].bias.copy_(model[3].bias)
        whole[4].load_state_dict(model[5].state_dict())
    _, found = advised(whole, batch)
    assert (found[0].kind, found[0].site, found[0].is_free) == ("factorise", "2", True)
    assert found[0].plan.depth == (Replace("2", Factorised(2)),)
    assert "2 of 24 singular values" in found[0].reason


def test_a_useless_block_comes_first() -> None:
    batch = classes(8)
    model = made(residual, batch)
    with torch.no_grad():
        model[2].outer.weight.zero_()
        model[2].outer.bias.zero_()
    structure, found = advised(model, batch)
    assert (found[0].kind, found[0].site, found[0].is_free) == ("remove", "2", True)
    assert found[0].plan.depth == (Remove("2", "entry"),)
    influence = {site: one.value for site, evidence in found.measured.items() for one in evidence
                 if one.measure == "block influence"}  # fmt: skip
    assert influence["layer 2"] == pytest.approx(0.0, abs=1e-6)
    assert min(influence["layer 1"], influence["layer 3"]) > 1e-4
    before = model(batch[0])
    structure.apply(found[0].plan)
    torch.testing.assert_close(model(batch[0]), before)


def test_two_linear_layers_in_a_row_become_one() -> None:
    batch = classes(8)
    model = made(lambda: nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 4)), batch)
    _, found = advised(model, batch)
    assert (found[0].kind, found[0].is_free) == ("fold", True)
    assert found[0].site in ("0", "1")


@pytest.mark.parametrize("criterion", ["aic-effective", "bic-effective", "loss"])
@pytest.mark.parametrize("deep", [False, True])
def test_a_bottleneck_of_one_unit_comes_first(deep: bool, criterion: str) -> None:
    batch = classes(8, count=512, hidden=0, noise=0.3)
    after = (nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 4)) if deep else (nn.Linear(1, 4),)
    layers = (nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 1), nn.Tanh(), *after)
    model = made(lambda: nn.Sequential(*layers), batch, steps=300)
    structure, found = advised(model, batch, criterion=criterion)
    first = found[0]
    assert (first.kind, first.site) == ("grow", "2")
    tests = {one.measure: one.p for one in first.evidence if one.p is not None}
    assert tests.keys() == {"gain of growing", "held-out loss"}
    assert max(tests.values()) <= 0.05
    assert first.loss + 3 * first.error < 0
    before = float(entropy(model, batch).detach())
    structure.apply(first.plan)
    assert float(entropy(model, batch).detach()) < before - 0.01


def test_dead_channels_of_a_convolution_behind_a_batch_norm() -> None:
    batch = classes(2, 6, 6)
    model = made(convolutional, batch, steps=60)
    with torch.no_grad():
        model[1].weight[[1, 4]] = 0.0
        model[1].bias[[1, 4]] = -1.0
    _, found = advised(model, batch)
    first = found[0]
    assert (first.kind, first.site, first.is_free) == ("dead", "0", True)
    assert set(first.plan.edits[0].remove) >= {1, 4}


def test_doubled_units_of_a_transformer() -> None:
    batch = classes(5, 6)
    model = made(Tokens, batch, steps=60)
    block = model.blocks[1]
    with torch.no_grad():
        for unit, other in ((3, 0), (8, 1), (9, 1), (11, 2), (14, 4), (15, 0)):
            block.up.weight[unit], block.up.bias[unit] = block.up.weight[other], block.up.bias[other]
    _, found = advised(model, batch)
    first = found[0]
    assert (first.kind, first.site, first.is_free) == ("duplicates", "blocks.1.up", True)
    assert first.plan.edits[0].remove == (3, 8, 9, 11, 14, 15)


# ----------------------------------------------------------------------------------------------------- chance stays out


def looked_at(model: nn.Module, batch: Batch, seed: int) -> Context:
    structure = attach(model, batch[0][:4])
    found = halved([batch], 2, partial(entropy, model)).found
    return Context(structure, (), 0, 0, 1.0, seed, partial(entropy, model), found[0], found)


def test_growing_is_asked_for_by_chance_as_seldom_as_the_level_says() -> None:
    """Classes that say nothing of the inputs, and a head of zeros, so that gradients do not either."""
    trials, level, rejected = 200, 0.1, 0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    context = looked_at(model, (torch.randn(48, 5), torch.randint(3, (48,))), 0)
    around = between(context.structure.topology, "0")
    for trial in range(trials):
        with torch.no_grad():
            model[0].reset_parameters()
            model[2].weight.zero_()
            model[2].bias.zero_()
        batches = [(torch.randn(24, 5), torch.randint(3, (24,))) for _ in range(2)]
        shown = Context(context.structure, (), 0, 0, 1.0, trial, context.loss, batches[0], batches)
        found = gain(shown, "0", around, 19, level)
        rejected += found.p <= level
        assert (found.units > 0) == (found.p <= level)
    assert 8 <= rejected <= 33  # binomial: 20 expected, standard deviation 4.2


def test_influence_of_a_layer_that_ignores_its_input_is_that_of_any_sample() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[2].weight.copy_(torch.eye(4))
        model[2].bias.zero_()
    context = looked_at(model, (torch.randn(40, 3), torch.randint(2, (40,))), 0)
    found = influences(context, {name: Candidate((), 0, 0, "", (name,)) for name in ("1", "2")}, 19)
    assert found["1"].value == pytest.approx(found["1"].null, rel=1e-5)
    assert found["1"].p > 0.05
    assert found["2"].value == pytest.approx(0.0, abs=1e-6)


# -------------------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize("case", ["perceptron", "convolutional", "tokens"])
def test_the_gain_of_growing_against_finite_differences(case: str) -> None:
    make, shape, axis = {
        "perceptron": (perceptron, (8,), "0"),
        "convolutional": (convolutional, (2, 6, 6), "3"),
        "tokens": (Tokens, (5, 6), "blocks.0.up"),
    }[case]
    x, y = classes(*shape, count=64)
    torch.manual_seed(0)
    model, batch = make().double().eval(), (x.double(), y)
    context = looked_at(model, batch, 0)
    around = between(context.structure.topology, axis)
    found = gain(context, axis, around, 0, 0.05)
    incoming, outgoing, values = new_units(found.wanted, 2, 1e-3)
    _, biases = tried(context, {axis: around}, context.probe[0])
    parts = {axis: taken_apart(context, around, incoming, outgoing, found.updates, biases)}
    chosen, ghosts = {axis: (0, 1)}, Ghosts(context, {axis: 2})

    def loss(amplitude: float) -> float:
        tensors = with_units(ghosts, chosen, parts, amplitude)
        return sum(float(ghosts.loss(tensors, one).detach()) for one in context.probe) / len(context.probe)

    step = 1e-5
    numerical = (loss(step) - loss(-step)) / (2 * step)
    said = slope(context, ghosts, with_units(ghosts, chosen, parts, 0.0), with_units(ghosts, chosen, parts, 1.0))
    assert said == pytest.approx(numerical, rel=1e-6)
    assert len(values) == 2


@pytest.mark.parametrize("make", [perceptron, residual])
def test_plans_change_the_loss_as_predicted(make: Callable[[], nn.Module]) -> None:
    batch = classes(8)
    model = made(make, batch)
    structure, found = advised(model, batch, criterion="bic")
    judged = halved(parts_of(batch), PARTS, partial(entropy, model))

    def loss_now() -> float:
        model.eval()
        with torch.no_grad():
            losses = torch.stack([entropy(model, one) for one in judged.judged])
        return float(losses.double() @ judged.weights)

    before, cost = loss_now(), structure.cost()
    assert found.loss == pytest.approx(before, rel=1e-6)
    tried_plans = [*found, *found.others]
    assert len({one.kind for one in tried_plans}) >= 3
    for one in tried_plans:
        structure.apply(one.plan)
        assert loss_now() - before == pytest.approx(one.loss, abs=2e-5)
        assert structure.cost().parameters - cost.parameters == one.parameters
        assert structure.cost().flops - cost.flops == one.flops
        structure.undo()
    assert loss_now() == pytest.approx(before, rel=1e-6)


def test_bic_with_all_parameters_says_smaller() -> None:
    """Whatever shrinks is recommended, whatever the loss, and nothing that grows; by the loss alone it is not."""
    batch = classes(8, count=256)
    model = made(partial(perceptron, 24), batch)
    _, by_bic = advised(model, batch, criterion="bic")
    _, by_loss = advised(model, batch, criterion="loss")
    _, by_freedom = advised(model, batch, criterion="bic-effective")
    shrinks = [one for one in (*by_bic, *by_bic.others) if one.parameters < 0]
    assert all(one in by_bic.ranked for one in shrinks)
    assert not any(one.parameters > 0 for one in by_bic)
    worst = max(one.loss for one in by_bic)
    assert worst > 0.1 * by_bic.loss
    assert all(one.loss <= 1e-4 for one in by_loss)
    assert max((one.loss for one in by_freedom), default=0.0) < worst


def test_wbic_ranks_with_the_error_of_its_sampling() -> None:
    batch = classes(8)
    model = made(partial(perceptron, 6), batch)
    _, found = advised(model, batch, criterion=esp.WBIC(draws=10, burn_in=5, most=3), layers=[])
    every = [*found, *found.others]
    assert len(every) <= 3
    for one in every:
        (evidence,) = [each for each in one.evidence if each.measure == "wbic"]
        assert evidence.value == one.criterion
        assert "learning coefficient" in evidence.words


def test_it_leaves_no_trace_and_repeats() -> None:
    batch = classes(2, 6, 6)
    model = made(lambda: nn.Sequential(*convolutional(), nn.Dropout(0.5)), batch, steps=10)
    optimizer = torch.optim.Adam(model.parameters())
    structure = attach(model, batch[0][:4], optimizer=optimizer)
    model.train()
    before, state = snapshot(model, optimizer, structure), torch.get_rng_state()
    found = esp.recommend(structure, loss=entropy, batches=parts_of(batch), permutations=19)
    assert not differences(before, snapshot(model, optimizer, structure))
    assert torch.equal(state, torch.get_rng_state())
    again = esp.recommend(structure, loss=entropy, batches=parts_of(batch), permutations=19)
    assert found.as_json() == again.as_json()


def test_only_the_kinds_that_are_asked_for_are_tried() -> None:
    batch, model = classes(8), perceptron()
    _, found = advised(model, batch, permutations=19)
    _, some = advised(model, batch, permutations=19, kinds=["grow", "redundant"])
    assert {one.kind for one in (*some.ranked, *some.others)} == {"grow", "redundant"}
    by_plan = {str(one.plan): one for one in (*found.ranked, *found.others)}
    for one in (*some.ranked, *some.others):  # and are what they are among others
        assert by_plan[str(one.plan)].as_json() == one.as_json()


def test_the_table_and_the_data_say_the_same() -> None:
    batch = classes(8)
    _, found = advised(made(perceptron, batch), batch, criterion="aic")
    text, data = str(found), found.as_json()
    assert len(found) > 0
    assert text.splitlines()[0].startswith(f"loss {found.loss:.4g}; by AIC with all parameters, 192 samples")
    for one, row in zip(found, data["recommendations"], strict=True):
        assert one.what in text
        assert one.reason in text
        assert row["parameters"] == one.parameters
        assert esp.Recommendation is type(one)
    assert f"and {len(found) - 1} more." in found.table(1)
    assert "model's output" in text
    assert data["refused"]["4"].endswith("model's output")
    assert found[0] == next(iter(found))
    assert found[:2] == found.ranked[:2]


def test_masked_weights_stay_so_and_count_nothing() -> None:
    batch = classes(8)
    model = made(perceptron, batch)
    structure = attach(model, batch[0][:4])
    structure.mask("2.weight", torch.rand(10, 10, generator=torch.Generator().manual_seed(0)) < 0.4)
    found = esp.recommend(structure, loss=entropy, batches=parts_of(batch), layers=[], permutations=19)
    for one in (*found, *found.others):
        structure.apply(one.plan)
        live = structure.masks["2.weight"]
        assert not bool(model[2].weight.detach()[~live].any())
        structure.undo()
    with pytest.raises(MethodError, match="masks hold some at zero"):
        esp.recommend(structure, loss=entropy, batches=parts_of(batch), criterion="wbic")


def test_a_network_that_is_not_trained_is_told_so() -> None:
    batch = classes(8, count=512, hidden=0, noise=0.3)
    _, found = advised(made(residual, batch, steps=3), batch, permutations=19)
    assert found.own_step < -0.05 * found.loss
    assert "not trained to the end" in str(found)
    compared = [one for each in (*found, *found.others) if each.kind == "insert" for one in each.evidence
                if one.measure == "held-out loss"]  # fmt: skip
    assert compared
    assert all(one.null == found.own_step for one in compared)


def test_limits_are_kept() -> None:
    batch = classes(8)
    model = made(partial(perceptron, 12, nn.ReLU), batch)
    with torch.no_grad():
        model[0].weight[2:9] = 0.0
    structure = attach(model, batch[0][:4], limits={"0": esp.Limits(at_least=8, multiple_of=4)})
    found = esp.recommend(structure, loss=entropy, batches=parts_of(batch), axes=["0"], layers=[])
    assert found[0].kind == "dead"
    for one in (*found, *found.others):
        structure.apply(one.plan)
        assert structure.axes["0"].size in (8, 16)
        structure.undo()


# ------------------------------------------------------------------------------------------------------------ anywhere


@pytest.mark.parametrize(
    "name",
    [
        "one_unit", "frozen_parameters", "lenet", "vgg_batch_norm", "hard_coded_view", "vit",
        *(pytest.param(name, marks=pytest.mark.slow)
          for name in ("shared_module", "densenet", "encoder_norm_first", "grouped_query", "tied_embeddings")),
    ],
)  # fmt: skip
def test_small_networks_of_every_kind(name: str) -> None:
    """Something is said of every axis, and every plan can be carried out."""
    model, example = ZOO[name]()

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return (model(*batch) - 0.3).square().mean()

    structure = attach(model, example)
    before = snapshot(model, None, structure)
    found = esp.recommend(structure, loss=loss, batches=[example, example], permutations=19)
    assert not differences(before, snapshot(model, None, structure))
    for axis in structure.axes:
        assert axis in found.measured or axis in found.refused
    every = [*found, *found.others]
    assert every
    cost = structure.cost().parameters
    for one in every:
        structure.apply(one.plan)
        assert structure.cost().parameters - cost == one.parameters
        structure.undo()


def test_wrong_arguments_are_named() -> None:
    batch = classes(8)
    structure = attach(perceptron(), batch[0][:4])
    call = partial(esp.recommend, structure, loss=entropy, batches=parts_of(batch))
    with pytest.raises(MethodError, match="no layer fits 'nothing\\*'"):
        call(layers=["nothing*"])
    with pytest.raises(MethodError, match="no axis fits the pattern"):
        call(axes=["nothing*"])
    with pytest.raises(MethodError, match="criterion: expected one of"):
        call(criterion="mdl")
    with pytest.raises(MethodError, match="found 'growing'"):
        call(kinds=["growing"])
    with pytest.raises(MethodError, match="expected 20 or more"):
        call(permutations=9)
    with pytest.raises(MethodError, match="level: expected a probability"):
        call(level=1.5)
    with pytest.raises(MethodError, match="samples: expected a whole number"):
        call(samples=1)
    with pytest.raises(MethodError, match="not finite"):
        esp.recommend(structure, loss=lambda model, one: entropy(model, one) * torch.inf, batches=parts_of(batch))
    with pytest.raises(MethodError, match="8 samples or more"):
        esp.recommend(structure, loss=entropy, batches=[])
