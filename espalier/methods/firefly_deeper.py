"""Firefly for layers: new ones near the identity, optimised together a little, of which the best stay."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_depth import LayerOptions, of_layers
from espalier.parts.depth.firefly import AsTrained, FireflyLayers
from espalier.parts.depth.places import Virtual, virtual_layers

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def firefly_deeper(
    new: Virtual = "residual",
    step: float = 0.1,
    steps: int = 10,
    points: int = 3,
    batches: int = 2,
    **options: Unpack[LayerOptions],
) -> Method:
    """Try a new layer at every place, all near the identity; insert those that lower the loss most, as trained so far.

    The network itself stays as it is meanwhile. The outputs change, by what the loss falls. Units are `firefly`'s.

    Args:
        new: what layers may come, as in `sensli`.
        step: eps, how far a layer goes, relative to the length of its matrices as torch draws them.
        steps: of descent, with that bound.
        points: of the path integral by which a layer is valued.
        batches: to look at, at most.
        options: those of `espalier.methods.common_depth.LayerOptions`, which says what raises MethodError.
    """
    method = of_layers(
        "firefly-deeper",
        "grow",
        FireflyLayers(step, steps, points=points, batches=batches),
        virtual_layers(new),
        paper="Wu et al. 2020, Firefly neural architecture descent (arXiv:2102.08574)",
        description="tries new layers near the identity, optimised together a little, and keeps the best",
        **options,
    )
    return replace(method, init=AsTrained())
