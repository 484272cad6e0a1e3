"""ShortGPT: remove the blocks that turn what passes through them least."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_depth import LayerOptions, of_layers
from espalier.parts.depth.places import Removable
from espalier.parts.depth.scores import Influence

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def shortgpt(batches: int = 4, kept: int = 1, **options: Unpack[LayerOptions]) -> Method:
    """Remove the blocks of least influence, 1 - cos(in, out) over samples and positions; look anew at every event.

    Args:
        batches: to look at, at most.
        kept: how many blocks of each stage stay at least.
        options: those of `espalier.methods.common_depth.LayerOptions`, which says what raises MethodError.
    """
    return of_layers(
        "shortgpt",
        "prune",
        Influence(batches),
        Removable(kept, leaves="entry"),
        paper="Men et al. 2024, ShortGPT: Layers in large language models are more redundant than you expect "
        "(arXiv:2403.03853)",
        description="removes the blocks that turn what passes through them by the smallest angle",
        **options,
    )
