"""A model of the zoo made fit for comparing: two samples, float64, and no value at which an error hides."""

from __future__ import annotations

from typing import Any

import torch
from oracles import calibrate
from torch import Tensor, nn
from zoo_parts.models import ZOO
from zoo_parts.torchvision_import import torchvision_importable

from espalier.graph.trees import map_tensors

BATCH = 2
"""Samples in the example: with one, a batch norm at a single position has nothing to normalise over in train mode."""

Prepared = tuple[nn.Module, Any]


def built(name: str) -> Prepared:
    """The model as its package makes it, in float32 and in eval mode, and an example of two samples."""
    torchvision_importable()
    torch.manual_seed(0)
    model, example = ZOO[name]()
    torch.manual_seed(1)
    return model.eval(), map_tensors(example, _two_samples)


def prepared(name: str) -> Prepared:
    """The same in float64, with weights that hide nothing; the same at every call."""
    model, example = built(name)
    model, example = model.double(), map_tensors(example, _in_double)
    disturb(model, example)
    return model, example


def disturb(model: nn.Module, example: Any) -> None:
    """Draw scales from [0.5, 1.5], biases from [-0.5, 0.5], constant matrices anew; set running statistics to match."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if parameter.numel() == max(parameter.shape, default=1):
                nn.init.uniform_(parameter, *((-0.5, 0.5) if name.endswith("bias") else (0.5, 1.5)))
            elif bool((parameter == parameter.flatten()[0]).all()):
                nn.init.normal_(parameter, std=0.2)
    calibrate(model, example)
    model.eval()


def _two_samples(tensor: Tensor) -> Tensor:
    """Another sample beside the one that there is."""
    if tensor.is_floating_point():
        return torch.cat([tensor, torch.randn_like(tensor)])
    return torch.cat([tensor, tensor.flip(-1)])


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
