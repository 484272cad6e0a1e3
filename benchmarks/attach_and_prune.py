"""ResNet-50 at 224x224: what it costs to read the network and to prune half of every axis.

    python benchmarks/attach_and_prune.py

Prints, as ratios within one run: `attach` against one forward pass on fake tensors, and pruning half of every axis
against copying the parameters once; beside them the same by torch-pruning, if it is installed (the extra `bench`).
"""

from __future__ import annotations

import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import espalier as esp

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from resnet import ResNet50

REPEATS = 7


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def fake_forward(model: nn.Module, example: Tensor) -> float:
    """Seconds of one eval-mode forward pass on fake tensors, without making the fakes."""
    with torch.no_grad(), FakeTensorMode():
        tensors = dict((*model.named_parameters(), *model.named_buffers()))
        fakes = {name: torch.empty(one.shape, dtype=one.dtype) for name, one in tensors.items()}
        inputs = torch.empty(example.shape)
        return timed(lambda: torch.func.functional_call(model.eval(), fakes, (inputs,)))


def espalier_prune(example: Tensor) -> tuple[float, float, int]:
    model = ResNet50()
    structure = esp.attach(model, example)
    units = {axis.name: range(0, axis.size, 2) for axis in structure.axes.values() if axis.prunable}
    copy = timed(lambda: [parameter.detach().clone() for parameter in model.parameters()])
    seconds = timed(lambda: structure.prune(units))
    return seconds, copy, structure.cost().parameters


def torch_pruning(example: Tensor) -> tuple[float, float, int]:
    import torch_pruning as tp

    model = ResNet50().eval()
    start = time.perf_counter()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
    attach = time.perf_counter() - start
    pruner = tp.pruner.BasePruner(
        model, example, importance=tp.importance.RandomImportance(), pruning_ratio=0.5, ignored_layers=[model.fc]
    )
    seconds = timed(pruner.step)
    del graph
    return attach, seconds, sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    torch.set_num_threads(1)
    example = torch.zeros(1, 3, 224, 224)
    model = ResNet50()
    fake_forward(model, example)
    esp.attach(model, example)
    fakes = [fake_forward(model, example) for _ in range(REPEATS)]
    attaches = [timed(lambda: esp.attach(model, example)) for _ in range(REPEATS)]
    fake, attach = statistics.median(fakes), statistics.median(attaches)
    runs = [espalier_prune(example) for _ in range(REPEATS)]
    prune, copy = (statistics.median(column) for column in list(zip(*runs, strict=True))[:2])
    first = runs[0][0]
    print(f"torch {torch.__version__}, {platform.machine()}, 1 thread, median of {REPEATS}")
    print(f"forward on fake tensors        {fake * 1e3:8.1f} ms")
    print(f"attach                         {attach * 1e3:8.1f} ms   {attach / fake:.2f} of it (at most 4)")
    print(f"copy of all parameters         {copy * 1e3:8.1f} ms")
    limit = 3 * copy + 0.2
    print(
        f"prune half of every axis       {prune * 1e3:8.1f} ms   first {first * 1e3:.1f} ms (at most {limit * 1e3:.1f})"
    )
    print(f"parameters after               {runs[0][2]:,}")
    if importlib.util.find_spec("torch_pruning") is None:
        print("torch-pruning is not installed: pip install -c constraints.txt -e '.[bench]'")
        return
    peers = [torch_pruning(example) for _ in range(3)]
    theirs = [statistics.median(column) for column in zip(*peers, strict=True)]
    print(f"torch-pruning: build graph     {theirs[0] * 1e3:8.1f} ms   {theirs[0] / attach:.1f} of attach")
    print(
        f"torch-pruning: prune by half   {theirs[1] * 1e3:8.1f} ms   {theirs[1] / prune:.1f} of prune (graph included)"
    )
    print(f"parameters after               {int(theirs[2]):,}")


if __name__ == "__main__":
    main()
