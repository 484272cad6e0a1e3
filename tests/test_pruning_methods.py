"""The pruning methods: penalties against autograd, selections against counting, Taylor against removing units."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from loops import loss_of, start
from torch import Tensor, nn
from zoo_small import ZOO

import espalier as esp
from espalier.errors import MethodError
from espalier.method import Penalty
from espalier.parts.budget import Parameters, Polynomial
from espalier.parts.goal import Cap, Goal, Scores
from espalier.parts.score import Context, GroupNorm
from espalier.parts.units.folded import Folded
from espalier.parts.units.penalty import L1, Polarization, RememberWeights, ScalesL1
from espalier.parts.units.polarization import polarization
from espalier.parts.units.select import Below, Global, Select
from espalier.parts.units.taylor import Taylor
from espalier.parts.units.threshold import Valley
from espalier.parts.units.unit_scale import UnitScale
from espalier.structure import Structure

NETWORKS = ["mlp", "lenet", "vgg_batch_norm", "resnet", "densenet", "vit", "llama_by_hand"]


def attached(name: str) -> Structure:
    model, example = ZOO[name]()
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 0.9)
    return esp.attach(model, example, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def free_axes(structure: Structure) -> tuple[str, ...]:
    return tuple(name for name, axis in structure.axes.items() if axis.reason is None)


def context_of(
    structure: Structure,
    memory: Any = None,
    axes: Sequence[str] | None = None,
    probe: Sequence[Any] = (),
    loss: Any = None,
) -> Context:
    names = free_axes(structure) if axes is None else tuple(axes)
    model_loss = loss or (lambda batch: loss_of(structure.model, batch))
    return Context(structure, names, 0, 0, 0.0, 7, model_loss, None, probe, 0, memory)


def goal_of(structure: Structure, *names: str) -> Goal:
    sizes = {name: structure.axes[name].size for name in names}
    least = dict.fromkeys(names, 1)
    return Goal("prune", sizes, least, sizes, sizes, Cap(Parameters(1).cost(structure.topology, names), 0))


def gradients(model: nn.Module, total: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if one is None else one for p, one in zip(model.parameters(), found, strict=True)]


# --- Penalties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("on", ["weights", "scales", "both"])
def test_l1_is_the_sum_over_the_weights_of_units(name: str, on: Any) -> None:
    structure = attached(name)
    model = structure.model
    context = context_of(structure, RememberWeights()())
    roles = {"weights": {"produce", "contract"}, "scales": {"scale"}, "both": {"produce", "contract", "scale"}}[on]
    names = {
        slot.tensor
        for axis in context.axes
        for slot in structure.axes[axis].slots
        if slot.role in roles and slot.tensor in structure.topology.parameters
    }
    if not names:
        assert L1(0.3, on)(context) is None
        return
    found = L1(0.3, on)(context)
    expected = 0.3 * sum(model.get_parameter(one).abs().sum() for one in names)  # all of them are whole tensors here
    torch.testing.assert_close(found, expected)
    for one, two in zip(gradients(model, found), gradients(model, expected), strict=True):
        torch.testing.assert_close(one, two)


def test_l1_leaves_weights_of_other_units_alone() -> None:
    """Of a layer that reads two axes side by side, only the columns of the one that the method has."""
    structure = attached("densenet")
    model = structure.model
    found = L1(1.0)(context_of(structure, axes=["dense.1.conv"]))
    made, reader = model.dense[1].conv.weight, model.dense[2].conv.weight
    first = reader.shape[1] - made.shape[0]
    columns = reader[:, first:]
    transition = model.transition[2].weight
    inside = slice(first, first + made.shape[0])
    torch.testing.assert_close(found, made.abs().sum() + columns.abs().sum() + transition[:, inside].abs().sum())
    (grad,) = torch.autograd.grad(found, reader)
    assert torch.equal(grad[:, first:], columns.sign())
    assert not grad[:, :first].any()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "make", [lambda: ScalesL1(0.2), lambda: Polarization(0.2, 1.3), lambda: Polarization(0.2, 1.3, (0.5, 2))]
)
def test_penalties_on_scales_are_those_of_autograd(name: str, make: Any) -> None:
    """All scales in a row, folded ones among them; weights by the FLOPs of a unit."""
    penalty, structure = make(), attached(name)
    model = structure.model
    memory = Folded(0.5, most=1.0)()
    context = context_of(structure, memory)
    found = penalty(context)
    scales = memory.scales(context)
    row = torch.cat([one.flatten() for one in scales.parameters()] + memory.values()) if scales.parameters() else None
    if row is None:
        assert name in ("mlp", "lenet")
        assert found is None
        return
    if isinstance(penalty, ScalesL1):
        expected = 0.2 * row.abs().sum()
    else:
        weights = None if penalty.by_flops is None else scales.weights(penalty.by_flops, row)
        expected = 0.2 * polarization(row, 1.3, weights)
    torch.testing.assert_close(found, expected)
    for one, two in zip(gradients(model, found), gradients(model, expected), strict=True):
        torch.testing.assert_close(one, two)


def test_the_mean_is_over_scales_of_norms_and_folded_ones() -> None:
    """By hand: a network with 8, 12, 12 and 16 scales of norms and 20 folded ones, at 0.5."""
    structure = attached("vgg_batch_norm")
    memory = Folded(0.5, most=1.0, rate=1.0, momentum=0.0)()
    context = context_of(structure, memory)
    Polarization(0.01, 1.3)(context)
    norms = [module.weight for module in structure.model.modules() if isinstance(module, nn.BatchNorm2d)]
    row = torch.cat([*norms, torch.full((20,), 0.5)]).detach().requires_grad_()
    assert len(row) == 8 + 12 + 12 + 16 + 20
    (slope,) = torch.autograd.grad(0.01 * polarization(row, 1.3), row)
    memory.after_step(context)
    torch.testing.assert_close(memory.scale("classifier.0"), 0.5 - slope[-20:])


def test_weights_by_flops_are_linear_in_what_a_unit_costs() -> None:
    structure = attached("vgg_batch_norm")
    memory = Folded(0.5, most=1.0)()
    scales = memory.scales(context_of(structure, memory))
    weights = scales.weights((1.0, 3.0), torch.zeros(()))
    flops = {axis: structure.axes[axis].unit_cost.flops for axis in free_axes(structure)}
    least, most = min(flops.values()), max(flops.values())
    expected = [
        1 + 2 * (flops[axis] - least) / (most - least) for axis in flops for _ in range(structure.axes[axis].size)
    ]
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize("penalty", [ScalesL1(1e-3), Polarization(1e-3, 1.2)])
def test_a_penalty_on_scales_without_its_memory_is_refused(penalty: Penalty) -> None:
    structure = attached("resnet")
    with pytest.raises(MethodError, match=r"needs its memory, found None: give the method memory=Folded"):
        penalty(context_of(structure))
    with pytest.raises(MethodError, match=r"need the memory Folded\(\.\.\.\), found None"):
        UnitScale()(context_of(structure), goal_of(structure, "conv1"))


@pytest.mark.parametrize("name", ["mlp", "lenet", "vgg_batch_norm", "resnet", "vit"])
@pytest.mark.parametrize("method", [esp.prune.L1, esp.prune.Slimming, esp.prune.Polarization])
def test_penalties_train_and_leave_no_hooks(name: str, method: Any) -> None:
    def trained() -> Any:
        run = start(name, [method(strength=1e-3, start=0.9, until=1.0, every=esp.steps(100))], total_steps=1000)
        return run.train(6)

    run, again = trained(), trained()
    model = run.structure.model
    plain = start(name, [], total_steps=1000).train(6).structure.model
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    differ = [not torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True)]
    assert any(differ)
    for p, q in zip(model.parameters(), again.structure.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_penalty_scales_with_the_loss() -> None:
    """As with a loss that is multiplied before it is differentiated, for half precision."""
    structure = attached("resnet")
    memory = Folded(0.5, most=1.0)()
    found = Polarization(0.1, 1.2)(context_of(structure, memory))
    once = gradients(structure.model, found)
    again = gradients(structure.model, 8 * Polarization(0.1, 1.2)(context_of(structure, memory)))
    for one, two in zip(once, again, strict=True):
        torch.testing.assert_close(8 * one, two)


# --- What penalties do -----------------------------------------------------------------------------------------------


def polarized(strength: float) -> Tensor:
    """All scales of a small VGG, folded ones too, after training with the penalty."""
    structure = attached("vgg_batch_norm")
    method = esp.prune.Polarization(strength=strength, t=1.2, start=0.9, until=1.0, every=esp.steps(10**6))
    session = esp.Session(structure, [method], loss=loss_of, total_steps=10**6)
    batch = ZOO["vgg_batch_norm"]()[1]
    for _ in range(300):
        session.optimizer.zero_grad()
        session.loss(batch).backward()
        session.optimizer.step()
        session.step()
    norms = [module.weight.detach() for module in structure.model.modules() if isinstance(module, nn.BatchNorm2d)]
    return torch.cat([*norms, session._controller.running[0].memory.scale("classifier.0")])


def test_polarized_scales_are_kept_in_bounds_and_part() -> None:
    row, plain = polarized(0.01), polarized(0.0)
    assert row.min() >= 0
    assert row.max() <= 1
    border = Valley()(row)
    small, large = row[row < border], row[row >= border]
    assert len(small) > 20
    assert len(large) > 10
    assert large.min() - small.max() > 0.2
    assert plain.sort().values.diff().max() < 0.2


def test_l1_makes_the_network_sparse() -> None:
    def small(strength: float) -> int:
        run = start("mlp", [esp.prune.L1(strength=strength, start=0.9, every=esp.steps(10**6), until=1.0)], 10**6)
        run.train(150)
        return sum(int((one.abs() < 0.02).sum()) for one in run.structure.model.parameters())

    assert small(3e-2) > 2 * small(0.0)


# --- Selections ------------------------------------------------------------------------------------------------------


def test_slimming_takes_a_percentile_of_absolute_scales_whatever_units_cost() -> None:
    """The smallest |scale| of all axes go; a negative scale is not a small one."""
    structure = attached("vgg_batch_norm")
    model = structure.model
    axes = ["features.0", "features.4", "features.7"]
    norms = [model.features[1], model.features[5], model.features[8]]
    draw = torch.Generator().manual_seed(3)
    for norm in norms:
        with torch.no_grad():
            norm.weight.copy_(2 * torch.rand(len(norm.weight), generator=draw) - 1)
    memory = Folded()()
    context = context_of(structure, memory, axes)
    scores = UnitScale()(context, goal_of(structure, *axes))
    row = torch.cat([norm.weight.detach().abs() for norm in norms])
    torch.testing.assert_close(torch.cat([scores.values[axis] for axis in axes]).float(), row)
    sizes = {axis: structure.axes[axis].size for axis in axes}
    units = Polynomial({(axis,): 1 for axis in axes})
    goal = Goal("prune", sizes, dict.fromkeys(axes, 1), sizes, sizes, Cap(units, 32 - 13))
    chosen = Global(per_cost=False)(scores, goal)
    border = row.sort().values[13]
    for axis, norm in zip(axes, norms, strict=True):
        assert chosen[axis] == tuple((norm.weight.abs() < border).nonzero().flatten().tolist())
    assert any(norm.weight[list(chosen[axis])].max() > 0 for axis, norm in zip(axes, norms, strict=True))


def two_axes(excess: int) -> tuple[Scores, Goal]:
    """Eight cheap units, three of them below the valley, and four dear ones, two of them below."""
    scores = Scores(
        {
            "cheap": torch.tensor([0.02, 0.8, 0.9, 0.01, 0.7, 0.05, 0.95, 1.0]),
            "dear": torch.tensor([0.03, 0.9, 1.0, 0.04]),
        }
    )
    cost = Polynomial({("cheap",): 1, ("dear",): 20})
    sizes = {"cheap": 8, "dear": 4}
    return scores, Goal("prune", sizes, dict.fromkeys(sizes, 1), sizes, sizes, Cap(cost, cost.at(sizes) - excess))


@pytest.mark.parametrize(
    ("excess", "expected"),
    [
        (1, {"cheap": (3,)}),
        (2, {"cheap": (0, 3)}),
        (22, {"cheap": (0, 3), "dear": (0,)}),
        (43, {"cheap": (0, 3, 5), "dear": (0, 3)}),
        # all that is small is gone: the others by score per cost, 0.9 / 20 < 0.7
        (63, {"cheap": (0, 3, 5), "dear": (0, 1, 3)}),
        (64, {"cheap": (0, 3, 4, 5), "dear": (0, 1, 3)}),
    ],
)
def test_units_below_the_valley_go_first_and_the_budget_decides_how_many(excess: int, expected: Any) -> None:
    scores, goal = two_axes(excess)
    assert Below(Valley())(scores, goal) == expected


@pytest.mark.parametrize("select", [Below(Valley()), Global(per_cost=False)])
@pytest.mark.parametrize("fraction", [0.9, 0.6, 0.3])
def test_selections_of_scales_keep_to_the_budget(select: Select, fraction: float) -> None:
    structure = attached("resnet")
    names = free_axes(structure)
    sizes = {name: structure.axes[name].size for name in names}
    held = {name: axis.size for name, axis in structure.axes.items() if name not in names}
    cost = Parameters(1).cost(structure.topology, names).fixed(held)
    goal = Goal("prune", sizes, dict.fromkeys(names, 1), sizes, sizes, Cap(cost, int(fraction * cost.at(sizes))))
    draw = torch.Generator().manual_seed(0)
    chosen = select(Scores({name: torch.rand(size, generator=draw) for name, size in sizes.items()}), goal)
    left = {name: size - len(chosen.get(name, ())) for name, size in sizes.items()}
    assert cost.at(left) <= goal.target.most
    for name in chosen:
        assert cost.at({**left, name: left[name] + 1}) > goal.target.most


def test_a_selection_by_threshold_is_for_pruning_only() -> None:
    scores, goal = two_axes(1)
    growing = Goal("grow", goal.sizes, goal.least, goal.most, goal.reference, goal.target)
    with pytest.raises(MethodError, match="Below chooses units to remove"):
        Below(Valley())(scores, growing)


@pytest.mark.parametrize("method", [esp.prune.Slimming, esp.prune.Polarization])
def test_a_scope_that_is_asked_for_replaces_the_methods_own(method: Any) -> None:
    assert method(scope="axis").select == esp.prune.Magnitude().select
    assert method(scope="global").select == Global()
    assert method().select not in (method(scope="axis").select, method(scope="global").select)


# --- Scores ----------------------------------------------------------------------------------------------------------


def test_filters_are_judged_by_the_weights_that_make_a_unit() -> None:
    structure = attached("resnet")
    model = structure.model
    scores = GroupNorm("l1", "made")(context_of(structure), goal_of(structure, "conv1", "layers.0.0.conv1")).values
    own = model.layers[0][0].conv1.weight.detach().abs().sum((1, 2, 3))
    torch.testing.assert_close(scores["layers.0.0.conv1"].float(), own / own.mean())
    made = [model.conv1, model.layers[0][0].conv2, model.layers[0][1].conv2]
    sums = [one.weight.detach().abs().sum((1, 2, 3)) for one in made]
    torch.testing.assert_close(scores["conv1"].float(), torch.stack([one / one.mean() for one in sums]).mean(0))


def test_a_folded_scale_counts_with_the_weights_behind_it() -> None:
    """Small weights behind a large scale are worth as much as large ones behind a small scale."""
    structure = attached("mlp")
    memory = Folded()()
    context = context_of(structure, memory)
    memory.scales(context)
    memory.restore({"scale": {"0": [0.5] * 6 + [1.0] * 6}, "velocity": {"0": [0.0] * 12}})
    weight = structure.model[2].weight
    with torch.no_grad():
        weight.fill_(0.1)
    scores = UnitScale()(context, goal_of(structure, "0")).values["0"]
    torch.testing.assert_close(scores, torch.full((12,), 1 / 1.5, dtype=torch.float64))
    with torch.no_grad():
        weight[:, 0] = 0.0
    assert UnitScale()(context, goal_of(structure, "0")).values["0"][0] == 0


def test_dead_weights_have_a_score_of_their_scale() -> None:
    structure = attached("mlp")
    nn.init.zeros_(structure.model[2].weight)
    memory = Folded()()
    scores = UnitScale()(context_of(structure, memory), goal_of(structure, "0")).values["0"]
    assert scores.tolist() == [1.0] * 12


# --- Taylor ----------------------------------------------------------------------------------------------------------


def without(structure: Structure, axis: str, unit: int, loss: Any) -> float:
    """The loss of the network without a unit, which is put back."""
    structure.prune(axis, [unit])
    structure.model.eval()
    with torch.no_grad():
        found = float(loss(structure.model))
    structure.model.train()
    structure.undo()
    return found


def quadratic() -> tuple[Structure, Any, Any]:
    """A linear network whose loss is a quadratic in the weights that read a unit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)

    def linear(net: nn.Module) -> Tensor:
        return (net(x) * y).mean()

    def squares(net: nn.Module) -> Tensor:
        return (net(x) - y).square().mean()

    return esp.attach(model, x, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)), linear, squares


def test_the_first_order_is_the_change_of_a_linear_loss() -> None:
    structure, linear, _ = quadratic()
    now = linear(structure.model).item()
    changes = torch.tensor([without(structure, "0", unit, linear) - now for unit in range(7)], dtype=torch.float64)
    for order, expected in (("absolute", changes.abs()), ("squared", changes.square())):
        context = context_of(structure, probe=[None], loss=lambda batch: linear(structure.model))
        found = Taylor(order)(context, goal_of(structure, "0")).values["0"]
        torch.testing.assert_close(found, expected)


def test_on_a_quadratic_the_error_is_the_second_order_term() -> None:
    """L(without) - L = -<g, w> + 1/2 w H w, where the last is the mean square of what the unit added to the outputs."""
    structure, _, squares = quadratic()
    model = structure.model
    now = squares(model).item()
    context = context_of(structure, probe=[None], loss=lambda batch: squares(model))
    found = Taylor("absolute")(context, goal_of(structure, "0")).values["0"]
    squares(model).backward()
    first = (model[1].weight.grad * model[1].weight.detach()).sum(0)
    torch.testing.assert_close(found, first.abs())
    hidden: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda module, inputs, output: hidden.append(output.detach()))
    squares(model)
    handle.remove()
    for unit in range(7):
        second = (hidden[0][:, unit, None] * model[1].weight.detach()[:, unit]).square().mean()
        change = without(structure, "0", unit, squares) - now
        assert change == pytest.approx(float(second - first[unit]), rel=1e-9)


def test_taylor_averages_over_batches_after_the_square() -> None:
    structure = attached("lenet")
    batches = [(torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(seed)),) for seed in range(3)]
    goal = goal_of(structure, "conv1", "fc1")
    alone = [Taylor()(context_of(structure, probe=[one]), goal).values for one in batches]
    together = Taylor(batches=3)(context_of(structure, probe=batches), goal).values
    first = Taylor(batches=1)(context_of(structure, probe=batches), goal).values
    for axis in goal.sizes:
        torch.testing.assert_close(together[axis], torch.stack([one[axis] for one in alone]).mean(0))
        assert torch.equal(first[axis], alone[0][axis])


def test_without_groups_every_weight_counts_by_itself() -> None:
    structure = attached("mlp")
    batch = ZOO["mlp"]()[1]
    context = context_of(structure, probe=[batch])
    weight = structure.model[2].weight
    structure.model.eval()
    (grad,) = torch.autograd.grad(loss_of(structure.model, batch), weight)
    product = (grad * weight).detach().double()
    for order, expected in (("absolute", product.abs()), ("squared", product.square())):
        found = Taylor(order, group=False)(context, goal_of(structure, "0")).values["0"]
        torch.testing.assert_close(found, expected.sum(0))


@pytest.mark.parametrize("name", ["vgg_batch_norm", "vit", "llama_by_hand", "frozen_parameters"])
def test_taylor_leaves_no_trace(name: str) -> None:
    structure = attached(name)
    model, batch = structure.model, ZOO[name]()[1]
    model.train()
    loss_of(model, batch).backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5)
    Taylor()(context_of(structure, probe=[batch]), goal_of(structure, *free_axes(structure)))
    assert torch.equal(torch.rand(3), torch.manual_seed(5) and torch.rand(3))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(module.training for module in model.modules())
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)


def test_taylor_without_any_batch_is_refused() -> None:
    structure = attached("mlp")
    with pytest.raises(MethodError, match="there is no batch to judge units by"):
        Taylor()(context_of(structure), goal_of(structure, "0"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Taylor(order="third"), "order: expected 'absolute' or 'squared', found 'third'"),
        (lambda: Taylor(batches=0), "batches: expected a whole number of at least 1, found 0"),
        (lambda: L1(-1.0), r"strength: expected a number of at least 0, found -1\.0"),
        (lambda: L1(1.0, "biases"), "on: expected one of weights, scales, both, found 'biases'"),
        (lambda: GroupNorm("l1", "read"), "side: expected 'all' or 'made', found 'read'"),
    ],
)
def test_wrong_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make()
