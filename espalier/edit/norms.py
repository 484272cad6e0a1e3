"""Finds where a network normalises across an axis: LayerNorm and RMSNorm, as operators or written by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from espalier.graph.capture import Call, Ref
from espalier.graph.dims import Leaf, axes_of
from espalier.graph.rules.registry import refs_in
from espalier.graph.topology import TracePrediction

DEFAULT_EPS: Mapping[str, float] = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""What torch takes for an RMSNorm whose eps is None."""


class NoCompensationError(Exception):
    """Growth across a norm cannot be made exact; says why."""


@dataclass(frozen=True)
class NormSite:
    """One normalisation across an axis."""

    kind: str
    """``mean`` (LayerNorm: a unit at the mean of the others is neutral) or ``zero`` (RMSNorm: a unit at zero is)."""
    source: int
    """Number of the value that is normalised."""
    result: int
    """Number of the value after normalisation, scale and shift."""
    calls: frozenset[int]
    weight: str
    bias: str | None
    eps: float | None
    """As the operator got it; None for torch's default."""
    module: str


def norm_sites(prediction: TracePrediction, number: int) -> list[NormSite]:
    """All norms across an axis in one trace.

    Raises:
        NoCompensationError: something is reduced across the axis that is no norm with a scale of its own.
    """
    return _Finder(prediction, number).find()


class _Finder:
    def __init__(self, prediction: TracePrediction, number: int) -> None:
        self._prediction = prediction
        self._number = number
        self._tensors = {index: name for name, index in prediction.tensors.items()}
        self._users: dict[int, list[Call]] = defaultdict(list)
        self._makers: dict[int, Call] = {}
        for call in prediction.calls:
            for ref in refs_in((call.args, call.kwargs)):
                self._users[ref.index].append(call)
            for out in call.outputs:
                if out is not None:
                    self._makers.setdefault(out.index, call)

    def find(self) -> list[NormSite]:
        sites = []
        for call in self._prediction.calls:
            name = call.name.removeprefix("aten::")
            if name in ("native_layer_norm", "_fused_rms_norm", "rms_norm"):
                if self._holds(call.arguments()["input"].index):
                    sites.append(self._operator(call))
            elif name == "mean" and self._holds(call.args[0].index) and not self._holds(_result(call)):
                sites.append(self._handwritten(call))
        return sites

    def _holds(self, index: int) -> bool:
        return any(self._number in axes_of(dim) for dim in self._prediction.dims[index])

    def _operator(self, call: Call) -> NormSite:
        arguments = call.arguments()
        source = arguments["input"].index
        weight, bias = (self._tensor(arguments.get(key)) for key in ("weight", "bias"))
        self._require_alone(source, len(arguments["normalized_shape"]), call)
        if weight is None:
            raise NoCompensationError(f"the norm {call.where} has no scale parameter of its own")
        kind = "mean" if "layer" in call.name else "zero"
        return NormSite(
            kind, source, _result(call), frozenset((call.index,)), weight, bias, arguments["eps"], _module(call)
        )

    def _handwritten(self, mean: Call) -> NormSite:
        """x * rsqrt(mean(x ** 2) + eps), then times a scale."""
        problem = NoCompensationError(f"the reduction {mean.where} belongs to no norm that is known")
        self._require_alone(mean.args[0].index, 1, mean)
        square = self._makers.get(mean.args[0].index)
        if square is None or not _is_square(square):
            raise problem
        shifted = self._only_user(mean, "add", problem)
        root = self._only_user(shifted, "rsqrt", problem)
        normalised = self._only_user(root, "mul", problem)
        eps = next((argument for argument in shifted.args[1:] if isinstance(argument, float)), None)
        source = square.args[0]
        if eps is None or source not in normalised.args:
            raise problem
        inside = [square, mean, shifted, root, normalised]
        weight = None
        while weight is None:
            users = self._users[_result(inside[-1])]
            if len(users) != 1:
                raise problem
            (user,) = users
            weight = next((self._tensors[ref.index] for ref in refs_in(user.args) if ref.index in self._tensors), None)
            if user.name not in ("aten::_to_copy", "aten::clone", "aten::mul") or (
                (user.name == "aten::mul") != (weight is not None)
            ):
                raise problem
            inside.append(user)
        calls = frozenset(call.index for call in inside)
        return NormSite("zero", source.index, _result(inside[-1]), calls, weight, None, eps, _module(mean))

    def _require_alone(self, source: int, count: int, call: Call) -> None:
        if count != 1 or self._prediction.dims[source][-1] != Leaf(self._number):
            raise NoCompensationError(f"the norm {call.where} runs over more than this axis")

    def _only_user(self, call: Call, name: str, problem: NoCompensationError) -> Call:
        users = [user for user in self._users[_result(call)] if user.index > call.index]
        if not users or users[0].name not in (f"aten::{name}", f"aten::{name}_"):
            raise problem
        in_place = users[0].name.endswith("_")
        if len(users) > 1 and not in_place:
            raise problem
        return users[0]

    def _tensor(self, ref: Ref | None) -> str | None:
        return None if ref is None else self._tensors.get(ref.index)


def _result(call: Call) -> int:
    assert call.outputs[0] is not None
    return call.outputs[0].index


def _module(call: Call) -> str:
    return call.modules[-1] if call.modules else ""


def _is_square(call: Call) -> bool:
    if call.name == "aten::pow":
        return bool(call.args[1] == 2)
    return call.name == "aten::mul" and call.args[0] == call.args[1]
