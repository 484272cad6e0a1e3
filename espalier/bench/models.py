"""Networks to grow and prune: plain PyTorch modules that know nothing of Espalier.

``width`` scales the number of units of every hidden layer (at least 1 each). Inputs are vectors (F,) for the MLP,
characters (T,) for the GPT, otherwise images (C, H, W); every network returns logits (N, classes), the GPT
(N, classes, T).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.errors import DataError

Shape = tuple[int, ...]


def build(name: str, input_shape: Shape, classes: int, *, width: float = 1.0, seed: int | None = None) -> nn.Module:
    """Build a network of ``MODELS`` by name. A ``seed`` makes the initial weights repeat and leaves torch's random
    state as it was.

    Raises:
        DataError: unknown name, or inputs that the network cannot take.
    """
    if name not in MODELS:
        raise DataError(f"unknown model '{name}': expected one of {', '.join(MODELS)}")
    if not (math.isfinite(width) and width > 0):
        raise DataError(f"width is a factor on the number of units: expected a number above 0, got {width}")
    if classes < 1 or not input_shape or min(input_shape) < 1:
        raise DataError(f"a network needs inputs and classes, got input_shape={input_shape} and classes={classes}")
    if seed is None:
        return MODELS[name](input_shape, classes, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](input_shape, classes, width)


def example_inputs(input_shape: Shape, device: torch.device | str = "cpu") -> Tensor:
    """Inputs to attach with, of networks that take images or vectors; those of any data are `Dataset.example`."""
    return torch.zeros(2, *input_shape, device=device)


def redraw(model: nn.Module, *, seed: int) -> None:
    """Give a network of ``MODELS`` fresh weights of the sizes that it has now, drawn as `build` draws them.

    What is not trained stays. Buffers start anew too; modes, gradients and torch's random state stay as they are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            fixed = not any(parameter.requires_grad for parameter in module.parameters())
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.Embedding)) and not fixed:
                module.reset_parameters()
        if isinstance(model, (VGG11, ResNet)):
            _initialise_convolutions(model)
        if isinstance(model, (VisionTransformer, GPT)):
            _initialise_tokens(model)


class MLP(nn.Module):
    """Two hidden layers of 128 units; images are flattened."""

    def __init__(self, input_shape: Shape, classes: int, width: float) -> None:
        super().__init__()
        hidden = _scaled(128, width)
        self.fc1 = nn.Linear(math.prod(input_shape), hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return cast(Tensor, self.head(x))


class EmbeddedMLP(nn.Module):
    """A fixed embedding of the inputs into 100 features, and one hidden layer of 80 units.

    Li & Ji (2020) embed two moons in this way, so that features can be left out as hidden units can. The embedding is
    orthonormal, the same in every network, and not trained.
    """

    def __init__(self, input_shape: Shape, classes: int, width: float) -> None:
        super().__init__()
        features, hidden = _scaled(100, width), _scaled(80, width)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Linear(math.prod(input_shape), features, bias=False)
            nn.init.orthogonal_(self.embed.weight)
        self.embed.weight.requires_grad_(False)
        self.hidden = nn.Linear(features, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.hidden(self.embed(x.flatten(1))))
        return cast(Tensor, self.head(x))


class LeNet5(nn.Module):
    """LeNet-5 as Caffe has it: 20-50-500 units, max-pooling, one ReLU (LeCun et al. 1998)."""

    def __init__(self, input_shape: Shape, classes: int, width: float) -> None:
        super().__init__()
        channels, height, frame = _image(input_shape, "lenet5", smallest=16)
        first, second, hidden = _scaled(20, width), _scaled(50, width), _scaled(500, width)
        self.conv1 = nn.Conv2d(channels, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        positions = math.prod(((side - 4) // 2 - 4) // 2 for side in (height, frame))
        self.fc1 = nn.Linear(second * positions, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return cast(Tensor, self.head(x))


class VGG11(nn.Module):
    """VGG-11 for small images: eight convolutions, one linear head (Simonyan & Zisserman 2015).

    Pooling rounds sizes up, so that images below 32x32 pass through all five.
    """

    _STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))

    def __init__(self, input_shape: Shape, classes: int, width: float, batch_norm: bool) -> None:
        super().__init__()
        channels, height, frame = _image(input_shape, "vgg11", smallest=8)
        layers: dict[str, nn.Module] = {}
        index = 0
        for stage, sizes in enumerate(self._STAGES, start=1):
            for size in sizes:
                index += 1
                layers[f"conv{index}"] = nn.Conv2d(channels, _scaled(size, width), 3, padding=1, bias=not batch_norm)
                channels = _scaled(size, width)
                if batch_norm:
                    layers[f"bn{index}"] = nn.BatchNorm2d(channels)
                layers[f"relu{index}"] = nn.ReLU()
            layers[f"pool{stage}"] = nn.MaxPool2d(2, ceil_mode=True)
        self.features = nn.Sequential()
        for name, layer in layers.items():
            self.features.add_module(name, layer)
        self.head = nn.Linear(channels * math.ceil(height / 32) * math.ceil(frame / 32), classes)
        _initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.features(x).flatten(1)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a projection where the shape changes (option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.add_module("conv", nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.add_module("bn", nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet for CIFAR: 6 * ``blocks`` + 2 layers, so 20 with 3 blocks per stage and 56 with 9 (He et al. 2016)."""

    def __init__(self, input_shape: Shape, classes: int, width: float, blocks: int) -> None:
        super().__init__()
        channels, _, _ = _image(input_shape, "resnet", smallest=8)
        first, second, third = _scaled(16, width), _scaled(32, width), _scaled(64, width)
        self.conv1 = nn.Conv2d(channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(first, first, blocks, stride=1)
        self.layer2 = _stage(first, second, blocks, stride=2)
        self.layer3 = _stage(second, third, blocks, stride=2)
        self.head = nn.Linear(third, classes)
        _initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return cast(Tensor, self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class Attention(nn.Module):
    """Multi-head self-attention over (N, T, D); query, key and value come from one linear layer. If it is causal, a
    place sees only itself and those before it."""

    def __init__(self, size: int, num_heads: int, head_dim: int, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.qkv = nn.Linear(size, 3 * num_heads * head_dim)
        self.proj = nn.Linear(num_heads * head_dim, size)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, _ = x.shape
        qkv = self.qkv(x).view(count, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        merged = attended.transpose(1, 2).reshape(count, tokens, self.num_heads * self.head_dim)
        return cast(Tensor, self.proj(merged))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, hidden)
        self.fc2 = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after a LayerNorm and added to the stream (pre-norm)."""

    def __init__(self, size: int, num_heads: int, head_dim: int, hidden: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size)
        self.attn = Attention(size, num_heads, head_dim, causal)
        self.norm2 = nn.LayerNorm(size)
        self.mlp = FeedForward(size, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """A small ViT: 4 pre-norm blocks of 6 heads of 16, class token, learned positions (Dosovitskiy et al. 2021).

    Patches are 4x4, or 2x2 in images below 16x16.
    """

    def __init__(self, input_shape: Shape, classes: int, width: float) -> None:
        super().__init__()
        channels, height, frame = _image(input_shape, "vit", smallest=4)
        patch = 4 if min(height, frame) >= 16 else 2
        if height % patch or frame % patch:
            raise DataError(
                f"vit cuts images into {patch}x{patch} patches, which do not fit {height}x{frame}; pad them"
            )
        num_heads, head_dim = _scaled(6, width), 16
        size = num_heads * head_dim
        self.patches = nn.Conv2d(channels, size, patch, patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, size))
        self.positions = nn.Parameter(torch.empty(1, 1 + (height // patch) * (frame // patch), size))
        self.blocks = nn.Sequential(*(TransformerBlock(size, num_heads, head_dim, 2 * size) for _ in range(4)))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, classes)
        _initialise_tokens(self)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], dim=1) + self.positions
        return cast(Tensor, self.head(self.norm(self.blocks(tokens))[:, 0]))


class GPT(nn.Module):
    """A small GPT over characters: 4 causal pre-norm blocks of 6 heads of 16, learned positions (Radford et al. 2019).

    Inputs are characters (N, T), numbered below the number of classes.
    """

    def __init__(self, input_shape: Shape, classes: int, width: float) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise DataError(
                f"gpt needs characters (T,), got inputs of shape {input_shape}; the model 'vit' takes images"
            )
        num_heads, head_dim = _scaled(6, width), 16
        size = num_heads * head_dim
        self.characters = nn.Embedding(classes, size)
        self.positions = nn.Parameter(torch.empty(1, input_shape[0], size))
        blocks = (TransformerBlock(size, num_heads, head_dim, 2 * size, causal=True) for _ in range(4))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, classes)
        _initialise_tokens(self)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.characters(x) + self.positions)))
        return cast(Tensor, logits.transpose(1, 2))


def _scaled(units: int, width: float) -> int:
    return max(1, round(units * width))


def _image(input_shape: Shape, model: str, smallest: int) -> tuple[int, int, int]:
    """Channels, height and width of images that a network can take."""
    if len(input_shape) != 3:
        raise DataError(
            f"{model} needs images (C, H, W), got inputs of shape {input_shape}; the model 'mlp' takes these"
        )
    channels, height, width = input_shape
    if min(height, width) < smallest:
        raise DataError(
            f"{model} needs images of at least {smallest}x{smallest}, got {height}x{width}; use 'mlp' or enlarge them"
        )
    return channels, height, width


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    following = (BasicBlock(outputs, outputs, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *following)


def _initialise_tokens(model: "VisionTransformer | GPT") -> None:
    first = model.characters.weight if isinstance(model, GPT) else model.class_token
    for parameter in (first, model.positions):
        nn.init.trunc_normal_(parameter, std=0.02)


def _initialise_convolutions(model: nn.Module) -> None:
    """He initialisation (He et al. 2015): without it VGG-11 does not start to learn unless it has batch norm."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


MODELS: Mapping[str, Callable[[Shape, int, float], nn.Module]] = MappingProxyType(
    {
        "mlp": MLP,
        "lenet5": LeNet5,
        "vgg11": partial(VGG11, batch_norm=False),
        "vgg11-bn": partial(VGG11, batch_norm=True),
        "resnet20": partial(ResNet, blocks=3),
        "resnet56": partial(ResNet, blocks=9),
        "vit": VisionTransformer,
        "embedded-mlp": EmbeddedMLP,
        "gpt": GPT,
    }
)
