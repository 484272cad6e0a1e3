"""Writes down which ATen operators the zoo's architectures run, in train and in eval mode: tests/zoo_operators.txt.

    python benchmarks/zoo_operators.py [name ...]

takes some minutes for all of them, and needs timm, torchvision, transformers and diffusers. With names, the operators
of these models are added to the list; without, it is written anew from all. A test asserts that each has a rule.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "zoo_parts"))

import torch
from models import ZOO
from torchvision_import import torchvision_importable

from espalier.errors import CaptureError
from espalier.graph.courses import passes
from espalier.graph.named_tensors import tensor_table

LIST = Path(__file__).parent.parent / "tests" / "zoo_operators.txt"


def operators(name: str) -> set[str]:
    """The operators of every pass of one model that `attach` reads, by name and without their overloads.

    Raises:
        CaptureError: the model's forward failed.
    """
    model, example = ZOO[name]()
    found = passes(model, example, tensor_table(model), {})
    return {call.name for trace in found.traces for call in trace.calls}


def collected(names: Iterable[str]) -> tuple[set[str], list[str]]:
    """The operators of several models, and the models that could not be captured."""
    found: set[str] = set()
    failed: list[str] = []
    for name in names:
        try:
            found |= operators(name)
        except CaptureError as problem:
            print(f"{name}: {problem}", file=sys.stderr)
            failed.append(name)
    return found, failed


def main(names: list[str]) -> int:
    """Write the list; the number of models that could not be captured is the exit code."""
    torch.set_num_threads(1)
    torchvision_importable()
    found, failed = collected(names or ZOO)
    if names and LIST.exists():
        found.update(LIST.read_text().split())
    LIST.write_text("".join(f"{name}\n" for name in sorted(found)))
    print(f"{len(found)} operators in {LIST.name}; not captured: {', '.join(failed) or 'none'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
