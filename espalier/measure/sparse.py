"""Whether masks save time at inference: linear layers in a sparse form, where that is measured to be faster.

A masked weight is multiplied like any other, so masks by themselves save nothing. On a CPU, a matrix of which nine
tenths and more are zero can be faster in compressed rows, for many inputs at once sooner than for one. On a GPU two of
every four weights are what kernels know, for which masks of the pattern ``NM(2, 4)`` are made. Which it is depends on
sizes, on the machine and on how many inputs come at once: so it is measured, and what does not pay stays dense.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.graph.trees import call_arguments
from espalier.measure.sparse_forms import DEVICES, Form, made, problem
from espalier.measure.stats import without_a_trace
from espalier.table import text_table


@dataclass(frozen=True)
class SparseWeight:
    """What became of a masked parameter in a copy for inference."""

    name: str
    sparsity: float
    """The part of it that is zero."""
    form: Form | None
    """The form that it has there; None: it is dense as before."""
    times: float | None
    """How many times faster its layer is in a sparse form, whether it has it or not; None: that could not be tried."""
    why_dense: str
    """Why it has none, in words that follow its name."""


@dataclass(frozen=True, eq=False)
class SparseCopy:
    """A copy of a network for inference, and what was measured."""

    model: nn.Module
    """In eval mode. It computes the same up to rounding, cannot be trained and is no model to attach to."""
    weights: tuple[SparseWeight, ...]
    """All masked parameters."""
    seconds: float
    """One forward of it on the example inputs."""
    dense_seconds: float
    """The same of a dense copy."""

    @property
    def faster(self) -> dict[str, float]:
        """Parameters in a sparse form -> how many times faster their layers are."""
        return {one.name: one.times for one in self.weights if one.form is not None and one.times is not None}

    def __str__(self) -> str:
        rows = [
            (
                one.name, f"{one.sparsity:.1%}", one.form or "dense",
                "-" if one.times is None else f"{one.times:.2f}", one.why_dense,
            )
            for one in self.weights
        ]  # fmt: skip
        lines = text_table(("parameter", "zeros", "form", "times faster", "why dense"), rows, right=(1, 3))
        if self.faster:
            ratio = self.dense_seconds / self.seconds
            times = f"{1e3 * self.seconds:.3g} ms, {1e3 * self.dense_seconds:.3g} ms dense: {ratio:.2f} times faster"
            return "\n".join([*lines, f"the whole network: {times}"])
        return "\n".join([*lines, "masks save no time here: no layer is faster in a sparse form"])


def sparse_copy(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    example: Any,
    *,
    form: Form | None = None,
    least: float = 1.1,
    repeats: int = 20,
) -> SparseCopy:
    """A copy for inference, in eval mode, in which masked linear layers are sparse where that pays.

    Every plain `nn.Linear` whose weight has a mask is timed on what reaches it from the example inputs, densely and in
    the sparse form, in turns; where that computes the same and is `least` times as fast, it takes its place.

    Args:
        model: the live model; it is not changed.
        masks: `Structure.masks`.
        example: inputs of the size that inference will have, as for `attach`; times depend on it.
        form: the form to take; None (default) for what the kernels of the device know: ``compressed rows`` on a CPU,
            ``semi-structured`` on a GPU. One that is asked for is refused where a masked weight cannot have it.
        least: how many times faster a layer has to be.
        repeats: timings of each, of which the fastest counts.

    Raises:
        EspalierError: nothing is masked; no sparse kernels are known for the device; or a weight cannot have the form
            that is asked for.
    """
    if not masks:
        raise EspalierError("nothing is masked, so there is nothing that could be sparse; prune single weights first.")
    dense = copy.deepcopy(model).eval()
    for name, parameter in dense.named_parameters():
        if parameter.device.type not in DEVICES:
            raise EspalierError(
                f"{name}: expected a weight on a CPU or a GPU, found {parameter.device}; move the model."
            )
    found = copy.deepcopy(dense)
    parameters = dict(found.named_parameters())
    linears, weights = _linears(found), list[SparseWeight]()
    inputs = _inputs(found, {path: linears[path] for path in linears if f"{path}.weight" in masks}, example)
    for name in masks:
        weight, path = parameters[name].detach(), name.rpartition(".")[0]
        zeros = 1 - float(torch.count_nonzero(weight)) / max(weight.numel(), 1)
        linear = linears.get(path) if name.endswith(".weight") else None
        wanted = form or DEVICES[weight.device.type]
        why = _not_linear(dense, path) if linear is None else problem(wanted, weight, _capability(weight.device))
        if why and form is not None:
            raise EspalierError(f"{form}: {name} {why}.")
        if not why and path not in inputs:
            why = "is not read for these inputs"
        if why or linear is None:
            weights.append(SparseWeight(name, zeros, None, None, why))
            continue
        sparse, times, why = _tried(wanted, linear, inputs[path], repeats)
        if sparse is not None and not why and times is not None and times < least:
            why = f"has to be {least:g} times as fast"
        if sparse is not None and not why:
            parent, _, key = path.rpartition(".")
            setattr(found.get_submodule(parent), key, sparse)
        weights.append(SparseWeight(name, zeros, None if why else wanted, times, why))
    if all(one.form is None for one in weights):
        seconds = _seconds([_forward(dense, example)], repeats)[0]
        return SparseCopy(found, tuple(weights), seconds, seconds)
    of_copy, of_dense = _seconds([_forward(found, example), _forward(dense, example)], repeats)
    return SparseCopy(found, tuple(weights), of_copy, of_dense)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain linear layers, which nothing but their weight and bias makes what they are."""
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks and path
    }


def _not_linear(model: nn.Module, path: str) -> str:
    module = model.get_submodule(path)
    if not path:
        return "belongs to the model itself, in which nothing can be replaced"
    if type(module) is nn.Linear:
        return "is not the weight of its layer, or its layer has hooks"
    return f"belongs to a {type(module).__name__}; sparse kernels are for plain linear layers"


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _tried(
    form: Form, linear: nn.Linear, given: Tensor, repeats: int
) -> tuple[nn.Module | None, float | None, str]:  # fmt: skip
    """The layer in a sparse form, how many times faster it is, and why it cannot be taken."""
    try:
        sparse = made(form, linear)
        with torch.no_grad():
            wanted, got = linear(given).double(), sparse(given).double()
    except (RuntimeError, NotImplementedError) as error:
        return None, None, f"is refused by torch: {str(error).splitlines()[0]}"
    rounding = 32 * torch.finfo(given.dtype).eps
    if not bool((got - wanted).norm() <= rounding * wanted.norm()):
        return None, None, "would make something else in a sparse form"
    fast, slow = _seconds([lambda: sparse(given), lambda: linear(given)], repeats)
    return sparse, slow / fast, ""


def _inputs(model: nn.Module, linears: Mapping[str, nn.Module], example: Any) -> dict[str, Tensor]:
    """What reaches each module."""
    inputs: dict[str, Tensor] = {}

    def seen(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[path] = (*args, *kwargs.values())[0].detach()

        return hook

    hooks = [module.register_forward_pre_hook(seen(path), with_kwargs=True) for path, module in linears.items()]
    try:
        with without_a_trace(model):
            _forward(model, example)()
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _forward(model: nn.Module, example: Any) -> Callable[[], object]:
    args, kwargs = call_arguments(example)
    return lambda: model(*args, **kwargs)


def _seconds(forwards: list[Callable[[], object]], repeats: int) -> list[float]:
    """The shortest time of each, taken in turns after one that does not count."""
    best = [float("inf")] * len(forwards)
    with torch.no_grad():
        for turn in range(max(1, repeats) + 1):
            for number, forward in enumerate(forwards):
                _finish()
                start = time.perf_counter()
                forward()
                _finish()
                if turn:
                    best[number] = min(best[number], time.perf_counter() - start)
    return best


def _finish() -> None:
    """Wait for the GPU, which runs behind."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


__all__ = ["SparseCopy", "SparseWeight", "sparse_copy"]
