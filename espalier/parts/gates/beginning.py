"""The logits with which gates begin: at the probability of the settings, a little apart from each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espalier.parts.gates.settings import GateSettings
from espalier.parts.score import derived_seed

_SPREAD = 0.01
"""Standard deviation of the noise."""


def beginning(settings: GateSettings) -> float:
    """The logit of a gate that begins open."""
    return settings.kind.logit(settings.begin, settings.stages.k or 1.0)


def noise_of(key: str, numbers: Sequence[int]) -> Tensor:
    """For things that have numbers for life: the same for each whenever it comes."""
    rows = [torch.Generator().manual_seed(derived_seed("gate", key, one)) for one in numbers]
    return torch.stack([_SPREAD * torch.randn((), generator=one, dtype=torch.float64) for one in rows])


def fresh_gates(settings: GateSettings, key: str, count: int) -> Tensor:
    """The logits of so many gates without numbers."""
    generator = torch.Generator().manual_seed(derived_seed("gates", key))
    return beginning(settings) + _SPREAD * torch.randn(count, generator=generator, dtype=torch.float64)


__all__ = ["beginning", "fresh_gates", "noise_of"]
