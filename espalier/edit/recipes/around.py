"""What runs before and after the place of a new layer: which norm, which activation, how wide, with which kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from espalier.edit.recipes.edges import Edge
from espalier.errors import PlanError
from espalier.graph.dims import axes_of, size_of
from espalier.graph.flow import operator_name
from espalier.graph.topology import Topology
from espalier.graph.trace import Call

_LINEAR = frozenset({"mm", "addmm", "linear"})
_BATCH_NORMS = frozenset(
    """
    native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit _batch_norm_with_update
    _native_batch_norm_legit_no_training _batch_norm_no_update
    """.split()
)
_ACTIVATIONS = frozenset({"relu", "silu", "elu", "mish", "hardswish", "leaky_relu"})
"""Operators that are activations of this name; `elu` with a scale is selu."""
_OF_LAYERS = frozenset({"produce", "contract", "filter", "lookup"})
_FAR = 4
"""So many calls at most lie between the square and the root of a norm that is written out."""


@dataclass(frozen=True)
class Branch:
    """The inside of a residual branch."""

    hidden: int
    kernel: tuple[int, ...] | None
    """None for linear layers."""


@dataclass(frozen=True)
class _Layer:
    out: int
    into: int
    kernel: tuple[int, ...]
    """Empty for a linear layer."""
    places: int
    """How many times it gives its features."""


class Around:
    """What runs before and after an edge.

    Attributes:
        features_first: whether features are dimension 1 of several; the last dimension otherwise.
        features: how many there are.
    """

    def __init__(self, topology: Topology, found: Edge) -> None:
        self._edge = found
        self._sizes = topology.sizes
        self._prediction = found.prediction
        calls = [call for call in found.prediction.calls if not self._of_weights(call)]
        self._before = [call for call in reversed(calls) if call.index < found.call]
        self._after = [call for call in calls if call.index >= found.call]
        self.features_first = self._features_first(_features(topology, found))
        self.features = found.shape[1 if self.features_first else -1]

    def _features_first(self, varying: tuple[int, ...]) -> bool:
        """Whether features are dimension 1 of several places; the last dimension otherwise."""
        shape = self._edge.shape
        last = len(shape) - 1
        if len(varying) > 1:
            # Tokens that layers mix are features too: the next layer tells which of both it takes for its own.
            nearest = next((operator_name(call) for call in self._nearest() if self._is_layer(call)), "")
            varying = tuple(one for one in varying if one == (1 if nearest == "convolution" else last))
        if varying == (1,) and 2 < len(shape) < 6:
            return True
        if varying == (last,) and last > 0:
            return False
        raise PlanError(
            f"{self._edge}: expected values whose features are dimension 1 or the last one, found {list(shape)} with "
            f"{f'features in dimensions {list(varying)}' if varying else 'no features that are known'}; give the layer."
        )

    def _of_weights(self, call: Call) -> bool:
        """Whether a call has nothing to do with data: weights are normalised there."""
        return any(out is not None and out.index in self._prediction.flow.of_weights for out in call.outputs)

    def _nearest(self) -> Iterator[Call]:
        """Calls by their distance from the edge, those before it first where they are as near."""
        yield from sorted((*self._before, *self._after), key=lambda call: abs(call.index + 0.5 - self._edge.call))

    def _layer(self, call: Call) -> _Layer | None:
        """What a call does if it multiplies each place with all of a weight, and gives as many places."""
        arguments, name = call.arguments(), operator_name(call)
        out = call.outputs[0] if call.outputs else None
        if name == "convolution":
            weight = arguments["weight"]
            if arguments["groups"] != 1 or arguments["transposed"]:
                return None
        elif name in _LINEAR:
            weight = arguments["weight" if name == "linear" else "mat2"]
        else:
            return None
        if out is None or weight.index not in self._prediction.flow.of_weights:
            return None
        shape = self._shape(weight.index)
        if name in ("mm", "addmm"):
            shape = shape[::-1]
        places = math.prod(self._shape(out.index)) // shape[0]
        return _Layer(shape[0], shape[1], shape[2:], places)

    def _is_layer(self, call: Call) -> bool:
        return operator_name(call) == "convolution" or self._layer(call) is not None

    def _shape(self, value: int) -> tuple[int, ...]:
        return tuple(size_of(dim, self._sizes) for dim in self._prediction.dims[value])

    def kernel(self) -> tuple[int, ...] | None:
        """That of the nearest convolution that looks around and keeps the size; 3 everywhere if there is none."""
        if not self.features_first:
            return None
        dimensions = len(self._edge.shape) - 2
        for call in self._nearest():
            layer = self._layer(call)
            if layer is None or len(layer.kernel) != dimensions or set(call.arguments()["stride"]) != {1}:
                continue
            if max(layer.kernel) > 1 and all(size % 2 for size in layer.kernel):
                return layer.kernel
        return (3,) * dimensions

    def branch(self) -> Branch:
        """The nearest one that leads back to the width of the edge, in the same places; else one of this width."""
        places = math.prod(self._edge.shape) // self.features
        for calls, inward in ((self._before, True), (self._after, False)):
            layers = [layer for call in calls if (layer := self._layer(call)) and layer.places == places][:3]
            if not inward:
                layers = [replace(layer, out=layer.into, into=layer.out) for layer in layers]
            if not layers or layers[0].out != self.features or layers[0].into == self.features:
                continue
            inside = layers[0].into
            last = next((n for n, one in enumerate(layers) if (one.out, one.into) == (inside, self.features)), None)
            if last is not None:
                return Branch(inside, self._widest([layer.kernel for layer in layers[: last + 1]]))
        return Branch(self.features, self.kernel())

    def _widest(self, kernels: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
        """The largest of some kernels; linear layers have 1."""
        if not self.features_first:
            return None
        dimensions = len(self._edge.shape) - 2
        odd = [one for one in kernels if len(one) == dimensions and all(size % 2 for size in one)]
        return tuple(map(max, zip((1,) * dimensions, *odd, strict=True)))

    def norm(self, kernel: tuple[int, ...] | None) -> tuple[str | None, int, float]:
        """Kind, groups and eps of the nearest norm between the layer before the edge and the second one after it."""
        near = [*_until(self._before, self._is_layer, 1), *_until(self._after, self._is_layer, 2)]
        near.sort(key=lambda call: abs(call.index + 0.5 - self._edge.call))
        for call in near:
            found = self._norm_of(call)
            if found is not None:
                return self._fitting(*found, kernel)
        return None, 1, 1e-5

    def _norm_of(self, call: Call) -> tuple[str, int, float] | None:
        name, arguments = operator_name(call), call.arguments()
        if name in _BATCH_NORMS:
            return "batch", 1, float(arguments.get("eps", arguments.get("epsilon", 1e-5)))
        if name == "native_layer_norm":
            return "layer", 1, float(arguments["eps"])
        if name == "native_group_norm":
            return "group", int(arguments["group"]), float(arguments["eps"])
        if name == "_fused_rms_norm":
            return "rms", 1, 1e-6 if arguments["eps"] is None else float(arguments["eps"])
        calls = self._prediction.calls[max(call.index - _FAR, 0) : call.index]
        if name == "rsqrt" and {"pow", "mean"} <= {operator_name(one) for one in calls}:
            added = [one.args[1] for one in calls if operator_name(one) == "add" and isinstance(one.args[1], float)]
            return "rms", 1, added[-1] if added else 1e-6
        return None

    def _fitting(
        self, norm: str, groups: int, eps: float, kernel: tuple[int, ...] | None
    ) -> tuple[str | None, int, float]:
        """The nearest thing to a norm of the neighbours that goes with the layer."""
        if kernel is not None:
            if norm in ("layer", "rms"):
                return "group", 1, eps
            return norm, groups if norm == "group" and self.features % groups == 0 else 1, eps
        if norm == "group" or (norm == "batch" and len(self._edge.shape) != 2):
            return "layer", 1, eps
        return norm, 1, eps

    def activation(self) -> str:
        """The nearest one; relu if there is none."""
        for call in self._nearest():
            name = self._activation_of(call)
            if name is not None:
                return name
        return "relu"

    def _activation_of(self, call: Call) -> str | None:
        name, arguments = operator_name(call), call.arguments()
        if name == "gelu":
            return "gelu_tanh" if arguments["approximate"] == "tanh" else "gelu"
        if name == "hardtanh":
            bounds = float(arguments["min_val"]), float(arguments["max_val"])
            return {(0.0, 6.0): "relu6", (-1.0, 1.0): "hardtanh"}.get(bounds)
        if name == "tanh":
            calls = self._prediction.calls[max(call.index - _FAR, 0) : call.index]
            cubes = [one for one in calls if operator_name(one) == "pow" and one.args[1] == 3]
            return "gelu_tanh" if cubes else None
        if name == "elu":
            return "elu" if arguments["scale"] == 1 else "selu"
        return name if name in _ACTIVATIONS else None


def _features(topology: Topology, found: Edge) -> tuple[int, ...]:
    """The dimensions of an edge whose axes layers make or sum over; those of positions are only added to."""
    dims = found.prediction.dims[found.value]
    axes = [[topology.axes[axis] for axis in axes_of(dim) if axis in topology.axes] for dim in dims]
    made = [any(role in _OF_LAYERS for one in inside for _, _, role in one.slots) for inside in axes]
    return tuple(position for position, one in enumerate(made) if one)


def _until(calls: list[Call], stop: Callable[[Call], bool], count: int) -> Iterator[Call]:
    """The calls before the one that is the `count`-th to stop."""
    for call in calls:
        count -= stop(call)
        if count == 0:
            return
        yield call


__all__ = ["Around", "Branch"]
