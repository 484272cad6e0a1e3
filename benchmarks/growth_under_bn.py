"""Growth under batch norm on real images: what it does to the outputs at once, and to the loss 100 steps later.

    python benchmarks/growth_under_bn.py DATA.npz [--model vgg11-bn] [--pixels 32] [--seeds 10] [--methods NAME ...]
    python benchmarks/growth_under_bn.py --table

For every seed a network of a quarter of the usual width is trained for 300 steps. All growing methods of the registry
start from that same network, with default settings: after one more step, half as many units again come to every axis
that may grow, and training goes on for 100 steps with the same batches for all, while the learning rate falls to 0
along a cosine (at a constant rate two trainings that differ by nothing but rounding end 2% apart). Measured are

- the change of the outputs at the moment of growth, in train and in eval mode: the largest difference over 256 held-out
  images, divided by the largest output; and the change of the loss on these images,
- the loss in eval mode on 2,000 held-out images (which no method sees) after 1, 5, 20 and 100 steps, minus that of the
  same network trained on without growth: paired by seed, mean and 95% interval (Student's t). A method is
  *not inferior* if the worse end of the interval after 100 steps is within 1% of the loss.

Two rows are no methods: `no growth` is the control, and `no growth, 1e-6` the control with its weights multiplied by
1 + 1e-6 N(0, 1) instead of growth: how far two trainings part that differ by nothing but rounding. `live` is the part
of the new units that get a gradient in the last step.

One line of JSON per seed and method goes to `docs/results/growth_under_bn-MODEL-PIXELS.jsonl`; what is there is
not run again, unless `--again` names it. `--table` writes all tables to `docs/results/growth_under_bn.md`.
`--pixels 16` makes images of that size by averaging, for a quarter of the time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from paired import Record, append, interval, origin, read, scaled
from torch import Tensor, nn

import espalier as esp
from espalier.bench.augment import crop_and_flip
from espalier.bench.data import Dataset, batches, load
from espalier.bench.models import build, example_inputs
from espalier.bench.tasks import cosine
from espalier.measure.stats import without_a_trace
from espalier.method import Method, find, methods

RESULTS = Path(__file__).parent.parent / "docs/results"
WIDTH, GROWN_TO = 0.25, 1.5
PRETRAINING, STEPS, MEASURED_AT = 300, 100, (1, 5, 20, 100)
BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 128, 0.05, 0.9, 5e-4
LOOKED_AT, HELD_OUT, PROBE_BATCHES = 256, 2000, 4
MARGIN = 0.01
CONTROL, ROUNDING = "no growth", "no growth, 1e-6"

Batch = tuple[Tensor, Tensor]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Bench:
    """One kind of network on one data set."""

    def __init__(self, model: str, data: Dataset, pixels: int, cache: Path) -> None:
        data = scaled(data, pixels)
        self._name, self._data, self._cache = model, data, cache / f"{model}-{data.name}-{pixels}"
        self._augment = crop_and_flip(flip="mnist" not in data.name)
        held = [data.x_val, data.y_val]
        starts = range(0, PROBE_BATCHES * BATCH, BATCH)
        self._probe = [(held[0][at : at + BATCH], held[1][at : at + BATCH]) for at in starts]
        self._looked_at = (held[0][512 : 512 + LOOKED_AT], held[1][512 : 512 + LOOKED_AT])
        self._held_out = (held[0][-HELD_OUT:], held[1][-HELD_OUT:])
        if len(held[0]) < 512 + LOOKED_AT + HELD_OUT:
            raise SystemExit(f"{data.name} holds only {len(held[0])} validation images; {HELD_OUT} more are needed")

    def run(self, seed: int, name: str) -> Record:
        """Grow the trained network of a seed with one method, train on, measure."""
        structure = self._trained(seed)
        model, optimizer = structure.model, structure.optimizer
        assert optimizer is not None
        chosen = [] if name in (CONTROL, ROUNDING) else [_once(name)]
        session = esp.Session(structure, chosen, loss=loss_of, probe=self._probe, total_steps=STEPS + 1, seed=seed)
        record: Record = {"seed": seed, "method": name, "loss": {}}
        for step, batch in enumerate(self._batches(seed)):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * cosine(max(step - 1, 0) / STEPS)
            loss = session.loss(batch)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            if step == 0:
                before = self._outputs(model)
                session.step()
                if name == ROUNDING:
                    _disturb(model, seed)
                record |= self._changes(before, self._outputs(model))
                record |= _event(session)
            else:
                session.step()
            if step in (0, *MEASURED_AT):
                record["loss"][str(step)] = self._loss(model)
        return record | {"live": _live(structure)}

    def _trained(self, seed: int) -> esp.Structure:
        """The network of a seed after its first steps, trained only once."""
        model = build(self._name, self._data.input_shape, self._data.classes, width=WIDTH, seed=seed)
        optimizer = torch.optim.SGD(
            model.parameters(), LEARNING_RATE, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
        )
        folder, example = self._cache / str(seed), example_inputs(self._data.input_shape)
        if folder.exists():
            return esp.load(folder, model, example, optimizer=optimizer)
        for batch in self._drawn(seed, PRETRAINING):
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        structure = esp.attach(model, example, optimizer=optimizer)
        folder.parent.mkdir(parents=True, exist_ok=True)
        esp.save(structure, folder)
        return structure

    def _batches(self, seed: int) -> Iterable[Batch]:
        return self._drawn(1000 + seed, STEPS + 1)

    def _drawn(self, seed: int, count: int) -> Iterable[Batch]:
        generator = torch.Generator().manual_seed(seed)
        one_pass = batches(self._data.x_train, self._data.y_train, BATCH, generator, self._augment)
        return islice(one_pass, count)

    def _outputs(self, model: nn.Module) -> Mapping[str, Tensor]:
        found = {}
        with without_a_trace(model):
            for mode in ("train", "eval"):
                model.train(mode == "train")
                found[mode] = model(self._looked_at[0])
        return found

    def _changes(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Record:
        labels = self._looked_at[1]
        change = {mode: float((after[mode] - old).abs().max() / old.abs().max()) for mode, old in before.items()}
        losses = {
            mode: float(F.cross_entropy(after[mode], labels) - F.cross_entropy(old, labels))
            for mode, old in before.items()
        }
        return {"change": change, "loss_change": losses}

    def _loss(self, model: nn.Module) -> float:
        total = 0.0
        with without_a_trace(model):
            model.eval()
            for batch in zip(*(one.split(500) for one in self._held_out), strict=True):
                total += float(loss_of(model, batch)) * len(batch[1])
        return total / HELD_OUT


def _live(structure: esp.Structure) -> float | None:
    """The part of new units that got a gradient in the last step; None if there are none."""
    parameters, found = dict(structure.model.named_parameters()), []
    for axis in structure.axes.values():
        new = structure.births[axis.name] > 0
        pulled = torch.zeros(axis.size, dtype=torch.bool)
        for slot in axis.slots if new.any() else ():
            if slot.tensor in parameters:
                gradient = parameters[slot.tensor].grad
                assert gradient is not None
                lines = gradient.movedim(slot.dim, 0).reshape(gradient.shape[slot.dim], -1).any(dim=1)
                pulled |= torch.stack([lines[list(positions)].any() for positions in slot.positions])
        found.append(pulled[torch.from_numpy(new)])
    return float(torch.cat(found).double().mean()) if sum(map(len, found)) else None


def _once(name: str) -> Method:
    """A registered method with its defaults, that acts once, after the first step."""
    first = esp.steps(1)
    return find("grow", name).make(width=GROWN_TO, shape="constant", every=first, start=first, until=first)


def _disturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))


def _event(session: esp.Session) -> Record:
    grown = [event for event in session.events if event.action == "grow"]
    return {
        "actions": [event.action for event in session.events],
        "contract": grown[0].contract if grown else "",
        "axes": {name: list(sizes) for event in grown for name, sizes in event.sizes.items()},
        "seconds": round(sum(event.seconds for event in session.events), 3),
    }


# --- Records and tables ----------------------------------------------------------------------------------------------


def drop(path: Path, names: Sequence[str]) -> None:
    """Forget what was measured of some methods."""
    kept = [one for one in read(path) if one["method"] not in names]
    if path.exists():
        path.write_text("".join(json.dumps(one) + "\n" for one in kept))


def table(path: Path) -> str:
    """All that was measured of one kind of network."""
    records = read(path)
    data = sorted({one["data"] for one in records})
    model, _, pixels = path.stem.partition("-")[2].rpartition("-")
    commits = sorted({one["commit"] for one in records})
    lines = [
        "### {} on {}, {pixels}x{pixels} pixels".format(model, ", ".join(data), pixels=pixels),
        "",
        f"`python benchmarks/growth_under_bn.py {data[0]}.npz --model {model} --pixels {pixels}`, "
        f"commits {', '.join(commits)}, {records[0]['machine']}.",
        "",
        "| method | seeds | contract | live | output change, train | eval | loss change, train | eval "
        "| @1 | @5 | @20 | @100 | @100 in % of the loss | not inferior |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    control = {one["seed"]: one["loss"] for one in records if one["method"] == CONTROL}
    base = statistics.mean(loss[str(STEPS)] for loss in control.values())
    at = ", ".join(f"{statistics.mean(loss[str(step)] for loss in control.values()):.4f}" for step in MEASURED_AT)
    names = dict.fromkeys(one["method"] for one in sorted(records, key=lambda one: one["method"]))
    for name in names:
        found = [one for one in records if one["method"] == name and one["seed"] in control]
        if name != CONTROL and found:
            lines.append(row(name, found, control, base))
    held = f"Held-out loss of the control after 1, 5, 20 and 100 steps: {at} (mean of {len(control)} seeds)."
    return "\n".join([*lines, "", held, ""])


def row(name: str, found: Sequence[Record], control: Mapping[int, Mapping[str, float]], base: float) -> str:
    cells = [name, str(len(found)), "/".join(sorted({one["contract"] for one in found}))]
    live = [one["live"] for one in found if one["live"] is not None]
    cells.append(f"{statistics.mean(live):.0%}" if live else "")
    cells += [f"{max(one['change'][mode] for one in found):.1e}" for mode in ("train", "eval")]
    cells += [f"{statistics.mean(one['loss_change'][mode] for one in found):+.1e}" for mode in ("train", "eval")]
    mean = half = math.nan
    for step in MEASURED_AT:
        mean, half = interval([one["loss"][str(step)] - control[one["seed"]][str(step)] for one in found])
        cells.append(f"{mean:+.4f} ± {half:.4f}")
    cells.append(f"{100 * mean / base:+.2f} ± {100 * half / base:.2f}")
    cells.append("yes" if mean + half <= MARGIN * base else "no" if mean - half > MARGIN * base else "open")
    return f"| {' | '.join(cells)} |"


def write_tables() -> None:
    parts = [table(path) for path in sorted(RESULTS.glob("growth_under_bn-*.jsonl")) if read(path)]
    head = (
        "# Growth under batch norm\n\n"
        "Made by `python benchmarks/growth_under_bn.py`, whose first lines say what is measured. Losses are "
        "differences to the control, smaller is better; output changes are the largest over all seeds.\n\n"
    )
    (RESULTS / "growth_under_bn.md").write_text(head + "\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description="Growth under batch norm on real images.")
    parser.add_argument("data", nargs="?", help="a .npz file, or the name of a data set")
    parser.add_argument("--model", default="vgg11-bn", choices=["vgg11-bn", "resnet20"])
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--methods", nargs="*", help="names of growing methods; all of the registry by default")
    parser.add_argument("--again", nargs="*", default=[], help="methods to measure anew")
    parser.add_argument("--cache", type=Path, help="a folder that keeps the trained networks between calls")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    given = parser.parse_args()
    if given.data is not None and not given.table:
        torch.set_num_threads(1)
        os.nice(5)
        measure(given)
    write_tables()


def measure(given: argparse.Namespace) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"growth_under_bn-{given.model}-{given.pixels}.jsonl"
    drop(path, given.again)
    registered = [entry.method.name for entry in methods("grow", "units") if entry.by_budget]
    names = [CONTROL, ROUNDING, *(given.methods or registered)]
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(given.model, load(given.data), given.pixels, given.cache or Path(scratch))
        data, place = Path(given.data).stem, origin()
        for seed in range(given.seeds):
            for name in names:
                if any((one["seed"], one["method"], one["data"]) == (seed, name, data) for one in read(path)):
                    continue
                record = bench.run(seed, name) | {"data": data} | place
                append(path, record)
                losses = " ".join(f"{step}:{loss:.4f}" for step, loss in record["loss"].items())
                print(f"{given.model} seed {seed} {name}: change {record['change']} loss {losses}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("default")
    sys.exit(main())
