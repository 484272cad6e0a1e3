"""The built-in networks: sizes as published, widths, inputs, repeatable weights, clear refusals."""

import math

import pytest
import torch
from torch import nn

from espalier.bench.models import MODELS, Attention, build, redraw
from espalier.errors import DataError

IMAGES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
TAKE_IMAGES = [name for name in MODELS if name != "gpt"]


@pytest.mark.parametrize("name", TAKE_IMAGES)
@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("width", [0.01, 0.25])
def test_every_network_trains_one_step_on_every_size_it_takes(name: str, shape: tuple[int, ...], width: float) -> None:
    if name == "lenet5" and shape == (1, 8, 8):
        with pytest.raises(DataError, match="lenet5 needs images of at least 16x16, got 8x8"):
            build(name, shape, 7, width=width)
        return
    model = build(name, shape, 7, width=width, seed=0)
    outputs = model(torch.randn(3, *shape))
    assert outputs.shape == (3, 7)
    outputs.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained), "every parameter takes part"


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("mlp", (64,), 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
        ("embedded-mlp", (2,), 2 * 100 + 100 * 80 + 80 + 80 * 10 + 10),
        ("lenet5", (1, 28, 28), 431_080),  # the number known from the pruning literature
        ("vgg11", (3, 32, 32), 9_225_610),
        ("vgg11-bn", (3, 32, 32), 9_228_362),
        # 0.27 and 0.85 million in the paper, whose shortcuts have no parameters; two projections more here
        ("resnet20", (3, 32, 32), 269_722 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64),
        ("resnet56", (3, 32, 32), 853_018 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64),
    ],
)
def test_sizes_are_the_known_ones(name: str, shape: tuple[int, ...], parameters: int) -> None:
    assert count(build(name, shape, 10)) == parameters


@pytest.mark.parametrize("name", TAKE_IMAGES)
def test_width_scales_the_units(name: str) -> None:
    sizes = [count(build(name, (3, 32, 32), 10, width=width)) for width in (0.25, 0.5, 1.0)]
    assert sizes[0] < sizes[1] < sizes[2]
    if name not in ("mlp", "embedded-mlp"):  # the first layer, linear in width, is most of them
        assert 3 < sizes[2] / sizes[1] < 4.2


@pytest.mark.parametrize("name", TAKE_IMAGES)
def test_a_seed_repeats_the_weights_and_leaves_the_random_state(name: str) -> None:
    before = torch.get_rng_state()
    one, other = (build(name, (3, 32, 32), 10, width=0.1, seed=3).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], other[key]) for key in one)
    different = build(name, (3, 32, 32), 10, width=0.1, seed=4).state_dict()
    assert not torch.equal(one["head.weight"], different["head.weight"])


def test_a_place_of_a_text_does_not_see_what_comes_after_it() -> None:
    model = build("gpt", (12,), 30, width=0.34, seed=0).eval()
    text = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = text.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 30
    one, other = model(text), model(changed)
    assert one.shape == (2, 30, 12)
    assert torch.equal(one[..., :7], other[..., :7])
    assert bool(((one - other)[..., 7:].abs().amax(dim=1) > 0).all())
    fresh = build("gpt", (12,), 30, width=0.34, seed=1)
    redraw(fresh, seed=0)
    assert torch.equal(fresh.eval()(text), one)


def test_attention_equals_the_formula() -> None:
    layer = Attention(12, num_heads=3, head_dim=5).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    query, key, value = (part.view(2, 7, 3, 5) for part in layer.qkv(x).chunk(3, dim=-1))
    weights = torch.einsum("nihd,njhd->nhij", query, key).div(math.sqrt(5)).softmax(dim=-1)
    expected = layer.proj(torch.einsum("nhij,njhd->nihd", weights, value).reshape(2, 7, 15))
    assert torch.allclose(layer(x), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "width", "message"),
    [
        (
            "vgg12",
            (3, 32, 32),
            10,
            1.0,
            "unknown model 'vgg12': expected one of mlp, lenet5, vgg11, vgg11-bn, resnet20",
        ),
        ("mlp", (2,), 2, 0.0, "width is a factor .* got 0.0"),
        ("mlp", (2,), 2, float("nan"), "width is a factor"),
        ("mlp", (), 2, 1.0, "needs inputs and classes"),
        ("mlp", (2,), 0, 1.0, "classes=0"),
        ("vgg11", (2,), 2, 1.0, r"vgg11 needs images \(C, H, W\), got inputs of shape \(2,\); the model 'mlp'"),
        ("resnet20", (3, 4, 4), 2, 1.0, "resnet needs images of at least 8x8, got 4x4"),
        ("vit", (3, 30, 30), 2, 1.0, "4x4 patches, which do not fit 30x30"),
        ("gpt", (1, 8, 8), 2, 1.0, r"gpt needs characters \(T,\), got inputs of shape \(1, 8, 8\)"),
    ],
)
def test_wrong_requests_are_refused(
    name: str, shape: tuple[int, ...], classes: int, width: float, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        build(name, shape, classes, width=width)


@pytest.mark.parametrize("name", TAKE_IMAGES)
def test_redrawn_weights_are_those_of_a_network_built_anew(name: str) -> None:
    fresh, other = (build(name, (3, 32, 32), 10, width=0.25, seed=seed) for seed in (0, 1))
    random_state = torch.get_rng_state()
    redraw(other, seed=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    redrawn = other.state_dict()
    assert all(torch.equal(tensor, redrawn[key]) for key, tensor in fresh.state_dict().items())


def test_the_embedding_is_orthonormal_the_same_everywhere_and_stays() -> None:
    model, other = build("embedded-mlp", (2,), 2, seed=0), build("embedded-mlp", (2,), 2, width=1.0, seed=1)
    assert isinstance(model.embed, nn.Linear)
    embedding = model.embed.weight.clone()
    assert torch.allclose(embedding.T @ embedding, torch.eye(2), atol=1e-6)
    assert torch.equal(other.get_parameter("embed.weight"), embedding)
    with torch.no_grad():
        model.embed.weight *= 2
    redraw(model, seed=0)
    assert torch.equal(model.embed.weight, 2 * embedding)
