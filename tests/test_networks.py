"""The generator of networks, the dropout and the oracles that the property-based tests stand on."""

import copy
import itertools
import random
import re

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from networks import OPERATORS, Network, assemble, build, networks
from oracles import (
    FixedDropout,
    FixedDropout2d,
    HeldMasks,
    aligned_ids,
    calibrate,
    call,
    disturb,
    outputs,
    relative_error,
    well_conditioned,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo_small import ZOO

SEEDS = range(300)


def _size(seed: int) -> int:
    return seed % 8


class RecordOperators(TorchDispatchMode):
    """The names of the ATen operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# --- The generator ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many() -> list[tuple[Network, Tensor]]:
    return [build(seed, _size(seed)) for seed in SEEDS]


def test_the_seed_decides_everything(many):
    for seed in (0, 7, 42, 299):
        torch.manual_seed(seed + 1)  # the global random state must not matter
        model, x = build(seed, _size(seed))
        first, first_x = many[seed]
        assert repr(model) == repr(first)
        assert torch.equal(x, first_x)
        assert model.state_dict().keys() == first.state_dict().keys()
        assert all(torch.equal(value, first.state_dict()[name]) for name, value in model.state_dict().items())
        assert torch.equal(outputs(model, x, True, 3), outputs(first, x, True, 3))
    assert len({repr(model) for model, _ in many}) > 290


def test_building_leaves_no_trace():
    state = torch.get_rng_state()
    build(3, 5)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32


def test_a_larger_network_begins_with_the_smaller():
    for seed in range(40):
        for domain in ("vector", "image", "sequence", "text"):
            small, large = build(seed, 3, domain)[0], build(seed, 4, domain)[0]
            pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(small.nodes, large.nodes, strict=False))
            assert len(list(pairs)) >= len(small.nodes) - 3  # all but what leads to the head


def test_every_operator_appears_within_300_seeds(many):
    assert set().union(*(model.operators for model, _ in many)) == OPERATORS


def test_the_operators_that_really_run_are_those_the_rules_must_know(many):
    with RecordOperators() as record, torch.no_grad():
        for model, x in many[:150]:
            outputs(model, x, True, 0)
    expected = {"convolution", "native_batch_norm", "native_group_norm", "native_layer_norm", "rsqrt"}
    expected |= {"addmm", "mm", "bmm", "embedding", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d"}
    expected |= {"cat", "split_with_sizes", "split", "slice", "unbind", "permute", "transpose", "expand", "view", "glu"}
    expected |= {"add_", "relu_", "_softmax", "masked_fill", "mul", "sigmoid", "gelu", "silu", "tanh", "elu", "mean"}
    assert expected - record.names == set()


def test_forward_is_finite_and_sane_and_each_sample_counts(many):
    for model, x in many:
        assert 8 <= x.shape[0] <= 10
        assert model.training
        for train in (False, True):
            y = outputs(model, x, train, seed=1)
            assert y.dtype == torch.float64, model
            assert y.isfinite().all(), model
            assert 1e-2 <= y.abs().max() <= 1e3, model
            assert (y - y.mean(0)).abs().max() >= 1e-2 * y.abs().max(), model


def test_nearly_every_parameter_reaches_the_output():
    """A parameter without a gradient would hide any error made in it (biases of keys have none: softmax shifts)."""
    idle, total = [], 0
    for model, x in (build(seed, _size(seed)) for seed in SEEDS[:150]):
        model.eval()
        weights = torch.linspace(0.5, 1.5, outputs(model, x, False, 0).numel(), dtype=torch.float64)
        (model(x).flatten() * weights).sum().backward()
        for name, parameter in model.named_parameters():
            total += 1
            assert parameter.grad is not None, (model, name)
            if parameter.grad.abs().max() < 1e-9:
                idle.append((model.recipe, name))
    assert len(idle) < 0.03 * total, idle


def test_structure_can_be_narrowed():
    plain = ("attention", "transformer_block", "residual", "layer_norm", "rms_norm", "batch_norm_2d", "group_norm")
    for seed in range(60):
        model, x = build(seed, 4, "image", without=plain)
        assert x.dim() == 4
        assert not model.operators & set(plain)
        assert not any(isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": -1}, "size of at least 0, found -1"),
        ({"domain": "audio"}, "found 'audio'"),
        ({"without": ["convolution"]}, r"found \['convolution'\]"),
        ({"without": ["tied_head", "untied_head"], "domain": "text", "size": 0}, "excludes them all"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(1, **arguments)


@settings(max_examples=30, deadline=None)
@given(networks(max_size=4, domains=("image", "text"), without=("attention", "transformer_block")))
def test_the_strategy_keeps_to_its_limits(example):
    model, x = example
    assert x.dim() == 4 or x.dtype == torch.int64
    assert not {"attention", "transformer_block"} & model.operators
    assert outputs(model, x, False, 0).isfinite().all()


@pytest.mark.slow
def test_the_strategy_shrinks_to_one_block():
    model, _ = hypothesis.find(
        networks(max_size=3, domains=("image",)),
        lambda example: "group_norm" in example[0].operators,
        settings=settings(max_examples=200, database=None),
        random=random.Random(0),
    )
    assert re.search(r"blocks=\[\d+\]", model.recipe)


def test_the_repr_is_the_program():
    model, x = assemble("image", base=4, blocks=[5, 8, 13], without=["tanh"])
    lines = repr(model).splitlines()
    assert lines[0] == "assemble('image', base=4, blocks=[5, 8, 13], without=['tanh'])"
    assert [line.split()[0] for line in lines[1:]] == [node.name for node in model.nodes]
    again, x_again = eval(lines[0], {"assemble": assemble})
    assert torch.equal(outputs(again, x_again, True, 0), outputs(model, x, True, 0))


# --- Dropout ---------------------------------------------------------------------------------------------------------


def _mask(dropout: nn.Module, x: Tensor, seed: int = 0, masks: HeldMasks | None = None) -> Tensor:
    return outputs(dropout, x, True, seed, masks) / x


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_masks_stay_when_units_are_appended(dim):
    small = torch.rand(8, 6, 5, 4, dtype=torch.float64) + 1
    extra = torch.rand(8, 6, 5, 4, dtype=torch.float64) + 1
    large = torch.cat([small, extra], dim)
    for dropout in (FixedDropout(0.4), FixedDropout2d(0.4)):
        mask, grown = _mask(dropout, small), _mask(dropout, large)
        assert torch.equal(grown.narrow(dim, 0, small.shape[dim]), mask)
    assert not torch.equal(_mask(FixedDropout(0.4), large).narrow(dim, small.shape[dim], small.shape[dim]), mask)


def test_masks_depend_on_seed_call_and_module():
    x = torch.ones(10, 50, dtype=torch.float64)
    twice = nn.Sequential(dropout := FixedDropout(0.1), nn.ReLU(), dropout)
    two = nn.Sequential(FixedDropout(0.1), nn.ReLU(), FixedDropout(0.1))
    once = _mask(nn.Sequential(dropout), x)
    assert torch.equal(_mask(twice, x), _mask(twice, x))
    assert not torch.equal(_mask(twice, x, seed=0), _mask(twice, x, seed=1))
    assert not torch.equal(_mask(twice, x) > 0, once > 0)  # the second call has a mask of its own
    assert not torch.equal(_mask(two, x), _mask(twice, x))


def test_masks_have_the_rate_and_the_scale():
    x = torch.ones(100, 300, dtype=torch.float64)
    mask = _mask(FixedDropout(0.3), x)
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.7}
    assert abs((mask == 0).double().mean() - 0.3) < 0.01
    assert (mask == 0).double().mean(0).std() < 0.07  # binomial: sqrt(0.3 * 0.7 / 100) = 0.046
    channels = _mask(FixedDropout2d(0.3), torch.ones(9, 7, 3, 3, dtype=torch.float64))
    assert torch.equal(channels.amax((2, 3)), channels.amin((2, 3)))
    assert 0 < (channels == 0).sum() < channels.numel()


def test_outside_of_outputs_it_is_torch_dropout():
    x = torch.randn(8, 6, 4, 4)
    for fixed, torch_s in ((FixedDropout(0.5), nn.Dropout(0.5)), (FixedDropout2d(0.5), nn.Dropout2d(0.5))):
        torch.manual_seed(2)
        expected = torch_s(x)
        torch.manual_seed(2)
        assert torch.equal(fixed(x), expected)
        assert torch.equal(fixed.eval()(x), x)


def test_held_masks_follow_units_in_the_middle():
    x = torch.randn(8, 7, 3, dtype=torch.float64)
    held, dropout = HeldMasks(), FixedDropout(0.4)
    mask = _mask(dropout, x, masks=held)
    keep = [0, 2, 3, 6]
    assert torch.equal(_mask(dropout, x[:, keep], masks=held), mask[:, keep])
    new = torch.randn(8, 2, 3, dtype=torch.float64)
    grown = torch.cat([x[:, :3], new, x[:, 3:]], 1)
    assert torch.equal(_mask(dropout, grown, masks=held)[:, [0, 1, 2, 5, 6, 7, 8]], mask)
    assert torch.equal(_mask(dropout, x, masks=held), mask)


def test_units_that_are_not_recognised_go_by_position():
    old, new = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    assert aligned_ids(old, new)[1].tolist() == [0, 1, 2]
    assert aligned_ids(old, old[:, [1, 3]])[1].tolist() == [1, 3]
    assert aligned_ids(old, torch.cat([new, old], 1))[1].tolist() == [4, 5, 6, 0, 1, 2, 3]
    assert aligned_ids(old, old[:6, 1:])[1].tolist() == [0, 1, 2]


# --- Oracles ---------------------------------------------------------------------------------------------------------


def _perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), FixedDropout(0.3), nn.Linear(6, 3))
    return nn.Sequential(*layers, FixedDropout(0.3)).double()


def _with_units(model: nn.Sequential, units: list[int]) -> nn.Sequential:
    """The perceptron with these of its hidden units, a unit as often as it is named."""
    changed = copy.deepcopy(model)
    index = torch.tensor(units)
    for tensor in (changed[0].weight, changed[0].bias, changed[1].weight, changed[1].bias):
        tensor.data = tensor.data[index]
    changed[1].running_mean, changed[1].running_var = changed[1].running_mean[index], changed[1].running_var[index]
    changed[4].weight.data = changed[4].weight.data[:, index]
    return changed


def test_the_oracle_accepts_exact_growth_and_sees_inexact_growth():
    model, x = _perceptron(), torch.randn(8, 5, dtype=torch.float64)
    disturb(model, x, seed=1)
    grown = _with_units(model, [*range(6), 2])
    inexact = copy.deepcopy(grown)
    grown[4].weight.data[:, 6] = 0
    for train in (False, True):
        before = outputs(model, x, train, 5)
        assert relative_error(outputs(grown, x, train, 5), before) < 1e-14
        assert relative_error(outputs(inexact, x, train, 5), before) > 1e-2


def test_the_oracle_needs_held_masks_for_pruning_in_the_middle():
    model, x = _perceptron(), torch.randn(8, 5, dtype=torch.float64)
    disturb(model, x, seed=1)
    model[4].weight.data[:, 2] = 0
    pruned = _with_units(model, [0, 1, 3, 4, 5])
    held = HeldMasks()
    before = outputs(model, x, True, 5, held)
    assert torch.equal(before, outputs(model, x, True, 5))
    assert relative_error(outputs(pruned, x, True, 5, held), before) < 1e-14
    assert relative_error(outputs(pruned, x, True, 5), before) > 1e-2


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("forward failed")


def test_outputs_leaves_no_trace():
    model, x = _perceptron(), torch.randn(8, 5, dtype=torch.float64)
    model[1].eval()
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    broken = nn.Sequential(*model, Failing())
    trained = outputs(model, x, True, 1)
    with pytest.raises(RuntimeError, match="forward failed"):
        outputs(broken, x, True, 1)
    assert not torch.equal(trained, outputs(model, x, False, 1))
    assert [module.training for module in model.modules()] == flags
    assert all(buffer is before[name][0] for name, buffer in model.named_buffers())
    assert all(torch.equal(buffer, before[name][1]) for name, buffer in model.named_buffers())
    assert all(module.source is None for module in model.modules() if isinstance(module, FixedDropout))
    assert torch.equal(torch.get_rng_state(), state)
    assert not trained.requires_grad


def test_outputs_seeds_every_dropout():
    model, x = nn.Sequential(nn.Dropout(0.5), FixedDropout(0.5)), torch.rand(8, 20) + 1
    assert torch.equal(outputs(model, x, True, 1), outputs(model, x, True, 1))
    assert not torch.equal(outputs(model, x, True, 1), outputs(model, x, True, 2))


def test_relative_error():
    b = torch.tensor([1.0, -4.0])
    assert relative_error(b, b) == 0.0
    assert relative_error(torch.tensor([1.0, -3.0]), b) == 0.25
    assert relative_error(b, torch.zeros(2)) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert not relative_error(torch.tensor([1.0, float("nan")]), b) < 1.0
    with pytest.raises(ValueError, match=r"found \(3,\) and \(2,\)"):
        relative_error(torch.zeros(3), b)


def test_calibration_gives_the_statistics_of_the_batch():
    model, x = _perceptron(), torch.randn(9, 5, dtype=torch.float64)
    calibrate(model, x)
    hidden = model[0](x)
    assert torch.allclose(model[1].running_mean, hidden.mean(0))
    assert torch.allclose(model[1].running_var, hidden.var(0))
    assert model[1].momentum == 0.1
    assert model.training


def test_ill_conditioned_networks_are_found():
    x = torch.randn(8, 4)
    linear = nn.Linear(4, 3)
    assert well_conditioned(linear, x)
    for scale in (1e6, 1e-6, float("nan")):
        broken = copy.deepcopy(linear)
        broken.weight.data *= scale
        broken.bias.data *= scale
        assert not well_conditioned(broken, x)
    linear.weight.data.zero_()
    assert not well_conditioned(linear, x)  # the same output for every sample


# --- The zoo ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_zoo_networks_run_and_repeat(name):
    model, inputs = ZOO[name]()
    assert model.training
    again, inputs_again = ZOO[name]()
    for train in (False, True):
        y = outputs(model, inputs, train, seed=1)
        assert y.isfinite().all()
        assert y.std() > 0
        assert torch.equal(y, outputs(again, inputs_again, train, seed=1))
    used = {p for p in model.parameters() if p.requires_grad}
    result = call(model, inputs)
    (result if isinstance(result, Tensor) else result["logits"]).sum().backward()
    assert all(p.grad is not None for p in used)
