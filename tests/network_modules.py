"""The modules that generated networks are made of, written as a careful user writes them, and their plain functions."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from oracles import FixedDropout
from torch import Tensor, nn


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
