"""What the benchmarks of gates share: a training that is kept in a folder now and then, and goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import espalier as esp
from espalier.method import Method

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Assignment:
    """What is trained, and how."""

    model: Callable[[], nn.Module]
    """Builds it at its original size."""
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    method: Method | None
    """None trains the network as it is."""
    example: Tensor
    loss: Callable[[nn.Module, Pair], Tensor]
    batches: Callable[[torch.Generator], Iterator[Pair]]
    """One epoch."""
    held_out: Sequence[Pair]
    epochs: int
    per_epoch: int
    seed: int
    rate: Callable[[float], float]
    """Fraction of the training that is done -> learning rate."""
    described: Callable[[esp.Structure], list[Any]]
    """What the curve shows of the network."""


class Run:
    """One training, with the validation accuracy and loss after every epoch in `curve`."""

    def __init__(self, assignment: Assignment, folder: Path) -> None:
        self.assignment, self.folder = assignment, folder
        model = assignment.model()
        self.optimizer = assignment.optimizer(model)
        kept = json.loads((folder / "run.json").read_text()) if (folder / "run.json").exists() else None
        if kept is None:
            structure = esp.attach(model, assignment.example, optimizer=self.optimizer, undo_limit=0)
        else:
            structure = esp.load(folder / kept["network"], model, assignment.example, optimizer=self.optimizer)
        self.session = esp.Session(
            structure, [] if assignment.method is None else [assignment.method], loss=assignment.loss,
            probe=assignment.held_out, total_steps=assignment.epochs * assignment.per_epoch, seed=assignment.seed,
        )  # fmt: skip
        self.seconds, self.curve = 0.0, []
        if kept is not None:
            self.session.load_state_dict(kept["session"])
            self.seconds, self.curve = kept["seconds"], kept["curve"]
        self.since = time.perf_counter()

    @property
    def taken(self) -> float:
        """Seconds, earlier sittings included."""
        return self.seconds + time.perf_counter() - self.since

    def epoch(self) -> None:
        """Train on all samples once, in an order that the seed and the number of the epoch decide."""
        assignment, session, optimizer = self.assignment, self.session, self.optimizer
        generator = torch.Generator().manual_seed(1000 * assignment.seed + session.epochs_done)
        session.model.train()
        for batch in assignment.batches(generator):
            for group in optimizer.param_groups:
                group["lr"] = assignment.rate(session.steps_done / assignment.epochs / assignment.per_epoch)
            loss = session.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step()
        session.epoch_end()
        right, value = self.judged(assignment.held_out)
        described = assignment.described(session.structure)
        self.curve.append([session.epochs_done, round(right, 4), round(value, 5), *described])

    def judged(self, batches: Sequence[Pair]) -> tuple[float, float]:
        """Accuracy and loss with gates as they are decided now."""
        model, right, value, count = self.session.model, 0, 0.0, 0
        model.eval()
        with torch.no_grad(), self.session.decided():
            for x, y in batches:
                logits = model(x)
                right += int((logits.argmax(1) == y).sum())
                value += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
                count += len(y)
        model.train()
        return right / count, value / count

    def keep(self) -> None:
        """Write a checkpoint; the file that names its network is replaced last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"network{self.session.epochs_done % 2}"
        esp.save(self.session.structure, self.folder / name)
        state = {"network": name, "session": self.session.state_dict(), "seconds": self.taken, "curve": self.curve}
        (self.folder / "run.json.new").write_text(json.dumps(state))
        os.replace(self.folder / "run.json.new", self.folder / "run.json")

    def go_on(self, every: int, seconds: float) -> bool:
        """Train until all epochs are done, or for so long; True if they are. Checkpoints come after so many epochs."""
        begin = last = time.perf_counter()
        while self.session.epochs_done < self.assignment.epochs:
            self.epoch()
            print(*self.curve[-1], f"{self.taken:.0f}s", flush=True)
            now = time.perf_counter()
            over = now - begin + 1.5 * (now - last) > seconds
            last = now
            if over or self.session.epochs_done % every == 0 or self.session.epochs_done == self.assignment.epochs:
                self.keep()
            if over:
                break
        return self.session.epochs_done >= self.assignment.epochs

    def shown(self, until: float) -> list[list[Any]]:
        """The curve after every tenth of the training, its first epoch, and the end of the search."""
        epochs = self.assignment.epochs
        numbers = {1, round(until * epochs)}
        return [row for row in self.curve if row[0] in numbers or row[0] % max(1, epochs // 10) == 0]


def in_batches(data: Pair, size: int = 1000) -> list[Pair]:
    """In order."""
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def folder_of(parent: Path, settings: Mapping[str, Any]) -> Path:
    """A folder of its own for every choice of settings."""
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    return parent / f"{settings['setting']}-{settings['seed']}-{settings['epochs']}-{digest}"


def finished(results: Path, settings: Mapping[str, Any], tested: bool) -> bool:
    """Whether the line of a run is there, with its test accuracy if that is asked for."""
    lines = results.read_text().splitlines() if results.exists() else []
    found = [one for one in map(json.loads, lines) if settings.items() <= one.items()]
    return any(one["test"] is not None or not tested for one in found)


def append(results: Path, line: Mapping[str, Any]) -> None:
    """Add a line of JSON, and show it without its curve."""
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print({key: value for key, value in line.items() if key != "curve"}, flush=True)
