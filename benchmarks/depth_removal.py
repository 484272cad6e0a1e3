"""Which blocks can go: block removal on a character-level transformer, by influence and at random.

    python benchmarks/depth_removal.py TEXT.txt [--seeds 3] [--weights FOLDER] [--retrain NUMBER ...]
    python benchmarks/depth_removal.py --table

A pre-norm transformer of 8 blocks is trained on the first 90% of a text (tinyshakespeare, say; `TEXT` may be left out
where $ESPALIER_DATA holds `tinyshakespeare.txt`). Then blocks are removed from it with Espalier, 1 to 6 of them, each
time from the trained network and without training afterwards. Which ones, is chosen on the next 5% of the text, by

- `influence`: those whose result is most like their input, 1 - cos, measured once (ShortGPT, Men et al. 2024),
- `influence, again`: one after the other, with the influence of the others measured anew after each removal,
- `loss`: one after the other, each time the one without which the loss rises least,
- `last`: the last ones; `last but one`: those before the last, which stays,

and the loss per character (nats) is measured on the final 5%, which nothing else sees. `random` is no sample: *every*
set of blocks of that size is removed and measured, and what is given is the mean over all sets, which is what removal
at random loses on average, and the rank of a method's choice among all sets (1 is the best).

With `--retrain 2 4`, what is left of the network after the removal of that many blocks is trained on for 100 steps, for
the sets of all methods and for five that are drawn at random; these go to `depth_removal-retrained.jsonl`.

One line of JSON per trained network and number of blocks goes to `docs/results/depth_removal.jsonl`; what is
there is not run again. `--table` writes the table to `docs/results/depth_removal.md`.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from characters import BATCH, CONTEXT, Text, loss_on, train, trained_once, windows
from paired import Record, append, interval, origin, read, reading
from torch import Tensor, nn

import espalier as esp
from espalier.bench.data import default_root
from espalier.edit.depth_edits import Remove
from espalier.edit.plan import Plan

RESULTS = Path(__file__).parent.parent / "docs/results"
BLOCKS, SIZE, HEADS, STEPS = 8, 96, 4, 2400
MOST = BLOCKS - 2
CHOSEN_ON, TESTED_ON = 256, 384
RETRAINED, RETRAINING_RATE, RANDOM_RETRAINED = 100, 5e-4, 5

Blocks = Sequence[int]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(SIZE, 3 * SIZE)
        self.proj = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        count, length, _ = x.shape
        parts = self.qkv(x).view(count, length, 3, HEADS, SIZE // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast(Tensor, self.proj(attended.transpose(1, 2).reshape(count, length, SIZE)))


class Block(nn.Module):
    """Attention and feed-forward, each after a LayerNorm and added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(SIZE)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(SIZE)
        self.mlp = nn.Sequential(nn.Linear(SIZE, 4 * SIZE), nn.GELU(), nn.Linear(4 * SIZE, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Characters (N, T) to logits (N, T, characters), with learned positions."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, SIZE)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, SIZE))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(SIZE)
        self.head = nn.Linear(SIZE, characters)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions
        return cast(Tensor, self.head(self.norm(self.blocks(x))))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def trained(text: Text, seed: int, weights: Path) -> Transformer:
    """The network of a seed, trained only once."""
    torch.manual_seed(seed)
    batches = text.drawn(seed, STEPS, CONTEXT + 1)
    return trained_once(Transformer(text.characters), weights / f"{seed}.pt", loss_of, batches, STEPS)


class Removal:
    """Removes sets of blocks from one trained network, one set at a time, and measures without them."""

    def __init__(self, model: Transformer, text: Text) -> None:
        self._model = model
        self._choose, self._test = (
            windows(part, count, CONTEXT + 1) for part, count in ((text.choose, CHOSEN_ON), (text.test, TESTED_ON))
        )
        self._structure = esp.attach(model, self._choose[:2, :-1])
        self._seen: dict[tuple[str, frozenset[int]], float] = {}

    def tested(self, removed: Blocks) -> float:
        """Loss on the test text without these blocks."""
        return self._loss("test", self._test, removed)

    def chosen_on(self, removed: Blocks) -> float:
        """Loss without these blocks on the text that choices see."""
        return self._loss("choose", self._choose, removed)

    def influence(self, removed: Blocks = ()) -> dict[int, float]:
        """1 - cos between what enters and what leaves each of the other blocks, mean over characters."""
        found: list[float] = []

        def hook(_: nn.Module, entered: tuple[Tensor], left: Tensor) -> None:
            found.append(1 - float(F.cosine_similarity(entered[0], left, dim=-1).mean()))

        with without(self._structure, removed), torch.no_grad():
            hooks = [block.register_forward_hook(hook) for block in self._model.blocks]
            self._model(self._choose[:, :-1])
            for one in hooks:
                one.remove()
        kept = [block for block in range(BLOCKS) if block not in removed]
        return dict(zip(kept, found, strict=True))

    def error(self, removed: Blocks) -> float:
        """Largest difference of logits between Espalier's removal and the other blocks run one after the other."""
        batch = self._test[:16, :-1]
        with torch.no_grad():
            x = self._model.characters(batch) + self._model.positions
            for number, block in enumerate(self._model.blocks):
                x = x if number in removed else block(x)
            expected = self._model.head(self._model.norm(x))
            with without(self._structure, removed):
                return float((self._model(batch) - expected).abs().max())

    def _loss(self, what: str, held: Tensor, removed: Blocks) -> float:
        key = what, frozenset(removed)
        if key not in self._seen:
            with without(self._structure, removed):
                self._seen[key] = loss_on(self._model, loss_of, held)
        return self._seen[key]


@contextmanager
def without(structure: esp.Structure, removed: Blocks) -> Iterator[None]:
    """The network without some of its blocks, for as long as this lasts."""
    if removed:
        structure.apply(plan_of(removed))
    yield
    if removed:
        structure.undo()


def plan_of(removed: Blocks) -> Plan:
    return Plan((), depth=tuple(Remove(f"blocks.{block}") for block in removed))


def choices(removal: Removal) -> dict[str, list[Blocks]]:
    """Method -> the blocks that it removes, if it removes 1, 2, ..."""
    once = removal.influence()
    ordered = sorted(once, key=lambda block: once[block])
    again: list[int] = []
    by_loss: list[int] = []
    for _ in range(MOST):
        now = removal.influence(again)
        again.append(min(now, key=lambda block: now[block]))
        left = [block for block in range(BLOCKS) if block not in by_loss]
        by_loss.append(min(left, key=lambda block: removal.chosen_on([*by_loss, block])))
    back = list(range(BLOCKS))[::-1]
    orders = {"influence": ordered, "influence, again": again, "loss": by_loss, "last": back, "last but one": back[1:]}
    return {name: [sorted(order[: many + 1]) for many in range(MOST)] for name, order in orders.items()}


def measure(text: Text, seed: int, weights: Path, numbers: Sequence[int]) -> Iterator[Record]:
    """All sets of blocks of one trained network, for these numbers of them."""
    if not numbers:
        return
    removal = Removal(trained(text, seed, weights).eval(), text)
    chosen, influence = choices(removal), removal.influence()
    for many in numbers:
        sets = [list(one) for one in combinations(range(BLOCKS), many)]
        yield {
            "seed": seed,
            "removed": many,
            "whole": removal.tested(()),
            "influence": [round(influence[block], 5) for block in range(BLOCKS)],
            "chosen": {name: orders[many - 1] for name, orders in chosen.items()},
            "loss": {name: removal.tested(orders[many - 1]) for name, orders in chosen.items()},
            "every": [[one, round(removal.tested(one), 5)] for one in sets],
            "error": removal.error(sets[0]),
        }


def retrained(text: Text, seed: int, weights: Path, removed: Blocks) -> float:
    """Loss on the test text without these blocks, after some more training."""
    model = trained(text, seed, weights)
    esp.attach(model, windows(text.choose, 2, CONTEXT)).apply(plan_of(removed))
    batches = text.drawn(1000 + seed, RETRAINED, CONTEXT + 1)
    train(model, loss_of, batches, RETRAINED, RETRAINING_RATE, warm_up=10)
    return loss_on(model.eval(), loss_of, windows(text.test, TESTED_ON, CONTEXT + 1))


# --- Records and tables ----------------------------------------------------------------------------------------------


def by_depth(records: Sequence[Record]) -> list[str]:
    """Losses by number of blocks removed."""
    names = list(records[0]["loss"])
    lines = [
        f"| removed | random | random that keeps the first block | {' | '.join(names)} | best set |",
        f"| --- | --- | --- |{' --- |' * len(names)} --- |",
    ]
    for many in sorted({one["removed"] for one in records}):
        found = [one for one in records if one["removed"] == many]
        losses = [[_random(one) for one in found], [_random(one, keeps_first=True) for one in found]]
        losses += [[one["loss"][name] for one in found] for name in names]
        losses += [[min(loss for _, loss in one["every"]) for one in found]]
        lines.append(f"| {many} of {BLOCKS} | {' | '.join(_mean(one) for one in losses)} |")
    return lines


def differences(records: Sequence[Record], *, keeps_first: bool) -> list[str]:
    """What the methods lose less (negative) or more than removal at random."""
    names = list(records[0]["loss"])
    lines = [f"| removed | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for many in sorted({one["removed"] for one in records}):
        found, cells = [one for one in records if one["removed"] == many], [f"{many} of {BLOCKS}"]
        for name in names:
            by_seed = [one["loss"][name] - _random(one, keeps_first=keeps_first) for one in found]
            verdict = "less" if max(by_seed) < 0 else "more" if min(by_seed) > 0 else "mixed"
            ranks = ", ".join(f"{_rank(one, name)}" for one in found)
            cells.append(f"{_mean(by_seed, '+.3f')}, {verdict} ({ranks} of {len(found[0]['every'])})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _random(record: Record, *, keeps_first: bool = False) -> float:
    """The mean loss over all sets."""
    return statistics.mean(loss for blocks, loss in record["every"] if not (keeps_first and 0 in blocks))


def _mean(values: Sequence[float], form: str = ".3f") -> str:
    mean, half = interval(values)
    return f"{mean:{form}}" + (f" ± {half:.3f}" if len(values) > 1 else "")


def _rank(record: Record, name: str) -> int:
    """Place of a method's set among all sets of that size, the least loss first."""
    return 1 + sum(loss < record["loss"][name] - 1e-5 for _, loss in record["every"])


def networks(records: Sequence[Record]) -> list[str]:
    """What was trained, and what is removed from it."""
    lines = ["| seed | loss of the whole | influence of each block | in order of `influence, again` | of `loss` |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for seed in sorted({one["seed"] for one in records}):
        found = {one["removed"]: one for one in records if one["seed"] == seed}
        influence = " ".join(f"{one:.3f}" for one in found[1]["influence"])
        orders = [
            _order([found[many]["chosen"][name] for many in sorted(found)]) for name in ("influence, again", "loss")
        ]
        lines.append(f"| {seed} | {found[1]['whole']:.4f} | {influence} | {' | '.join(orders)} |")
    return lines


def _order(sets: Sequence[Sequence[int]]) -> str:
    """Sets, each with one block more than the one before, as the order in which blocks go."""
    return " ".join(str(next(iter({*more} - {*less}))) for less, more in pairwise([[], *sets]))


def after_training(records: Sequence[Record]) -> list[str]:
    """Losses after some more training."""
    names = list(dict.fromkeys(one["method"] for one in records))
    lines = [f"| seed | removed | {' | '.join(names)} |", f"| --- | --- |{' --- |' * len(names)}"]
    for seed, many in sorted({(one["seed"], len(one["blocks"])) for one in records}):
        cells = [f"{seed}", f"{many} of {BLOCKS}"]
        for name in names:
            losses = [
                one["loss"] for one in records if (one["seed"], len(one["blocks"]), one["method"]) == (seed, many, name)
            ]
            cells.append((_mean(losses) if len(losses) > 1 else f"{losses[0]:.3f}") if losses else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_table() -> None:
    records = read(RESULTS / "depth_removal.jsonl")
    seeds = len({one["seed"] for one in records})
    commits = ", ".join(sorted({one["commit"] for one in records}))
    error = max(one["error"] for one in records)
    lines = [
        "# Which blocks can go",
        "",
        f"`python benchmarks/depth_removal.py tinyshakespeare.txt --seeds {seeds}`, commit {commits}, "
        f"{records[0]['machine']}. The first lines of that file say what is measured. A pre-norm transformer of "
        f"{BLOCKS} blocks, {SIZE} wide, {HEADS} heads, {CONTEXT} characters of context, trained for {STEPS:,} steps "
        f"of {BATCH * CONTEXT:,} characters; {seeds} trained networks. Loss in nats per character on "
        f"{TESTED_ON * CONTEXT:,} characters that nothing else sees. Removal by Espalier against leaving the blocks "
        f"out by hand: logits differ by {error:.0e} at most.",
        "",
        "Loss by the number of blocks removed, mean and 95% interval (Student's t) over networks:",
        "",
        *by_depth(records),
        "",
        "What the methods lose less (negative) or more than removal at random. *less* or *more* is said where that "
        "holds for every network; in brackets the rank of the chosen set among all sets of that size by network, 1 "
        "being the best:",
        "",
        *differences(records, keeps_first=False),
        "",
        "The same against sets at random that keep the first block, without which a network is lost:",
        "",
        *differences(records, keeps_first=True),
        "",
        "The networks, and the order in which blocks (counted from 0) go:",
        "",
        *networks(records),
        "",
    ]
    again = read(RESULTS / "depth_removal-retrained.jsonl")
    if again:
        lines += [
            f"After {RETRAINED} steps of training more (`--retrain`, learning rate {RETRAINING_RATE:g}); `random` is "
            f"the mean of {RANDOM_RETRAINED} sets drawn:",
            "",
            *after_training(again),
            "",
        ]
    path = RESULTS / "depth_removal.md"
    path.write_text("\n".join(lines) + reading(path))


def main() -> None:
    parser = argparse.ArgumentParser(description="Block removal on a character-level transformer.")
    parser.add_argument("text", nargs="?", type=Path, help="a text; by default $ESPALIER_DATA/tinyshakespeare.txt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weights", type=Path, default=Path("runs/depth_removal"), help="folder of trained networks")
    parser.add_argument("--retrain", nargs="*", type=int, default=[], help="train on too, without this many blocks")
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    if not given.table:
        torch.set_num_threads(1)
        os.nice(5)
        text, place = Text.read(given.text or default_root() / "tinyshakespeare.txt"), origin()
        for seed in range(given.seeds):
            measure_all(text, seed, given.weights, place)
            for many in given.retrain:
                retrain(text, seed, many, given.weights, place)
    write_table()


def measure_all(text: Text, seed: int, weights: Path, place: Record) -> None:
    """Measure what was not measured yet of one network."""
    path = RESULTS / "depth_removal.jsonl"
    done = [one["removed"] for one in read(path) if one["seed"] == seed]
    for record in measure(text, seed, weights, [many for many in range(1, MOST + 1) if many not in done]):
        append(path, record | place)
        losses = " ".join(f"{name}: {loss:.3f}" for name, loss in record["loss"].items())
        print(f"seed {seed}, {record['removed']} removed: {losses}", flush=True)


def retrain(text: Text, seed: int, many: int, weights: Path, place: Record) -> None:
    """Train on without the blocks that the methods chose, and without some at random."""
    path = RESULTS / "depth_removal-retrained.jsonl"
    chosen = next(one for one in read(RESULTS / "depth_removal.jsonl") if (one["seed"], one["removed"]) == (seed, many))
    draw = random.Random(seed)
    sets = [("random", sorted(draw.sample(range(BLOCKS), many))) for _ in range(RANDOM_RETRAINED)]
    done = [(one["seed"], one["method"], one["blocks"]) for one in read(path)]
    for name, blocks in [*chosen["chosen"].items(), *sets]:
        if (seed, name, blocks) not in done:
            loss = retrained(text, seed, weights, blocks)
            append(path, {"seed": seed, "method": name, "blocks": blocks, "loss": loss} | place)
            print(f"seed {seed}, {name}, without {blocks}: {loss:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
