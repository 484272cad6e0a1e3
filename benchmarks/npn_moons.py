"""Neural Plasticity Networks on two moons: 100 embedded features, 80 hidden units, pruned and expanded.

    python benchmarks/npn_moons.py moons-vat.npz results.jsonl --setting both --seeds 5

The data are 1000 points in the plane (`points`), their labels, and an embedding into 100 dimensions (`embedding`), as
Li & Ji (2020) take them; the embedding is the first, fixed layer, so that features have gates like hidden units. 500
points are trained on, 100 say when to expand, and 400, which nothing is chosen by, are the test. Sizes are counted as
in the paper: features x hidden units + hidden units x 2. One line of JSON per run; runs that are there are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import espalier as esp
from espalier.method import Method
from espalier.parts.gates.estimators import ARM
from espalier.parts.gates.expected import ExpectedCost, PerUnit
from espalier.parts.gates.stages import Stages

EPOCHS, BATCH = 1999, 128
SHOWN = (99, 199, 499, 999, 1999)


class Moons(nn.Module):
    """A fixed embedding of the plane, and a perceptron with one hidden layer."""

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 100, bias=False)
        self.embed.weight = nn.Parameter(embedding.T.contiguous(), requires_grad=False)
        self.hidden = nn.Linear(100, 80)
        self.out = nn.Linear(80, 2)

    def widen(self) -> None:
        """Begin with the weights of the authors' code, which are larger: normal, of variance 2 / inputs."""
        for layer in (self.hidden, self.out):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.embed(x))))


def search_end(preset: str) -> float:
    """Where the search ends and the learning rate falls to a tenth, as a fraction of the training."""
    return (1500 if preset == "annealed" else 1000) / EPOCHS


def method(setting: str, preset: str) -> Method:
    """The method of a preset.

    `paper`: its stages, k, penalty and initial gates. `code`: the same as the authors' code does it, in which the
    search of the large network begins with the first epoch. `annealed`: k rises from 1 to 50 over a longer search,
    in which the first gates of the large network begin undecided and units wake almost surely there, and the penalty
    counts the parameters that are expected.
    """
    grows, until, axes = setting == "growing", search_end(preset), ["embed", "hidden"]
    few = {"embed": 3, "hidden": 3}
    if preset == "annealed":
        stages = Stages(1.0, 100 / EPOCHS, until, rise=50.0)
        if grows:
            return esp.grow.NPN(stages, ExpectedCost(0.8), few, fill=3.0, fresh=False, rate=2e-2, axes=axes)
        return esp.prune.NPN(stages, ExpectedCost(0.5), begin=0.73, rate=5e-3, axes=axes)
    plain = 100 if grows else 500 if preset == "paper" else 0
    stages = Stages(1.0 if grows else 7.0, plain / EPOCHS, until)
    each = 0.35 * 80 / 8160
    weights = PerUnit({"embed": each, "hidden": each})
    if grows:
        return esp.grow.NPN(stages, weights, few, fill=0.1, fresh=False, estimator=ARM(), judged="mean", axes=axes)
    return esp.prune.NPN(stages, weights, estimator=ARM(), judged="mean", axes=axes)


def run(data: Path, setting: str, preset: str, seed: int, epochs: int) -> dict[str, object]:
    """One training."""
    torch.manual_seed(seed)
    file = np.load(data)
    points, labels = torch.tensor(file["points"], dtype=torch.float32), torch.tensor(file["labels"])
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    points, labels = points[order], labels[order]
    model = Moons(torch.tensor(file["embedding"], dtype=torch.float32))
    if preset != "annealed":
        model.widen()
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    structure = esp.attach(model, points[:4], optimizer=optimizer, undo_limit=0)
    batches = [(points[i : min(i + BATCH, 500)], labels[i : min(i + BATCH, 500)]) for i in range(0, 500, BATCH)]
    held_out, test = (points[500:600], labels[500:600]), (points[600:], labels[600:])
    session = esp.Session(
        structure, [method(setting, preset)],
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        probe=[held_out], total_steps=epochs * len(batches), seed=seed,
    )  # fmt: skip
    began, shown, smallest, largest = time.perf_counter(), {}, 10**9, 0
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in batches:
            loss = session.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step()
        session.epoch_end()
        if epoch == round(search_end(preset) * epochs):
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
        features, hidden = (structure.axes[axis].size for axis in ("embed", "hidden"))
        size = features * hidden + 2 * hidden
        smallest, largest = min(smallest, size), max(largest, size if epoch > 2 else 0)
        if epoch in {round(one / EPOCHS * epochs) for one in SHOWN}:
            model.eval()
            with torch.no_grad(), session.decided():
                right = float((model(test[0]).argmax(1) == test[1]).double().mean())
            shown[str(epoch)] = {"accuracy": right, "features": features, "hidden": hidden, "weights": size}
    return {
        "setting": setting, "preset": preset, "seed": seed, "epochs": epochs, "shown": shown, "largest": largest,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--setting", choices=("growing", "shrinking", "both"), default="both")
    parser.add_argument("--preset", choices=("paper", "code", "annealed"), default="paper")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = ("shrinking", "growing") if options.setting == "both" else (options.setting,)
    done = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    for seed in range(options.seeds):
        for setting in settings:
            key = {"setting": setting, "preset": options.preset, "seed": seed, "epochs": options.epochs}
            if not any(key.items() <= one.items() for one in done):
                done.append(run(options.data, setting, options.preset, seed, options.epochs))
                with options.results.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    for setting in settings:
        same = [one for one in done if (one["setting"], one["preset"]) == (setting, options.preset)]
        print(f"{setting}, {options.preset}, medians of {len(same)} seeds (least to largest)")
        for epoch in same[0]["shown"] if same else ():
            rows = [one["shown"][epoch] for one in same]
            found = {name: sorted(row[name] for row in rows) for name in ("accuracy", "features", "hidden", "weights")}
            median = {name: statistics.median(values) for name, values in found.items()}
            right, sizes = found["accuracy"], found["weights"]
            print(f"  epoch {epoch:>4}: {median['accuracy']:.1%} ({right[0]:.1%} to {right[-1]:.1%}) with "
                  f"{median['features']:g} features, {median['hidden']:g} hidden units, {median['weights']:g} weights "
                  f"({sizes[0]} to {sizes[-1]})")  # fmt: skip


if __name__ == "__main__":
    main()
