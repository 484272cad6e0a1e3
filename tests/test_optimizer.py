"""Optimizer state follows an edit: survivors go on exactly as without it, new units take ordinary steps."""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor as HuggingFaceAdafactor

from espalier.edit.journal import Journal
from espalier.edit.optimizer import RULES, check, check_shapes, plan_state
from espalier.edit.tensors import gather
from espalier.edit.young import AGE, YOUTH, Youth
from espalier.errors import OptimizerError

Build = Callable[[object], Optimizer]


def build(name: str, **options) -> Build:
    return lambda parameters: getattr(torch.optim, name)(parameters, **options)


PER_ELEMENT: dict[str, Build] = {
    "sgd": build("SGD", lr=0.05, momentum=0.9),
    "sgd nesterov": build("SGD", lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd foreach": build("SGD", lr=0.05, momentum=0.9, foreach=True),
    "sgd fused": build("SGD", lr=0.05, momentum=0.9, fused=True),
    "adam": build("Adam", lr=1e-3, foreach=False),
    "adam foreach": build("Adam", lr=1e-3, foreach=True),
    "adam fused": build("Adam", lr=1e-3, fused=True),
    "adam maximize": build("Adam", lr=1e-3, maximize=True),
    "adamw": build("AdamW", lr=1e-3, weight_decay=0.1),
    "adamw fused amsgrad": build("AdamW", lr=1e-3, fused=True, amsgrad=True),
    "amsgrad": build("Adam", lr=1e-3, amsgrad=True),
    "nadam": build("NAdam", lr=1e-3),
    "radam": build("RAdam", lr=1e-3),
    "adamax": build("Adamax", lr=2e-3),
    "rmsprop": build("RMSprop", lr=5e-4),
    "rmsprop centered": build("RMSprop", lr=5e-4, centered=True, momentum=0.5),
    "adagrad": build("Adagrad", lr=2e-2),
    "adagrad fused": build("Adagrad", lr=2e-2, fused=True),
    "adadelta": build("Adadelta", lr=1.0),
    "asgd": build("ASGD", lr=5e-2, t0=5),
    "rprop": build("Rprop", lr=1e-3),
}
FACTORED: dict[str, Build] = {
    "adafactor": build("Adafactor", lr=1e-2),
    "adafactor of transformers": lambda parameters: HuggingFaceAdafactor(parameters, lr=None, beta1=0.9),
}
HIDDEN = 20


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16.0), torch.tensor(labels)


IMAGES, LABELS = digits()


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)).to(dtype)


def batches(seed: int, steps: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(0, len(LABELS), (64,), generator=generator)
        yield IMAGES[chosen].to(dtype), LABELS[chosen]


def train(model: nn.Module, optimizer: Optimizer, seed: int, steps: int) -> None:
    for images, labels in batches(seed, steps, next(model.parameters()).dtype):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def change(model: nn.Sequential, optimizer: Optimizer, units: list[int], zero_state: bool = False) -> None:
    """Gives the hidden axis other units: new ones (-1) with random incoming and zero outgoing weights."""
    source = np.array(units, dtype=np.int64)
    incoming = torch.randn(len(units), 64, generator=torch.Generator().manual_seed(7)) * model[0].weight.std()
    journal = Journal()
    for tensor, sources, fill in [
        (model[0].weight, (source, None), incoming),
        (model[0].bias, (source,), 0.0),
        (model[2].weight, (None, source), 0.0),
    ]:
        new = gather(tensor, sources, fill)
        grad = None if tensor.grad is None else gather(tensor.grad, sources, 0.0, like=tensor)
        state = plan_state(optimizer, tensor, sources, new)
        if zero_state:
            state = {key: gather(optimizer.state[tensor][key], sources, 0.0) for key in state if key != AGE}
        journal.replace_tensor(tensor, new, grad)
        journal.replace_state(optimizer, tensor, state)
    check_shapes(optimizer, model.named_parameters())
    Youth(optimizer).look()


def grown(count: int) -> list[int]:
    return [*range(HIDDEN), *[-1] * count]


def survivors(model: nn.Sequential) -> list[torch.Tensor]:
    return [model[0].weight[:HIDDEN], model[0].bias[:HIDDEN], model[2].weight[:, :HIDDEN], model[2].bias]


@pytest.mark.parametrize("name", PER_ELEMENT)
def test_survivors_take_the_step_that_they_would_have_taken(name):
    model = network()
    optimizer = PER_ELEMENT[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    train(model, optimizer, seed=1, steps=30)
    scheduler.step()
    (plain, plain_optimizer, plain_scheduler) = copy.deepcopy((model, optimizer, scheduler))
    change(model, optimizer, grown(7))
    before = [tensor.detach().clone() for tensor in survivors(model)]
    for each, its_optimizer, its_scheduler in (
        (model, optimizer, scheduler),
        (plain, plain_optimizer, plain_scheduler),
    ):
        train(each, its_optimizer, seed=2, steps=1)
        its_scheduler.step()
    assert model[0].weight.shape == (HIDDEN + 7, 64)
    for new, expected, old in zip(survivors(model), survivors(plain), before, strict=True):
        torch.testing.assert_close(new, expected, rtol=1e-12, atol=1e-14)
        assert not torch.equal(new, old)
    assert scheduler.get_last_lr() == plain_scheduler.get_last_lr()


@pytest.mark.parametrize("name", PER_ELEMENT)
def test_pruned_networks_step_like_the_smaller_network(name):
    """Pruning units without outgoing weights, then a step, equals the step, then pruning."""
    model = network()
    optimizer = PER_ELEMENT[name](model.parameters())
    train(model, optimizer, seed=1, steps=10)
    kept = [0, 3, 4, 11, 19]
    gone = [unit for unit in range(HIDDEN) if unit not in kept]
    with torch.no_grad():
        model[2].weight[:, gone] = 0.0
    unpruned, its_optimizer = copy.deepcopy((model, optimizer))
    change(model, optimizer, kept)
    train(model, optimizer, seed=2, steps=1)
    train(unpruned, its_optimizer, seed=2, steps=1)
    torch.testing.assert_close(model[0].weight, unpruned[0].weight[kept], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model[2].weight, unpruned[2].weight[:, kept], rtol=1e-12, atol=1e-14)
    for key, value in optimizer.state[model[2].weight].items():
        if isinstance(value, torch.Tensor) and value.dim() == 2:
            expected = its_optimizer.state[unpruned[2].weight][key][:, kept]
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*PER_ELEMENT, *FACTORED])
def test_every_optimizer_trains_on(name, dtype):
    model = network(dtype)
    optimizer = {**PER_ELEMENT, **FACTORED}[name](model.parameters())
    train(model, optimizer, seed=1, steps=5)
    for units in (grown(9), [0, 2, 28, -1], [1, 0], [-1, 1, -1]):
        change(model, optimizer, units)
        train(model, optimizer, seed=2, steps=3)
    assert model[2].weight.shape == (10, 3)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def steps_under_equal_gradients(name: str, zero_state: bool) -> list[float]:
    """RMS step of new entries over that of old ones, per tensor, when each new unit gets an old one's gradients.

    The gradients are real ones: of the surviving network on its own. With its true gradients a new unit with zero
    outgoing weights is slower, since those of its incoming weights start at zero, whatever the state is. Before, the
    network is trained until gradients no longer grow, which takes RAdam longer: old entries are divided by what theirs
    were.
    """
    model = network(torch.float32)
    optimizer = PER_ELEMENT[name](model.parameters())
    train(model, optimizer, seed=1, steps=1200 if name == "radam" else 300)
    old_network = copy.deepcopy(model)
    change(model, optimizer, grown(HIDDEN), zero_state)
    squares = torch.zeros(3, 2)
    for images, labels in batches(3, 100, torch.float32):
        with torch.no_grad():
            for parameter, value in zip(old_network.parameters(), survivors(model), strict=True):
                parameter.copy_(value)
        old_network.zero_grad()
        F.cross_entropy(old_network(images), labels).backward()
        for index, (parameter, source) in enumerate(zip(model.parameters(), old_network.parameters(), strict=True)):
            doubled = torch.cat([source.grad] * 2, 1 if index == 2 else 0)
            parameter.grad = source.grad.clone() if index == 3 else doubled
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step()
        for index, dim in enumerate((0, 0, 1)):
            step = list(model.parameters())[index].detach() - before[index]
            squares[index] += torch.stack([half.pow(2).sum() for half in step.chunk(2, dim)])
    return (squares[:, 1] / squares[:, 0]).sqrt().tolist()


@pytest.mark.parametrize(
    "name",
    [
        "sgd",
        "adam",
        "adamw",
        "amsgrad",
        "rmsprop",
        "rmsprop centered",
        "adagrad",
        "nadam",
        "radam",
        "adamax",
        "adadelta",
    ],
)
def test_new_units_take_the_steps_of_long_trained_ones(name):
    for ratio in steps_under_equal_gradients(name, zero_state=False):
        assert 1 / 1.5 < ratio < 1.5


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad"])
def test_zero_second_moments_would_make_steps_too_large(name):
    assert min(steps_under_equal_gradients(name, zero_state=True)) > 1.5


def stepped(build_optimizer: Build, shape: tuple[int, ...], sparse: bool = False) -> tuple[nn.Parameter, Optimizer]:
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = build_optimizer([parameter])
    for _ in range(3):
        parameter.grad = torch.randn(shape)
        if sparse:
            parameter.grad = parameter.grad.to_sparse()
        optimizer.step()
    return parameter, optimizer


def test_every_state_of_every_torch_optimizer_has_a_rule():
    for name in torch.optim.__all__:
        kind = getattr(torch.optim, name)
        if isinstance(kind, type) and issubclass(kind, Optimizer) and name not in ("Optimizer", "LBFGS"):
            options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
            _, optimizer = stepped(build(name, **options), (3, 4), sparse=name == "SparseAdam")
            states = set(next(iter(optimizer.state.values())))
            assert states
            assert states <= set(RULES), name


def test_planning_changes_nothing_and_keeps_what_has_no_entries():
    parameter, optimizer = stepped(PER_ELEMENT["amsgrad"], (3, 4))
    before = copy.deepcopy(optimizer.state[parameter])
    source = np.array([2, -1], dtype=np.int64)
    planned = plan_state(optimizer, parameter, (source, None), torch.zeros(2, 4))
    assert set(planned) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", AGE}
    assert torch.equal(planned[AGE], torch.tensor([[float(YOUTH)], [0.0]]).expand(2, 4))
    for key, value in before.items():
        assert torch.equal(optimizer.state[parameter][key], value)
    assert torch.equal(planned["exp_avg"], torch.stack([before["exp_avg"][2], torch.zeros(4)]))
    assert torch.equal(planned["exp_avg_sq"], torch.stack([before["exp_avg_sq"][2]] * 2))
    fresh = torch.optim.Adam([parameter])
    assert plan_state(fresh, parameter, (source, None), torch.zeros(2, 4)) == {}
    assert parameter not in fresh.state
    assert plan_state(optimizer, parameter, (None, None), parameter) == {}


@pytest.mark.parametrize("name", sorted(set(PER_ELEMENT) - {"asgd"}))
def test_new_entries_start_at_zero_or_at_the_neighbours_mean(name):
    parameter, optimizer = stepped(PER_ELEMENT[name], (3, 4))
    directions = {"momentum_buffer", "exp_avg", "grad_avg", "prev", "exp_inf"}
    planned = plan_state(optimizer, parameter, (None, np.array([1, 3, -1])), torch.zeros(3, 3))
    age = planned.pop(AGE, None)
    assert age is None or age.tolist() == [[YOUTH, YOUTH, 0.0]] * 3
    assert planned
    for key, value in planned.items():
        old = optimizer.state[parameter][key][:, [1, 3]]
        assert torch.equal(value[:, :2], old)
        expected = torch.zeros(3) if key in directions else old.mean(1)
        torch.testing.assert_close(value[:, 2], expected)
        assert key in directions or bool((value[:, 2] > 0).all())


def test_state_takes_the_layout_of_its_parameter():
    """A checkpoint may have brought it row-major, and with one input channel the two layouts look alike."""
    parameter = nn.Parameter(torch.zeros(4, 1, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.randn(4, 1, 3, 3)
    optimizer.step()
    state = optimizer.state[parameter]
    state["exp_avg_sq"] = torch.empty_strided((4, 1, 3, 3), (9, 9, 3, 1)).copy_(state["exp_avg_sq"])
    sources = (None, np.array([0, -1]), None, None)
    for value in plan_state(optimizer, parameter, sources, gather(parameter, sources, 0.0)).values():
        assert value.is_contiguous(memory_format=torch.channels_last)


def test_momentum_that_is_not_yet_there_stays_so():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], momentum=0.9)
    optimizer.state[parameter]["momentum_buffer"] = None
    assert plan_state(optimizer, parameter, (np.array([0, -1]),), torch.zeros(2)) == {}


def test_the_average_of_asgd_starts_at_the_new_values():
    parameter, optimizer = stepped(PER_ELEMENT["asgd"], (3,))
    new = torch.tensor([1.0, 2.0, 3.0])
    planned = plan_state(optimizer, parameter, (np.array([1, -1, -1]),), new)
    assert planned["ax"].tolist() == [optimizer.state[parameter]["ax"][1].item(), 2.0, 3.0]


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("shape", [(4, 3), (5, 4, 3, 3), (5, 1), (1, 5), (1, 1), (4,), (1,)])
def test_factored_state_follows_the_dimensions_that_it_kept(name, shape):
    parameter, optimizer = stepped(FACTORED[name], shape)
    sources = [np.r_[np.arange(size), -1, -1] for size in shape[:2]] + [None] * len(shape[2:])
    new = gather(parameter, sources, 0.1)
    planned = plan_state(optimizer, parameter, sources, new)
    reference, fresh = stepped(FACTORED[name], tuple(new.shape))
    expected = {
        key: value.shape
        for key, value in fresh.state[reference].items()
        if isinstance(value, torch.Tensor) and value.dim()
    }
    for key, expected_shape in expected.items():
        found = planned[key]
        assert found.shape == expected_shape
        old = optimizer.state[parameter][key]
        assert torch.equal(found[tuple(slice(size) for size in old.shape)], old)
        if key not in ("exp_avg",):
            torch.testing.assert_close(found.mean(), old.mean(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("name", ["adam", "adam fused", "sgd", "adagrad", "rmsprop centered"])
def test_a_parameter_of_one_entry_grows(name):
    parameter, optimizer = stepped(PER_ELEMENT[name], (1,))
    sources, new = (np.array([0, -1, -1]),), torch.zeros(3)
    planned = plan_state(optimizer, parameter, sources, new)
    planned.pop(AGE, None)
    assert planned
    for key, value in planned.items():
        assert value.shape == (3,)
        assert value[0] == optimizer.state[parameter][key][0]
    assert optimizer.state[parameter].get("step", torch.zeros(())).dim() == 0


def test_unknown_names_follow_their_shape_and_sign():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {
        "hessian": torch.tensor([1.0, 3.0]),
        "direction": torch.tensor([-1.0, 3.0]),
        "untouched": torch.zeros(2),
        "frozen": torch.tensor([True, False]),
        "count": torch.tensor(5.0),
        "counts": torch.tensor([[5.0]]),
        "plain": (1, "two"),
    }
    planned = plan_state(optimizer, parameter, (np.array([1, -1, 0]),), torch.zeros(3))
    assert {key: value.tolist() for key, value in planned.items()} == {
        "hessian": [3.0, 2.0, 1.0],
        "direction": [3.0, 0.0, -1.0],
        "untouched": [0.0, 0.0, 0.0],
        "frozen": [False, False, True],
    }


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("preconditioner", torch.zeros(3, 3), r"SGD state 'preconditioner' of fc.weight is a tensor of shape \(3, 3\)"),
        ("exp_avg", torch.zeros(2), r"shape \(2,\), which fits neither the parameter of shape \(3, 4\)"),
        ("history", [torch.zeros(12)], r"'history' of fc.weight is a list that holds tensors"),
        ("tree", {"left": (torch.zeros(12),)}, r"is a dict that holds tensors"),
    ],
)
def test_state_that_cannot_follow_is_refused(key, value, match):
    parameter = nn.Parameter(torch.zeros(3, 4))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter][key] = value
    with pytest.raises(OptimizerError, match=match):
        plan_state(optimizer, parameter, (np.array([0]), None), torch.zeros(1, 4), "fc.weight")
    assert optimizer.state[parameter][key] is value


def test_lbfgs_is_refused_once_it_has_state_whichever_parameter_holds_it():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.LBFGS([first, second])
    keep_two = (np.array([0, 1]),)
    assert plan_state(optimizer, second, keep_two, torch.ones(2)) == {}

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = first.pow(4).sum() + second.pow(4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(
        OptimizerError, match=r"flat vectors, which cannot follow the edit of fc\.bias; build a new LBFGS"
    ):
        plan_state(optimizer, second, keep_two, torch.ones(2), "fc.bias")


def test_check_wants_parameters_of_the_model():
    model, other = network(), network()
    check(torch.optim.SGD([model[0].weight]), model.named_parameters())
    with pytest.raises(
        OptimizerError, match=r"SGD optimizer holds 4 parameters, but none of the 4 .* before attaching"
    ):
        check(torch.optim.SGD(other.parameters()), model.named_parameters())
    with pytest.raises(OptimizerError, match=r"Expected a torch\.optim\.Optimizer, got list"):
        check(list(model.parameters()), model.named_parameters())


@pytest.mark.parametrize("name", ["adam", "adam fused", "adafactor", "adafactor of transformers", "adagrad", "sgd"])
def test_state_of_the_wrong_size_is_found(name):
    model = network()
    optimizer = {**PER_ELEMENT, **FACTORED}[name](model.parameters())
    train(model, optimizer, seed=1, steps=1)
    check_shapes(optimizer, model.named_parameters())
    state = optimizer.state[model[2].weight]
    key = next(key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim() > 0)
    expected = tuple(state[key].shape)
    state[key] = torch.zeros([size + 1 for size in expected])
    with pytest.raises(OptimizerError, match=rf"state '{key}' of 2.weight should have shape \({expected[0]},"):
        check_shapes(optimizer, model.named_parameters())
    with pytest.raises(OptimizerError, match="of parameter 2 of group 0 should have shape"):
        check_shapes(optimizer, [])


def test_fused_state_of_another_layout_is_found():
    """torch 2.13 walks all of them in memory order without looking at strides, and is silently wrong."""
    convolution = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    for fused in (False, True):
        optimizer = torch.optim.Adam(convolution.parameters(), fused=fused)
        convolution(torch.randn(1, 3, 4, 4)).sum().backward()
        optimizer.step()
        check_shapes(optimizer, convolution.named_parameters())
        state = optimizer.state[convolution.weight]
        state["exp_avg"] = state["exp_avg"].contiguous()
        if fused:
            with pytest.raises(OptimizerError, match=r"'exp_avg' of weight has strides .* laid out alike"):
                check_shapes(optimizer, convolution.named_parameters())
        else:
            check_shapes(optimizer, convolution.named_parameters())


@pytest.mark.parametrize("variant", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_steps_are_right_after_an_edit(variant, channels):
    """All variants agree with row-major, single-tensor Adam after growing, gradients in any layout."""
    torch.manual_seed(0)
    values = [torch.randn(4, channels, 3, 3) for _ in range(3)]
    sources = (np.array([0, 1, 3, -1]), np.r_[np.arange(channels), -1], None, None)
    results = []
    for format_, options in ((torch.channels_last, variant), (torch.contiguous_format, {"foreach": False})):
        parameter = nn.Parameter(torch.zeros_like(values[0], memory_format=format_))
        optimizer = torch.optim.Adam([parameter], **options)
        parameter.grad = torch.zeros_like(values[1], memory_format=format_).copy_(values[1])
        optimizer.step()
        new = gather(parameter, sources, 0.0)
        grad = gather(values[2], sources, 0.0, like=parameter)
        state = plan_state(optimizer, parameter, sources, new)
        journal = Journal()
        journal.replace_tensor(parameter, new, grad)
        journal.replace_state(optimizer, parameter, state)
        check_shapes(optimizer, [])
        optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(results[0], results[1])


def test_groups_and_their_options_go_on():
    model = network()
    groups = [
        {"params": list(model[0].parameters()), "lr": 1e-2, "weight_decay": 0.1},
        {"params": list(model[2].parameters()), "betas": (0.5, 0.9), "amsgrad": True},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.9**step])
    train(model, optimizer, seed=1, steps=3)
    scheduler.step()
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    held = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    change(model, optimizer, grown(2))
    assert held == [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    assert "max_exp_avg_sq" in optimizer.state[model[2].weight]
    train(model, optimizer, seed=1, steps=1)
    scheduler.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(1e-3 * 0.9**2)
    for group, before in zip(optimizer.param_groups, options, strict=True):
        assert {key: group[key] for key in before if key != "lr"} == {k: v for k, v in before.items() if k != "lr"}


@pytest.mark.skipif("Muon" not in torch.optim.__all__, reason="this torch has no Muon")
def test_muon_steps_on():
    model = network(torch.float32)
    optimizer = torch.optim.Muon([model[0].weight, model[2].weight], lr=1e-2)
    train(model, optimizer, seed=1, steps=3)
    change(model, optimizer, grown(4))
    assert optimizer.state[model[2].weight]["momentum_buffer"][:, HIDDEN:].abs().sum() == 0
    before = model[2].weight.detach().clone()
    train(model, optimizer, seed=1, steps=2)
    assert not torch.equal(model[2].weight, before)
