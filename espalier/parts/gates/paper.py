"""The settings of Neural Plasticity Networks for LeNet-5 on MNIST (Li & Ji 2020, arXiv:1908.08118).

    prune.NPN(**lenet5())                 sparsifies 20-50-800-500
    grow.NPN(**lenet5(growing=True))      expands 3-3-48-3

As in the official code, and otherwise than by default here: gates are judged by their means; the estimator is ARM; k is
constant in the search, 7, or 1 to grow; the penalty on a gate is lambda times the weights of its unit in one layer over
the 60,000 images, lambda being 10, 0.5, 0.1 and 10, whatever other layers do; and the 800 flattened inputs of the first
dense layer have gates of their own, beside those of the 50 channels that they come from. Otherwise than in that code
both samples of a step see the network in the same mode, the first stage has decided gates, and the first units are
those that are awake. It trains for 500 epochs, by Adam at 1e-3 and from epoch 400 on at 1e-4, with batches of 128.
"""

from __future__ import annotations

from typing import Any

from espalier.parts.gates.decay import GroupDecay
from espalier.parts.gates.estimators import ARM
from espalier.parts.gates.expected import PerUnit
from espalier.parts.gates.stages import Stages

_LAMBDAS = (10.0, 0.5, 0.1, 10.0)
_WEIGHTS = (1 * 5 * 5, 20 * 5 * 5, 500, 10)
"""Of one unit: of a filter of either convolution, of a column of the first dense layer and of one of the second."""


def lenet5(
    convolutions: tuple[str, str] = ("conv1", "conv2"),
    dense: str = "fc1",
    *,
    growing: bool = False,
    images: int = 60_000,
) -> dict[str, Any]:
    """Arguments of `prune.NPN`, or of `grow.NPN` if it is to grow.

    Args:
        convolutions: names of the convolutions.
        dense: name of the first dense layer.
        growing: see above.
        images: that there are to train on.
    """
    columns = f"{dense}.weight[1]"
    keys = (*convolutions, columns, dense)
    strengths = {key: one * weights / images for key, one, weights in zip(keys, _LAMBDAS, _WEIGHTS, strict=True)}
    axes = (*convolutions, dense)
    found: dict[str, Any] = {
        "stages": Stages(1.0 if growing else 7.0, start=0.2, until=0.7),
        "penalty": PerUnit(strengths),
        "estimator": ARM(),
        "judged": "mean",
        "axes": axes,
        "columns": (columns,),
        "decay": GroupDecay(5e-4 / images),
    }
    return found | {"awake": dict.fromkeys(axes, 3)} if growing else found


__all__ = ["lenet5"]
