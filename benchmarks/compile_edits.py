"""Steps per second of a compiled network over 20 edits, the time to compile anew counted, beside eager mode.

    python benchmarks/compile_edits.py [--steps 1000] [--edits 20]   writes docs/results/compile_edits.md

The network is a residual MLP whose norms and activations are written out in Python, as those of Hugging Face's models
are: many small pointwise operators, which compiling fuses. Every edit grows or prunes the hidden width of one block, in
multiples of 8, and `--steps` training steps (forward, backward, AdamW) follow it. The first step after an edit, which
compiles, is measured every time; of the others `--sampled` are, whose median stands for all. Each way runs in a process
of its own with an empty cache of compiled code:

    eager      as it stands
    compiled   torch.compile(model); Espalier discards what edits make useless, so that it is compiled after each
    left alone the same, with what Espalier does after an edit taken away: PyTorch's own behaviour
    dynamic    with sizes of parameters that may change (two settings of torch._dynamo.config)

All times are CPU seconds of the process and of the compilers that it starts, on one thread: other programs on the
machine take their part of wall time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paired import origin, reading
from torch import Tensor, nn

import espalier as esp
from espalier.compiled import CompiledCode
from espalier.table import text_table

RESULT = Path(__file__).parent.parent / "docs" / "results" / "compile_edits.md"
WAYS = ("eager", "compiled", "left alone", "dynamic")
SAMPLES, INPUTS, WIDTH, HIDDEN, BLOCKS, CLASSES = 4096, 64, 32, 128, 4, 10


class RMSNorm(nn.Module):
    """As in Llama."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class GELU(nn.Module):
    """As in GPT-2."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class Block(nn.Module):
    """A residual block with a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.act = GELU()
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Network(nn.Module):
    """Samples of shape (batch, inputs) -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def spent() -> float:
    """CPU seconds of this process and of the programs that it has run."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def run(way: str, edits: int, steps: int, sampled: int) -> dict[str, Any]:
    """Train and edit in one way; what it took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(SAMPLES, INPUTS), torch.randint(0, CLASSES, (SAMPLES,))
    model = Network()
    runs = model if way == "eager" else torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    structure = esp.attach(model, x, optimizer=optimizer)
    axes = [f"blocks.{number}.up" for number in range(BLOCKS)]
    if way == "left alone":
        CompiledCode.renew = lambda *_, **__: None
    if way == "dynamic":
        torch._dynamo.config.force_parameter_static_shapes = False
        torch._dynamo.config.force_nn_module_property_static_shapes = False

    def step() -> None:
        loss = F.cross_entropy(runs(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def seconds(what: Callable[[], object], times: int = 1) -> float:
        found = []
        for _ in range(times):
            before = spent()
            what()
            found.append(spent() - before)
        return statistics.median(found)

    seconds(step, 10)
    before = seconds(step, 3 * sampled)
    cutting, firsts, others = [], [], []
    for number in range(edits):
        axis = axes[number % BLOCKS]
        grows = number // BLOCKS % 2 == 0
        edit = partial(structure.grow, axis, 16) if grows else partial(structure.prune, axis, range(8))
        cutting.append(seconds(edit))
        firsts.append(seconds(step))
        others.append(seconds(step, sampled))
    return {
        "way": way,
        "before": before,
        "after": seconds(step, 3 * sampled),
        "first": firsts,
        "others": others,
        "edit": cutting,
        "total": sum(firsts) + (steps - 1) * sum(others),
    }


def main() -> None:
    """Run each way by itself, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--sampled", type=int, default=15)
    parser.add_argument("--way", choices=WAYS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(run(given.way, given.edits, given.steps, given.sampled)))
        return
    found = []
    for way in WAYS:
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            command = [sys.executable, __file__, "--way", way]
            for name in ("edits", "steps", "sampled"):
                command += [f"--{name}", str(getattr(given, name))]
            output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        found.append(json.loads(output.splitlines()[-1]))
    write(found, given.edits, given.steps)


def write(found: Sequence[Mapping[str, Any]], edits: int, steps: int) -> None:
    """The table of what was found."""
    eager = next(one for one in found if one["way"] == "eager")
    rows = []
    for one in found:
        compiled = sum(first > 10 * one["before"] for first in one["first"])
        rows.append(
            (
                one["way"],
                f"{one['before'] * 1e3:.1f}",
                f"{eager['before'] / one['before']:.2f}",
                f"{one['after'] * 1e3:.1f}",
                f"{eager['after'] / one['after']:.2f}",
                str(compiled),
                f"{sum(one['first']):.0f}",
                f"{edits * steps / one['total']:.1f}",
                f"{eager['total'] / one['total']:.2f}",
            )
        )
    header = (
        "way", "ms a step at first", "x eager's", "ms a step at the end", "x eager's ", "compiled after edits",
        "s of that", "steps per s, all", "x eager's  ",
    )  # fmt: skip
    about = origin()
    lines = [
        "# Compiled networks over edits",
        "",
        f"`benchmarks/compile_edits.py`, commit {about['commit']}, {about['machine']}; CPU seconds. {edits} edits, "
        f"{steps:,} training steps after each.",
        "",
        "```",
        *text_table(header, rows, right=tuple(range(1, len(header)))),
        "```",
    ]
    RESULT.write_text("\n".join(lines) + "\n" + reading(RESULT))


if __name__ == "__main__":
    main()
