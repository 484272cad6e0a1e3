"""Pruning a language model on calibration text: a Llama of transformers, by activations, by block influence, at random.

    python benchmarks/prune_llm.py TEXT.txt [--seeds 2] [--weights FOLDER]
    python benchmarks/prune_llm.py --table

A `LlamaForCausalLM` of 6 blocks is trained on the characters of the first 90% of a text (tinyshakespeare, say; `TEXT`
may be left out where $ESPALIER_DATA holds `tinyshakespeare.txt`). Then it is pruned with Espalier, each time from the
trained weights and without training afterwards, on the next 5% of the text as calibration text:

- units of the feed-forward layers and groups of heads, with `uniform=True`, so that the configuration can say what is
  left: by `wanda-units` (weights times activations), `taylor`, `magnitude` and `random`;
- whole blocks by `shortgpt` (influence, 1 - cos of what goes in and comes out) and `layers-random`;
- single weights, as masks, by `wanda`, `weights-magnitude` and `weights-random`.

Perplexity, exp of the loss per character, is measured on 24,576 characters of the final 5%, which nothing else sees.
Methods that draw are run with five seeds. Units and blocks are saved by `save_pretrained` and read by `from_pretrained`
in a process that cannot import Espalier: are the logits the same bits?

One line of JSON per network, method and size goes to `docs/results/prune_llm.jsonl`; what is there is not run
again. `--table` writes the table to `docs/results/prune_llm.md`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from characters import BATCH, CONTEXT, Text, loss_on, trained_once, windows
from paired import Record, append, origin, read, reading
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import espalier as esp
from espalier.adapters.pretrained import save_pretrained
from espalier.bench.data import default_root
from espalier.method import Method, find

RECORDS = Path(__file__).parent.parent / "docs/results/prune_llm.jsonl"
STEPS, CALIBRATED_ON, TESTED_ON, DRAWN = 2000, 128, 384, 5
READER = """
import sys
sys.modules["espalier"] = None
import torch, transformers
folder = sys.argv[1]
batch, expected = torch.load(folder + "/expected.pt")
torch.set_num_threads(1)
model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
with torch.no_grad():
    sys.exit(not torch.equal(model(input_ids=batch).logits, expected))
"""


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss


def built(characters: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=characters,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=6,
            num_attention_heads=12,
            num_key_value_heads=6,
            max_position_embeddings=CONTEXT,
        )
    )


def trained(text: Text, seed: int, weights: Path) -> LlamaForCausalLM:
    """The network of a seed, trained only once."""
    batches = text.drawn(seed, STEPS, CONTEXT)
    return trained_once(built(text.characters, seed), weights / f"{seed}.pt", loss_of, batches, STEPS).eval()


def methods() -> Iterator[tuple[str, float, int, Method]]:
    """Name, part that stays, seed, and the method that prunes to it in one event."""
    once = {"every": esp.steps(1), "start": 0.0, "until": 1.0, "max_events": 1}
    for part in (0.8, 0.6, 0.4):
        width = {"budget": esp.Parameters(part, of="initial"), "shape": "constant", "uniform": True, **once}
        axes = ["*gate_proj", "*:heads"]
        for name in ("wanda-units", "taylor", "magnitude", "random"):
            for seed in range(DRAWN if name == "random" else 1):
                yield name, part, seed, find("prune", name).make(axes=axes, **width)
    for blocks in (5, 4, 3):
        depth = {"budget": esp.Units(blocks / 6, of="initial"), "shape": "constant", **once}
        for name in ("shortgpt", "layers-random"):
            for seed in range(DRAWN if name == "layers-random" else 1):
                yield name, blocks / 6, seed, find("prune", name).make(axes=["model.layers.*"], **depth)
    for part in (0.7, 0.5, 0.3):
        masks = {"budget": esp.Sparsity(1 - part), "shape": "constant", **once}
        for name in ("wanda", "weights-magnitude", "weights-random"):
            for seed in range(DRAWN if name == "weights-random" else 1):
                yield name, part, seed, find("prune", name).make(axes=["*_proj.weight"], **masks)


def pruned(text: Text, seed: int, weights: Path, method: Method, drawn: int) -> dict[str, Any]:
    """What one method makes of the trained network, and what is left of its perplexity."""
    model = trained(text, seed, weights)
    calibration, held = (
        windows(part, count, CONTEXT) for part, count in ((text.choose, CALIBRATED_ON), (text.test, TESTED_ON))
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    structure = esp.attach(model, {"input_ids": held[:2]}, optimizer=optimizer)
    before, cost = math.exp(loss_on(model, loss_of, held)), structure.cost()
    probe = [*calibration.split(32)]
    session = esp.Session(structure, [method], loss=loss_of, probe=probe, total_steps=1, seed=drawn)
    started = time.perf_counter()
    session.step()
    seconds = time.perf_counter() - started
    model.eval()
    live = sum(int(mask.sum()) - mask.numel() for mask in structure.masks.values())
    found = {
        "before": before,
        "after": math.exp(loss_on(model, loss_of, held)),
        "parameters": [cost.parameters, structure.cost().parameters + live],
        "flops": [cost.flops, structure.cost().flops],
        "seconds": round(seconds, 2),
    }
    if method.level != "weights":
        found["same bits"] = read_again(structure, held[:8])
    return found


def read_again(structure: esp.Structure, batch: Tensor) -> bool:
    """Whether `from_pretrained` gives the same logits in a process that cannot import Espalier."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(structure, folder)
        with torch.no_grad():
            logits = structure.model(input_ids=batch).logits
        torch.save((batch, logits), f"{folder}/expected.pt")
        return subprocess.run([sys.executable, "-c", READER, folder], check=False).returncode == 0


def run(text: Text, seeds: int, weights: Path) -> None:
    known = {(one["seed"], one["method"], one["part"], one["drawn"]) for one in read(RECORDS)}
    for seed in range(seeds):
        for name, part, drawn, method in methods():
            if (seed, name, part, drawn) in known:
                continue
            found = pruned(text, seed, weights, method, drawn)
            append(RECORDS, {"seed": seed, "method": name, "part": part, "drawn": drawn, **found, **origin()})
            print(f"{name} {part:.2f}: {found['before']:.3f} -> {found['after']:.3f}", flush=True)


def table() -> str:
    records = read(RECORDS)
    if not records:
        return "Nothing was run.\n"
    seeds = sorted({one["seed"] for one in records})
    commits = ", ".join(dict.fromkeys(one["commit"] for one in records))
    before = [next(one["before"] for one in records if one["seed"] == seed) for seed in seeds]
    lines = [
        "# Pruning a language model without training afterwards\n",
        f"`python benchmarks/prune_llm.py tinyshakespeare.txt --seeds {len(seeds)}`, "
        f"commit {commits}, {records[0]['machine']}. The first lines of that file say what is measured.\n",
        f"A Llama of 6 blocks, {records[0]['parameters'][0]:,} parameters, trained for {STEPS:,} steps of "
        f"{BATCH} x {CONTEXT} characters; trained networks: {len(seeds)}. Perplexity per character on "
        f"{TESTED_ON * CONTEXT:,} characters that nothing else sees; before pruning "
        f"{', '.join(f'{one:.3f}' for one in before)}. What draws is the mean over {DRAWN} seeds, with the best and "
        "the worst of them.\n",
    ]
    for title, what, names in (
        ("Units", "parameters", ("wanda-units", "taylor", "magnitude", "random")),
        ("Blocks", "blocks", ("shortgpt", "layers-random")),
        ("Single weights, as masks", "weights of linear layers", ("wanda", "weights-magnitude", "weights-random")),
    ):
        lines += [f"## {title}\n", f"| {what} that stay | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
        for part in sorted({one["part"] for one in records if one["method"] == names[0]}, reverse=True):
            cells = [_cell([one for one in records if one["method"] == name and one["part"] == part]) for name in names]
            lines.append(f"| {part:.0%} | {' | '.join(cells)} |")
        lines.append("")
    checked = [one["same bits"] for one in records if "same bits" in one]
    lines.append(
        f"Read by `from_pretrained` in a process without Espalier, {sum(checked)} of {len(checked)} pruned networks "
        "gave the same logits, bit for bit. A method took "
        f"{max(one['seconds'] for one in records):.0f} s at most, calibration included.\n"
    )
    return "\n".join(lines) + reading(RECORDS.with_suffix(".md"))


def _cell(records: list[Record]) -> str:
    found = [one["after"] for one in records]
    if not found:
        return "-"
    spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > len({one["seed"] for one in records}) else ""
    return f"{statistics.mean(found):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, help="a text; $ESPALIER_DATA/tinyshakespeare.txt by default")
    parser.add_argument("--seeds", type=int, default=2, help="trained networks")
    parser.add_argument("--weights", type=Path, default=Path("runs/prune_llm"), help="where those are kept")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        run(Text.read(options.text or default_root() / "tinyshakespeare.txt"), options.seeds, options.weights)
    RECORDS.with_suffix(".md").write_text(table())


if __name__ == "__main__":
    main()
