"""Copies of blocks: LLaMA Pro's, which begin as nothing, and SOLAR's and stacking's, which are copies at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_depth import LayerOptions, of_layers
from espalier.parts.depth.order import InOrder, Order
from espalier.parts.depth.places import Copies, Start

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def copy_blocks(init: Start = "zero", order: Order = "spread", **options: Unpack[LayerOptions]) -> Method:
    """Put copies right after blocks.

    Args:
        init: ``zero``, so that the network computes what it did: those parameters of a copy are zero without which it
            hands on what it gets (LLaMA Pro); ``copy``, as it is (SOLAR, stacking), which changes the outputs;
            ``random``, initialised anew.
        order: which blocks first: ``spread`` evenly over the depth, ``middle`` or ``last``.
        options: those of `espalier.methods.common_depth.LayerOptions`, which says what raises MethodError.
    """
    return of_layers(
        "copy-blocks",
        "grow",
        InOrder(order),
        Copies(init),
        paper="Wu et al. 2024, LLaMA Pro: Progressive LLaMA with block expansion (arXiv:2401.02415); Kim et al. 2023, "
        "SOLAR 10.7B (arXiv:2312.15166); Du et al. 2024, Stacking your transformers (arXiv:2405.15319)",
        description="repeats blocks, so that nothing changes at first or as they are",
        **options,
    )
