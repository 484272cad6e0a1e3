"""Gates that every sample draws for itself: they multiply activations where these are read, not the readers.

With gates of their own in every sample the gradient by the logits is a mean over as many draws as a batch has samples,
each with the loss of its sample. Its variance is lower as far as a gate means the same to all samples (by their number
where they are alike; not at all where what it means to one says nothing of the others), and every sample trains another
sub-network. The price is a product per activation, and that no unit can be left out of a step.

While the loss is evaluated, calls of linear and convolutional layers are told by the weights that they are handed, and
what they read is multiplied first. That all readers are met as often as when the network was read, that samples lie
along the first dimension there, and that no loss depends on the gates of another sample, is looked at and not assumed:
the last once after every edit, in eval mode, by gradients. Batch norms in train mode do mix samples; the estimate then
leaves out what the gates of a sample do to the losses of others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from espalier.errors import MethodError
from espalier.graph.flow import operator_name
from espalier.graph.named_tensors import TensorTable, tensor_table
from espalier.graph.topology import Topology
from espalier.graph.trees import flatten_tensors
from espalier.measure.stats import without_a_trace
from espalier.parts.gates.kinds import Rows
from espalier.parts.gates.places import GatePlace
from espalier.parts.units.scales import Place
from espalier.structure import Structure

_LINEAR = frozenset({F.linear})
_CONVOLUTIONS = frozenset({F.conv1d, F.conv2d, F.conv3d})
_TRANSPOSED = frozenset({F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d})
_SMALL = 1e-6
"""Relative size up to which a derivative counts as zero."""


@dataclass(frozen=True, eq=False)
class _Reader:
    """A weight that reads units with gates along one of its dimensions."""

    name: str
    dim: int
    units: tuple[tuple[str, Tensor], ...]
    """Key of gates -> for every position along the dimension the gate of its unit, -1 for none."""

    def factor(self, gates: Rows) -> Tensor | None:
        """What activations are multiplied by: shape (samples, positions); None if they stay as they are."""
        found = None
        for key, units in self.units:
            if key in gates:
                z = torch.cat([gates[key], gates[key].new_ones(len(gates[key]), 1)], dim=1)
                one = z[:, units.to(z.device)]
                found = one if found is None else found * one
        return found


class BySample:
    """Evaluates losses, one per sample, under gates that differ between samples; to be made anew after every edit.

    Args:
        structure: of the live network.
        places: those of axes of which `sample_problem` knows nothing bad.
    """

    def __init__(self, structure: Structure, places: Iterable[GatePlace]) -> None:
        self.model = structure.model
        places = tuple(places)
        self._table = tensor_table(structure.model)
        self._sizes = {place.key: place.count for place in places}
        self._readers = _readers(places)
        self._uses = _uses(structure.topology, [name for name, _ in self._readers])
        self._trusted = False

    def losses(self, forward: Callable[[], Tensor], gates: Rows, samples: int) -> Tensor:
        """The losses at these gates, of shape (samples, gates) for every key: shape (samples,).

        Raises:
            MethodError: the loss is not one per sample, or a reader is not met, or not as it has to be.
        """
        if not self._trusted:
            self._try_out(forward, samples)
            self._trusted = True
        return self._evaluated(forward, gates, samples)

    def _evaluated(self, forward: Callable[[], Tensor], gates: Rows, samples: int) -> Tensor:
        if any(one.dim() != 2 for one in gates.values()):
            raise MethodError("per_sample: this kind of gates is drawn for a batch; use Bernoulli gates.")
        moved = {key: z for key, z in gates.items() if z.requires_grad or not bool((z == 1).all())}
        with self._applied(moved, samples):
            found = forward()
        if tuple(found.shape) != (samples,):
            raise MethodError(
                f"per_sample: expected one loss per sample, shape ({samples},), found {tuple(found.shape)}: have the "
                "loss function return them without taking the mean."
            )
        return found

    @contextmanager
    def _applied(self, gates: Rows, samples: int) -> Iterator[None]:
        mode = _Multiplying(self._table, self._readers, gates, samples)
        with mode:
            yield
        for name, uses in self._uses.items():
            if mode.met[name] not in uses:
                raise MethodError(
                    f"per_sample: {name} reads units with gates {' or '.join(map(str, sorted(uses)))} times, of which "
                    f"{mode.met[name]} were linear or convolutional layers with this weight: others cannot be told. "
                    "Leave its axis out of axes=."
                )

    def _try_out(self, forward: Callable[[], Tensor], samples: int) -> None:
        """Raise MethodError if a loss depends on gates of another sample, in eval mode."""
        gates = {key: torch.full((samples, size), 0.5, requires_grad=True) for key, size in self._sizes.items()}
        with without_a_trace(self.model), torch.enable_grad():
            for module in self.model.modules():
                module.training = False
            losses = self._evaluated(forward, gates, samples)
            for sample in {0, samples - 1}:
                slopes = torch.autograd.grad(losses[sample], list(gates.values()), retain_graph=True, allow_unused=True)
                for key, slope in zip(gates, slopes, strict=True):
                    sizes = torch.zeros(samples) if slope is None else slope.abs().amax(1)
                    others = torch.arange(samples) != sample
                    if bool((sizes[others] > _SMALL * sizes.max()).any()):
                        raise MethodError(
                            f"per_sample: the loss of sample {sample} depends on gates of other samples in {key}: "
                            "samples have to lie along the first dimension everywhere, and each loss has to be that of "
                            "its own sample. Leave the axis out of axes=, or let gates be shared by the batch."
                        )


@dataclass(frozen=True)
class SampleEvaluation:
    """The training losses at gates of every sample."""

    by_sample: BySample
    forward: Callable[[], Tensor]
    samples: int

    def __call__(self, gates: Rows, /) -> Tensor:
        return self.by_sample.losses(self.forward, gates, self.samples)

    def aside(self, gates: Rows, /) -> Tensor:
        with without_a_trace(self.by_sample.model):
            return self.by_sample.losses(self.forward, gates, self.samples).detach()


def sample_problem(structure: Structure, place: GatePlace) -> str | None:
    """Why gates of a place cannot differ from sample to sample; None if nothing is known."""
    topology = structure.topology
    if place.norms:
        return "a norm runs over it, whose statistics a batch shares"
    slots = {slot[:2]: slot[2] for slot in topology.by_name[place.key].slots if slot[2] == "contract"}
    for one in place.multiplied:
        if not isinstance(one, Place) or (one.tensor, one.dim) not in slots:
            return f"its gates act on {one.tensor}, which does not read activations of its units"
        for prediction in topology.predictions:
            for call, operands in zip(prediction.calls, prediction.flow.operands, strict=True):
                if any(prediction.flow.names.get(ref.index) == one.tensor for ref in operands):
                    why = _refused(operator_name(call), call.arguments(), one)
                    if why is not None:
                        return why
    return None


def _refused(operator: str, arguments: Mapping[str, Any], place: Place) -> str | None:
    """Why what a call reads cannot be multiplied; None if it can."""
    if operator == "convolution":
        if arguments["groups"] != 1:
            return f"{place.tensor} reads it in groups"
        return None if place.dim == (0 if arguments["transposed"] else 1) else f"{place.tensor} is no reader of it"
    return None if operator == "t" and place.dim == 1 else f"{place.tensor} is read by {operator}, not by a layer"


def samples_of(batch: Any) -> int:
    """How many samples a batch has: the first size of its tensors. Raises MethodError if they do not agree."""
    sizes = {tensor.shape[0] for _, tensor in flatten_tensors(batch, "") if tensor.dim()}
    if len(sizes) != 1:
        raise MethodError(
            f"per_sample: expected tensors of one first size in a batch, found {sorted(sizes) or 'none'}."
        )
    return int(next(iter(sizes)))


def _readers(places: Iterable[GatePlace]) -> dict[tuple[str, int], _Reader]:
    found: dict[tuple[str, int], _Reader] = {}
    for place in places:
        for one in place.multiplied:
            assert isinstance(one, Place)
            known = found.get((one.tensor, one.dim))
            units = (*(known.units if known else ()), (place.key, one.units))
            found[one.tensor, one.dim] = _Reader(one.tensor, one.dim, units)
    return found


def _uses(topology: Topology, names: Iterable[str]) -> dict[str, set[int]]:
    """Reader -> how often a pass uses it; one number for every way in which the network was read."""
    wanted = set(names)
    found: dict[str, set[int]] = {name: set() for name in wanted}
    for prediction in topology.predictions:
        counts: Counter[str] = Counter()
        for operands in prediction.flow.operands:
            counts.update(name for ref in operands if (name := prediction.flow.names.get(ref.index)) in wanted)
        for name in wanted:
            found[name].add(counts[name])
    return found


class _Multiplying(TorchFunctionMode):
    """Multiplies what readers read."""

    def __init__(
        self, table: TensorTable, readers: Mapping[tuple[str, int], _Reader], gates: Rows, samples: int
    ) -> None:
        super().__init__()
        self.met: Counter[str] = Counter()
        """Reader -> how often it was met."""
        self._readers = {id(table.tensors[one.name]): one for one in readers.values()}
        self._factors = {key: one.factor(gates) for key, one in self._readers.items()}
        self._samples = samples

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        layer = func in _LINEAR or func in _CONVOLUTIONS or func in _TRANSPOSED
        if not layer:
            return func(*args, **kwargs)
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        reader = self._readers.get(id(weight))
        if reader is None:
            return func(*args, **kwargs)
        self.met[reader.name] += 1
        factor = self._factors[id(weight)]
        if factor is None:
            return func(*args, **kwargs)
        inputs = args[0] if args else kwargs["input"]
        gated = self._gated(reader, inputs, factor, last=func in _LINEAR)
        return func(gated, *args[1:], **kwargs) if args else func(**{**kwargs, "input": gated})

    def _gated(self, reader: _Reader, inputs: Tensor, factor: Tensor, *, last: bool) -> Tensor:
        dim = inputs.dim() - 1 if last else 1
        if inputs.dim() < 2 or inputs.shape[0] != self._samples or inputs.shape[dim] != factor.shape[1]:
            raise MethodError(
                f"per_sample: {reader.name} reads activations of shape {tuple(inputs.shape)}; expected {self._samples} "
                f"samples along the first dimension and {factor.shape[1]} units along dimension {dim}. Leave its axis "
                "out of axes=, or let gates be shared by the batch."
            )
        shape = [self._samples if one == 0 else factor.shape[1] if one == dim else 1 for one in range(inputs.dim())]
        return inputs * factor.to(inputs).view(shape)


__all__ = ["BySample", "SampleEvaluation", "sample_problem", "samples_of"]
