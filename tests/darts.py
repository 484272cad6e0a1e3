"""Small networks of cells as in DARTS (Liu et al. 2019, arXiv:1806.09055) while it searches.

Every edge is a mixture of operations, with weights that are the softmax of parameters of the whole network; a cell's
result is the concatenation of its nodes; a reduction cell halves places and doubles channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEPS = 2
OPERATIONS = 5


class Separable(nn.Module):
    def __init__(self, channels: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Halved(nn.Module):
    """Half of the channels from every second place, half from those between."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, out // 2, 1, 2, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        return self.norm(torch.cat([self.one(x), self.two(x[:, :, 1:, 1:])], 1))


class Zero(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class Mixed(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        pooled = nn.Sequential(nn.MaxPool2d(3, stride, 1), nn.BatchNorm2d(channels, affine=False))
        passed = nn.Identity() if stride == 1 else Halved(channels, channels)
        separable = (Separable(channels, stride, kernel) for kernel in (3, 5))
        self.ops = nn.ModuleList([Zero(stride), pooled, passed, *separable])

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(weight * op(x) for weight, op in zip(weights, self.ops, strict=True))


def pointwise(channels: int, out: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))


class Cell(nn.Module):
    """Of one input, or of two, which are the results of the two cells before."""

    def __init__(self, before: list[nn.Module], channels: int, *, reduction: bool) -> None:
        super().__init__()
        self.reduction = reduction
        self.before = nn.ModuleList(before)
        self.ops = nn.ModuleList(
            Mixed(channels, 2 if reduction and source < len(before) else 1)
            for node in range(STEPS)
            for source in range(len(before) + node)
        )

    def forward(self, *given: Tensor) -> Tensor:
        *inputs, weights = given
        states = [before(one) for before, one in zip(self.before, inputs, strict=True)]
        first, offset = len(states), 0
        for _ in range(STEPS):
            edges = zip(states, self.ops[offset : offset + len(states)], weights[offset:], strict=False)
            offset += len(states)
            states.append(sum(op(one, weight) for one, op, weight in edges))
        return torch.cat(states[first:], dim=1)


class Search(nn.Module):
    """`cells` normal cells, a reduction cell, and as many normal ones; of one input or of two."""

    def __init__(self, cells: int = 2, inputs: int = 1, channels: int = 4) -> None:
        super().__init__()
        self.inputs = inputs
        sizes = [STEPS * channels] * 2
        self.stem = nn.Sequential(nn.Conv2d(3, sizes[0], 3, padding=1, bias=False), nn.BatchNorm2d(sizes[0]))
        self.cells = nn.ModuleList()
        halved = False
        for number in range(2 * cells + 1):
            reduction = number == cells
            channels *= 2 if reduction else 1
            before = [pointwise(size, channels) for size in sizes[2 - inputs :]]
            if inputs == 2 and halved:
                before[0] = Halved(sizes[0], channels)
            self.cells.append(Cell(before, channels, reduction=reduction))
            sizes, halved = [sizes[1], STEPS * channels], reduction
        edges = sum(inputs + node for node in range(STEPS))
        self.normal, self.reduce = (nn.Parameter(1e-3 * torch.randn(edges, OPERATIONS)) for _ in range(2))
        self.head = nn.Linear(sizes[1], 5)

    def forward(self, x: Tensor) -> Tensor:
        states = [self.stem(x)] * self.inputs
        for cell in self.cells:
            weights = (self.reduce if cell.reduction else self.normal).softmax(-1)
            states = [*states[1:], cell(*states, weights)]
        return self.head(states[-1].mean((2, 3)))
