"""Recipes of layers: what they build is what they promise, in train and in eval mode, in double precision."""

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from zoo_small import ZOO

import espalier as esp
from espalier.edit.depth_edits import Remove, Replace
from espalier.edit.low_rank import factors, rank_by_energy
from espalier.edit.recipes.base import Lookup, Recipe, recipe_of
from espalier.edit.recipes.copies import CopyOf
from espalier.edit.recipes.defaults import default_layer
from espalier.edit.recipes.factorised import Factorised
from espalier.edit.recipes.folded import Folded
from espalier.edit.recipes.folding import fold_plan
from espalier.edit.recipes.identity import Identity
from espalier.edit.recipes.residual import ResidualLayer
from espalier.edit.residual import Residual
from espalier.errors import MethodError, PlanError
from espalier.graph.topology import infer
from espalier.parts.depth.rank import rank_by_error, whitened_factors

Make = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def lookup(model: nn.Module) -> Lookup:
    modules = dict(model.named_modules())
    return lambda path: modules[path]


def randomised(model: nn.Module) -> nn.Module:
    """With statistics, scales and shifts that are not those of a fresh model."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.3)
                if tensor.dim() > 1:
                    tensor.sub_(0.8)
    return model


def promised(recipe: Recipe, model: nn.Module, example: Any, at: str, *, before: bool = False) -> str:
    return recipe.promise(infer(model, example), lookup(model), at, before=before).kind


# --- All kinds -------------------------------------------------------------------------------------------------------

RECIPES = [
    CopyOf("block.0", ("weight", "bias")),
    Identity(8),
    Identity(8, (3, 5), "relu", bias=False),
    ResidualLayer(8, 12, (3,), "group", "silu", groups=2, eps=1e-6, pointwise_out=False, seed=4),
    Factorised(3),
    Folded("fc1"),
    Folded("bn1", after=True),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda one: one.kind)
def test_recipes_come_back_from_json(recipe: Recipe) -> None:
    found = recipe_of(json.loads(json.dumps(recipe.to_json())))
    assert found == recipe
    assert type(found) is type(recipe)
    assert hash(found) == hash(recipe)


SOURCES = nn.ModuleDict({"linear": nn.Linear(6, 8), "conv": nn.Conv2d(6, 8, 3), "first": nn.Linear(8, 6)})


@pytest.mark.parametrize(
    ("recipe", "at"),
    [
        (Identity(8, (3, 3), "relu"), "conv"),
        (ResidualLayer(8, 5, (3, 3), "batch"), "conv"),
        (ResidualLayer(8, 5, None, "rms", "gelu"), "linear"),
        (Factorised(3), "linear"),
        (Factorised(3), "conv"),
        (Folded("first"), "linear"),
        (CopyOf("conv"), "conv"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_new_layers_are_as_those_around_them(recipe: Recipe, at: str, dtype: torch.dtype, training: bool) -> None:
    model = copy.deepcopy(SOURCES).to(dtype).train(training)
    random_state = torch.get_rng_state()
    with torch.device("meta"):  # what the user has set as default device does not count
        new, again = (recipe.build(lookup(model), at) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {tensor.dtype for tensor in new.parameters()} == {dtype}
    assert {tensor.device.type for tensor in new.state_dict().values()} == {"cpu"}
    assert all(module.training is training for module in new.modules())
    assert all(
        parameter.requires_grad and parameter.is_leaf and parameter.grad is None for parameter in new.parameters()
    )
    old = {id(tensor) for tensor in model.parameters()}
    assert old.isdisjoint(id(tensor) for tensor in new.parameters())
    for (name, left), (other, right) in zip(new.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(left, right)
        assert left.data_ptr() != right.data_ptr()


def test_layers_without_parameters_take_their_type_from_the_layer_before() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3).to(torch.float16))
    assert Identity(4).build(lookup(model), "1").weight.dtype == torch.float64
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 3).to(torch.float16))
    assert Identity(4).build(lookup(model), "0").weight.dtype == torch.float16


# --- Identity --------------------------------------------------------------------------------------------------------

PLACES = [
    ((5, 8), None),
    ((2, 5, 8), None),
    ((2, 8, 7), (3,)),
    ((2, 8, 7, 6), (3, 5)),
    ((2, 8, 7, 6), (1, 1)),
    ((2, 8, 4, 5, 6), (3, 1, 5)),
]


def bare(shape: tuple[int, ...], kernel: tuple[int, ...] | None) -> nn.Module:
    """A network that gives a value of that shape at ``0``, then one that has been through a ReLU at ``1``."""
    if kernel is None:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    make = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
    return nn.Sequential(make(8, 8, 1), nn.ReLU(), make(8, 3, 1))


@pytest.mark.parametrize(("shape", "kernel"), PLACES)
@pytest.mark.parametrize("training", [True, False])
def test_identities_are(shape: tuple[int, ...], kernel: tuple[int, ...] | None, training: bool) -> None:
    model, x = bare(shape, kernel).train(training), torch.randn(shape)
    new = Identity(8, kernel).build(lookup(model), "0")
    assert torch.equal(new(x), x)
    assert promised(Identity(8, kernel), model, x, "0") == "exact"
    assert promised(Identity(8, kernel), model, x, "0", before=True) == "exact"
    new(x).square().sum().backward()
    assert all(bool((one.grad != 0).any()) for one in new.parameters())


@pytest.mark.parametrize(("shape", "kernel"), PLACES)
def test_identities_with_an_activation_keep_its_results(shape: tuple[int, ...], kernel: tuple[int, ...] | None) -> None:
    model, x = bare(shape, kernel), torch.randn(shape)
    for name, function in (("relu", F.relu), ("relu6", F.relu6), ("hardtanh", F.hardtanh)):
        settled = function(3 * x)
        assert torch.equal(Identity(8, kernel, name, bias=False).build(lookup(model), "0")(settled), settled)
    changed = Identity(8, kernel, "relu").build(lookup(model), "0")
    assert not torch.equal(changed(x), x)
    assert promised(Identity(8, kernel, "relu"), model, x, "0") == "changing"
    assert promised(Identity(8, kernel, "gelu"), model, x, "1") == "changing"
    assert promised(Identity(8, kernel, "relu6"), model, x, "1") == "changing"
    for at, before in (("1", False), ("2", True)):
        assert promised(Identity(8, kernel, "relu"), model, x, at, before=before) == "exact"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Identity(8, (2, 3)), "odd kernel sizes, found \\(2, 3\\)"),
        (Identity(8, (3, 3), "relux"), "no activation 'relux'; known are elu"),
        (Identity(0), "features of at least 1, found 0"),
        (Identity(8.0), "features of at least 1, found 8.0"),
        (ResidualLayer(8, 0), "features of at least 1, found 0"),
        (ResidualLayer(8, 4, None, "group"), "expected batch or layer or rms"),
        (ResidualLayer(8, 4, (3,), "layer"), "expected batch or group"),
        (ResidualLayer(8, 4, (3,), "group", groups=3), "3 groups does not divide 8"),
        (ResidualLayer(8, 4, (3,), "power"), "no norm 'power'"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_made_are_refused(recipe: Recipe, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        recipe.build(lookup(SOURCES), "linear")


@pytest.mark.parametrize("recipe", [Identity(9), Identity(8, (3,)), ResidualLayer(9, 2), ResidualLayer(8, 2, (3, 3))])
def test_layers_that_do_not_fit_the_place_are_refused(recipe: Recipe) -> None:
    model = bare((2, 5, 8), None)
    with pytest.raises(PlanError, match=r"after 0: the layer takes values of shape .*, found \[2, 5, 8\]"):
        promised(recipe, model, torch.randn(2, 5, 8), "0")


# --- Residual branches -----------------------------------------------------------------------------------------------

NORMS = {
    None: lambda x: x,
    "batch": lambda x: F.batch_norm(x, None, None, training=True),
    "layer": lambda x: F.layer_norm(x, (8,)),
    "rms": lambda x: F.rms_norm(x, (8,), eps=1e-5),
    "group": lambda x: F.group_norm(x, 4),
}


def fits(norm: str | None, shape: tuple[int, ...], kernel: tuple[int, ...] | None) -> bool:
    if norm == "batch":
        return kernel is not None or len(shape) == 2
    return norm is None or (norm == "group") is (kernel is not None)


BRANCHES = [(*place, norm) for place in PLACES for norm in NORMS if fits(norm, *place)]


@pytest.mark.parametrize(("shape", "kernel", "norm"), BRANCHES)
def test_residual_branches_begin_as_nothing_and_learn(
    shape: tuple[int, ...], kernel: tuple[int, ...] | None, norm: str | None
) -> None:
    x, model = torch.randn(shape), bare(shape, kernel)
    recipe = ResidualLayer(8, 12, kernel, norm, "gelu", groups=4 if norm == "group" else 1, pointwise_out=False)
    assert promised(recipe, model, x, "1") == "exact"
    new = recipe.build(lookup(model), "1")
    assert isinstance(new, Residual)
    for mode in (True, False):
        assert torch.equal(new.train(mode)(x), x)
    new.train()
    new(x).square().sum().backward()
    assert all(bool((one.grad != 0).any()) for one in new.out.parameters())
    assert all(bool((one.grad == 0).all()) for one in new.mid.parameters())
    torch.optim.SGD(new.parameters(), lr=0.01).step()
    new.zero_grad()
    result = new(x)
    result.square().sum().backward()
    assert all(bool((one.grad != 0).any()) for one in new.mid.parameters())

    def run(layer: Any, values: Tensor) -> Tensor:
        if kernel is None:
            return values @ layer.weight.T + layer.bias
        convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
        return convolution(values, layer.weight, layer.bias, padding="same")

    # the norm as well has made a step
    normed = NORMS[norm](x)
    if norm is not None:
        wide = (8,) if norm in ("layer", "rms") else (8, *(1 for _ in shape[2:]))
        normed = normed * new.norm.weight.view(wide) + (new.norm.bias.view(wide) if norm != "rms" else 0)
    expected = x + run(new.out, F.gelu(run(new.mid, normed)))
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_residual_branches_can_be_copied_and_saved() -> None:
    new = ResidualLayer(8, 12, (3, 3), "batch").build(lookup(copy.deepcopy(SOURCES).double()), "conv")
    torch.nn.init.normal_(new.out.weight)
    x = torch.randn(2, 8, 5, 5)
    buffer = io.BytesIO()
    torch.save(new, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other.eval()(x), new.eval()(x))


def test_seeds_of_residual_branches_make_other_weights() -> None:
    first, second = (ResidualLayer(8, 12, seed=seed).build(lookup(SOURCES), "linear") for seed in (0, 1))
    assert not torch.equal(first.mid.weight, second.mid.weight)
    assert not bool(second.out.weight.any())


@pytest.mark.parametrize("kernel", [None, (3, 3)])
@pytest.mark.parametrize("norm", [None, "batch", "own"])
def test_the_inside_of_a_residual_branch_is_an_axis(kernel: tuple[int, ...] | None, norm: str | None) -> None:
    shape = (4, 8) if kernel is None else (4, 8, 5, 5)
    model, x = bare(shape, kernel), torch.randn(shape)
    norm = {"own": "layer" if kernel is None else "group"}.get(norm or "", norm)
    model.insert(1, ResidualLayer(8, 12, kernel, norm, "silu").build(lookup(model), "0"))
    randomised(model)
    structure = esp.attach(model, x)
    axis = structure.axes["1.mid"]
    assert axis.size == 12
    assert axis.prunable
    assert axis.growable
    before = model.eval()(x)
    structure.grow("1.mid", by=3)
    assert torch.allclose(model(x), before, rtol=1e-12, atol=1e-12)
    structure.prune("1.mid", units=[0, 4])
    assert model[1].mid.weight.shape[0] == 13
    assert model(x).shape == before.shape


# --- Products --------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 9), (4, 7)),
    "linear without bias": (lambda: nn.Linear(9, 5, bias=False), (2, 3, 9)),
    "conv1d": (lambda: nn.Conv1d(6, 5, 3, stride=2, padding=1), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 9, (3, 5), stride=(1, 2), padding=(1, 3), dilation=(2, 1)), (2, 4, 9, 11)),
    "conv2d same": (lambda: nn.Conv2d(4, 9, 3, padding="same", padding_mode="reflect", bias=False), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 3, padding=1, padding_mode="circular"), (1, 3, 4, 5, 4)),
    "conv 1x1": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_factorised_layers_are_the_best_of_their_rank(name: str, training: bool) -> None:
    make, shape = LAYERS[name]
    layer, x = make().train(training), torch.randn(shape)
    model = nn.Sequential(layer)
    matrix = layer.weight.detach().flatten(1).numpy()
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    for rank in (1, 3, len(values)):
        new = Factorised(rank).build(lookup(model), "0")
        best = torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank]).view_as(layer.weight)
        expected = copy.deepcopy(layer)
        expected.weight.data = best
        assert torch.allclose(new(x), expected(x), rtol=1e-11, atol=1e-11)
        assert [tuple(one.shape[:2]) for one in (new[0].weight, new[1].weight)] == [
            (rank, layer.weight.shape[1]),
            (layer.weight.shape[0], rank),
        ]
        assert new[0].bias is None
        promise = Factorised(rank).promise(infer(model, x), lookup(model), "0", before=False)
        error = np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())
        if rank == len(values):
            assert promise.kind == "exact"
            assert torch.allclose(new(x), layer(x), rtol=1e-11, atol=1e-11)
        else:
            assert promise.kind == "changing"
            assert f"relative error of {error:.2g}" in promise.why
        # either side has the same part of every direction
        first, second = new[0].weight.detach().flatten(1), new[1].weight.detach().flatten(1)
        assert torch.allclose(first.norm(dim=1), second.norm(dim=0), rtol=1e-9)


def test_factors_are_trained_if_the_weight_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    frozen = Factorised(2).build(lookup(model), "0")
    assert [one.requires_grad for one in frozen.parameters()] == [False, False, True]
    assert not frozen[0].weight.requires_grad


def test_factors_of_a_smaller_layer_have_the_asked_rank() -> None:
    """As when a checkpoint is loaded into a model that had grown before."""
    model = nn.Sequential(nn.Linear(3, 4))
    new, x = Factorised(5).build(lookup(model), "0"), torch.randn(2, 3)
    assert new[0].weight.shape == (5, 3)
    assert torch.allclose(new(x), model(x))
    with pytest.raises(PlanError, match="expected a rank from 1 to 3, found 5"):
        promised(Factorised(5), model, x, "0")


def test_factorised_layers_of_hugging_face() -> None:
    library = pytest.importorskip("transformers.pytorch_utils")
    model, x = nn.Sequential(library.Conv1D(7, 5), nn.Linear(7, 2)), torch.randn(3, 5)
    new = Factorised(5).build(lookup(model), "0")
    assert torch.allclose(new(x), model[0](x), rtol=1e-12)
    assert promised(Factorised(5), model, x, "0") == "exact"
    both = Folded("0").build(lookup(model), "1")
    assert torch.allclose(both(x), model(x), rtol=1e-12)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Tied(nn.Module):
    """Uses the weight of its layer a second time, by the layer's name or by another one."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.by_name = by_name
        if not by_name:
            self.other.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        return F.linear(hidden, self.fc.weight) if self.by_name else self.other(hidden)


def _hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, args, result: 2 * result)
    return layer


def _patched() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Doubled(4, 4), "found Doubled, which is derived from Linear"),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "is parametrised"),
        (_hooked, "has hooks"),
        (_patched, "has a forward of its own"),
        (lambda: nn.Conv1d(4, 4, 1, groups=2), "2 groups, which is not one matrix"),
        (lambda: nn.ConvTranspose1d(4, 4, 1), "found ConvTranspose1d"),
        (nn.ReLU, "found ReLU"),
    ],
)
def test_what_is_more_than_a_product_is_not_factorised(make: Make, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Factorised(2).build(lookup(nn.Sequential(make())), "0")


@pytest.mark.parametrize(("by_name", "message"), [(True, "fc.weight is read outside of fc"), (False, "are one tensor")])
def test_shared_weights_are_not_factorised(by_name: bool, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        promised(Factorised(2), Tied(by_name), torch.randn(2, 4), "fc")


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(PlanError, match="not finite"):
        Factorised(2).build(lookup(model), "0")


# --- Ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (6, 3, 3, 3)])
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_ranks_by_energy_are_the_smallest(shape: tuple[int, ...], energy: float) -> None:
    weight = torch.randn(shape)
    found = rank_by_energy(weight, energy)
    squares = np.linalg.svd(weight.flatten(1).numpy(), compute_uv=False) ** 2
    parts = np.cumsum(squares) / squares.sum()
    assert parts[found.rank - 1] >= energy - 1e-12
    assert found.rank == 1 or parts[found.rank - 2] < energy
    assert found.error == pytest.approx(np.sqrt(max(1 - parts[found.rank - 1], 0)), abs=1e-7)
    rows, columns = weight.flatten(1).shape
    product = sum(one.numel() for one in factors(weight, found.rank))
    assert found.worth_it is (product < rows * columns)
    assert ("not worth it" in str(found)) is not found.worth_it


def error_of(weight: Tensor, product: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (weight - product).T).norm() / (inputs @ weight.T).norm())


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("samples", [5, 200])
def test_ranks_by_error_keep_it_on_the_inputs(whitened: bool, samples: int) -> None:
    weight = torch.randn(9, 14)
    inputs = torch.randn(samples, 14) @ torch.diag(torch.logspace(0, -3, 14))
    for most in (0.3, 0.05, 1e-3):
        found = rank_by_error(weight, inputs, most, whitened=whitened)

        def measured(rank: int) -> float:
            first, second = whitened_factors(weight, inputs, rank) if whitened else factors(weight, rank)
            return error_of(weight, second @ first, inputs)

        assert found.error == pytest.approx(measured(found.rank), abs=1e-7)
        assert found.error <= most
        assert found.rank == 1 or measured(found.rank - 1) > most


def test_whitening_is_better_on_the_inputs_than_the_weight_alone() -> None:
    weight, inputs = torch.randn(9, 14), torch.randn(300, 14) @ torch.diag(torch.logspace(0, -2, 14))
    for rank in range(1, 9):
        errors = []
        for first, second in (whitened_factors(weight, inputs, rank), factors(weight, rank)):
            errors.append(error_of(weight, second @ first, inputs))
        assert errors[0] < errors[1]


def test_ranks_refuse_what_does_not_fit() -> None:
    weight = torch.randn(4, 3)
    with pytest.raises(PlanError, match="energy: expected a part"):
        rank_by_energy(weight, 0.0)
    with pytest.raises(MethodError, match=r"expected rows of 3 inputs, found \(5, 4\)"):
        rank_by_error(weight, torch.randn(5, 4), 0.1)
    with pytest.raises(MethodError, match="max_error"):
        rank_by_error(weight, torch.randn(5, 3), 1.5)
    with pytest.raises(MethodError, match="expected 1 to 3"):
        whitened_factors(weight, torch.randn(5, 3), 4)


# --- Folding ---------------------------------------------------------------------------------------------------------

PAIRS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4)), (3, 5)),
    "linear of tokens": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4, bias=False)), (3, 2, 5)),
    "first without bias": (lambda: nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 4)), (3, 5)),
    "no bias": (lambda: nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 4, bias=False)), (3, 5)),
    "conv then 1x1": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2), nn.Conv2d(5, 4, 1)),
        (2, 3, 9, 8),
    ),
    "conv then strided 1x1": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, stride=(2, 1), padding=1), nn.Conv2d(5, 4, 1, stride=(2, 3))),
        (2, 3, 11, 10),
    ),
    "valid conv then strided 1x1": (
        lambda: nn.Sequential(nn.Conv1d(3, 5, 3, padding="valid"), nn.Conv1d(5, 4, 1, stride=2)),
        (2, 3, 9),
    ),
    "1x1 then conv without padding": (
        lambda: nn.Sequential(nn.Conv1d(3, 5, 1), nn.Conv1d(5, 4, 3, stride=2)),
        (2, 3, 9),
    ),
    "1x1 without bias": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), nn.Conv2d(5, 4, 3, padding="same")),
        (2, 3, 6, 7),
    ),
    "1x1 with bias then reflecting conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 3, padding=1, padding_mode="reflect")),
        (2, 3, 6, 7),
    ),
    "1x1 twice": (lambda: nn.Sequential(nn.Conv3d(3, 5, 1), nn.Conv3d(5, 4, 1)), (1, 3, 3, 2, 4)),
}
NORMED: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear, norm": (lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), (6, 5)),
    "conv, norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5, eps=0.1)),
        (2, 3, 6, 6),
    ),
    "conv in groups, plain norm": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, groups=2), nn.BatchNorm1d(6, affine=False)),
        (2, 4, 6),
    ),
    "conv, synchronised norm": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.SyncBatchNorm(5)), (2, 3, 6, 6)),
    "norm, linear": (lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 7)), (6, 5)),
    "norm, conv": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3)), (2, 3, 6, 6)),
}


@pytest.mark.parametrize("name", [*PAIRS, *NORMED])
@pytest.mark.parametrize("after", [False, True])
def test_folded_layers_are_both(name: str, after: bool) -> None:
    make, shape = {**PAIRS, **NORMED}[name]
    model, x = randomised(make()), torch.randn(shape)
    at, other = ("0", "1") if after else ("1", "0")
    recipe = Folded(other, after)
    new = recipe.build(lookup(model), at)
    for training in (True, False) if name in PAIRS else (False,):
        expected = model.train(training)(x)
        assert torch.allclose(new.train(training)(x), expected, rtol=1e-11, atol=1e-11)
    promise = recipe.promise(infer(model, x), lookup(model), at, before=False)
    assert promise.kind == ("exact" if name in PAIRS else "changing")
    assert name in PAIRS or "in train mode" in promise.why
    assert recipe.absorbed() == (other,)
    whole = nn.Sequential(model)
    merged = Folded().build(lookup(whole), "0")
    assert torch.equal(merged.eval()(x), new.eval()(x))
    assert promised(Folded(), whole, x, "0") == promise.kind


@pytest.mark.parametrize(
    ("layers", "shape", "message"),
    [
        ((nn.Conv1d(3, 5, 1), nn.Conv1d(5, 4, 3, padding=1)), (2, 3, 9), "pads with zeros what the bias"),
        ((nn.BatchNorm1d(3), nn.Conv1d(3, 4, 3, padding=1)), (2, 3, 9), "pads with zeros what the bias"),
        ((nn.Conv1d(3, 5, 3), nn.Conv1d(5, 4, 3)), (2, 3, 9), "one of two convolutions must be 1 x 1"),
        ((nn.Conv1d(3, 5, 1, stride=2), nn.Conv1d(5, 4, 3)), (2, 3, 9), "the first with stride 1"),
        ((nn.Conv1d(3, 5, 3), nn.Conv1d(5, 4, 1, padding=1)), (2, 3, 9), "must be 1 x 1 without padding"),
        ((nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 1)), (2, 4, 9), "in groups"),
        ((nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 1, groups=2)), (2, 4, 9), "in groups"),
        ((nn.Conv1d(3, 5, 3, padding="same"), nn.Conv1d(5, 4, 1, stride=2)), (2, 3, 9), "does not go with"),
        ((nn.Conv1d(3, 4, 6), nn.Linear(4, 2)), (2, 3, 9), "the other a linear layer"),
        ((nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)), (2, 3), "no running statistics"),
        ((nn.Linear(3, 4), nn.BatchNorm1d(5)), (2, 5, 3), r"one gives 4 features|it gives 4 features"),
        ((nn.Linear(3, 4), nn.BatchNorm1d(4)), (2, 4, 3), r"gets values of \[3\] dimensions"),
        ((nn.Linear(3, 4), Doubled(4, 4)), (2, 3), "found Doubled"),
        ((nn.Linear(3, 4), nn.Dropout(0.0), nn.Linear(4, 4)), (2, 3), "found Dropout"),
    ],
)  # fmt: skip
def test_what_would_not_be_the_same_is_not_folded(
    layers: tuple[nn.Module, ...], shape: tuple[int, ...], message: str
) -> None:
    whole = nn.Sequential(nn.Sequential(*layers), nn.Identity()).double()
    topology = infer(whole, torch.randn(shape))
    with pytest.raises(PlanError, match=message):
        Folded().promise(topology, lookup(whole), "0", before=False)
    with pytest.raises(PlanError):
        fold_plan(topology, lookup(whole), "0.0", "0.1")


def test_a_folded_layer_is_trained_if_one_of_both_was() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3))
    model[0].requires_grad_(False)
    assert all(one.requires_grad for one in Folded("1", after=True).build(lookup(model), "0").parameters())
    model.requires_grad_(False)
    assert not any(one.requires_grad for one in Folded("1", after=True).build(lookup(model), "0").parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_folding_takes_factors_back(name: str) -> None:
    make, shape = LAYERS[name]
    model, x = nn.Sequential(make()), torch.randn(shape)
    pair = nn.Sequential(Factorised(5 if "conv1d" in name else 4).build(lookup(model), "0"))
    back = Folded().build(lookup(pair), "0")
    assert type(back) is type(model[0])
    assert torch.allclose(back(x), pair(x), rtol=1e-11, atol=1e-11)


class Wired(nn.Module):
    """Two layers, with something done to what is between them."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)
        self.between = between
        self.quiet = nn.Sequential(nn.Dropout(0.0), nn.Identity())
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc1(x)
        match self.between:
            case "nothing":
                return self.fc2(self.quiet(hidden))
            case "dropout":
                return self.fc2(self.drop(hidden))
            case "in place":
                return self.fc2(hidden.relu_())
            case "function":
                return self.fc2(hidden.sin())
            case "later":
                result = self.fc2(hidden)
                return result + hidden.mean()
            case "view":
                return self.fc2(hidden) + hidden.view(-1)[:1]
            case "output":
                return self.fc2(hidden), hidden
            case "twice":
                return self.fc2(self.fc1(x)) + self.fc2(hidden)
        raise AssertionError(self.between)


def test_plans_fold_layers_with_nothing_between_them() -> None:
    model, x = Wired("nothing"), torch.randn(5, 4)
    topology = infer(model, x)
    assert fold_plan(topology, lookup(model), "fc1") == (Replace("fc2", Folded("fc1")), Remove("fc1"))
    assert fold_plan(topology, lookup(model), "fc2") == (Replace("fc1", Folded("fc2", after=True)), Remove("fc2"))
    assert fold_plan(topology, lookup(model), "fc1", "fc2") == fold_plan(topology, lookup(model), "fc1")
    new = Folded("fc1").build(lookup(model), "fc2")
    assert torch.allclose(new(x), model(x), rtol=1e-12)


@pytest.mark.parametrize(
    ("between", "message"),
    [
        ("dropout", "fc2 does not get what fc1 gives"),
        ("in place", "fc1 gives is (changed in place|read elsewhere)"),
        ("function", "fc2 does not get what fc1 gives"),
        ("later", "fc1 gives is read elsewhere too, in the model itself"),
        ("view", "fc1 gives is read elsewhere too, in the model itself"),
        ("output", "fc1 gives is an output of the model too"),
        ("twice", "fc1 runs 2 times"),
    ],
)
def test_plans_do_not_fold_layers_with_something_between_them(between: str, message: str) -> None:
    model, x = Wired(between), torch.randn(5, 4)
    topology = infer(model, x)
    for path, into in (("fc1", "fc2"), ("fc2", "fc1")):
        with pytest.raises(PlanError, match=message):
            fold_plan(topology, lookup(model), path, into)
        with pytest.raises(PlanError, match=f"{path} cannot be folded away"):
            fold_plan(topology, lookup(model), path)


def test_plans_fold_batch_norms_into_the_convolution_before() -> None:
    model, example = ZOO["resnet"]()
    topology = infer(model, example)
    found = fold_plan(topology, lookup(model), "layers.0.0.bn1")
    assert found == (
        Replace("layers.0.0.conv1", Folded("layers.0.0.bn1", after=True)),
        Remove("layers.0.0.bn1"),
    )
    with pytest.raises(PlanError, match="conv1 cannot be folded away"):
        fold_plan(topology, lookup(model), "layers.0.0.conv1")


def test_a_sequential_is_folded_as_one() -> None:
    model, x = (
        nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 5)), nn.ReLU()),
        torch.randn(2, 3),
    )
    assert fold_plan(infer(model, x), lookup(model), "0") == (Replace("0", Folded()),)
    with pytest.raises(PlanError, match="no layer runs right before or after"):
        fold_plan(infer(nn.Linear(3, 4), x), lookup(nn.Sequential(nn.Linear(3, 4))), "0")


# --- Copies ----------------------------------------------------------------------------------------------------------


class Cells(nn.Module):
    """A residual block that ends in a ReLU, after values that a ReLU has made or not, and a layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.block = nn.Linear(3, 4), nn.ReLU(), Block()
        self.end = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.block(self.relu(self.stem(x))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.fc2(F.relu(self.fc1(x))))


@pytest.mark.parametrize(
    ("zero", "at", "before", "kind"),
    [
        (("fc2.weight", "fc2.bias"), "block", False, "exact"),
        (("fc2.weight", "fc2.bias", "fc1.bias"), "block", True, "exact"),
        (("fc2.weight",), "block", False, "changing"),
        ((), "block", False, "changing"),
        # what comes there may be negative
        (("fc2.weight", "fc2.bias"), "end", False, "changing"),
        (("fc2.weight", "fc2.bias"), "relu", False, "exact"),
    ],
)
def test_copies_are_exact_where_only_their_input_is_left(
    zero: tuple[str, ...], at: str, before: bool, kind: str
) -> None:
    model, x = randomised(Cells()), torch.randn(5, 3)
    recipe = CopyOf("block", zero)
    assert promised(recipe, model, x, at, before=before) == kind
    expected = model(x)
    new = recipe.build(lookup(model), at)
    assert type(new) is Block
    assert new.fc1.weight.grad is None
    assert torch.equal(new.fc1.weight, model.block.fc1.weight)
    module = model.get_submodule(at)
    if before:
        module.register_forward_pre_hook(lambda module, args: new(*args))
    else:
        module.register_forward_hook(lambda module, args, result: new(result))
    assert torch.allclose(model(x), expected, rtol=1e-12) is (kind == "exact")


def test_copies_name_what_they_have_not() -> None:
    with pytest.raises(PlanError, match=r"block has no parameter 'fc3\.weight'"):
        CopyOf("block", ("fc3.weight",)).build(lookup(Cells()), "block")


# --- Like the neighbours ---------------------------------------------------------------------------------------------


def default(name: str, at: str) -> Recipe:
    model, example = ZOO[name]()
    return default_layer(infer(model, example), at)


@pytest.mark.parametrize(
    ("network", "at", "expected"),
    [
        ("vgg_batch_norm", "features.2", ResidualLayer(8, 8, (3, 3), "batch", "relu")),
        ("resnet", "layers.0.0", ResidualLayer(8, 8, (3, 3), "batch", "relu")),
        ("group_norm_resnet", "1", ResidualLayer(8, 12, (3, 3), "group", "silu", groups=2)),
        ("vit", "blocks.0", ResidualLayer(8, 12, None, "layer", "gelu")),
        ("llama_by_hand", "layers.0", ResidualLayer(16, 20, None, "rms", "silu", eps=1e-6)),
        ("mlp_batch_norm", "2", ResidualLayer(16, 16, None, "batch", "relu")),
        ("hf_gpt2", "transformer.h.0", ResidualLayer(16, 24, None, "layer", "gelu_tanh")),
        ("hf_llama", "model.layers.0", ResidualLayer(16, 24, None, "rms", "silu", eps=1e-6)),
        ("mobilenet", "stem", ResidualLayer(8, 16, (1, 1), "batch", "relu6")),
        ("mlp", "0", ResidualLayer(12, 12, None, None, "relu")),
        ("mlp", "1", Identity(12, None, "relu")),
    ],
)
def test_default_layers_are_like_those_around_them(network: str, at: str, expected: Recipe) -> None:
    assert default(network, at) == expected


@pytest.mark.parametrize("network", ["lenet", "resnet", "mobilenet", "vit", "llama_by_hand", "densenet", "shufflenet"])
def test_default_layers_change_nothing(network: str) -> None:
    torch.set_default_dtype(torch.float32)
    model, example = ZOO[network]()
    randomised(model)
    topology = infer(model, example)
    inserted = 0
    for at in dict(model.named_modules()):
        try:
            layer = default_layer(topology, at) if at else None
        except PlanError:
            continue
        if layer is None or layer.promise(topology, lookup(model), at, before=False).kind != "exact":
            continue
        new = layer.build(lookup(model), at)
        for training in (True, False):
            model.train(training)
            new.train(training)
            found = []
            for hook in (lambda m, a, r: r, lambda m, a, r, new=new: new(r)):
                copied = copy.deepcopy(model)
                copied.get_submodule(at).register_forward_hook(hook)
                torch.manual_seed(1)
                found.append(copied(*example) if isinstance(example, tuple) else copied(example))
            assert torch.equal(found[0], found[1])
        inserted += 1
    assert inserted > 3


def test_layers_are_for_numbers_with_a_fraction() -> None:
    model = nn.Sequential(nn.Identity(), nn.Embedding(5, 4))
    with pytest.raises(PlanError, match=r"after 0: the layer takes floating-point numbers, found torch.int64"):
        promised(Identity(3), model, torch.zeros(2, 3, dtype=torch.int64), "0")


def test_places_without_features_have_no_default_layer() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.turn = nn.Linear(3, 4), nn.Flatten(0)

        def forward(self, x: Tensor) -> Tensor:
            return self.turn(self.fc(x))

    model = Turned()
    with pytest.raises(PlanError, match=r"after turn: expected values whose features .*, found \[20\]"):
        default_layer(infer(model, torch.randn(5, 3)), "turn")
    with pytest.raises(PlanError, match="beside nowhere: it is never run"):
        default_layer(infer(model, torch.randn(5, 3)), "nowhere")
