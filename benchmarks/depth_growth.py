"""Growing deeper in training: a ResNet that starts with one block per stage against the final one from scratch.

    python benchmarks/depth_growth.py cifar10-jpeg.npz [--seeds 5] [--ways NAME ...]
    python benchmarks/depth_growth.py --table

All trainings of a seed draw the same batches and spend the same floating-point operations. `scratch` trains ResNet-20
(three stages of three blocks; half the width, images of 16x16 pixels by averaging). The others start with one block per
stage, insert a second one in each stage after `GROWN_AT[0]` of their steps and a third one after `GROWN_AT[1]`, and so
make more steps for the same operations. The new block comes after the last one of its stage, and is

- `copy, silent`: a copy, but the weight and bias of its second batch norm are 0, so that outputs stay as they are,
- `copy`: a plain copy (stacking, G_stack: Du et al. 2024),
- `fresh, silent`: drawn at random as at the start, but the second batch norm is 0 (like LLaMA-Pro, Wu et al. 2024),
- `fresh`: drawn at random as at the start (AutoGrow, Wen et al. 2020).

`one block` does not grow, and makes as many steps as take the same operations: what more steps do by themselves.

The first block of stages 2 and 3 halves the image and cannot be repeated; where it is the last one, a copy takes both
of its convolutions from the second one of that block, and both batch norms likewise. Every insertion is one plan, given
to `Structure.apply`; the optimizer goes on with what it knows of the old parameters.

SGD with Nesterov momentum 0.9, the learning rate falls along a cosine to 0 over the steps of each training; crops and
flips. The test set is seen once, after the last step. Differences are paired by seed. Learning rate and times of growth
were chosen on the validation images of the seeds from 100 on, which are in no table.

One line of JSON per seed and way goes to `docs/results/depth_growth.jsonl`, and what is there is not run again.
`--table` writes the table to `docs/results/depth_growth.md`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from paired import Record, append, interval, origin, read, reading, scaled
from torch import Tensor, nn

import espalier as esp
from espalier.bench.augment import crop_and_flip
from espalier.bench.data import Dataset, batches, load
from espalier.bench.models import BasicBlock, ResNet, example_inputs
from espalier.bench.tasks import cosine, sgd_momentum
from espalier.edit.depth_edits import Insert
from espalier.edit.plan import Plan
from espalier.edit.promise import Promise
from espalier.edit.recipes.base import Lookup, Recipe, recipe
from espalier.edit.recipes.kinds import CopyOf
from espalier.graph.topology import Topology
from espalier.measure.stats import without_a_trace

RESULTS = Path(__file__).parent.parent / "docs/results"
SCRATCH, SHALLOW = "scratch", "one block"
WAYS = (SCRATCH, "copy, silent", "copy", "fresh, silent", "fresh", SHALLOW)
STAGES, BLOCKS, WIDTH, PIXELS = ("layer1", "layer2", "layer3"), 3, 0.5, 16
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 1056, 128, 0.2, 5e-4
GROWN_AT = (0.25, 0.5)
SILENT = ("bn2.weight", "bn2.bias")
LOOKED_AT, EVALUATED_AT_ONCE = 256, 1000


@recipe
@dataclass(frozen=True)
class BlockLike(Recipe):
    """A block for more of what leaves another one, at random or with the weights of its second half in both halves."""

    kind: ClassVar[str] = "block-like"
    source: str
    silent: bool
    seed: int | None
    """Of the weights drawn; None copies."""

    def build(self, module: Lookup, at: str) -> nn.Module:
        source = module(self.source)
        assert isinstance(source, BasicBlock)
        units = source.bn2.num_features
        block = BasicBlock(units, units, stride=1)
        with torch.no_grad():
            if self.seed is None:
                for half in (1, 2):
                    block.get_submodule(f"conv{half}").load_state_dict(source.conv2.state_dict())
                    block.get_submodule(f"bn{half}").load_state_dict(source.bn2.state_dict())
            else:
                generator = torch.Generator().manual_seed(self.seed)
                for convolution in (block.conv1, block.conv2):
                    nn.init.kaiming_normal_(
                        convolution.weight, mode="fan_out", nonlinearity="relu", generator=generator
                    )
            if self.silent:
                for name in SILENT:
                    block.get_parameter(name).zero_()
        return block.to(memory_format=torch.channels_last)

    def promise(self, topology: Topology, module: Lookup, at: str, *, before: bool) -> Promise:
        return Promise("changing", "a second block computes something of its own")


def deeper(model: nn.Module, way: str, seed: int) -> Plan:
    """One more block at the end of each stage."""
    weights, _, silent = way.partition(", ")
    edits = []
    for number, stage in enumerate(STAGES):
        last = len(list(model.get_submodule(stage).children())) - 1
        at = f"{stage}.{last}"
        repeatable = number == 0 or last > 0
        layer: Recipe
        if weights == "copy" and repeatable:
            layer = CopyOf(at, SILENT if silent else ())
        else:
            layer = BlockLike(at, bool(silent), None if weights == "copy" else 1000 * seed + 10 * last + number)
        edits.append(Insert(at, layer))
    return Plan((), depth=tuple(edits))


def made(data: Dataset, seed: int, blocks: int) -> nn.Module:
    torch.manual_seed(seed)
    model = ResNet(data.input_shape, data.classes, WIDTH, blocks)
    return model.to(memory_format=torch.channels_last)


def operations(data: Dataset) -> list[int]:
    """Floating-point operations of one image, forward, by the number of blocks per stage."""
    example = example_inputs(data.input_shape)
    costs = [esp.attach(made(data, 0, blocks), example).cost().flops for blocks in range(1, BLOCKS + 1)]
    return [cost // len(example) for cost in costs]


def steps_of(way: str, costs: Sequence[int], grown_at: Sequence[float]) -> int:
    """As many as take the operations of STEPS with the final network."""
    if way == SCRATCH:
        return STEPS
    shares = [1, 0, 0] if way == SHALLOW else [grown_at[0], grown_at[1] - grown_at[0], 1 - grown_at[1]]
    return round(STEPS * costs[-1] / sum(share * cost for share, cost in zip(shares, costs, strict=True)))


def run(
    data: Dataset, way: str, seed: int, rate: float = LEARNING_RATE, grown_at: Sequence[float] = GROWN_AT
) -> Record:
    """Train once and test."""
    started = time.perf_counter()
    costs = operations(data)
    steps = steps_of(way, costs, grown_at)
    events = [] if way in (SCRATCH, SHALLOW) else [round(share * steps) for share in grown_at]
    model = made(data, seed, BLOCKS if way == SCRATCH else 1)
    optimizer = sgd_momentum(model.parameters(), rate, WEIGHT_DECAY)
    structure = esp.attach(model, example_inputs(data.input_shape), optimizer=optimizer)
    spent, losses, changes = 0, [], []
    for step, (images, labels) in enumerate(drawn(data, seed, steps)):
        if step in events:
            before = outputs(model, data)
            structure.apply(deeper(model, way, seed))
            changes.append(float((outputs(model, data) - before).abs().max() / before.abs().max()))
        optimizer.param_groups[0]["lr"] = rate * cosine(step / steps)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
        spent += 3 * len(labels) * costs[len(model.get_submodule(STAGES[0])) - 1]  # type: ignore[arg-type]
    return {
        "seed": seed,
        "way": way,
        "test": tested(model, data.x_test, data.y_test),
        "validation": tested(model, data.x_val, data.y_val),
        "training_loss": [round(float(part.mean()), 4) for part in torch.stack(losses).tensor_split(10)],
        "steps": steps,
        "grown_at": events,
        "output_change": changes,
        "training_flops": spent,
        "parameters": structure.cost().parameters,
        "seconds": round(time.perf_counter() - started, 1),
    }


def drawn(data: Dataset, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator, augment = torch.Generator().manual_seed(seed), crop_and_flip(padding=2)
    while steps > 0:
        for batch in islice(batches(data.x_train, data.y_train, BATCH, generator, augment), steps):
            steps -= 1
            yield batch


def outputs(model: nn.Module, data: Dataset) -> Tensor:
    """Of some validation images, in train mode."""
    with without_a_trace(model):
        return model(data.x_val[:LOOKED_AT])  # type: ignore[no-any-return]


def tested(model: nn.Module, inputs: Tensor, labels: Tensor) -> Record:
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


def table(records: Sequence[Record]) -> str:
    """All that was measured; differences are those to scratch of the same seed."""
    found = {way: {one["seed"]: one for one in records if one["way"] == way} for way in WAYS}
    scratch = found[SCRATCH]
    lines = [
        "| way | seeds | steps | training FLOPs, times those of scratch | outputs change by | test accuracy, % "
        "| test loss | more accurate than scratch, points | standard error | by seed | claim |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way, runs in ((way, runs) for way, runs in found.items() if runs):
        one = next(iter(runs.values()))
        change = f"{max(max(run['output_change']) for run in runs.values()):.1e}" if one["output_change"] else ""
        cells = [way, f"{len(runs)}", f"{one['steps']:,}", f"{one['training_flops'] / _spent(scratch):.3f}", change]
        for what, factor, digits in (("accuracy", 100, 2), ("loss", 1, 4)):
            mean, half = interval([factor * run["test"][what] for run in runs.values()])
            cells.append(f"{mean:.{digits}f} ± {half:.{digits}f}")
        lines.append(f"| {' | '.join(cells + ([''] * 4 if way == SCRATCH else _against(way, runs, scratch)))} |")
    return "\n".join(lines)


def _against(way: str, runs: Mapping[int, Record], scratch: Mapping[int, Record]) -> list[str]:
    seeds = sorted(runs.keys() & scratch.keys())
    by_seed = [100 * (runs[seed]["test"]["accuracy"] - scratch[seed]["test"]["accuracy"]) for seed in seeds]
    mean, half = interval(by_seed)
    error = statistics.stdev(by_seed) / math.sqrt(len(by_seed)) if len(by_seed) > 1 else math.nan
    verdict = "" if way == SHALLOW else "holds" if mean >= -error else "does not hold"
    return [f"{mean:+.2f} ± {half:.2f}", f"{error:.2f}", ", ".join(f"{one:+.2f}" for one in by_seed), verdict]


def _spent(runs: Mapping[int, Record]) -> int:
    return int(next(iter(runs.values()))["training_flops"])


def write_table() -> None:
    records = read(RESULTS / "depth_growth.jsonl")
    seeds = len({one["seed"] for one in records})
    commits = ", ".join(sorted({one["commit"] for one in records}))
    head = [
        "# Growing deeper in training",
        "",
        f"`python benchmarks/depth_growth.py cifar10-jpeg.npz --seeds {seeds}`, commit {commits}, "
        f"{records[0]['machine']}. The first lines of that file say what is measured. ResNet-20 of {WIDTH:g} times the "
        f"usual width ({records[0]['parameters']:,} parameters) on cifar10-jpeg, {PIXELS}x{PIXELS} pixels; {STEPS:,} "
        f"steps of {BATCH} from scratch, learning rate {LEARNING_RATE:g}, weight decay {WEIGHT_DECAY:g}; growth after "
        f"{GROWN_AT[0]:.0%} and {GROWN_AT[1]:.0%} of the steps.",
        "",
        "± is the 95% interval (Student's t). The claim is that a grown network ends within one standard error of the "
        "one from scratch, or above: the mean difference, paired by seed, is no more than its standard error below 0.",
        "",
    ]
    path = RESULTS / "depth_growth.md"
    path.write_text("\n".join([*head, table(records), ""]) + reading(path))


def main() -> None:
    parser = argparse.ArgumentParser(description="Growing a ResNet deeper in training.")
    parser.add_argument("data", nargs="?", help="a .npz file, or the name of a data set")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS, help="all by default")
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    if given.data is not None and not given.table:
        torch.set_num_threads(1)
        measure(scaled(load(given.data), PIXELS), given.seeds, given.ways)
    write_table()


def measure(data: Dataset, seeds: int, ways: Sequence[str]) -> None:
    """Run what was not run yet."""
    RESULTS.mkdir(exist_ok=True)
    path, place = RESULTS / "depth_growth.jsonl", origin()
    for seed in range(seeds):
        for way in ways:
            if any((one["seed"], one["way"]) == (seed, way) for one in read(path)):
                continue
            record = run(data, way, seed) | {"data": data.name} | place
            append(path, record)
            print(f"seed {seed} {way}: {record['test']} in {record['seconds']} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
