"""Twice as fast on a CPU: `esp.shrink`, torch-pruning and NVIDIA ModelOpt, with the same budget and distillation.

    python benchmarks/shrink_latency.py DATA.npz WEIGHTS [--models resnet20 vit] [--tools NAME ...] [--seeds 0 1 2]
    python benchmarks/shrink_latency.py --table

A ResNet-20, one of twice its width and a small ViT (`espalier.bench.models`) are trained for 10 epochs (MNIST: 3) on
images of half their width and height, by averaging: 16x16 pixels of CIFAR-10, 14x14 of MNIST. A third of the time of
the narrow ResNet is spent on no work at all but on calling operators, so that half of the time is a fifth of the work
by widths alone. Every tool gets the trained network and has to halve the time of a forward pass of 64 images, eager, on
one thread, by the processor time of the process, which other work on the machine hardly touches. Then it trains with
what is left of its budget, a fifth of the FLOPs of the first training, by the same function, in which the learning rate
goes up for a twentieth of the steps and then down to nothing. ResNets learn from the network they began as (0.9 of the
loss, temperature 4). ViTs have no teacher: its passes would cost half of their steps, which did more for them, on
validation images.

- `espalier`: `esp.shrink` with target=Latency(0.5, of="initial") and max_training, in one round.
- `espalier, widths`: the same with `blocks=False`.
- `torch-pruning`: group norms (`GroupMagnitudeImportance`), global, at once; the pruning ratio is the smallest, by
  bisection, at which the time is measured to be half.
- `torch-pruning, Taylor`: `GroupTaylorImportance`, with gradients on 1,000 training images.
- `modelopt`: `fastnas` in steps of 4 channels, scored on 200 validation images after new statistics of 128, with a
  constraint on FLOPs, as it knows no measured times; the largest part of the FLOPs, of 50% to 5%, at which the time is
  half. What the searches before that took is not charged. It wants omegaconf, pulp and torchprofile 0.0.4 as well.
- `from scratch`: the network that `espalier` came to, with fresh weights, trained for the FLOPs of the first training
  and the budget together: what its size is good for.

The budget is counted in samples trained on with the first network, three forward passes each. Training counts, teacher,
scoring, refitting and evaluation; passes that are timed do not. Scores are accuracies on the 10,000 test images, which
no tool sees; `esp.shrink` evaluates on 5,000 validation images (MNIST: 2,000). One line of JSON per model, seed and
tool goes to `docs/results/shrink_latency.jsonl`; what is there is not run again. Trained networks, and the rounds of
`esp.shrink`, are kept in WEIGHTS.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from paired import Record, append, interval, origin, read, reading, scaled
from torch import Tensor, nn

import espalier as esp
from espalier.bench.augment import crop_and_flip
from espalier.bench.data import Dataset, batches, load
from espalier.bench.models import build, redraw
from espalier.bench.tasks import cosine
from espalier.measure.repeated import Reading, repeated
from espalier.oneshot.meter import TRAINED, Meter

RESULTS = Path(__file__).parent.parent / "docs/results"
BATCH, TIMED, BUDGET = 128, 64, 0.2
EPOCHS = {"mnist": 3}
"""Of training; 10 where nothing is said."""
RATES = {"resnet20": (0.1, 0.05), "resnet20-wide": (0.1, 0.05), "vit": (2e-3, 2e-3)}
"""Learning rates of training and of tuning."""
WIDTHS = {"resnet20": 1.0, "resnet20-wide": 2.0, "vit": 1.0}
TARGET, MAX_DROP = 0.5, 0.005
AIM = 0.49
"""What tools are asked for, so that the last measurement finds no more than the target."""
EVALUATED = {"mnist": 2000}
"""Validation images that a tool may look at, again and again; all 5,000 where nothing is said."""


Found = tuple[nn.Module, float, str]
"""The network, what was spent as a part of the first training, and a remark."""


class Task:
    """One kind of network on one data set."""

    def __init__(self, model: str, data: Dataset, seed: int, weights: Path) -> None:
        self.name, self.data, self.seed = model, data, seed
        self._path = weights / f"{data.name}-{model}-{seed}.pt"
        self.folder = weights / f"shrink-{data.name}-{model}-{seed}"
        self.epochs = EPOCHS.get(data.name, 10)
        self._augment = crop_and_flip(padding=data.input_shape[-1] // 8, flip=data.name != "mnist")
        self.example = torch.zeros(TIMED, *data.input_shape)
        self._per_epoch = -(-len(data.x_train) // BATCH)
        self.trained = self._base()
        self.teacher = self.trained if model.startswith("resnet") else None
        self.whole = self.epochs * len(data.x_train)
        """Samples of the first training."""
        self.eager = esp.measure.Eager(clock=time.process_time)

    def accuracy(self, model: nn.Module, test: bool = False, most: int | None = None) -> float:
        data, most = self.data, most or EVALUATED.get(self.data.name)
        x, y = (data.x_test, data.y_test) if test else (data.x_val[:most], data.y_val[:most])
        model.eval()
        with torch.no_grad():
            return sum(int((model(a).argmax(1) == b).sum()) for a, b in batches(x, y, 100)) / len(x)

    def tune(self, model: nn.Module, tuning: esp.Tuning) -> None:
        """Train on as many samples as may be."""
        assert tuning.samples is not None
        model.train()
        self.train(model, tuning.samples // BATCH, RATES[self.name][1], tuning, self.seed + 100 * tuning.number)

    def meter(self) -> Meter:
        """The budget, of which nothing is spent."""
        return Meter(esp.attach(self.trained, self.example), BUDGET * self.whole, self.teacher)

    def tuned(self, model: nn.Module, spent: float) -> float:
        """Train with what is left of the budget after so many samples; returns the part of the training it all was."""
        meter = self.meter()
        meter.spent = spent
        cost = meter.of(esp.attach(model, self.example))
        samples = int(max(0.0, meter.left) / (cost + meter.of_teacher))
        with meter.watching(model, cost, granted=max(0.0, meter.left)):
            self.tune(model, esp.Tuning(1, 1, 1.0, self.teacher, samples=samples))
        return meter.spent / self.whole

    def flops(self, model: nn.Module) -> float:
        """Of one image."""
        return esp.attach(model, self.example).cost().flops / TIMED

    def ratio(self, model: nn.Module) -> Reading:
        """The time of a forward pass as a part of what it was, pass by pass in turn."""
        first, ours = (self.eager.prepared(one, self.example) for one in (self.trained, model))
        return repeated(lambda: ours() / first(), lambda found: found.narrow(0.03), most=100)

    def train(self, model: nn.Module, steps: int, rate: float, tuning: esp.Tuning, seed: int) -> None:
        """Steps of a learning rate that goes up for a twentieth of them, and then down to nothing."""
        optimizer: torch.optim.Optimizer
        if self.name.startswith("resnet"):
            optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
        warm = max(1, steps // 20)
        for step, (x, y) in zip(range(steps), self._batches(seed), strict=False):
            factor = min(1, (step + 1) / warm) * cosine(max(0, step - warm) / max(1, steps - warm))
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            outputs = model(x)
            loss = tuning.loss(outputs, x, F.cross_entropy(outputs, y))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            if not self.name.startswith("resnet"):
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    def _batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from batches(self.data.x_train, self.data.y_train, BATCH, generator, self._augment)

    def _base(self) -> nn.Module:
        kind, width = self.name.removesuffix("-wide"), WIDTHS[self.name]
        model = build(kind, self.data.input_shape, self.data.classes, width=width, seed=self.seed)
        if not self._path.exists():
            self.train(model, self.epochs * self._per_epoch, RATES[self.name][0], esp.Tuning(1, 1, 1.0), self.seed)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"state": model.state_dict()}, self._path)
        model.load_state_dict(torch.load(self._path, weights_only=True)["state"])
        return model.eval()


def by_espalier(task: Task, blocks: bool = True) -> Found:
    """In one call."""
    found = esp.shrink(
        task.trained, task.example, target=esp.Latency(AIM, of="initial", measure=task.eager), train=task.tune,
        evaluate=task.accuracy, max_drop=MAX_DROP, max_training=BUDGET * task.whole, teacher=task.teacher, rounds=1,
        blocks=blocks, folder=task.folder / ("blocks" if blocks else "widths"),
    )  # fmt: skip
    print(found, flush=True)
    assert found.spent is not None
    return found.last, found.spent / task.whole, f"round_to={found.round_to}, {'; '.join(found.notes)}"


def by_torch_pruning(task: Task, taylor: bool = False) -> Found:
    """Group norms or Taylor scores over all layers, at the smallest ratio that is fast enough."""
    import torch_pruning as tp

    looked = 1000 if taylor else 0
    importance = tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2)

    def pruned(ratio: float) -> nn.Module:
        model = copy.deepcopy(task.trained)
        heads = {module.qkv: module.num_heads for module in model.modules() if hasattr(module, "qkv")}
        tokens = [(model.class_token, 2), (model.positions, 2)] if task.name == "vit" else None
        if taylor:
            torch.autograd.backward(F.cross_entropy(model(task.data.x_train[:looked]), task.data.y_train[:looked]))
        tp.pruner.MetaPruner(
            model, task.example[:2], importance=importance, global_pruning=True, pruning_ratio=ratio,
            ignored_layers=[model.head], num_heads=heads, unwrapped_parameters=tokens, max_pruning_ratio=0.9,
        ).step()  # fmt: skip
        for module in model.modules():
            if hasattr(module, "qkv"):  # it changes layers and not what the code reads
                module.head_dim = module.qkv.out_features // (3 * module.num_heads)
        model.zero_grad()
        return model.eval()

    low, high = 0.0, 0.9
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (low, middle) if task.ratio(pruned(middle)).value <= AIM else (middle, high)
    model = pruned(high)
    return model, task.tuned(model, spent=looked), f"ratio {high:.2f}"


def by_modelopt(task: Task) -> Found:
    """FastNAS, at the largest part of the FLOPs that is fast enough."""
    import modelopt.torch.prune as mtp

    loader = list(batches(task.data.x_train[:BATCH], task.data.y_train[:BATCH], BATCH))
    ratios = tuple(part / 16 for part in range(1, 17))
    fine = {"*": {"channels_ratio": ratios, "kernel_size": (), "channel_divisor": 4}}
    features = {"*": {"features_ratio": ratios, "feature_divisor": 4}}
    rules = {"nn.Conv2d": fine, "nn.BatchNorm2d": features, "nn.Linear": features, "nn.LayerNorm": features}
    for part in (50, 30, 20, 10, 5):
        meter, model = task.meter(), copy.deepcopy(task.trained)
        with meter.watching(model, TRAINED):  # in a search all layers but the one that is looked at are whole
            model, _ = mtp.prune(
                model, mode=[("fastnas", rules)], constraints={"flops": f"{part}%"}, dummy_input=task.example[:1],
                config={
                    "data_loader": loader, "score_func": partial(task.accuracy, most=200),
                    "collect_func": lambda batch: batch[0],
                },
            )  # fmt: skip
        if task.ratio(model.eval()).value <= AIM:
            break
    return model, task.tuned(model, meter.spent), f"{part}% of the FLOPs, {meter.spent / task.whole:.1%} for the search"


def from_scratch(task: Task) -> Found:
    """What the network that `espalier` came to is good for, with fresh weights and all of the training."""
    model, _, remark = by_espalier(task)
    redraw(model, seed=task.seed + 1)
    samples = (1 + BUDGET) * task.whole * task.flops(task.trained) / task.flops(model)
    model.train()
    task.train(model, int(samples / BATCH), RATES[task.name][0], esp.Tuning(1, 1, 1.0), task.seed + 1)
    return model, 1 + BUDGET, remark


TOOLS: dict[str, Callable[[Task], Found]] = {
    "espalier": by_espalier,
    "espalier, widths": partial(by_espalier, blocks=False),
    "torch-pruning": by_torch_pruning,
    "torch-pruning, Taylor": partial(by_torch_pruning, taylor=True),
    "modelopt": by_modelopt,
    "from scratch": from_scratch,
}


def measured(task: Task, tool: str) -> Record:
    """One row: run a tool, and look at what came of it."""
    record: Record = {"data": task.data.name, "model": task.name, "seed": task.seed, "tool": tool, **origin()}
    start = time.process_time()
    try:
        model, spent, remark = TOOLS[tool](task)
    except Exception as error:  # a tool that cannot do it is a result
        return {**record, "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    ratio = task.ratio(model)
    return {
        **record,
        "before": task.accuracy(task.trained, test=True),
        "after": task.accuracy(model, test=True),
        "time": [ratio.value, ratio.low, ratio.high],
        "flops": task.flops(model) / task.flops(task.trained),
        "parameters": sum(one.numel() for one in model.parameters())
        / sum(p.numel() for p in task.trained.parameters()),
        "spent": spent,
        "remark": remark,
        "seconds": time.process_time() - start,
    }


def table(records: list[Record]) -> str:
    """Means over seeds, with 95% intervals where there is more than one."""
    heads = (
        "images",
        "model",
        "tool",
        "seeds",
        "time",
        "before",
        "after",
        "points lost",
        "FLOPs",
        "parameters",
        "training spent",
    )
    lines = [" | ".join(["", *heads, ""]).strip(), "|" + " --- |" * len(heads)]
    for data, model in sorted({(one["data"], one["model"]) for one in records}):
        for tool in TOOLS:
            rows = [one for one in records if (one["data"], one["model"], one["tool"]) == (data, model, tool)]
            cells = [data, model, tool, str(len(rows)), *_cells(rows)]
            lines.append("| " + " | ".join([*cells, *[""] * (len(heads) - len(cells))]) + " |")
    return "\n".join(lines)


def _cells(rows: list[Record]) -> list[str]:
    good = [one for one in rows if "failed" not in one]
    if not good:
        return [rows[0]["failed"].replace("|", "/") if rows else "not run"]

    def mean(key: str) -> float:
        return statistics.mean(one[key] for one in good)

    lost, half = interval([100 * (one["before"] - one["after"]) for one in good])
    part = statistics.mean(one["time"][0] for one in good)
    return [
        f"{part:.3f} ({1 / part:.2f}x faster)",
        f"{mean('before'):.2%}",
        f"{mean('after'):.2%}",
        f"{lost:.2f}" + (f" ± {half:.2f}" if len(good) > 1 else ""),
        *(f"{mean(key):.1%}" for key in ("flops", "parameters", "spent")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("weights", nargs="?", type=Path)
    parser.add_argument("--models", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    path, text = RESULTS / "shrink_latency.jsonl", RESULTS / "shrink_latency.md"
    if not options.table:
        if options.data is None or options.weights is None:
            sys.exit("give the data and a folder for trained networks, or --table")
        torch.set_num_threads(1)
        data = load(options.data)
        data = scaled(data, data.input_shape[-1] // 2)
        known = {(one["data"], one["model"], one["seed"], one["tool"]) for one in read(path)}
        for seed in options.seeds:
            for model in options.models:
                left = [tool for tool in options.tools if (data.name, model, seed, tool) not in known]
                task = Task(model, data, seed, options.weights) if left else None
                for tool in left:
                    assert task is not None
                    append(path, measured(task, tool))
    if options.table:
        about = "Written by `python benchmarks/shrink_latency.py --table`; see there what was done."
        text.write_text(f"# Twice as fast\n\n{about}\n\n{table(read(path))}\n{reading(text)}")


if __name__ == "__main__":
    main()
