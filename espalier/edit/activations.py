"""Activations by name: what plans and checkpoints can say of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import nn

from espalier.errors import PlanError

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "elu": nn.ELU,
        "gelu": nn.GELU,
        "gelu_tanh": partial(nn.GELU, approximate="tanh"),
        "hardsigmoid": nn.Hardsigmoid,
        "hardswish": nn.Hardswish,
        "hardtanh": nn.Hardtanh,
        "leaky_relu": nn.LeakyReLU,
        "mish": nn.Mish,
        "relu": nn.ReLU,
        "relu6": nn.ReLU6,
        "selu": nn.SELU,
        "sigmoid": nn.Sigmoid,
        "silu": nn.SiLU,
        "softplus": nn.Softplus,
        "tanh": nn.Tanh,
    }
)
"""Name -> what makes the module, with the settings that it has by default."""

IDEMPOTENT = frozenset({"relu", "relu6", "hardtanh"})
"""Those that leave their own results as they are."""


def activation(name: str) -> nn.Module:
    """A new activation. Raises PlanError for an unknown name."""
    make = ACTIVATIONS.get(name)
    if make is None:
        raise PlanError(f"there is no activation {name!r}; known are {', '.join(sorted(ACTIVATIONS))}.")
    return make()


__all__ = ["ACTIVATIONS", "IDEMPOTENT", "activation"]
