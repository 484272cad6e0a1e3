"""Random networks for property-based tests, and the oracles that compare a network before and after an edit.

`assemble(domain, base, blocks)` makes one network and its input, a number deciding each block; `build(seed, size)`
draws these numbers, and `networks()` is the hypothesis strategy, which shrinks by leaving out blocks. A network is an
ordinary module with named sub-modules; its forward runs a list of nodes, each a call of one sub-module or of one plain
function, so that its repr is the program.
"""

import math
import random
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import hypothesis.strategies as st
import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import reject
from torch import Tensor, nn

Option = TypeVar("Option")


# --- Dropout whose masks can be held ---------------------------------------------------------------------------------


def _mix(state: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea, Flood 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def hashed_uniform(keys: Sequence[int], ids: Sequence[np.ndarray]) -> Tensor:
    """Uniform [0, 1) numbers of shape (len(ids[0]), len(ids[1]), ...); each depends on the keys and its own ids."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = _mix(state + golden + np.uint64(key))
    state = state.reshape(())[None]
    for dim_ids in ids:
        state = _mix(state[..., None] + golden * (dim_ids.astype(np.uint64) + np.uint64(1)))
    return torch.from_numpy((state[0] >> np.uint64(11)).astype(np.float64) / 2.0**53)


def aligned_ids(old: Tensor, new: Tensor) -> list[np.ndarray]:
    """For each dimension of `new`, which index of `old` each of its indices continues; new units get fresh numbers.

    Where one dimension has another size, units are recognised by their values (an edit keeps their order, and leaves
    values as they are when it is exact). Where that fails, or several dimensions differ, the position decides.
    """
    ids = [np.arange(size) for size in new.shape]
    if old.dim() != new.dim():
        return ids
    changed = [dim for dim in range(new.dim()) if old.shape[dim] != new.shape[dim]]
    if len(changed) != 1:
        return ids
    (dim,) = changed
    before, after = old.movedim(dim, 0).flatten(1), new.movedim(dim, 0).flatten(1)
    tolerance = 1e-5 * max(float(before.abs().max()), float(after.abs().max()))
    small, large = (before, after) if len(before) < len(after) else (after, before)
    matches: list[int] = []
    for index, row in enumerate(large):
        if len(matches) < len(small) and float((row - small[len(matches)]).abs().max()) <= tolerance:
            matches.append(index)
    if len(matches) < len(small):
        return ids
    if len(before) < len(after):
        ids[dim] = np.arange(len(before), len(before) + len(after))
        ids[dim][matches] = np.arange(len(before))
    else:
        ids[dim] = np.array(matches)
    return ids


class HeldMasks:
    """Dropout masks that stay with their units: pass the same object to `outputs` before and after an edit.

    The first run decides; later runs give every unit they recognise (see `aligned_ids`) the mask it had then, so that
    units may be removed from or put into the middle of an axis.
    """

    def __init__(self) -> None:
        self._inputs: dict[tuple[str, int], Tensor] = {}

    def ids(self, name: str, call: int, x: Tensor) -> list[np.ndarray]:
        first = self._inputs.setdefault((name, call), x.detach().clone())
        return aligned_ids(first, x.detach())


class _MaskSource:
    """The masks of one dropout module during one run."""

    def __init__(self, seed: int, name: str, held: HeldMasks | None) -> None:
        self.seed, self.name, self.held, self.calls = seed, name, held, 0

    def mask(self, x: Tensor, p: float, whole_channels: bool) -> Tensor:
        ids = [np.arange(size) for size in x.shape] if self.held is None else self.held.ids(self.name, self.calls, x)
        if whole_channels:
            ids[2:] = [np.arange(1) for _ in ids[2:]]
        keys = (self.seed, zlib.crc32(self.name.encode()), self.calls)
        self.calls += 1
        return (hashed_uniform(keys, ids) >= p).to(x.dtype) / (1 - p)


class FixedDropout(nn.Dropout):
    """Dropout that is torch's own, except during `outputs`: there, each element's mask depends on its position alone.

    So a unit's mask stays what it was when units are appended; with `HeldMasks` also when others are removed or put in
    the middle. It is an ordinary dropout otherwise, so that a recording of the network shows an ordinary dropout.
    """

    whole_channels = False

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.source: _MaskSource | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.source is None or not self.training:
            return self.drop(x)
        return x * self.source.mask(x, self.p, self.whole_channels)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


class FixedDropout2d(FixedDropout):
    """The same, dropping whole channels of (B, C, H, W)."""

    whole_channels = True

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout2d(x, self.p, self.training)


# --- Oracles ---------------------------------------------------------------------------------------------------------


def call(model: nn.Module, x: Any) -> Any:
    """The model called with x: a tensor, a tuple of arguments or a dict of named ones."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floating(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _floating(item)


@contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    """Train/eval flags, buffers and the random state as before."""
    training = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            with torch.no_grad():
                buffer.copy_(value)


def outputs(model: nn.Module, x: Any, train: bool, seed: int, masks: HeldMasks | None = None) -> Tensor:
    """The model's output for x (a tensor, a tuple or a dict of arguments) in train or eval mode, without side effects.

    Several output tensors come flattened and joined into one. `masks` holds dropout masks over edits: see `HeldMasks`.
    """
    dropouts = [(name, module) for name, module in model.named_modules() if isinstance(module, FixedDropout)]
    with _no_trace(model):
        torch.manual_seed(seed)
        model.train(train)
        for name, dropout in dropouts:
            dropout.source = _MaskSource(seed, name, masks)
        try:
            result = call(model, x)
        finally:
            for _, dropout in dropouts:
                dropout.source = None
    if isinstance(result, Tensor):
        return result.clone()
    return torch.cat([tensor.flatten() for tensor in _floating(result)])


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|; ValueError if the shapes differ; 0 for two zeros, infinite if b alone is zero."""
    if a.shape != b.shape:
        raise ValueError(f"expected two tensors of one shape, found {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel() == 0:
        return 0.0
    difference, scale = float((a - b).abs().max()), float(b.abs().max())
    if scale == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / scale


def calibrate(model: nn.Module, x: Any) -> None:
    """Set the running statistics of every batch norm to those of x, over three train-mode forwards."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    training = {module: module.training for module in model.modules()}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the forwards
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model.train()
        for _ in range(3):
            call(model, x)
    for module, flag in training.items():
        module.training = flag
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def sane(model: nn.Module, x: Any) -> bool:
    """Whether train- and eval-mode outputs are finite, of magnitude 1e-2 to 1e3, and depend on the sample."""
    for train in (False, True):
        y = outputs(model, x, train, seed=0)
        magnitude = float(y.abs().max())
        if not math.isfinite(magnitude) or not 1e-2 <= magnitude <= 1e3:
            return False
        if float((y - y.mean(0)).abs().max()) < 1e-2 * magnitude:
            return False
    return True


def well_conditioned(model: nn.Module, x: Any) -> bool:
    """Calibrate the batch norms on x, then say whether the outputs are fit for comparison (see `sane`)."""
    calibrate(model, x)
    return sane(model, x)


def disturb(model: nn.Module, x: Any, seed: int) -> None:
    """Leave no value at which an error hides: scales (every 1-d parameter that is no bias) get [0.5, 1.5], biases
    [-0.5, 0.5], and running statistics move off those of x, so that train and eval mode differ.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                bias = name.endswith("bias")
                nn.init.uniform_(parameter, *((-0.5, 0.5) if bias else (0.5, 1.5)))
        calibrate(model, x)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                shift = torch.randn_like(module.running_mean)
                module.running_mean += 0.2 * module.running_var.sqrt() * shift
                module.running_var *= torch.empty_like(module.running_var).uniform_(0.7, 1.4)


# --- Modules, as a careful user writes them --------------------------------------------------------------------------


class SdpaCore(nn.Module):
    """Fused attention over (B, heads, T, head_dim); its scale comes from the size of the query."""

    def __init__(self, head_dim: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class StoredScaleCore(nn.Module):
    """Explicit softmax; the scale is a number kept from construction; dropout on the probabilities."""

    def __init__(self, head_dim: int, causal: bool) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.causal = causal
        self.dropout = FixedDropout(0.2)
        self.register_buffer("mask", torch.ones(16, 16, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)) * self.scale
        if self.causal:
            tokens = q.shape[-2]
            scores = scores.masked_fill(self.mask[:tokens, :tokens], float("-inf"))
        return self.dropout(scores.softmax(dim=-1)) @ v


class HeadDimCore(nn.Module):
    """Explicit softmax; the scale is computed from head_dim in every forward."""

    def __init__(self, head_dim: int, causal: bool) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        return torch.matmul(F.softmax(scores, dim=-1), v)


class FusedViewAttention(nn.Module):
    """qkv in one projection, taken apart by one view and permute."""

    def __init__(self, width: int, num_heads: int, head_dim: int, core: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv = nn.Linear(width, 3 * num_heads * head_dim)
        self.core = core
        self.proj = nn.Linear(num_heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.core(q, k, v).transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim))


class FusedChunkAttention(nn.Module):
    """qkv in one projection, taken apart by chunk; head_dim is left to the view."""

    def __init__(self, width: int, num_heads: int, head_dim: int, core: nn.Module) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * num_heads * head_dim, bias=False)
        self.core = core
        self.proj = nn.Linear(num_heads * head_dim, width)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.num_heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out = self.core(self.heads(q), self.heads(k), self.heads(v))
        return self.proj(out.transpose(1, 2).flatten(2))


class SeparateAttention(nn.Module):
    """q, k and v each with their own projection."""

    def __init__(self, width: int, num_heads: int, head_dim: int, core: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.query = nn.Linear(width, num_heads * head_dim)
        self.key = nn.Linear(width, num_heads * head_dim)
        self.value = nn.Linear(width, num_heads * head_dim)
        self.core = core
        self.output = nn.Linear(num_heads * head_dim, width)

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.core(self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x)))
        out = out.permute(0, 2, 1, 3).contiguous()
        return self.output(out.view(*x.shape[:2], self.num_heads * self.head_dim))


class GroupedQueryAttention(nn.Module):
    """Several query heads for each key/value head; the key/value heads are repeated by `repeat`."""

    def __init__(self, width: int, num_kv_heads: int, group: int, head_dim: int, core: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_kv_heads * group, num_kv_heads, head_dim
        self.q_proj = nn.Linear(width, self.num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.core = core
        self.o_proj = nn.Linear(self.num_heads * head_dim, width, bias=False)

    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        out = self.core(q, self.repeat(k), self.repeat(v))
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class ExpandedQueryAttention(GroupedQueryAttention):
    """The same, repeating by expand and reshape."""

    def repeat(self, x: Tensor) -> Tensor:
        b, heads, t, d = x.shape
        group = self.num_heads // self.num_kv_heads
        return x[:, :, None].expand(b, heads, group, t, d).reshape(b, heads * group, t, d)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); no sizes are needed in forward."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GatedLinear(nn.Module):
    """One projection to twice the width, then F.glu."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.proj(x), dim=-1)


class GatedConv(nn.Module):
    """One convolution to twice the channels; half of them gate the other half."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * hidden, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x).chunk(2, dim=1)
        return value * torch.sigmoid(gate)


class ConvSqueezeExcite(nn.Module):
    """Squeeze-and-excitation by 1x1 convolutions."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(self.pool(x)))))


class LinearSqueezeExcite(nn.Module):
    """Squeeze-and-excitation by linear layers on the spatial mean."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        return x * self.fc(x.mean((2, 3))).view(b, c, 1, 1)


class ChannelShuffle(nn.Module):
    """(B, groups x n, H, W) -> (B, n x groups, H, W), as in ShuffleNet."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class ChannelLayerNorm(nn.Module):
    """Layer norm over the channels of (B, C, H, W), as in ConvNeXt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SplitChannels(nn.Module):
    """Two pieces of given sizes along dim 1 of images and vectors."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, [self.first, self.second], dim=1)


class SplitFeatures(nn.Module):
    """Two pieces of given sizes along the last dimension, by slices."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x[..., : self.first], x[..., self.first :]


class Scale(nn.Module):
    """x * self.scale over the features (last dimension)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ChannelScale(nn.Module):
    """x * self.scale over the channels of (B, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(1, -1, 1, 1)


class ParameterLinear(nn.Module):
    """x @ self.w + self.bias, with bare parameters."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(width, hidden))
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + self.bias


class TokenEmbedding(nn.Module):
    """Token embedding plus a learned position embedding, by index."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))


class Positions(nn.Module):
    """x + a learned table of shape (1, T, D)."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, length, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[:, : x.shape[1]]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": torch.add,
    "add_": lambda x, y: x.add_(y),
    "mul": torch.mul,
    "cat_channels": lambda *xs: torch.cat(xs, dim=1),
    "cat_features": lambda *xs: torch.cat(xs, dim=-1),
    "chunk_channels": lambda x: x.chunk(2, dim=1),
    "chunk_features": lambda x: x.chunk(2, dim=-1),
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "flatten": lambda x: torch.flatten(x, 1),
    "view_flat": lambda x: x.contiguous().view(x.size(0), -1),
    "mean_space": lambda x: x.mean(dim=(2, 3)),
    "mean_tokens": lambda x: x.mean(dim=1),
    "first_token": lambda x: x[:, 0],
    "to_tokens": lambda x: x.flatten(2).transpose(1, 2),
}


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


@st.composite
def networks(
    draw: st.DrawFn, max_size: int = 6, domains: Sequence[str] = DOMAINS, without: Collection[str] = ()
) -> tuple[Network, Tensor]:
    """A hypothesis strategy of (network, input) with up to `max_size` blocks."""
    numbers = st.integers(0, _NUMBERS - 1)
    domain, base = draw(st.sampled_from(tuple(domains))), draw(numbers)
    blocks = draw(st.lists(numbers, max_size=max_size))
    try:
        return assemble(domain, base, blocks, without)
    except IllConditionedError:
        reject()
