"""Models that tests export: a module of its own, which knows nothing of Espalier."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block with a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Mixed(nn.Module):
    """Convolutions, a batch norm, residual blocks and heads that share their weight with the stem's last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3))
        self.blocks = nn.ModuleList([Block(8), Block(8), Block(8)])
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 4)
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean((2, 3))
        for block in self.blocks:
            x = block(x)
        return self.head(torch.relu(self.second(torch.relu(self.first(x))))) * self.scale


def build() -> Mixed:
    return Mixed()
