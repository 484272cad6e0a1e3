"""Code that people read, run as it stands."""

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch


def run_code(pieces: Iterable[str], path: Path, name: str) -> dict[str, object]:
    """Run pieces of a file in one module of this name, warnings being errors; returns what they left."""
    scope: dict[str, object] = {"__name__": name}
    state = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for piece in pieces:
                exec(compile(piece, str(path), "exec"), scope)
    finally:
        torch.set_rng_state(state)
    return scope
