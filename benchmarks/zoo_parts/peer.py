"""What torch-pruning makes of one model: its graph, 30% of every group, a forward pass. In a process of its own."""

from __future__ import annotations

import resource
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from oracles import call
from torch import Tensor, nn
from zoo_parts.prepare import built
from zoo_parts.record import Record

from espalier.graph.trees import flatten_tensors

PRUNED = 0.3
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def check_peer(name: str, path: Path, memory_gib: int) -> None:
    """Let torch-pruning try; the findings are in `path`.

    Args:
        memory_gib: address space that the process may take; index lists of millions of entries would take it all.
    """
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (memory_gib << 30, memory_gib << 30))
    record = Record(name, path)
    with record.step("build"):
        model, example = built(name)
        import torch_pruning as tp
    if not record.passed("build"):
        return
    outputs = list(output_layers(model, example))
    if isinstance(example, tuple) and len(example) == 1:
        example = example[0]
    warnings.simplefilter("ignore")
    with record.step("attach"):
        pruner = tp.pruner.MagnitudePruner(
            model, example, importance=tp.importance.MagnitudeImportance(), pruning_ratio=PRUNED, ignored_layers=outputs
        )
    if record.passed("attach"):
        with record.step("prune") as entry:
            before = sum(one.numel() for one in model.parameters())
            pruner.step()
            entry["left"] = sum(one.numel() for one in model.parameters()) / before
    if record.passed("attach", "prune"):
        with record.step("forward after prune"), torch.no_grad():
            call(model, example)
    record.found["finished"] = True
    record.write()


def output_layers(model: nn.Module, example: Any) -> Iterator[nn.Module]:
    """The layers whose results are, or are only reshaped and interpolated to, outputs of the model.

    That is: for every output the last layer called whose number of output features is a size of that output.
    """
    called: list[tuple[nn.Module, int]] = []

    def note(module: nn.Module, _: Any, result: Tensor) -> None:
        called.append((module, result.shape[-1 if isinstance(module, nn.Linear) else 1]))

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, LAYERS)]
    with torch.no_grad():
        result = call(model, example)
    for hook in hooks:
        hook.remove()
    for _, tensor in flatten_tensors(result, "output"):
        matching = [module for module, features in called if features in tensor.shape[1:]]
        yield from matching[-1:]
