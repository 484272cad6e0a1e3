"""Sparse training on real images: RigL, SET and static random masks, and magnitude pruning, at a tenth of the weights.

    python benchmarks/sparse_training.py --data mnist cifar10-jpeg [--seeds 5] [--methods NAME ...] [--out DIR]
    python benchmarks/sparse_training.py --table

Five trainings per seed, of as many steps each, with the same initial weights and the same batches in the same order:

- `dense`: no masks,
- `static`: random masks after the first step (`weights-random`), which stay,
- `set`, `rigl`: the same random masks, of which `espalier.train.settings.sparse_training` moves a part at a time,
- `magnitude`: dense at first, the smallest weights masked along the cubic schedule until three quarters of the steps.

All four sparse ones end with a tenth of the weights of matrices and filters, shared out in the same way: Erdos-Renyi-
Kernel (ERK). Accuracies are those of the test set, seen once, after the last step. Differences are paired by seed: mean
and 95% interval (Student's t).

FLOPs are those that live weights would take: masks save none by themselves. Counted is every pass in which a training
evaluates the loss, its events included: forward f, backward 2 f, with f for live weights only, but at events of RigL
the gradient by the weights is that of all of them. So `static` is the least; SET and RigL cost a little more, and
magnitude pruning several times as much, since it starts dense.

One line of JSON per seed and method goes to `OUT/sparse_training-DATA.jsonl` (`OUT` is `docs/results` by default)
as soon as it is there, and what is there is not run again. All tables of the folder go to `OUT/sparse_training.md`.
Data are looked for as `NAME.npz` in the folder that the environment variable ESPALIER_DATA names, then as
`espalier.bench.data` does.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paired import Record, append, interval, origin, read, scaled
from torch import Tensor, nn

import espalier as esp
from espalier.bench.augment import Augment, crop_and_flip
from espalier.bench.data import Dataset, batches, default_root, load
from espalier.bench.models import build, example_inputs
from espalier.bench.tasks import cosine, sgd_momentum
from espalier.method import Method
from espalier.train.settings import sparse_training

RESULTS = Path(__file__).parent.parent / "docs/results"
SPARSITY, UNTIL = 0.9, 0.75
METHODS = ("dense", "static", "set", "rigl", "magnitude")
PAIRS = (
    ("rigl", "static"),
    ("rigl", "set"),
    ("set", "static"),
    ("magnitude", "rigl"),
    ("magnitude", "static"),
    ("dense", "magnitude"),
)
EVALUATED_AT_ONCE = 1000

Batch = tuple[Tensor, Tensor]
_Found = Mapping[str, Mapping[int, Record]]
"""Method -> seed -> what was measured."""


@dataclass(frozen=True)
class Setup:
    """How networks are trained on one data set."""

    network: str
    """What it is called in the table."""
    make: Callable[[Dataset, int], nn.Module]
    """Data and seed -> the network."""
    pixels: int
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    every: int
    """Steps between two events."""
    fraction: float
    """Of the live weights, what goes and comes at first."""
    augment: Augment | None = None


def mlp(data: Dataset, seed: int) -> nn.Module:
    """LeNet-300-100."""
    torch.manual_seed(seed)
    sizes = (math.prod(data.input_shape), 300, 100)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], data.classes))


def of_the_bench(name: str, width: float, data: Dataset, seed: int) -> nn.Module:
    """A network of `espalier.bench.models`; channels last, which is half as fast again on a CPU."""
    model = build(name, data.input_shape, data.classes, width=width, seed=seed)
    return model.to(memory_format=torch.channels_last)


SETUPS: Mapping[str, Setup] = {
    "mnist": Setup("MLP 784-300-100-10", mlp, 28, 15, 128, 0.1, 1e-4, 100, 0.3),
    "cifar10-jpeg": Setup(
        "VGG-11 with batch norm, a quarter of the width",
        partial(of_the_bench, "vgg11-bn", 0.25),
        16,
        8,
        128,
        0.1,
        5e-4,
        100,
        0.3,
        crop_and_flip(padding=2),
    ),
}


def methods_of(name: str, setup: Setup) -> list[Method]:
    """What a row of the table trains with."""
    if name == "dense":
        return []
    budget, every = esp.Sparsity(SPARSITY), esp.steps(setup.every)
    if name == "static":
        return [esp.prune.WeightsRandom(budget=budget, density="erk")]
    if name == "magnitude":
        return [esp.prune.WeightsMagnitude(budget=budget, density="erk", shape="cubic", every=every, until=UNTIL)]
    return sparse_training(name, sparsity=SPARSITY, density="erk", fraction=setup.fraction, every=every, until=UNTIL)


class Work:
    """Counts the floating-point operations of a training as if only live weights took any."""

    def __init__(self, structure: esp.Structure, example: Tensor) -> None:
        self._structure = structure
        self._positions = _positions(structure.model, example)
        self._masks: object = None
        self._live = 0
        self.dense = 2 * sum(many * self._entries(name) for name, many in self._positions.items())
        self.total = 0

    @property
    def live(self) -> int:
        """Of one image, forward, now."""
        masks = self._structure.masks
        if masks is not self._masks:
            self._masks = masks
            self._live = 2 * sum(
                many * (int(masks[name].sum()) if name in masks else self._entries(name))
                for name, many in self._positions.items()
            )
        return self._live

    def passed(self, images: int, *, event: bool) -> None:
        """A pass was made: forward, and backward where gradients are recorded."""
        backward = self.live + (self.dense if event else self.live) if torch.is_grad_enabled() else 0
        self.total += images * (self.live + backward)

    def _entries(self, name: str) -> int:
        return self._structure.model.get_parameter(name).numel()


def _positions(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Weight of a linear or convolutional layer -> positions of one image at which it is used."""
    found: dict[str, int] = {}

    def seen(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            found[f"{name}.weight"] = output[0].numel() // output.shape[1]

        return hook

    able = [(name, one) for name, one in model.named_modules() if isinstance(one, (nn.Linear, nn.Conv2d))]
    hooks = [module.register_forward_hook(seen(name)) for name, module in able]
    model.eval()
    with torch.no_grad():
        model(example)
    model.train()
    for hook in hooks:
        hook.remove()
    return found


def run(setup: Setup, data: Dataset, name: str, seed: int) -> Record:
    """Train once and test."""
    started = time.perf_counter()
    model = setup.make(data, seed)
    example = example_inputs(data.input_shape)
    optimizer = sgd_momentum(model.parameters(), setup.learning_rate, setup.weight_decay)
    structure = esp.attach(model, example, optimizer=optimizer)
    work, training = Work(structure, example), False

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        work.passed(len(batch[1]), event=not training)
        return F.cross_entropy(model(batch[0]), batch[1])

    steps = setup.epochs * math.ceil(len(data.x_train) / setup.batch)
    session = esp.Session(structure, methods_of(name, setup), loss=loss_of, total_steps=steps, seed=seed)
    losses = []
    for step, batch in enumerate(_drawn(setup, data, seed, steps)):
        optimizer.param_groups[0]["lr"] = setup.learning_rate * cosine(step / steps)
        training = True
        loss = session.loss(batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
        training = False
        session.step()
    actions = [event.action for event in session.events]
    masks = structure.masks
    return {
        "seed": seed,
        "method": name,
        "test": _tested(model, data.x_test, data.y_test),
        "validation": _tested(model, data.x_val, data.y_val),
        "training_loss": round(float(torch.stack(losses[-steps // setup.epochs :]).mean()), 5),
        "steps": steps,
        "training_flops": work.total,
        "flops": [work.live, work.dense],
        "weights": {key: [int(mask.sum()), mask.numel()] for key, mask in masks.items()},
        "events": {action: actions.count(action) for action in sorted(set(actions))},
        "seconds": round(time.perf_counter() - started, 1),
    }


def _drawn(setup: Setup, data: Dataset, seed: int, steps: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    left = steps
    while left > 0:
        for batch in islice(batches(data.x_train, data.y_train, setup.batch, generator, setup.augment), left):
            left -= 1
            yield batch


def _tested(model: nn.Module, inputs: Tensor, labels: Tensor) -> Record:
    loss, correct = 0.0, 0
    model.eval()
    with torch.no_grad():
        for batch in batches(inputs, labels, EVALUATED_AT_ONCE):
            logits = model(batch[0])
            loss += float(F.cross_entropy(logits, batch[1], reduction="sum"))
            correct += int((logits.argmax(dim=1) == batch[1]).sum())
    model.train()
    return {"accuracy": correct / len(labels), "loss": round(loss / len(labels), 5)}


# --- Records and tables ----------------------------------------------------------------------------------------------


def table(path: Path) -> str:
    """All that was measured on one data set."""
    records = read(path)
    data = path.stem.partition("-")[2]
    setup = SETUPS[data]
    found = {name: {one["seed"]: one for one in records if one["method"] == name} for name in METHODS}
    found = {name: one for name, one in found.items() if one}
    commits = ", ".join(sorted({one["commit"] for one in records}))
    rate, decay = f"learning rate {setup.learning_rate:g} along a cosine to 0", f"weight decay {setup.weight_decay:g}"
    lines = [
        f"## {setup.network} on {data}, {setup.pixels}x{setup.pixels} pixels",
        "",
        f"`python benchmarks/sparse_training.py --data {data} --seeds {len({one['seed'] for one in records})}`, "
        f"commit {commits}, {records[0]['machine']}. {setup.epochs} epochs, {records[0]['steps']:,} steps of "
        f"{setup.batch}, SGD with Nesterov momentum 0.9, {rate}, {decay}; events every {setup.every} steps until "
        f"{UNTIL:.0%} of them, fraction {setup.fraction:g}.",
        "",
        "| method | seeds | test accuracy, % | test loss | sparsity | FLOPs of the result, times those of dense "
        "| training FLOPs, times those of dense | times those of static |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(name, runs, found) for name, runs in found.items()]
    lines += [
        "",
        "Differences of the test accuracy, in points:",
        "",
        "| difference | seeds | mean ± 95% | by seed | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [_difference(one, other, found) for one, other in PAIRS if one in found and other in found]
    return "\n".join([*lines, "", *_layers(found), ""])


def _row(name: str, runs: Mapping[int, Record], found: _Found) -> str:
    accuracy, half = interval([100 * one["test"]["accuracy"] for one in runs.values()])
    loss, loss_half = interval([one["test"]["loss"] for one in runs.values()])
    sizes = _sizes(found)
    held = sum(pair[1] - pair[0] for one in runs.values() for pair in one["weights"].values()) / len(runs)
    result = statistics.mean(one["flops"][0] / one["flops"][1] for one in runs.values())
    spent = [f"{_times(runs, found[other]):.3f}" if other in found else "" for other in ("dense", "static")]
    return (
        f"| {name} | {len(runs)} | {accuracy:.2f} ± {half:.2f} | {loss:.4f} ± {loss_half:.4f} "
        f"| {held / max(sum(sizes.values()), 1):.2%} | {result:.3f} | {' | '.join(spent)} |"
    )


def _times(runs: Mapping[int, Record], others: Mapping[int, Record]) -> float:
    """How many times the training FLOPs of others."""
    own, theirs = (statistics.mean(one["training_flops"] for one in some.values()) for some in (runs, others))
    return own / theirs


def _difference(name: str, other: str, found: _Found) -> str:
    seeds = sorted(found[name].keys() & found[other].keys())
    by_seed = [100 * (found[name][at]["test"]["accuracy"] - found[other][at]["test"]["accuracy"]) for at in seeds]
    mean, half = interval(by_seed)
    verdict = "open" if not abs(mean) > half else "more" if mean > 0 else "less"
    each = ", ".join(f"{one:+.2f}" for one in by_seed)
    return f"| {name} - {other} | {len(seeds)} | {mean:+.2f} ± {half:.2f} | {each} | {verdict} |"


def _layers(found: _Found) -> list[str]:
    """Sparsity by parameter, of the first seed."""
    masked = {name: runs[min(runs)]["weights"] for name, runs in found.items() if runs[min(runs)]["weights"]}
    rows = [f"| parameter | weights | {' | '.join(masked)} |", f"| --- | --- |{' --- |' * len(masked)}"]
    for key, many in _sizes(found).items():
        held = [1 - weights.get(key, [many])[0] / many for weights in masked.values()]
        rows.append(f"| {key} | {many:,} | {' | '.join(f'{one:.1%}' for one in held)} |")
    return ["Sparsity by parameter (first seed):", "", *rows]


def _sizes(found: _Found) -> dict[str, int]:
    """Parameters that any method masks -> all their weights."""
    weights = [one["weights"] for runs in found.values() for one in runs.values()]
    return {key: each[key][1] for each in weights for key in each}


def write_tables(folder: Path) -> None:
    """All tables of a folder, in one file."""
    parts = [table(path) for path in sorted(folder.glob("sparse_training-*.jsonl")) if read(path)]
    head = (
        "# Sparse training\n\n"
        "Made by `python benchmarks/sparse_training.py`, whose first lines say what is measured. A difference is "
        "*more* or *less* where its 95% interval does not reach 0, else *open*.\n\n"
    )
    (folder / "sparse_training.md").write_text(head + "\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description="Sparse training on real images.")
    parser.add_argument("--data", nargs="*", default=[], help=f"{', '.join(SETUPS)}, or files so named")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS, help="all by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the results")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.table:
        torch.set_num_threads(1)
        for one in given.data:
            measure(Path(one), given.seeds, given.methods, given.out)
    write_tables(given.out)


def measure(file: Path, seeds: int, names: Sequence[str], folder: Path) -> None:
    """Run what was not run yet on one data set."""
    if file.stem not in SETUPS:
        raise SystemExit(f"{file}: expected data named {' or '.join(SETUPS)}")
    place, setup, path = origin(), SETUPS[file.stem], folder / f"sparse_training-{file.stem}.jsonl"
    files = (one for one in (file, default_root() / f"{file.stem}.npz") if one.is_file())
    data = scaled(load(next(files, file.stem)), setup.pixels)
    for seed in range(seeds):
        for name in names:
            if any((one["seed"], one["method"]) == (seed, name) for one in read(path)):
                continue
            record = run(setup, data, name, seed) | place
            append(path, record)
            print(f"{file.stem} seed {seed} {name}: {record['test']} in {record['seconds']} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
