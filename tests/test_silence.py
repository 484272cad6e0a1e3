"""Blocks whose branches end in zeros hand on their input, bit for bit; where nothing is known, a reason is given."""

import pytest
import torch
from brute_sites import Place, at, given
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_small import ZOO

from espalier.graph.regions import Boundaries, Refusal, Region, region_of
from espalier.graph.silence import Silence, settled, settled_by, silenced, silencing
from espalier.graph.topology import infer


class Bottleneck(nn.Module):
    """As in ResNet-50: the sum is what a ReLU gets, in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.conv3, self.bn3 = nn.Conv2d(2, width, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x
        return self.relu(y)


class StochasticDepth(nn.Module):
    """Drops a branch for some examples."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty((len(x),) + (1,) * (x.dim() - 1)).bernoulli_(0.5).div_(0.5)


class ConvNeXtBlock(nn.Module):
    """Depthwise, permuted, scaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 6), nn.Linear(6, width)
        self.scale, self.depth = nn.Parameter(torch.full((width, 1, 1), 1e-3)), StochasticDepth()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return x + self.depth(self.scale * y)


class SwinBlock(nn.Module):
    """Attention within windows that are shifted, by padding, roll and permute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width), nn.Dropout(0.1))

    def attention(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = F.pad(x, (0, 0, 0, 1, 0, 1)).roll((-1, -1), (1, 2))[:, :h, :w]
        x = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.proj(((q @ k.mT) * c**-0.5).softmax(-1) @ v)
        x = x.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return F.dropout(x.roll((1, 1), (1, 2)), 0.1, self.training)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AfterReLU(nn.Module):
    """A stem that ends in a ReLU and pooling, then two blocks."""

    def __init__(self, stem: nn.Module, block: type[nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(block(4), block(4))  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


def after(*stem: nn.Module, block: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    return AfterReLU(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *stem), block), torch.randn(2, 3, 8, 8)


class ToLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


TWINS = {
    "bottleneck": lambda: after(nn.ReLU(), nn.MaxPool2d(2), block=Bottleneck),
    "convnext": lambda: after(block=ConvNeXtBlock),
    "swin": lambda: after(ToLast(), block=SwinBlock),
    **{
        name: ZOO[name]
        for name in (
            *("resnet", "group_norm_resnet", "mobilenet", "vit", "llama_by_hand"),
            *("encoder_norm_first", "encoder_batch_second_norm_first"),
        )
    },
}
ENDS = {
    ("bottleneck", "blocks.0"): ("bn3.bias", "bn3.weight"),
    ("bottleneck", "blocks.1"): ("bn3.bias", "bn3.weight"),
    ("convnext", "blocks.1"): ("scale",),
    ("swin", "blocks.0"): ("mlp.2.bias", "mlp.2.weight", "proj.bias", "proj.weight"),
    ("resnet", "layers.0.0"): ("bn2.bias", "bn2.weight"),
    ("resnet", "layers.1.1"): ("bn2.bias", "bn2.weight"),
    ("group_norm_resnet", "3"): ("conv2.bias", "conv2.weight"),
    ("mobilenet", "blocks.0"): ("conv.8.bias", "conv.8.weight"),
    ("vit", "blocks.1"): ("gamma", "mlp.2.bias", "mlp.2.weight"),
    ("llama_by_hand", "layers.0"): ("attention.wo.weight", "w2.weight"),
    ("encoder_norm_first", "layers.1"): (
        "linear2.bias", "linear2.weight", "self_attn.out_proj.bias", "self_attn.out_proj.weight"
    ),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model, x = TWINS[name]()
    x = tuple(one.double() if one.is_floating_point() else one for one in (x if isinstance(x, tuple) else (x,)))
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, x


def hands_on(model: nn.Module, x: tuple[Tensor, ...], region: Region, silence: Silence) -> list[bool]:
    """Whether a module with these tensors at zero gives its entry, in eval and in train mode."""
    found: list[bool] = []

    def compare(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], result: object) -> None:
        entry: Place = region.entry or ()
        found.append(torch.equal(at(given(args, kwargs), entry), at(result, region.exit)))

    before = {name: model.get_parameter(name).detach().clone() for name in silence.tensors}
    handle = model.get_submodule(region.module).register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        for name in silence.tensors:
            model.get_parameter(name).zero_()
        for mode in (False, True):
            model.train(mode)(*x)
        for name, values in before.items():
            model.get_parameter(name).copy_(values)
    handle.remove()
    return found


@pytest.mark.parametrize("name", TWINS)
def test_silent_blocks_hand_on_their_input(name):
    model, x = made(name)
    boundaries = Boundaries(infer(model, x))
    for path in dict(model.named_modules()):
        silence, region = silenced(boundaries, path), boundaries.region(path)
        if isinstance(silence, Silence) and isinstance(region, Region):
            assert hands_on(model, x, region, silence) == [True, True], (path, silence)
    for (network, path), tensors in ENDS.items():
        if network == name:
            silence = silencing(boundaries.topology, path)
            assert isinstance(silence, Silence)
            assert silence.tensors == tuple(f"{path}.{one}" for one in tensors)
            assert silence.settled == (("relu",) if name in ("bottleneck", "resnet") else ())


def test_without_the_zeros_they_do_not():
    model, x = made("bottleneck")
    region = region_of(infer(model, x), "blocks.0")
    assert isinstance(region, Region)
    assert hands_on(model, x, region, Silence(())) == [False, False]


def reason(model: nn.Module, x: object, path: str) -> str:
    found = silencing(infer(model, x), path)
    assert isinstance(found, Refusal), found
    return found.reason


def test_a_relu_at_the_end_needs_an_entry_that_is_not_negative():
    torch.manual_seed(0)
    model, x = after(nn.BatchNorm2d(4), block=Bottleneck)
    assert reason(model, x, "blocks.0").startswith(
        "changes its entry even where its parameters are zero (in blocks.0.relu"
    )
    assert isinstance(silencing(infer(model, x), "blocks.1"), Silence)


def test_a_copy_needs_such_an_entry_where_it_comes():
    model, x = made("bottleneck")
    topology = infer(model, x)
    assert silencing(topology, "blocks.0", copied_after="blocks.1") == silencing(topology, "blocks.0")
    assert silencing(topology, "blocks.0", copied_after="stem.0") == Refusal(
        "ends in relu, which would change what comes out of stem.0"
    )


@pytest.mark.parametrize("name", ["encoder_batch_first", "attention_separate"])
def test_a_norm_at_the_end_is_refused(name):
    model, x = ZOO[name]()
    assert "native_layer_norm" in reason(model, x, "layers.0")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.other.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_tensors_that_others_use_are_left_alone():
    model = nn.Sequential(Tied(), nn.Linear(4, 4))
    assert isinstance(silencing(infer(model, torch.randn(2, 4)), "0"), Silence)  # both are inside of it
    model[1].weight = model[0].inner.weight
    assert reason(model, torch.randn(2, 4), "0").startswith("adds something to its entry that no parameter of its own")


def test_dropout_of_the_sum_is_no_identity_in_train_mode():
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.drop = nn.Linear(4, 4), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x + self.inner(x))

    assert "drop" in reason(nn.Sequential(Dropped()), torch.randn(2, 4), "0")


def test_a_buffer_is_not_set_to_zero():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * x.tanh()

    assert reason(nn.Sequential(Scaled()), torch.randn(2, 4), "0").startswith("adds something")


def test_what_is_written_through_a_view_is_not_trusted():
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = x * 1.0 + 0.0
            branch = self.inner(y)
            branch[:, 1:].add_(1.0)
            return x + branch

    assert reason(nn.Sequential(Viewed()), torch.randn(2, 4), "0").startswith("adds something")


SETTLED = {
    "relu": (nn.ReLU(), ("relu",)),
    "in place": (nn.ReLU(inplace=True), ("relu",)),
    "pooled": (nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), ("relu",)),
    "relu6": (nn.ReLU6(), ("relu", "relu6")),
    "relu6 averaged": (nn.Sequential(nn.ReLU6(), nn.AvgPool2d(2)), ("relu",)),
    "sigmoid": (nn.Sigmoid(), ("relu", "relu6", "hardtanh")),
    "hardtanh": (nn.Hardtanh(), ("hardtanh",)),
    "gelu": (nn.GELU(), ()),
    "dropped": (nn.Sequential(nn.ReLU6(), nn.Dropout(0.5)), ("relu",)),
    "shifted": (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), ()),
}


@pytest.mark.parametrize("name", SETTLED)
def test_activations_that_would_change_nothing(name):
    layer, names = SETTLED[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 3, 6, 6) * 5
    topology = infer(model, x)
    assert settled(Boundaries(topology), "1", "exit") == names == settled(Boundaries(topology), "2", "entry")
    assert settled_by(topology, "1", "exit") == (names[0] if names else None)
    functions = {"relu": F.relu, "relu6": F.relu6, "hardtanh": F.hardtanh}
    for mode in (False, True):
        value = model.train(mode)[:2](x)
        for known, function in functions.items():
            assert torch.equal(function(value), value) or known not in names


def test_nothing_is_known_of_the_model_itself():
    topology = infer(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    assert silencing(topology, "") == Refusal("is the model itself")
    assert settled_by(topology, "", "exit") is None
    assert silencing(topology, "7") == Refusal("is never run by itself")
