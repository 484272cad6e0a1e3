"""Small networks made of repeated blocks, for what adds and removes layers and cells while training goes on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from zoo_small import ResNet, ViT


class Branch(nn.Module):
    """x + down(relu(up(norm(x))))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.act = nn.ReLU()
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Blocks(nn.Module):
    """Residual blocks of an MLP in an `nn.ModuleList`."""

    def __init__(self, depth: int = 3, width: int = 8, hidden: int = 10) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.layers = nn.ModuleList(Branch(width, hidden) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@dataclass(frozen=True)
class Block:
    """How to make a network, and the lists in which its cells are."""

    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    containers: tuple[str, ...]


BLOCKS = {
    "blocks": Block(lambda: (Blocks(), (torch.randn(5, 6),)), ("layers",)),
    "resnet": Block(lambda: (ResNet((8, 12)), (torch.randn(2, 3, 8, 8),)), ("layers.0", "layers.1")),
    "vit": Block(lambda: (ViT(depth=3), (torch.randn(2, 3, 8, 8),)), ("blocks",)),
}
