"""A network as rows of a table: its modules with their shapes, for the report."""

from __future__ import annotations

from typing import Any

from torch import nn


def architecture(model: nn.Module) -> list[dict[str, Any]]:
    """One row for every module that holds parameters of its own: module, type, shape, parameters."""
    rows = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            rows.append(
                {
                    "module": name or "(the network)",
                    "type": type(module).__name__,
                    "shape": _shape(module),
                    "parameters": sum(parameter.numel() for parameter in own.values()),
                }
            )
    return rows


def _shape(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"{module.in_features} → {module.out_features}"
    if isinstance(module, nn.Conv2d):
        window = "x".join(map(str, module.kernel_size))
        return f"{module.in_channels} → {module.out_channels}, {window}"
    if isinstance(module, nn.BatchNorm2d):
        return str(module.num_features)
    return ", ".join("x".join(map(str, one.shape)) for one in module.parameters(recurse=False))
