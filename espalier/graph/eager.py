"""Runs code without what `torch.compile` made, where Espalier looks at a network or has tensors of its own in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def eagerly() -> Iterator[None]:
    """Run the body in eager mode, whatever is compiled: modules, wrappers around them and functions.

    Compiled code knows no fake tensors, no hooks that came after it, and would be made anew for tensors that are there
    for a moment only. Costs nothing where nothing was ever compiled.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


__all__ = ["eagerly"]
