"""Layers of torch whose own code looks into their children instead of calling them."""

from __future__ import annotations

from torch import nn

_LOOKING = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def looks_inside(parent: nn.Module) -> bool:
    """Whether a module may hand the weights of its children to a fused kernel: these have to be there then.

    What is inserted beside the children is safe, since hooks turn the fused kernel off.
    """
    return isinstance(parent, _LOOKING)


LOOKED_INTO = "has its weights read by a fused kernel of torch"
"""Why such children are neither removed nor replaced, in words that follow their name."""

__all__ = ["LOOKED_INTO", "looks_inside"]
