"""What masks save at inference, if anything: layers in a sparse form against dense ones, in turns on one machine.

    python benchmarks/sparse_inference.py [--device cpu|cuda] [--threads N] [--write]

On a CPU weights that are zero at random, in compressed rows; on a GPU two of every four (half precision), as its
kernels know them. Every number is how many times faster `Structure.sparse_copy` found a square linear layer to be;
below 1 it is slower, and `sparse_copy` leaves it dense. Sizes that torch refuses are given with its reason. With
``--write`` the table of the device goes to docs/results/sparse_inference-DEVICE.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import espalier as esp
from espalier.table import text_table

RESULTS = Path(__file__).parent.parent / "docs/results"
WIDTHS = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}
INPUTS = {"cpu": (1, 16, 128), "cuda": (16, 256, 4096)}
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99)


def live(width: int, sparsity: float | None) -> Tensor:
    """A mask; with two of every four live, at random, if no sparsity is given."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(width, width // 4, 4, generator=generator)
    if sparsity is None:
        return (drawn.argsort(-1).argsort(-1) < 2).view(width, width)
    return drawn.view(width, width) >= sparsity


def measured(width: int, inputs: int, sparsity: float | None, device: str) -> str:
    """How many times faster one layer is, or why it has no sparse form."""
    torch.manual_seed(0)
    structure = esp.attach(nn.Sequential(nn.Linear(width, width)), torch.randn(inputs, width))
    structure.mask("0.weight", live(width, sparsity))
    x = torch.randn(inputs, width)
    model = structure.model
    if device == "cuda":
        model, x = model.half().to(device), x.half().to(device)
    found = structure.sparse_copy(x, least=0.0)
    (weight,) = found.weights
    return weight.why_dense if weight.times is None else f"{weight.times:.2f}"


def rows(device: str) -> Iterator[tuple[str, ...]]:
    for width in WIDTHS[device]:
        for sparsity in SPARSITIES if device == "cpu" else (None,):
            zeros = "2 of 4" if sparsity is None else f"{sparsity:.0%}"
            yield str(width), zeros, *(measured(width, inputs, sparsity, device) for inputs in INPUTS[device])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header = ("width", "zeros", *(f"{inputs} inputs" for inputs in INPUTS[options.device]))
    table = text_table(header, list(rows(options.device)), right=tuple(range(len(header))))
    place = f"{options.threads} thread(s)" if options.device == "cpu" else torch.cuda.get_device_name()
    lines = [f"Times faster than dense, torch {torch.__version__}, {options.device}, {place}:", "", *table]
    print("\n".join(lines))
    if options.write:
        text = [f"# What masks save at inference on a {options.device}", "", lines[0], "", "```", *table, "```", ""]
        text += ["Layers are timed in turns, and the shortest of 20 times counts.", ""]
        text += [f"Made by `python benchmarks/sparse_inference.py --device {options.device} --write`.", ""]
        (RESULTS / f"sparse_inference-{options.device}.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
