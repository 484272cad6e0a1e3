"""Activations of the units of axes as their readers see them, and how many directions they fill.

The model runs on real values, and the operators that multiply with weights are matched one by one with the recorded
ones. So an activation is found wherever the code computes it, and not by the names of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.errors import CaptureError
from espalier.graph.dims import axes_of, labels, size_of
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.trees import flatten_tensors
from espalier.measure.stats import without_a_trace

Place = tuple[int, int, int]
"""(number of the call, which of its tensors, dimension of that)."""


def grams(
    model: nn.Module, topology: Topology, axes: Iterable[str], forwards: Sequence[Callable[[], object]]
) -> dict[str, Tensor]:
    """Axis -> A'A / n of its activations A in eval mode, n samples (and positions) by units: a (units, units) matrix.

    An activation is what the first operator reads that multiplies the axis with weights; in double precision on the
    CPU. Leaves no trace in the model.

    Args:
        model: the live model.
        topology: what is known of it at its present sizes.
        axes: by name.
        forwards: each runs the model on one batch.

    Raises:
        CaptureError: an axis is read by no weights, or the model runs other operators on these batches than on the
            example inputs.
    """
    found: dict[str, tuple[Tensor, int]] = {}

    def add(name: str, seen: Tensor) -> None:
        rows = seen.double().cpu().flatten(0, -2)
        known, count = found.get(name, (torch.zeros(()), 0))
        found[name] = known + rows.T @ rows, count + len(rows)

    _collect(model, topology, axes, forwards, add)
    return {name: total / count for name, (total, count) in found.items()}


def activations(
    model: nn.Module, topology: Topology, axes: Iterable[str], forwards: Sequence[Callable[[], object]]
) -> dict[str, list[Tensor]]:
    """Axis -> for every forward its activations, as `grams` sees them: (other dimensions in order..., places, units).

    `places` is how many of them each unit has along its dimension, mostly 1. Arguments and errors are those of `grams`;
    on the device and in the precision of the model.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in axes}
    _collect(model, topology, found, forwards, lambda name, seen: found[name].append(seen.clone()))
    return found


def _collect(
    model: nn.Module,
    topology: Topology,
    axes: Iterable[str],
    forwards: Sequence[Callable[[], object]],
    take: Callable[[str, Tensor], None],
) -> None:
    """Show the activations of every axis, (..., places, units), as they come."""
    prediction = topology.predictions[0]
    places = {name: _read_at(prediction, topology.by_name[name].number, name) for name in axes}

    def seen(name: str, tensor: Tensor) -> None:
        number, (call, operand, dim) = topology.by_name[name].number, places[name]
        ref = prediction.flow.operands[call][operand]
        expected = prediction.dims[ref.index][dim]
        if tensor.shape[dim] != size_of(expected, topology.sizes):
            raise CaptureError(
                f"{name}: expected {size_of(expected, topology.sizes)} activations, found {tensor.shape[dim]}: batches "
                "and samples cannot be told from units here; use batches of the size of the example inputs."
            )
        units = torch.from_numpy(labels(expected, topology.sizes, number))
        inside = units >= 0
        order = units[inside].argsort(stable=True)
        rows = tensor.detach().movedim(dim, -1)[..., inside][..., order]
        take(name, rows.reshape(*rows.shape[:-1], topology.sizes[number], -1).movedim(-2, -1))

    fastpath = torch.backends.mha.get_fastpath_enabled()
    with without_a_trace(model):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for module in model.modules():
                module.training = False
            for forward in forwards:
                _run(model, prediction, places, seen, forward)
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


def check_read(topology: Topology, axes: Iterable[str]) -> None:
    """Raise CaptureError if no weights read the activations of one of these axes."""
    for name in axes:
        _read_at(topology.predictions[0], topology.by_name[name].number, name)


def effective_rank(gram: Tensor) -> float:
    """How many directions activations fill, from 1 to the number of units; 0 if all are zero.

    exp of the entropy of the singular values of A, as parts of their sum (Roy & Vetterli 2007, The effective rank);
    those are the roots of the eigenvalues of A'A.
    """
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if not bool(values.sum() > 0):
        return 0.0
    parts = values / values.sum()
    return float(torch.special.entr(parts).sum().exp())


def _read_at(prediction: TracePrediction, number: int, name: str) -> Place:
    """Where an axis is first multiplied with weights and gone afterwards."""
    flow = prediction.flow
    for index in flow.touching.get(number, ()):
        call, operands = prediction.calls[index], flow.operands[index]
        outputs = [out.index for out in call.outputs if out is not None]
        if any(number in axes_of(dim) for out in outputs for dim in prediction.dims.get(out, ())):
            continue
        held = [[number in axes_of(dim) for dim in prediction.dims.get(one.index, ())] for one in operands]
        weights = [one.index in flow.of_weights for one in operands]
        if not any(any(dims) for dims, weight in zip(held, weights, strict=True) if weight):
            continue
        for position, (dims, weight) in enumerate(zip(held, weights, strict=True)):
            if any(dims) and not weight:
                return index, position, dims.index(True)
    raise CaptureError(f"{name}: no weights read its activations, so there are none to look at; leave it out of axes=.")


def _run(
    model: nn.Module,
    prediction: TracePrediction,
    places: Mapping[str, Place],
    seen: Callable[[str, Tensor], None],
    forward: Callable[[], object],
) -> None:
    watcher = _Watcher(prediction, places, seen)
    hooks = [model.register_forward_pre_hook(watcher.start), model.register_forward_hook(watcher.end)]
    try:
        with watcher:
            forward()
    finally:
        for hook in hooks:
            hook.remove()


class _Watcher(TorchDispatchMode):
    """Counts the operators that read activations along with the recorded ones, and shows what they read.

    Only operators of the kinds that are looked for are counted: what else runs (views, masks, copies) differs between
    fake and real tensors.
    """

    def __init__(
        self, prediction: TracePrediction, places: Mapping[str, Place], seen: Callable[[str, Tensor], None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen
        self._inside = False
        self._wanted: dict[tuple[Any, int], list[tuple[str, int]]] = {}
        kinds = {prediction.calls[call].op for call, _, _ in places.values()}
        self._expected = dict.fromkeys(kinds, 0)
        for call in prediction.calls:
            if call.op in kinds:
                here = [(name, operand) for name, (at, operand, _) in places.items() if at == call.index]
                self._wanted[call.op, self._expected[call.op]] = here
                self._expected[call.op] += 1
        self._counts = dict.fromkeys(kinds, 0)

    def start(self, *_: object) -> None:
        self._inside, self._counts = True, dict.fromkeys(self._expected, 0)

    def end(self, *_: object) -> None:
        self._inside = False
        for op, expected in self._expected.items():
            if self._counts[op] != expected:
                raise CaptureError(
                    f"expected {op.name()} {expected} times in a forward pass, found {self._counts[op]}: on these "
                    "batches the model takes another course than on the example inputs, so that its activations "
                    "cannot be told."
                )

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside and func in self._counts:
            wanted = self._wanted.get((func, self._counts[func]), ())
            self._counts[func] += 1
            if wanted:
                tensors = [tensor for _, tensor in flatten_tensors((args, kwargs), "")]
                for name, operand in wanted:
                    self._seen(name, tensors[operand])
        return func(*args, **kwargs)


__all__ = ["activations", "check_read", "effective_rank", "grams"]
