"""Neural Plasticity Networks on MNIST: LeNet5-Caffe (20-50-800-500, no batch norm), pruned and expanded.

    ESPALIER_DATA=data python benchmarks/npn_mnist.py results.jsonl --setting shrinking --epochs 500 --seeds 1
    ESPALIER_DATA=data python benchmarks/npn_mnist.py results.jsonl --setting growing --epochs 500 --seeds 1

The four files of MNIST are in the folder `mnist` of ESPALIER_DATA. 55,000 images are trained on; the last 5,000
training images are held out: they say when to expand, and settings are chosen by them. The test images are looked at
once, after the last step, and only with --test, which the search for settings went without. Sizes are counted as in the
paper: weights without biases of the four layers. A run takes up its checkpoint in the folder --keep where there is one,
so that the same command goes on after an interruption; runs whose line is there are left out.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from npn_training import Assignment, Pair, Run, append, finished, folder_of, in_batches
from torch import Tensor, nn

import espalier as esp
from espalier.bench.augment import warp
from espalier.bench.formats import read_idx
from espalier.bench.models import build
from espalier.method import Method
from espalier.parts.gates.expected import ExpectedCost, GatePenalty, PerUnit
from espalier.parts.gates.stages import Stages

BATCH, HELD_OUT, AXES, INPUTS = 128, 5000, ["conv1", "conv2", "fc1"], "fc1.weight[1]"
BEGIN_WITH = {"conv1": 3, "conv2": 3, "fc1": 3}


@dataclass(frozen=True)
class Settings:
    """All that decides the result of a run."""

    setting: str
    seed: int
    epochs: int
    strength: float
    """Of the expected parameters, as a part of those of the full network; 0 for a penalty on each unit."""
    each: list[float]
    """Penalty on each unit that is expected, of both convolutions and the dense layer."""
    columns: float
    """Penalty on each input of the dense layer that is expected, which have gates of their own then; 0 for none."""
    k: float
    rise: float
    start: float
    until: float
    rate: float
    begin: float
    fill: float
    low: float
    patience: int
    lr: float
    finish: float
    """Learning rate at the beginning of the last stage; `lr` holds until then."""
    decay: str
    weight_decay: float
    warp: list[float]
    """Degrees, part of the size and pixels by which training images are warped at most (`espalier.bench.augment`)."""

    def method(self) -> Method:
        """Stages are fractions of the training; k rises from `k` to `k * rise` in the search."""
        stages, penalty = Stages(self.k, self.start, self.until, rise=self.rise), self.penalty()
        same: dict[str, Any] = {"rate": self.rate, "low": self.low, "patience": self.patience, "axes": AXES}
        same["columns"] = [INPUTS] if self.columns else []
        if self.setting == "growing":
            return esp.grow.NPN(stages, penalty, BEGIN_WITH, fill=self.fill, fresh=False, begin=self.begin, **same)
        return esp.prune.NPN(stages, penalty, begin=self.begin, **same)

    def penalty(self) -> GatePenalty:
        if self.strength:
            return ExpectedCost(self.strength)
        return PerUnit({**dict(zip(AXES, self.each, strict=True)), INPUTS: self.columns})

    def learning_rate(self, progress: float) -> float:
        """Constant until the search ends, then along half a cosine to zero (`cosine`) or a tenth (`tenth`)."""
        if progress < self.until:
            return self.lr
        if self.decay == "tenth":
            return self.finish * (0.1 if progress >= 0.8 else 1.0)
        return self.finish * (1 + math.cos(math.pi * (progress - self.until) / (1 - self.until))) / 2


def images(folder: Path) -> tuple[Pair, Pair, Pair]:
    """Training, held-out and test images, normalised by the mean and deviation of the first."""
    x, y, x_test, y_test = (
        torch.from_numpy(read_idx(folder / f"{name}-ubyte.gz").copy())
        for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    )
    x, x_test = x[:, None].float(), x_test[:, None].float()
    mean, deviation = x[:-HELD_OUT].mean(), x[:-HELD_OUT].std()
    x, x_test, y, y_test = (x - mean) / deviation, (x_test - mean) / deviation, y.long(), y_test.long()
    return (x[:-HELD_OUT], y[:-HELD_OUT]), (x[-HELD_OUT:], y[-HELD_OUT:]), (x_test, y_test)


def objective(model: nn.Module, batch: Pair) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def architecture(structure: esp.Structure) -> list[int]:
    """Channels of both convolutions, inputs that the first dense layer reads, and hidden units."""
    first, second, hidden = (structure.axes[axis].size for axis in AXES)
    mask = structure.masks.get("fc1.weight")
    inputs = structure.model.fc1.weight.shape[1] if mask is None else int(mask.any(dim=0).sum())
    return [first, second, inputs, hidden]


def weights(structure: esp.Structure) -> tuple[int, int]:
    """Weights that are live, and entries of the tensors that hold them; without biases."""
    live = stored = 0
    for name, tensor in structure.model.named_parameters():
        if name.endswith(".weight"):
            stored += tensor.numel()
            live += int(structure.masks[name].sum()) if name in structure.masks else tensor.numel()
    return live, stored


def assignment(settings: Settings, train: Pair, held_out: Pair) -> Assignment:
    x, y = train
    degrees, scale, pixels = settings.warp
    change = warp(degrees, scale, pixels) if any(settings.warp) else None

    def batches(generator: torch.Generator) -> Iterator[Pair]:
        for chosen in torch.randperm(len(y), generator=generator).split(BATCH):
            yield x[chosen] if change is None else change(x[chosen], generator), y[chosen]

    return Assignment(
        model=lambda: build("lenet5", (1, 28, 28), 10, seed=settings.seed).to(memory_format=torch.channels_last),
        optimizer=lambda model: torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        ),
        method=settings.method(), example=x[:2], loss=objective, batches=batches, held_out=in_batches(held_out),
        epochs=settings.epochs, per_epoch=math.ceil(len(y) / BATCH), seed=settings.seed, rate=settings.learning_rate,
        described=lambda structure: [weights(structure)[0], *architecture(structure)],
    )  # fmt: skip


def run(settings: Settings, options: argparse.Namespace, data: tuple[Pair, Pair, Pair]) -> dict[str, Any] | None:
    """The line of a run that is finished; None for one that is not."""
    one = Run(assignment(settings, *data[:2]), folder_of(options.keep, asdict(settings)))
    if not one.go_on(options.keep_every, 60 * options.minutes):
        return None
    live, stored = weights(one.session.structure)
    return {
        **asdict(settings), "validation": one.curve[-1][1],
        "test": one.judged(in_batches(data[2]))[0] if options.test else None, "weights": live, "stored": stored,
        "architecture": architecture(one.session.structure), "seconds": round(one.taken),
        "largest": max(row[3] for row in one.curve[1:]), "curve": one.shown(settings.until),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--setting", choices=("growing", "shrinking"), required=True)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--test", action="store_true", help="look at the test images when all is done")
    parser.add_argument("--keep", type=Path, default=Path("runs"), help="folder of checkpoints")
    parser.add_argument("--keep-every", type=int, default=10, metavar="EPOCHS")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; the next call goes on")
    for name, value in (
        ("strength", 0.0), ("columns", 0.0), ("k", 1.0), ("rise", 50.0), ("start", 0.05), ("until", 0.7),
        ("rate", 5e-3), ("begin", 0.73), ("fill", 1.0), ("low", 0.1), ("lr", 1e-3), ("finish", 3e-3),
        ("weight_decay", 0.1),
    ):  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value)
    parser.add_argument(
        "--each", type=float, nargs=3, default=(0.004, 0.0175, 0.003), metavar=("CONV1", "CONV2", "FC1")
    )
    parser.add_argument("--warp", type=float, nargs=3, default=(0.0, 0.0, 0.0), metavar=("DEGREES", "SCALE", "PIXELS"))
    parser.add_argument("--decay", choices=("cosine", "tenth"), default="cosine")
    parser.add_argument("--patience", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = images(Path(os.environ["ESPALIER_DATA"]) / "mnist")
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        chosen = {name: getattr(options, name) for name in Settings.__dataclass_fields__ if name != "seed"}
        settings = Settings(seed=seed, **{**chosen, "each": list(options.each), "warp": list(options.warp)})
        if finished(options.results, asdict(settings), options.test):
            continue
        line = run(settings, options, data)
        if line is None:
            break
        append(options.results, line)


if __name__ == "__main__":
    main()
