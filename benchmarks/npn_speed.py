"""What a step under stochastic gates costs, in steps of the same network without them, all measured in one run.

    python benchmarks/npn_speed.py [--networks lenet5:128 ...] [--turns 15] [--repeats 3] [--parts search asleep memory]

`search`: a step of the search (the loss at two samples of the gates, the penalty, the logits) in units of its floor, a
plain step and one forward pass without a graph: at most 1.1 wanted as it begins, below 1 late. Gates are held at given
probabilities: `begun`, all at 0.95; `undecided`, all at 1/2; `late`, 60% of them at 0.002 and the others at 0.998. The
last column is `late` with all units multiplied and none left out (`espalier.parts.gates.subnetwork`).

`asleep`: a step once these 60% sleep, in steps of the dense network, while gates are searched on and once they are
decided: at most 0.6 wanted. `memory`: the peak of a run that grows to a size, beside plain training at that size, each
in a process of its own, above what the same procedure has taken on a tiny network.

Steps of all states take turns, each on its own copy of the network, in CPU seconds of one thread, so that other work on
the machine counts little. A ratio is the median over turns; in brackets the least and the largest of all repeats.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from paired import origin
from torch import Tensor, nn

import espalier as esp
from espalier.bench.models import build, example_inputs
from espalier.parts.gates.expected import ExpectedCost
from espalier.parts.gates.stages import DECIDED, Stages
from espalier.parts.gates.subnetwork import Worth
from espalier.structure import Structure

NETWORKS = ("mlp:128", "lenet5:128", "resnet20:16", "resnet20:128", "resnet56:16")
ASLEEP = ("lenet5:128", "resnet56:128")
HIDDEN = (256, 512, 1024, 2048)
SHAPES = {"mlp": (1, 28, 28), "lenet5": (1, 28, 28)}
LONG = 10**8
"""Steps of a training of which a benchmark sees the beginning only: k stays."""

LEAST = 0.05
"""Seconds that a turn of an action takes at least."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Held:
    """A gate function under which logits rest: those of some units, drawn with the noise they begin with, are low."""

    probabilities: tuple[float, float]
    share: float = 0.0
    """Of units with the first one."""

    def probability(self, logits: Tensor, k: float, /) -> Tensor:
        low = logits < 0.01 * math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * self.share - 1)))
        return torch.where(low, *((0.0, 1.0) if k >= DECIDED else self.probabilities)) + 0 * logits

    def chain(self, logits: Tensor, k: float, /) -> Tensor:
        return torch.ones_like(logits)

    def logit(self, probability: float, k: float, /) -> float:
        return 1e-12  # as good as 0, but open at k=0


STATES: Mapping[str, Held] = {
    "begun": Held((0.95, 0.95)),
    "undecided": Held((0.5, 0.5)),
    "late": Held((0.002, 0.998), 0.6),
}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Network:
    """A network to build, and a batch for it."""

    name: str
    size: int
    """Of the batch."""

    @classmethod
    def named(cls, text: str) -> Network:
        name, _, size = text.partition(":")
        return cls(name, int(size))

    def __str__(self) -> str:
        return f"{self.name}, batch {self.size}"

    @property
    def shape(self) -> tuple[int, ...]:
        return SHAPES.get(self.name, (3, 32, 32))

    def batch(self) -> Batch:
        drawn = torch.Generator().manual_seed(0)
        return torch.randn(self.size, *self.shape, generator=drawn), torch.randint(10, (self.size,), generator=drawn)

    def model(self) -> nn.Module:
        return build(self.name, self.shape, 10, seed=0)

    def attached(self) -> Structure:
        model = self.model()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
        return esp.attach(model, example_inputs(self.shape), optimizer=optimizer, undo_limit=0)


def plain(network: Network) -> Callable[[], None]:
    """A step without gates."""
    model, batch = network.model(), network.batch()
    return stepping(torch.optim.SGD(model.parameters(), 0.01, 0.9), lambda: loss_of(model, batch), lambda: None)


def forward(network: Network) -> Callable[[], None]:
    """A pass without a graph."""
    model, batch = network.model(), network.batch()

    def run() -> None:
        with torch.no_grad():
            loss_of(model, batch)

    return run


def session_of(network: Network, held: Held, until: float = 1.0, multiplied: bool = False) -> esp.Session:
    """A session whose gates are in a given state, at its first step."""
    stages, rests = Stages(k=1.0, start=0.0, until=until), 1e-12
    method = esp.prune.NPN(stages, ExpectedCost(1.0), function=held, rate=rests, patience=1)
    if multiplied:
        method = replace(method, memory=replace(method.memory, worth=Worth(per_tensor=math.inf)))
    return esp.Session(network.attached(), [method], loss=loss_of, total_steps=LONG)


def gated(network: Network, held: Held, multiplied: bool = False) -> Callable[[], None]:
    """A step of the search."""
    session, batch = session_of(network, held, multiplied=multiplied), network.batch()
    return stepping(session.optimizer, lambda: session.loss(batch), session.step)


def slept(network: Network, decided: bool) -> Callable[[], None]:
    """A step after units that were low have gone to sleep."""
    session = session_of(network, STATES["late"], until=3 / LONG if decided else 1.0)
    batch, few = network.batch(), replace(network, size=8).batch()
    units = sum(one.size for one in session.structure.axes.values() if one.prunable)
    step = stepping(session.optimizer, lambda: session.loss(few), session.step)
    for _ in range(4):
        step()
        session.epoch_end()
    left = sum(one.size for one in session.structure.axes.values() if one.prunable) / units
    if not 0.35 < left < 0.45:
        raise SystemExit(f"{left:.0%} of the units of {network} are awake, expected 40%")
    return stepping(session.optimizer, lambda: session.loss(batch), session.step)


def stepping(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], after: Callable[[], None]
) -> Callable[[], None]:
    def step() -> None:
        value = loss()
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        after()

    return step


def timed(action: Callable[[], object], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        action()
    return (time.process_time() - start) / times


Times = Mapping[str, Sequence[float]]


def in_turn(actions: Mapping[str, Callable[[], None]], turns: int) -> Times:
    """CPU seconds of every action, turn by turn; short ones are repeated within a turn, as a training loop would."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    longest = max(min(timed(action, 1) for _ in range(4)) for action in actions.values())
    times = max(1, round(LEAST / longest))
    for turn in range(turns):
        for name in list(actions) if turn % 2 else reversed(actions):
            found[name].append(timed(actions[name], times))
    return found


def ratio(times: Times, of: str, to: Sequence[str]) -> float:
    """The median over turns of what one action takes in units of what some others take together."""
    floors = [sum(one) for one in zip(*(times[name] for name in to), strict=True)]
    return statistics.median(one / floor for one, floor in zip(times[of], floors, strict=True))


def shown(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def search(networks: Sequence[Network], turns: int, repeats: int) -> None:
    print("\n## A step of the search, in units of a plain step and a forward pass without a graph\n")
    print(f"| network | plain step, ms | floor, plain steps | {' | '.join(STATES)} | late, multiplied |")
    print(f"| --- | --- | --- |{' --- |' * (len(STATES) + 1)}")
    for network in networks:
        actions = {"plain": plain(network), "forward": forward(network)}
        actions |= {name: gated(network, held) for name, held in STATES.items()}
        actions["multiplied"] = gated(network, STATES["late"], multiplied=True)
        rounds = [in_turn(actions, turns) for _ in range(repeats)]
        step = statistics.median(one for times in rounds for one in times["plain"])
        floor = statistics.median(1 + ratio(times, "forward", ["plain"]) for times in rounds)
        cells = [shown([ratio(times, name, ["plain", "forward"]) for times in rounds]) for name in list(actions)[2:]]
        print(f"| {network} | {step * 1e3:.1f} | {floor:.2f} | {' | '.join(cells)} |", flush=True)


def asleep(networks: Sequence[Network], turns: int, repeats: int) -> None:
    print("\n## A step with 60% of the units asleep, in plain steps of the dense network\n")
    print("| network | search | decided |\n| --- | --- | --- |")
    for network in networks:
        actions = {"plain": plain(network), "search": slept(network, False), "decided": slept(network, True)}
        rounds = [in_turn(actions, turns) for _ in range(repeats)]
        cells = [shown([ratio(times, name, ["plain"]) for times in rounds]) for name in ("search", "decided")]
        print(f"| {network} | {' | '.join(cells)} |", flush=True)


# --- Memory ----------------------------------------------------------------------------------------------------------


def memory(sizes: Sequence[int]) -> None:
    print("\n## Peak memory of training an MLP, MB\n")
    print("| hidden units | plain | growing to it | growing, of the largest |\n| --- | --- | --- | --- |")
    found = {(size, how): measured_apart(size, how) for size in sizes for how in ("plain", "growing")}
    for size in sizes:
        grown, most = found[size, "growing"], found[max(sizes), "plain"]
        print(f"| {size} | {found[size, 'plain']:.1f} | {grown:.1f} | {grown / most:.0%} |")


def measured_apart(size: int, how: str) -> float:
    """MB that training takes at its peak, in a process of its own.

    Large blocks are given back to the system at once there: else what is measured is how torn the heap is.
    """
    command, settings = [sys.executable, __file__, "--child", str(size), how], {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **settings})
    return float(done.stdout)


def child(size: int, how: str) -> None:
    """Prints the peak of one training, beyond what is there after training a tiny network in the same way."""
    train = grown if how == "growing" else trained
    train(16)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    train(size)
    print((status("VmHWM") - before) / 1024)


def status(key: str) -> int:
    """Of this process, in kB."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(f"{key}:"))
    return int(line.split()[1])


def trained(size: int) -> None:
    """A few plain steps of an MLP."""
    model, batch = perceptron(size)
    optimizer = torch.optim.Adam(model.parameters())
    step = stepping(optimizer, lambda: loss_of(model, batch), lambda: None)
    for _ in range(6):
        step()


def grown(size: int) -> None:
    """A run that begins a little smaller and grows to that size: new units come, none was there asleep."""
    model, batch = perceptron(size - 4)
    optimizer = torch.optim.Adam(model.parameters())
    structure = esp.attach(model, batch[0][:2], optimizer=optimizer, undo_limit=0)
    method = esp.grow.NPN(Stages(k=1.0, start=0.0, until=1.0), None, fill=3.0)
    session = esp.Session(structure, [method], loss=loss_of, probe=[batch], total_steps=LONG)
    step = stepping(optimizer, lambda: session.loss(batch), session.step)
    for _ in range(40):
        step()
        session.epoch_end()
        if structure.axes["fc1"].size >= size:
            return
    raise SystemExit(f"grew to {structure.axes['fc1'].size} units only, expected {size}")


def perceptron(hidden: int) -> tuple[nn.Module, Batch]:
    network = Network("mlp", 32)
    return build("mlp", network.shape, 10, width=hidden / 128, seed=0), network.batch()


PARTS = ("search", "asleep", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description="What a step under stochastic gates costs.")
    parser.add_argument("--networks", nargs="*", help="name:batch")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--child", nargs=2, metavar=("SIZE", "HOW"), help="one training, for its memory")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.child:
        child(int(given.child[0]), given.child[1])
        return
    print(f"commit {origin()['commit']}, {os.cpu_count()} CPU cores, 1 thread, torch {torch.__version__}")
    print(f"CPU time, medians of {given.turns} turns, {given.repeats} repeats", flush=True)
    if "search" in given.parts:
        search([Network.named(one) for one in given.networks or NETWORKS], given.turns, given.repeats)
    if "asleep" in given.parts:
        asleep([Network.named(one) for one in given.networks or ASLEEP], given.turns, given.repeats)
    if "memory" in given.parts:
        memory(HIDDEN)


if __name__ == "__main__":
    main()
