"""What growth events cost, in plain training steps of the same network, all measured in one run.

    python benchmarks/method_cost.py [--networks vgg11-bn:0.25 ...] [--methods NAME ...] [--repeats 5] [--gromo]

For every growing method of the registry, with default settings: the event in which half as many units again come to
one axis, and to all axes at once, applying it and calibrating norms included. For `gradmax` also one power iteration, a
pair of passes: a quarter of what an event takes longer with four rounds more. Wanted: a pair within 2 steps, an event
of `gradmax` on one axis within 20, of `tiny` within 30. All times are CPU seconds of one thread, so that other work on
the machine hardly counts; medians over events of fresh networks, in plain steps just before.

`--gromo` measures the library that introduced TINY (package `gromo`, which must be installed) beside it, on an MLP
784-64-64-10: statistics of the second hidden layer on the same few batches, the new units, and putting them in.
What penalties of pruning methods cost is in `penalty_cost.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import espalier as esp
from espalier.bench.models import build, example_inputs
from espalier.method import Method, find, methods

NETWORKS = ("vgg11-bn:0.25", "vgg11:0.25", "resnet20:0.25", "resnet20:1")
ONE_AXIS = {"vgg11": "features.conv4", "vgg11-bn": "features.conv4", "resnet20": "layer2.1.conv1", "mlp": "fc2"}
BATCH, MORE_ROUNDS, PLAIN_STEPS = 128, 4, 3
WANTED = {"gradmax": 20, "tiny": 30}
WANTED_PAIR = 2
IMAGES, PIXELS = (3, 32, 32), (1, 28, 28)

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Network:
    """A network to build, and batches for it."""

    name: str
    width: float
    shape: tuple[int, ...]
    batches: Sequence[Batch]

    def __str__(self) -> str:
        return f"{self.name} x {self.width:g}"

    def model(self) -> nn.Module:
        return build(self.name, self.shape, 10, width=self.width, seed=0)


def network(name: str, width: float, shape: tuple[int, ...]) -> Network:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(BATCH, *shape, generator=generator), torch.randint(10, (BATCH,), generator=generator))
        for _ in range(4)
    ]
    return Network(name, width, shape, batches)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def timed(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def event(measured: Network, make: Callable[..., Method], axes: Sequence[str] | None, **options: Any) -> float:
    """One event of a method on a fresh network, in plain steps of that network."""
    model, now = measured.model(), esp.steps(PLAIN_STEPS)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    structure = esp.attach(model, example_inputs(measured.shape), optimizer=optimizer)
    method = make(width=1.5, shape="constant", every=now, start=now, until=now, axes=axes, **options)
    session = esp.Session(structure, [method], loss=loss_of, probe=measured.batches[1:], total_steps=100)
    batch, plain = measured.batches[0], []
    for _ in range(PLAIN_STEPS):

        def step() -> None:
            loss = session.loss(batch)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

        plain.append(timed(step))
        last = timed(session.step)
    if [one.action for one in session.events] != ["grow"]:
        raise SystemExit(f"{method.name} did not grow {measured}: {session.events}")
    return last / statistics.median(plain)


def median(repeats: int, measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(repeats))


def growth(measured: Network, repeats: int, names: Sequence[str] | None) -> None:
    print(f"\n### {measured}\n\n| method | one axis | all axes | wanted, one axis |\n| --- | --- | --- | --- |")
    one = [ONE_AXIS[measured.name]]
    for entry in methods("grow", "units"):
        name = entry.method.name
        if not entry.by_budget or (names is not None and name not in names):
            continue
        single = median(repeats, partial(event, measured, entry.make, one))
        every = median(repeats, partial(event, measured, entry.make, None))
        wanted = f"at most {WANTED[name]}" if name in WANTED else ""
        print(f"| {name} | {single:.1f} | {every:.1f} | {wanted} |", flush=True)
    gradmax = find("grow", "gradmax").make
    few, many = (
        median(repeats, partial(event, measured, gradmax, one, rounds=rounds)) for rounds in (2, 2 + MORE_ROUNDS)
    )
    pair = (many - few) / MORE_ROUNDS
    print(f"| gradmax, one pair of passes | {pair:.2f} | | at most {WANTED_PAIR} |", flush=True)


# --- Side by side with gromo -----------------------------------------------------------------------------------------


def beside_gromo(repeats: int) -> None:
    measured = network("mlp", 0.5, PIXELS)
    print("\n### MLP 784-64-64-10, second hidden layer, events in plain steps\n")
    print("| | TINY | GradMax |\n| --- | --- | --- |")
    own = [median(repeats, partial(event, measured, find("grow", name).make, ["fc2"])) for name in ("tiny", "gradmax")]
    print(f"| Espalier, whole event | {own[0]:.1f} | {own[1]:.1f} |", flush=True)
    tiny = {"compute_delta": False, "use_covariance": True, "alpha_zero": False, "use_projection": True}
    gradmax = {"compute_delta": False, "use_covariance": False, "alpha_zero": True, "use_projection": False}
    gradmax |= {"ignore_singular_values": True}
    for batches, label in ((2, "2 batches"), (1, "1 batch"), (60_000 // BATCH, "60,000 samples, as by default")):
        times = repeats if batches < 5 else 1
        found = [median(times, partial(gromo_event, measured, batches, how)) for how in (tiny, gradmax)]
        print(f"| gromo, {label} | {found[0]:.1f} | {found[1]:.1f} |", flush=True)


def gromo_event(measured: Network, batches: int, how: dict[str, bool]) -> float:
    """Statistics of one layer over some batches, its new units, and putting them in, in plain steps of the same MLP."""
    from gromo.containers.growing_mlp import GrowingMLP

    torch.manual_seed(0)
    model = GrowingMLP(784, 10, 64, 2, activation=nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    batch = measured.batches[0]

    def step() -> None:
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    def grow() -> None:
        model.set_growing_layers(index=1)  # the layer that reads the second hidden one
        model.init_computation()
        for number in range(batches):
            x, y = measured.batches[number % len(measured.batches)]
            model.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x), y, reduction="sum"))
            model.update_computation()
        model.compute_optimal_updates(maximum_added_neurons=32, **how)
        model.reset_computation()
        model.dummy_select_update()
        model.set_scaling_factor(1.0)
        model.apply_change()

    plain = [timed(step) for _ in range(10 * PLAIN_STEPS)]
    return timed(grow) / statistics.median(plain)


def main() -> None:
    parser = argparse.ArgumentParser(description="What growth events cost, in plain training steps.")
    parser.add_argument("--networks", nargs="*", default=NETWORKS, help="name:width")
    parser.add_argument("--methods", nargs="*", help="names; all of the registry by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gromo", action="store_true", help="only side by side with gromo")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {os.cpu_count()} shared cores, 1 thread, batch {BATCH}, CPU time, "
          f"medians of {given.repeats}")  # fmt: skip
    if given.gromo:
        beside_gromo(given.repeats)
        return
    for one in given.networks:
        name, _, width = one.partition(":")
        growth(network(name, float(width or 1), IMAGES), given.repeats, given.methods)


if __name__ == "__main__":
    main()
