"""Neural Plasticity Networks on CIFAR: ResNet56, pruned from all of its units or expanded from a fifth of them.

    python benchmarks/npn_cifar.py cifar10.npz results.jsonl --setting shrinking --device cuda --bf16 --minutes 9 --test
    python benchmarks/npn_cifar.py cifar10.npz results.jsonl --setting growing --device cuda --bf16 --minutes 9 --test

The file holds x_train, y_train, x_test, y_test; that of CIFAR-100 is given in the same way. A tenth of the training
images is held out: it says when to expand, and settings are to be chosen by it; test images are looked at once, after
the last step, with --test. A command stops after --minutes and keeps its state in --keep, and the same command goes on
from there; a run whose line is in the results is left out. Training is that of the paper: 220 epochs of SGD at 0.1, a
tenth of it after 60, 120 and 180, cropped and mirrored images, batches of 128. Gates are on the units inside of all 27
blocks and, with --streams, on the three residual streams, coupled through all layers that write and read them. The
paper (CIFAR-10): pruned 93.2 to 93.0% at 76.1M multiply-adds and 0.33M parameters; expanded 92.7% at 100.5M and 0.55M.

`--setting plain` trains without gates, for comparison. `--model resnet20 --width 0.5 --pool 2 --part 0.25 --epochs 20`
is a reduced run for a CPU, on images of half the side, and its line says so.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from npn_training import Assignment, Pair, Run, append, finished, folder_of, in_batches
from torch import Tensor, nn

import espalier as esp
from espalier.bench.augment import crop_and_flip
from espalier.bench.data import Dataset, load
from espalier.bench.models import build
from espalier.method import Method
from espalier.parts.gates.expected import ExpectedCost
from espalier.parts.gates.kinds import Judged
from espalier.parts.gates.stages import Stages

EPOCHS, BATCH, AWAKE = 220, 128, 0.2
FALLS, IMAGES = (60, 120, 180), ("x_train", "x_val", "x_test")
INNER, STREAMS = "layer*.conv1", ("conv1", "layer2.0.conv2", "layer3.0.conv2")


@dataclass(frozen=True)
class Settings:
    """All that decides the result of a run."""

    setting: str
    data: str
    model: str
    seed: int
    epochs: int
    pool: int
    """Pixels along each side of a square that are averaged; 1 leaves images as they are."""
    part: float
    """Of the training images; 1 for all."""
    width: float
    """Factor on the units of the network."""
    strength: float
    of: str
    k: float
    rise: float
    start: float
    until: float
    rate: float
    begin: float
    fill: float
    patience: int
    judged: Judged
    """``mean`` goes with the running statistics of batch norms, which have seen drawn gates."""
    streams: bool
    bf16: bool

    def method(self, structure: esp.Structure) -> Method | None:
        """None without gates. Stages are fractions of the training; k rises from `k` to `k * rise` in the search."""
        if self.setting == "plain":
            return None
        stages = Stages(self.k, self.start, self.until, rise=self.rise)
        penalty = ExpectedCost(self.strength, "flops" if self.of == "flops" else "parameters")
        axes = [INNER, *(STREAMS if self.streams else ())]
        same: dict[str, Any] = {"rate": self.rate, "patience": self.patience, "begin": self.begin, "axes": axes}
        same["judged"] = self.judged
        if self.setting == "shrinking":
            return esp.prune.NPN(stages, penalty, **same)
        awake = {name: max(1, round(AWAKE * axis.size)) for name, axis in structure.axes.items()}
        return esp.grow.NPN(stages, penalty, awake, fill=self.fill, fresh=False, **same)

    def learning_rate(self, progress: float) -> float:
        """That of the paper."""
        return 0.1 * 0.1 ** sum(progress >= epoch / EPOCHS for epoch in FALLS)


def assignment(settings: Settings, data: Dataset) -> Assignment:
    augment, count = crop_and_flip(), round(settings.part * len(data.y_train))
    device = data.x_train.device

    def objective(model: nn.Module, batch: Pair) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            logits = model(batch[0])
        return nn.functional.cross_entropy(logits.float(), batch[1])

    def batches(generator: torch.Generator) -> Iterator[Pair]:
        order = torch.randperm(count, generator=generator).to(device)
        for chosen in order.tensor_split(math.ceil(count / BATCH)):
            yield augment(data.x_train[chosen], generator), data.y_train[chosen]

    def fresh() -> nn.Module:
        model = build(settings.model, data.input_shape, data.classes, width=settings.width, seed=settings.seed)
        return model.to(device)

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def described(structure: esp.Structure) -> list[Any]:
        cost = structure.cost()
        return [cost.parameters, cost.flops // (2 * len(example))]

    example = data.x_train[:2]
    return Assignment(
        model=fresh, optimizer=sgd, method=settings.method(esp.attach(fresh(), example)), example=example,
        loss=objective, batches=batches, held_out=in_batches((data.x_val, data.y_val)), epochs=settings.epochs,
        per_epoch=math.ceil(count / BATCH), seed=settings.seed, rate=settings.learning_rate, described=described,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--setting", choices=("growing", "shrinking", "plain"), required=True)
    parser.add_argument("--model", choices=("resnet20", "resnet56"), default="resnet56")
    parser.add_argument("--pool", type=int, default=1, help="average squares of so many pixels a side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--part", type=float, default=1.0)
    parser.add_argument("--width", type=float, default=1.0)
    for name, value in (
        ("strength", 0.5), ("k", 1.0), ("rise", 50.0), ("start", 0.05), ("until", 0.7), ("rate", 2e-3),
        ("begin", 0.88), ("fill", 1.0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=float, default=value)
    parser.add_argument("--of", choices=("parameters", "flops"), default="flops")
    parser.add_argument("--patience", type=int, default=3)
    parser.add_argument("--judged", choices=("mean", "hard"), default="mean")
    parser.add_argument("--streams", action="store_true", help="gates on the residual streams too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; the next call goes on")
    parser.add_argument("--keep", type=Path, default=Path("runs"), help="folder of checkpoints")
    parser.add_argument("--keep-every", type=int, default=10, metavar="EPOCHS")
    parser.add_argument("--test", action="store_true", help="look at the test images when all is done")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    given = {name: getattr(options, name) for name in Settings.__dataclass_fields__ if name != "data"}
    settings = Settings(data=options.data.stem, **given)
    if finished(options.results, asdict(settings), options.test):
        return
    data = load(options.data.resolve(), seed=settings.seed).to(options.device)
    if settings.pool > 1:
        pooled = {name: nn.functional.avg_pool2d(getattr(data, name), settings.pool) for name in IMAGES}
        data = replace(data, **pooled)
    one = Run(assignment(settings, data), folder_of(options.keep, asdict(settings)))
    if not one.go_on(options.keep_every, 60 * options.minutes):
        print(f"{one.session.epochs_done} of {settings.epochs} epochs are done; the same command goes on", flush=True)
        return
    _, parameters, multiply_adds = one.curve[-1][2:]
    append(options.results, {
        **asdict(settings),
        "reduced": (settings.model, settings.part, settings.width, settings.pool, settings.epochs)
        != ("resnet56", 1, 1, 1, EPOCHS),
        "validation": one.curve[-1][1],
        "test": one.judged(in_batches((data.x_test, data.y_test)))[0] if options.test else None,
        "parameters": parameters, "multiply_adds": multiply_adds, "first": one.curve[0][3:],
        "axes": {name: axis.size for name, axis in one.session.structure.axes.items()},
        "seconds": round(one.taken), "curve": one.shown(settings.until),
    })  # fmt: skip


if __name__ == "__main__":
    main()
