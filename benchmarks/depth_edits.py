"""Layer and cell edits on well-known networks: done, exact as promised, trained on, undone, saved and loaded.

    python benchmarks/depth_edits.py --out runs/depth_edits.jsonl

For every network and every kind of edit some of the sites that `structure.sites()` lists are tried: removed, copied as
something that changes nothing at first, copied as they are, factorised, folded; default layers are inserted after and
before them. After each edit outputs are compared in eval and in train mode where it promises to be exact, a training
step is made on a copy, the optimizer has to hold what it should, and undoing has to give every tensor back. Then
several edits are made one after the other with training steps between them, saved, and loaded into a fresh network,
which has to give the same bits. In single precision; dropout is off, since a new layer draws too. One line per network.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_parts.models import ZOO
from zoo_parts.torchvision_import import torchvision_importable

import espalier as esp
from espalier.edit.depth_edits import Insert, Remove, Replace
from espalier.edit.plan import Plan
from espalier.errors import EspalierError, PlanError
from espalier.graph.sites import Site
from espalier.layers import CopyOf, Factorised, default_layer
from espalier.structure import Structure

MODELS = (
    "tv_resnet18", "resnet50", "tv_densenet121", "inception_v3", "vit", "tv_swin_t", "hf_bert", "hf_gpt2", "hf_llama",
)  # fmt: skip
EXACT = 1e-5
"""Largest difference of outputs, relative to the largest of them."""

Example = Any


def resnet50() -> tuple[nn.Module, Example]:
    from torchvision.models import resnet50 as make

    return make(weights=None), (torch.randn(2, 3, 64, 64),)


def inception_v3() -> tuple[nn.Module, Example]:
    from torchvision.models import inception_v3 as make

    return make(weights=None, init_weights=False), (torch.randn(2, 3, 299, 299),)


def vit() -> tuple[nn.Module, Example]:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 8, 6, 4, 64, 128), (torch.randn(2, 3, 32, 32),)


OWN: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    "resnet50": resnet50, "inception_v3": inception_v3, "vit": vit,
}  # fmt: skip


def built(name: str) -> tuple[nn.Module, Example]:
    torch.manual_seed(0)
    model, example = OWN[name]() if name in OWN else ZOO[name]()
    if isinstance(example, tuple) and example[0].dim() == 4 and len(example[0]) == 1:
        example = (torch.cat([example[0], torch.randn_like(example[0])]),)  # batch norm wants more than one image
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        elif type(module).__name__ == "StochasticDepth":
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model.train(), example


def run(model: nn.Module, example: Example) -> list[Tensor]:
    result = model(**example) if isinstance(example, dict) else model(*example)
    return [one for one in _tensors(result) if one.is_floating_point()]


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for one in tree.values():
            yield from _tensors(one)
    elif isinstance(tree, (tuple, list)):
        for one in tree:
            yield from _tensors(one)


def both(model: nn.Module, example: Example) -> list[Tensor]:
    """Outputs in eval and in train mode; the model's running statistics stay as they are."""
    found, kept = [], {name: one.clone() for name, one in model.named_buffers()}
    for training in (False, True):
        model.train(training)
        torch.manual_seed(1)
        with torch.no_grad():
            found += run(model, example)
    with torch.no_grad():
        for name, one in model.named_buffers():
            one.copy_(kept[name])
    return found


def error(before: list[Tensor], after: list[Tensor]) -> float:
    pairs = zip(before, after, strict=True)
    return max(float((one - two).abs().max() / one.abs().max().clamp_min(1e-30)) for one, two in pairs)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, example: Example) -> None:
    optimizer.zero_grad()
    sum(one.square().mean() for one in run(model, example)).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()


def plans(structure: Structure, most: int) -> Iterator[tuple[str, Plan]]:
    """(kind, plan) for up to `most` sites of each kind."""
    sites, draw = structure.sites(), random.Random(0)

    def some(found: list[Site]) -> list[Site]:
        return found if len(found) <= most else sorted(draw.sample(found, most), key=lambda one: one.position)

    for kind in ("cell", "layer"):
        for site in some([one for one in sites if one.removal is not None and one.kind == kind]):
            *first, last = site.modules
            yield f"remove {kind}", Plan((), depth=(*map(Remove, first), Remove(last, site.removal or "entry")))
    for site in some([one for one in sites if one.silence is not None and one.parameters]):
        zero = tuple(one.removeprefix(f"{site.name}.") for one in site.silence or ())
        yield "copy as nothing", Plan((), depth=(Insert(site.name, CopyOf(site.name, zero)),))
    for site in some([one for one in sites if one.copyable and one.parameters]):
        yield "copy", Plan((), depth=(Insert(site.name, CopyOf(site.name)),))
    for before in (False, True):
        for site in some([one for one in sites if (one.insert_before if before else one.insert_after)]):
            try:
                layer = default_layer(structure.topology, site.name, before=before)
            except PlanError:
                continue  # nothing there is known to be features
            yield "insert", Plan((), depth=(Insert(site.name, layer, before=before),))
    for site in some([one for one in sites if one.factorisable]):
        yield "factorise", Plan((), depth=(Replace(site.name, Factorised(4)),))


def examined(name: str, most: int) -> dict[str, Any]:
    model, example = built(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    step(model, optimizer, example)
    begin = time.perf_counter()
    structure = esp.attach(model, example if isinstance(example, dict) else tuple(example), optimizer=optimizer)
    sites = structure.sites()
    seconds = time.perf_counter() - begin
    found: dict[str, Any] = {
        "model": name, "sites": len(sites), "cells": sum(one.kind == "cell" for one in sites),
        "something may be done": sum(bool(one.may) for one in sites), "attach and sites (s)": round(seconds, 2),
    }  # fmt: skip
    before, times = both(model, example), []
    kinds: Counter[str] = Counter()
    exact = worst = 0.0
    problems: list[str] = []
    for kind, plan in plans(structure, most):
        tensors = {one: (id(tensor), tensor._version) for one, tensor in model.named_parameters()}
        states = {id(one): value["momentum_buffer"].clone() for one, value in optimizer.state.items()}
        begin = time.perf_counter()
        try:
            edit = structure.apply(plan)
        except EspalierError as problem:
            problems.append(f"{plan}: {str(problem)[:300]}")
            continue
        times.append(time.perf_counter() - begin)
        kinds[kind] += 1
        after = both(model, example)
        if edit.contract == "exact":
            exact += 1
            worst = max(worst, error(before, after))
        twin = copy.deepcopy(model)
        step(twin, torch.optim.SGD(twin.parameters(), lr=1e-4), example)
        held = [id(one) for group in optimizer.param_groups for one in group["params"]]
        if sorted(held) != sorted(id(one) for one in model.parameters()):
            problems.append(f"{plan}: the optimizer does not hold the parameters of the model")
        for one, value in optimizer.state.items():
            if not torch.equal(value["momentum_buffer"], states[id(one)]):
                problems.append(f"{plan}: optimizer state changed")
        structure.undo()
        if {one: (id(tensor), tensor._version) for one, tensor in model.named_parameters()} != tensors:
            problems.append(f"{plan}: undoing did not give back all parameters")
    if error(before, both(model, example)):
        problems.append("after undoing everything the outputs differ")
    found |= {
        "edits": dict(kinds), "exact": int(exact), "worst error": worst,
        "median edit (s)": round(statistics.median(times), 2),
        "saved and loaded": saved(name, structure, optimizer, example, most), "problems": problems,
    }  # fmt: skip
    return found


def saved(name: str, structure: Structure, optimizer: torch.optim.Optimizer, example: Example, most: int) -> str:
    """Several edits, training steps between them, a checkpoint, and the same network again."""
    model, done = structure.model, 0
    every = [plan for _, plan in plans(structure, most)]
    for plan in random.Random(1).sample(every, min(8, len(every))):
        try:
            structure.apply(plan)
        except EspalierError:
            continue  # an earlier one took what this is about
        model.train()
        step(model, optimizer, example)
        done += 1
    with tempfile.TemporaryDirectory() as folder:
        esp.save(structure, folder)
        other, example_of_other = built(name)
        optimizer_of_other = torch.optim.SGD(other.parameters(), lr=1e-4, momentum=0.9)
        esp.load(folder, other, example_of_other, optimizer=optimizer_of_other)
    for _ in range(2):
        if error(both(model, example), both(other, example)):
            return f"after {done} edits outputs differ"
        for one, two in ((model, optimizer), (other, optimizer_of_other)):
            one.train()
            step(one, two, example)
    return f"{done} edits"


def table(path: Path) -> str:
    """The findings in a file as Markdown."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["edits"]))
    head = ("network", "sites", "cells", *kinds, "exact", "worst error", "saved and loaded", "median edit", "problems")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        done = [str(row["edits"].get(kind, "")) for kind in kinds]
        found = [row["exact"], f"{row['worst error']:.0e}", row["saved and loaded"], f"{row['median edit (s)']} s"]
        cells = [row["model"], row["sites"], row["cells"], *done, *found, len(row["problems"])]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=MODELS, help="some of the networks")
    parser.add_argument("--most", type=int, default=6, help="sites of each kind")
    parser.add_argument("--out", type=Path, help="where findings are added, a line per network")
    parser.add_argument("--table", type=Path, help="only show the findings in a file as Markdown")
    options = parser.parse_args()
    if options.table is not None:
        print(table(options.table))
        return
    torchvision_importable()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for name in options.only:
        found = {"commit": commit, **examined(name, options.most)}
        print(json.dumps(found), flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
