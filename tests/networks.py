"""Random networks for property-based tests.

`assemble(domain, base, blocks)` makes one network and its input, a number deciding each block; `build(seed, size)`
draws these numbers, and `networks()` is the hypothesis strategy, which shrinks by leaving out blocks. A network is an
ordinary module with named sub-modules; its forward runs a list of nodes, each a call of one sub-module or of one plain
function, so that its repr is the program.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import hypothesis.strategies as st
import torch
from hypothesis import reject
from network_modules import (
    FUNCTIONS,
    ChannelLayerNorm,
    ChannelScale,
    ChannelShuffle,
    ConvSqueezeExcite,
    ExpandedQueryAttention,
    FusedChunkAttention,
    FusedViewAttention,
    GatedConv,
    GatedLinear,
    GroupedQueryAttention,
    HeadDimCore,
    LinearSqueezeExcite,
    ParameterLinear,
    Positions,
    Scale,
    SdpaCore,
    SeparateAttention,
    SplitChannels,
    SplitFeatures,
    StoredScaleCore,
    SwiGLU,
    TokenEmbedding,
)
from oracles import FixedDropout, FixedDropout2d, disturb, sane
from torch import Tensor, nn

Option = TypeVar("Option")


# --- The network -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """One call: the result's name, what is called (a sub-module's name or a key of FUNCTIONS), its arguments' names."""

    name: str
    call: str
    inputs: tuple[str, ...]


class Network(nn.Module):
    """Runs its nodes in order and returns the last one's result; several pieces are named `split1.0`, `split1.1`..."""

    def __init__(self, recipe: str) -> None:
        super().__init__()
        self.recipe = recipe
        self.nodes: list[Node] = []
        self.operators: set[str] = set()

    def run(self, node: Node, values: dict[str, Tensor]) -> None:
        function = FUNCTIONS[node.call] if node.call in FUNCTIONS else self.get_submodule(node.call)
        result = function(*(values[name] for name in node.inputs))
        if isinstance(result, Tensor):
            values[node.name] = result
        else:
            values.update({f"{node.name}.{index}": piece for index, piece in enumerate(result)})

    def forward(self, x: Tensor) -> Tensor:
        values = {"input": x}
        for node in self.nodes:
            self.run(node, values)
        return values[self.nodes[-1].name]

    def __repr__(self) -> str:
        lines = [self.recipe]
        for node in self.nodes:
            call = node.call if node.call in FUNCTIONS else " ".join(repr(self.get_submodule(node.call)).split())
            if node.call not in FUNCTIONS and node.call != node.name:
                call = f"{node.call} again"
            lines.append(f"    {node.name} = {call}({', '.join(node.inputs)})")
        return "\n".join(lines)


class Builder:
    """Grows a network node by node, running each at once, so that a value's shape is that of a real tensor."""

    def __init__(self, network: Network, x: Tensor, rng: random.Random, without: Collection[str]) -> None:
        self.network, self.rng, self.without = network, rng, frozenset(without)
        self.values: dict[str, Tensor] = {"input": x}
        self.counts: Counter[str] = Counter()
        self.skips: list[str] = []

    def shape(self, name: str) -> torch.Size:
        return self.values[name].shape

    def rank(self, name: str) -> int:
        return self.values[name].dim()

    def width(self, name: str) -> int:
        """Features of (B, F) and (B, T, D), channels of (B, C, H, W)."""
        return self.shape(name)[-1 if self.rank(name) == 3 else 1]

    def pick(self, options: Mapping[str, Option]) -> Option:
        """One of the named operators, and a note that it was used."""
        names = [name for name in options if name not in self.without]
        if not names:
            raise ValueError(f"expected `without` to leave one of {sorted(options)}, found it excludes them all")
        name = self.rng.choice(names)
        self.network.operators.add(name)
        return options[name]

    def new_width(self) -> int:
        return self.rng.choice((1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 8))

    def _name(self, kind: str) -> str:
        self.counts[kind] += 1
        return f"{kind}{self.counts[kind]}"

    def _run(self, node: Node) -> str:
        self.network.nodes.append(node)
        self.network.run(node, self.values)
        return node.name

    def function(self, name: str, *inputs: str) -> str:
        """Call one of FUNCTIONS."""
        return self._run(Node(self._name(name.rstrip("_")), name, inputs))

    def module(self, kind: str, module: nn.Module, *inputs: str) -> str:
        """Add a sub-module and call it."""
        name = self._name(kind)
        self.network.add_module(name, module.double())
        return self._run(Node(name, name, inputs))

    def again(self, module: str, *inputs: str) -> str:
        """Call a sub-module that the network has already."""
        return self._run(Node(self._name("again"), module, inputs))

    def cat(self, *inputs: str) -> str:
        by_channels = self.rank(inputs[0]) == 4 or (self.rank(inputs[0]) == 2 and self.rng.random() < 0.5)
        return self.function("cat_channels" if by_channels else "cat_features", *inputs)

    def project(self, x: str, width: int, stride: int = 1) -> str:
        """x at another width, by a linear layer or a 1x1 convolution."""
        if self.rank(x) == 4:
            return self.module("proj", nn.Conv2d(self.width(x), width, 1, stride=stride), x)
        return self.module("proj", nn.Linear(self.width(x), width), x)

    def at_least(self, x: str, width: int) -> str:
        """x, widened where a normalisation over so few features would leave nothing of it."""
        return x if self.width(x) >= width else self.project(x, width + self.rng.randrange(3))

    def multiple_of(self, x: str, factor: int) -> str:
        return x if self.width(x) % factor == 0 else self.project(x, factor * self.rng.randint(1, 3))

    def chain(self, x: str, length: int) -> str:
        """Simple blocks that leave the spatial size as it is."""
        for _ in range(length):
            x = self.pick(SIMPLE[self.rank(x)])(self, x)
        return x


Block = Callable[[Builder, str], str]


# --- Simple blocks: one operator, no branch; sizes other than the width stay -----------------------------------------


def linear(b: Builder, x: str) -> str:
    return b.module("linear", nn.Linear(b.width(x), b.new_width(), bias=b.rng.random() < 0.8), x)


def conv(b: Builder, x: str) -> str:
    kernel = b.rng.choice((1, 3))
    layer = nn.Conv2d(b.width(x), b.new_width(), kernel, padding=kernel // 2, bias=b.rng.random() < 0.7)
    return b.module("conv", layer, x)


def grouped_conv(b: Builder, x: str) -> str:
    groups = b.rng.choice((2, 3))
    x = b.multiple_of(x, groups)
    width = groups * b.rng.randint(1, 3)
    return b.module("conv", nn.Conv2d(b.width(x), width, 3, padding=1, groups=groups), x)


def depthwise_conv(b: Builder, x: str) -> str:
    width = b.width(x)
    layer = nn.Conv2d(width, width * b.rng.choice((1, 1, 2)), 3, padding=1, groups=width, bias=b.rng.random() < 0.5)
    return b.module("depthwise", layer, x)


def conv_norm_relu(b: Builder, x: str) -> str:
    """The usual triple, with the activation in place."""
    width = b.new_width()
    x = b.module("conv", nn.Conv2d(b.width(x), width, 3, padding=1, bias=False), x)
    x = b.module("bn", nn.BatchNorm2d(width), x)
    return b.module("act", nn.ReLU(inplace=True), x)


def batch_norm(b: Builder, x: str) -> str:
    norm = nn.BatchNorm2d if b.rank(x) == 4 else nn.BatchNorm1d
    return b.module("bn", norm(b.width(x)), x)


def group_norm(b: Builder, x: str) -> str:
    groups = b.rng.choice((1, 2, 3))
    x = b.multiple_of(b.at_least(x, 2 * groups), groups)
    if b.width(x) == groups:  # one channel of one pixel is nothing but its own mean
        x = b.project(x, 2 * groups)
    return b.module("gn", nn.GroupNorm(groups, b.width(x)), x)


def layer_norm(b: Builder, x: str) -> str:
    x = b.at_least(x, 4)
    if b.rank(x) == 4:
        return b.module("ln", ChannelLayerNorm(b.width(x)), x)
    return b.module("ln", nn.LayerNorm(b.width(x)), x)


def rms_norm(b: Builder, x: str) -> str:
    x = b.at_least(x, 3)
    return b.module("rms", nn.RMSNorm(b.width(x), eps=1e-6), x)


def activation(b: Builder, x: str) -> str:
    function, module = b.pick(ACTIVATIONS)
    return b.function(function, x) if b.rng.random() < 0.5 else b.module("act", module(), x)


def dropout(b: Builder, x: str) -> str:
    return b.module("drop", FixedDropout(b.rng.choice((0.1, 0.3))), x)


def dropout_2d(b: Builder, x: str) -> str:
    return b.module("drop", FixedDropout2d(0.2), x)


def scale(b: Builder, x: str) -> str:
    return b.module("scale", (ChannelScale if b.rank(x) == 4 else Scale)(b.width(x)), x)


def parameter_matmul(b: Builder, x: str) -> str:
    return b.module("matmul", ParameterLinear(b.width(x), b.new_width()), x)


def glu(b: Builder, x: str) -> str:
    return b.module("glu", (GatedConv if b.rank(x) == 4 else GatedLinear)(b.width(x), b.new_width()), x)


def swiglu(b: Builder, x: str) -> str:
    return b.module("swiglu", SwiGLU(b.width(x), b.new_width()), x)


def squeeze_excite(b: Builder, x: str) -> str:
    kind = b.pick({"squeeze_excite_conv": ConvSqueezeExcite, "squeeze_excite_linear": LinearSqueezeExcite})
    return b.module("se", kind(b.width(x), b.rng.randint(2, 4)), x)


def channel_shuffle(b: Builder, x: str) -> str:
    """Grouped convolution, shuffle, grouped convolution."""
    groups = b.rng.choice((2, 3))
    x = b.multiple_of(x, groups)
    hidden, width = (groups * b.rng.randint(1, 3) for _ in range(2))
    x = b.module("conv", nn.Conv2d(b.width(x), hidden, 1, groups=groups), x)
    x = b.module("shuffle", ChannelShuffle(groups), x)
    return b.module("conv", nn.Conv2d(hidden, width, 3, padding=1, groups=groups), x)


def attention(b: Builder, x: str) -> str:
    core = b.pick(CORES)
    heads, head_dim, causal = b.rng.randint(1, 3), b.rng.randint(2, 4), b.rng.random() < 0.4
    return b.pick(ATTENTIONS)(b, x, heads, head_dim, core(head_dim, causal))


def grouped_query(kind: type[GroupedQueryAttention]) -> Callable[[Builder, str, int, int, nn.Module], str]:
    def block(b: Builder, x: str, heads: int, head_dim: int, core: nn.Module) -> str:
        return b.module("attention", kind(b.width(x), heads, b.rng.randint(2, 3), head_dim, core), x)

    return block


def multi_head(kind: Callable[..., nn.Module]) -> Callable[[Builder, str, int, int, nn.Module], str]:
    def block(b: Builder, x: str, heads: int, head_dim: int, core: nn.Module) -> str:
        return b.module("attention", kind(b.width(x), heads, head_dim, core), x)

    return block


def positions(b: Builder, x: str) -> str:
    return b.module("position", Positions(b.shape(x)[1], b.width(x)), x)


# --- Blocks with branches --------------------------------------------------------------------------------------------


def residual(b: Builder, x: str) -> str:
    """x + f(x), with a projection of one side where the widths differ."""
    branch = b.chain(x, b.rng.randint(1, 3))
    skip = x
    if b.width(branch) != b.width(x):
        if b.rng.random() < 0.5:
            branch = b.project(branch, b.width(x))
        else:
            skip = b.project(x, b.width(branch))
    return b.function("add", branch, skip)


def transformer_block(b: Builder, x: str) -> str:
    """Pre-norm attention and feed-forward on a residual stream."""
    x = b.at_least(x, 4)
    norm = b.pick({"layer_norm": layer_norm, "rms_norm": rms_norm})
    x = b.function("add", x, b.pick({"attention": attention})(b, norm(b, x)))
    return b.function("add", x, b.pick({"swiglu": swiglu, "mlp": mlp})(b, norm(b, x)))


def mlp(b: Builder, x: str) -> str:
    hidden, width = b.rng.randint(3, 8), b.width(x)
    layers = (nn.Linear(width, hidden), nn.GELU(), FixedDropout(0.1), nn.Linear(hidden, width))
    return b.module("mlp", nn.Sequential(*layers), x)


def concat(b: Builder, x: str) -> str:
    """Two or three branches of x, side by side; the first may be x itself (a dense connection)."""
    branches = [b.chain(x, b.rng.randint(1, 2)) for _ in range(2)]
    if b.rng.random() < 0.4:
        branches.insert(0, x)
    return b.cat(*branches)


def product(b: Builder, x: str) -> str:
    """Two branches of one width, multiplied: one gates the other."""
    left = b.chain(x, 1)
    return b.function("mul", left, b.function("sigmoid", b.project(x, b.width(left))))


def split(b: Builder, x: str) -> str:
    """Two pieces, each consumed on its own, joined again."""
    x = b.at_least(x, 2)
    first = b.rng.randint(1, b.width(x) - 1)
    if b.rank(x) == 4:
        pieces = b.module("split", SplitChannels(first, b.width(x) - first), x)
    else:
        pieces = b.module("split", SplitFeatures(first), x)
    return rejoin(b, pieces)


def chunk(b: Builder, x: str) -> str:
    """The same with two halves."""
    x = b.multiple_of(x, 2)
    return rejoin(b, b.function("chunk_channels" if b.rank(x) == 4 else "chunk_features", x))


def rejoin(b: Builder, pieces: str) -> str:
    left, right = f"{pieces}.0", f"{pieces}.1"
    if b.rng.random() < 0.3:  # the left piece goes on as it is
        return b.cat(left, b.project(right, b.new_width()))
    return b.cat(b.project(left, b.new_width()), b.chain(b.project(right, b.new_width()), 1))


def shared(b: Builder, x: str) -> str:
    """One layer used twice, an activation between."""
    width = b.width(x)
    layer: nn.Module = nn.Conv2d(width, width, 3, padding=1) if b.rank(x) == 4 else nn.Linear(width, width)
    first = b.module("shared", layer, x)
    return b.again(first, b.function("tanh", first))


def skip(b: Builder, x: str) -> str:
    """An earlier value of the same spatial size comes back, added or side by side."""
    dims = slice(2, None) if b.rank(x) == 4 else slice(1, -1)
    earlier = [
        name for name in b.skips if name != x and b.rank(name) == b.rank(x) and b.shape(name)[dims] == b.shape(x)[dims]
    ]
    back = b.rng.choice(earlier) if earlier else b.chain(x, 1)
    if b.pick({"skip_add": False, "skip_concat": True}):
        return b.cat(x, back)
    return b.function("add", x, back if b.width(back) == b.width(x) else b.project(back, b.width(x)))


# --- Blocks that change the spatial size or the rank - ----------------------------------------------------------------


def strided_conv(b: Builder, x: str) -> str:
    padding = 1 if min(b.shape(x)[2:]) < 3 else b.rng.choice((0, 1))
    return b.module("conv", nn.Conv2d(b.width(x), b.new_width(), 3, stride=2, padding=padding), x)


def strided_residual(b: Builder, x: str) -> str:
    """ResNet's block at a change of size: two convolutions with batch norm, a projection, a sum in place."""
    width = b.new_width()
    out = b.module("conv", nn.Conv2d(b.width(x), width, 3, stride=2, padding=1, bias=False), x)
    out = b.module("act", nn.ReLU(inplace=True), b.module("bn", nn.BatchNorm2d(width), out))
    out = b.module("conv", nn.Conv2d(width, width, 3, padding=1, bias=False), out)
    out = b.module("bn", nn.BatchNorm2d(width), out)
    return b.function("relu", b.function("add_", out, batch_norm(b, b.project(x, width, stride=2))))


def max_pool(b: Builder, x: str) -> str:
    return b.module("pool", nn.MaxPool2d(2, ceil_mode=True), x)


def avg_pool(b: Builder, x: str) -> str:
    return b.module("pool", nn.AvgPool2d(2, ceil_mode=True), x)


def flatten(b: Builder, x: str) -> str:
    return b.function("flatten", x)


def view_flat(b: Builder, x: str) -> str:
    return b.function("view_flat", x)


def adaptive_avg(b: Builder, x: str) -> str:
    return b.function("flatten", b.module("pool", nn.AdaptiveAvgPool2d(b.rng.choice((1, 2))), x))


def adaptive_max(b: Builder, x: str) -> str:
    return b.module("flat", nn.Flatten(), b.module("pool", nn.AdaptiveMaxPool2d(b.rng.choice((1, 2))), x))


def mean_space(b: Builder, x: str) -> str:
    return b.function("mean_space", x)


def to_tokens(b: Builder, x: str) -> str:
    if b.shape(x)[2] * b.shape(x)[3] > 16:
        x = strided_conv(b, x)
    return b.function("to_tokens", x)


def mean_tokens(b: Builder, x: str) -> str:
    return b.function("mean_tokens", x)


def first_token(b: Builder, x: str) -> str:
    return b.function("first_token", x)


ACTIVATIONS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "relu": ("relu", nn.ReLU),
    "gelu": ("gelu", nn.GELU),
    "silu": ("silu", nn.SiLU),
    "tanh": ("tanh", nn.Tanh),
    "sigmoid": ("sigmoid", nn.Sigmoid),
    "elu": ("elu", nn.ELU),
}
CORES: dict[str, Callable[[int, bool], nn.Module]] = {
    "sdpa": SdpaCore,
    "softmax_stored_scale": StoredScaleCore,
    "softmax_head_dim_scale": HeadDimCore,
}
ATTENTIONS: dict[str, Callable[[Builder, str, int, int, nn.Module], str]] = {
    "attention_fused_view": multi_head(FusedViewAttention),
    "attention_fused_chunk": multi_head(FusedChunkAttention),
    "attention_separate": multi_head(SeparateAttention),
    "attention_gqa_repeat": grouped_query(GroupedQueryAttention),
    "attention_gqa_expand": grouped_query(ExpandedQueryAttention),
}
_ANY: dict[str, Block] = {"layer_norm": layer_norm, "activation": activation, "scale": scale, "glu": glu}
_DENSE: dict[str, Block] = {
    "linear": linear,
    "rms_norm": rms_norm,
    "dropout": dropout,
    "swiglu": swiglu,
    "parameter_matmul": parameter_matmul,
}
SIMPLE: dict[int, dict[str, Block]] = {
    2: {**_ANY, **_DENSE, "batch_norm_1d": batch_norm},
    3: {**_ANY, **_DENSE, "attention": attention, "positions": positions},
    4: {
        **_ANY,
        "conv": conv,
        "grouped_conv": grouped_conv,
        "depthwise_conv": depthwise_conv,
        "conv_norm_relu": conv_norm_relu,
        "batch_norm_2d": batch_norm,
        "group_norm": group_norm,
        "dropout_2d": dropout_2d,
        "squeeze_excite": squeeze_excite,
        "channel_shuffle": channel_shuffle,
    },
}
BRANCHED: dict[str, Block] = {
    "residual": residual,
    "concat": concat,
    "product": product,
    "split": split,
    "chunk": chunk,
    "shared": shared,
    "skip": skip,
}
TOP_LEVEL: dict[int, dict[str, Block]] = {
    2: SIMPLE[2],
    3: {"transformer_block": transformer_block, "residual": residual, "linear": linear},
    4: {
        "strided_conv": strided_conv,
        "strided_residual": strided_residual,
        "max_pool": max_pool,
        "avg_pool": avg_pool,
        "to_tokens": to_tokens,
    },
}
TO_VECTOR: dict[int, dict[str, Block]] = {
    3: {"mean_tokens": mean_tokens, "first_token": first_token, "flatten": flatten},
    4: {
        "flatten": flatten,
        "view_flat": view_flat,
        "adaptive_avg": adaptive_avg,
        "adaptive_max": adaptive_max,
        "mean_space": mean_space,
    },
}
OPERATORS: frozenset[str] = frozenset(
    {*ACTIVATIONS, *CORES, *ATTENTIONS, *BRANCHED, "embedding", "tied_head", "untied_head", "skip_add", "skip_concat"}
    | {"squeeze_excite_conv", "squeeze_excite_linear", "mlp"}
    | {name for table in (SIMPLE, TOP_LEVEL, TO_VECTOR) for options in table.values() for name in options}
)
"""Names that `Network.operators` may hold and `without` may exclude."""

DOMAINS: tuple[str, ...] = ("vector", "image", "sequence", "text")
_VOCABULARY = 11
_WIDEST = 20
_NUMBERS = 2**16


# --- Building --------------------------------------------------------------------------------------------------------


def _input(domain: str, batch: int, rng: random.Random) -> Tensor:
    if domain == "vector":
        return torch.randn(batch, rng.randint(3, 8), dtype=torch.float64)
    if domain == "image":
        return torch.randn(batch, rng.randint(1, 3), rng.randint(5, 7), rng.randint(5, 7), dtype=torch.float64)
    if domain == "sequence":
        return torch.randn(batch, rng.randint(3, 5), rng.randint(4, 7), dtype=torch.float64)
    return torch.randint(0, _VOCABULARY, (batch, rng.randint(4, 6)))


def _stem(b: Builder, domain: str) -> str:
    """The input, in its first layer, so that nothing else reads it at its own frozen width."""
    if domain == "text":
        b.network.operators.add("embedding")
        embedding = TokenEmbedding(_VOCABULARY, b.shape("input")[1], b.rng.randint(4, 7))
        return b.module("embedding", embedding, "input")
    return (conv if domain == "image" else linear)(b, "input")


def _step(b: Builder, x: str) -> str:
    """One more block; the rank may fall."""
    if b.width(x) > _WIDEST:
        x = b.project(x, b.new_width())
    chance = b.rng.random()
    if chance < 0.45:
        x = b.pick(SIMPLE[b.rank(x)])(b, x)
    elif chance < 0.75:
        x = b.pick(BRANCHED)(b, x)
    elif chance < 0.92 or b.rank(x) == 2:
        x = b.pick(TOP_LEVEL[b.rank(x)])(b, x)
    else:
        x = b.pick(TO_VECTOR[b.rank(x)])(b, x)
    b.skips.append(x)
    return x


def _head(b: Builder, x: str, domain: str) -> None:
    if domain == "text" and b.rank(x) == 3 and b.rng.random() < 0.8:
        if b.pick({"tied_head": True, "untied_head": False}):
            embedding = b.network.get_submodule("embedding1.tokens")
            x = b.project(x, embedding.weight.shape[1])
            head = nn.Linear(embedding.weight.shape[1], _VOCABULARY, bias=False)
            head.weight = embedding.weight
        else:
            head = nn.Linear(b.width(x), _VOCABULARY, bias=False)
        b.module("head", head, x)
        return
    if b.rank(x) != 2:
        x = b.pick(TO_VECTOR[b.rank(x)])(b, x)
    b.module("head", nn.Linear(b.width(x), b.rng.randint(2, 5)), x)


class IllConditionedError(ValueError):
    """No weights were found with which the network's outputs are fit for comparison."""


def _draw_weights(network: Network, x: Tensor) -> None:
    """Weights that keep the variance of what passes them, rescaled node by node where it leaves [0.3, 3] even so."""
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            if isinstance(module, (nn.Embedding, Positions)):
                nn.init.normal_(parameter)
                continue
            fan_in = parameter.shape[0] if isinstance(module, ParameterLinear) else parameter[0].numel()
            limit = 1.3 * math.sqrt(3 / fan_in)
            nn.init.uniform_(parameter, -limit, limit)
    values = {"input": x}
    for node in network.nodes:
        network.run(node, values)
        weights = [] if node.call != node.name else list(network.get_submodule(node.call).parameters())
        matrices = [weight for weight in weights if weight.dim() > 1]
        if matrices and not 0.3 < (spread := float(values[node.name].std())) < 3:
            matrices[-1].div_(max(spread, 1e-3))
            network.run(node, values)


def assemble(domain: str, base: int, blocks: Sequence[int], without: Collection[str] = ()) -> tuple[Network, Tensor]:
    """A random float64 network in train mode, and its input of 8 to 10 samples.

    `domain` (of DOMAINS) is the kind of input, `base` decides its sizes, the first and last layer and all weights, each
    of `blocks` decides one block. `without` names operators (of OPERATORS) to leave out; a block such as
    strided_residual goes by its own name, whatever is in it.
    ValueError for unknown names or a `without` that leaves a block no choice; IllConditionedError (1 network in 10,000)
    if 20 draws of weights give no outputs fit for comparison (see `sane`).
    """
    if domain not in DOMAINS:
        raise ValueError(f"expected a domain of {DOMAINS}, found {domain!r}")
    if unknown := sorted(set(without) - OPERATORS):
        raise ValueError(f"expected `without` to name operators of OPERATORS, found {unknown}")
    excluded = f", without={sorted(without)}" if without else ""
    recipe = f"assemble({domain!r}, base={base}, blocks={list(blocks)}{excluded})"
    rng = random.Random(base)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(base)
        x = _input(domain, rng.randint(8, 10), rng)
        b = Builder(Network(recipe), x, rng, without)
        value = _stem(b, domain)
        for block in blocks:
            b.rng = random.Random(block)
            value = _step(b, value)
        b.rng = rng
        _head(b, value, domain)
        for trial in range(20):
            _draw_weights(b.network, x)
            disturb(b.network, x, base + trial)
            if sane(b.network, x):
                return b.network, x
    raise IllConditionedError(f"expected sane outputs for some weights, found none in 20 trials of\n{b.network!r}")


def build(seed: int, size: int = 4, domain: str | None = None, without: Collection[str] = ()) -> tuple[Network, Tensor]:
    """`assemble` of `size` blocks, the seed deciding everything else, the domain too if none is given.

    Of two sizes the smaller network's blocks are the first of the larger one. ValueError for a negative size.
    """
    if size < 0:
        raise ValueError(f"expected a size of at least 0, found {size}")
    rng = random.Random(seed)
    drawn, base = rng.choice((*DOMAINS, "image")), rng.randrange(_NUMBERS)
    return assemble(domain or drawn, base, [rng.randrange(_NUMBERS) for _ in range(size)], without)


class Drawn(NamedTuple):
    """A network and its input; shown as the network alone."""

    model: Network
    x: Tensor

    def __repr__(self) -> str:
        return repr(self.model)


@st.composite
def networks(
    draw: st.DrawFn, max_size: int = 6, domains: Sequence[str] = DOMAINS, without: Collection[str] = ()
) -> Drawn:
    """A hypothesis strategy of (network, input) with up to `max_size` blocks."""
    numbers = st.integers(0, _NUMBERS - 1)
    domain, base = draw(st.sampled_from(tuple(domains))), draw(numbers)
    blocks = draw(st.lists(numbers, max_size=max_size))
    try:
        return Drawn(*assemble(domain, base, blocks, without))
    except IllConditionedError:
        reject()
