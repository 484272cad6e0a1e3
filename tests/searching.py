"""A problem that is searched in milliseconds, and ways in which workers of it come to grief."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from espalier.edit.plan import Plan, Resize
from espalier.evolve.problem import Workbench
from espalier.evolve.proposals import Material, Proposal


@dataclass(frozen=True)
class Spirals:
    """Two spirals, and a perceptron that is too small for them."""

    width: int = 4
    seed: int = 0
    trouble: str = ""
    """``kill``, ``hang``, ``memory`` or ``bug``: what becomes of who trains a network of more than `width` units."""
    once: str = ""
    """A file that is there when the trouble is over; it is made before."""

    def workbench(self) -> Workbench:
        drawn = torch.Generator().manual_seed(self.seed)
        angle = torch.rand(400, generator=drawn) * 6
        side = torch.arange(400) % 2
        points = torch.stack([angle.cos(), angle.sin()], 1) * angle[:, None] / 6 * (1 - 2 * side[:, None])
        torch.manual_seed(self.seed)
        model = nn.Sequential(nn.Linear(2, self.width), nn.Tanh(), nn.Linear(self.width, self.width), nn.Tanh())
        model.append(nn.Linear(self.width, 2))

        def loss(network: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            if self.trouble and network[0].out_features > self.width and network.training:
                self._come_to_grief()
            return F.cross_entropy(network(batch[0]), batch[1])

        return Workbench(
            model, torch.optim.Adam(model.parameters(), 1e-2), points[:2], 2,
            lambda step: (points[step % 6 * 40 :][:40], side[step % 6 * 40 :][:40]), lambda batch: len(batch[1]), loss,
            lambda network, batch: F.cross_entropy(network(batch[0]), batch[1], reduction="none"),
            lambda network, batch: (network(batch[0]).argmax(1) == batch[1]).float(),
            [(points[240:320], side[240:320])], [(points[320:], side[320:])], lambda done: 1 - 0.9 * done,
        )  # fmt: skip

    def _come_to_grief(self) -> None:
        if self.once:
            if Path(self.once).exists():
                return
            Path(self.once).touch()
        if self.trouble == "memory":
            torch.empty(1 << 58)
        if self.trouble == "bug":
            raise KeyError("forgotten")
        if self.trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)


@dataclass(frozen=True)
class Wider:
    """Proposes to widen both layers, and to widen the first one into nonsense if `broken`."""

    broken: bool = False

    def __call__(self, material: Material, count: int, /) -> list[Proposal]:
        material.loss(material.batches[0]).backward()
        found = [
            Proposal(Plan((Resize(axis, add=2),), seed=material.seed), "wider", f"widen {axis}", "why not")
            for axis in "02"
        ]
        if self.broken:
            plan = Plan((Resize("2", add=2),), values={"4.weight": torch.full((2, 6), 3e38)})
            found.append(Proposal(plan, "broken", "widen into what overflows", "for trouble"))
        return found
