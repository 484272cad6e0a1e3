"""Finds where a network normalises across an axis: LayerNorm and RMSNorm, as operators or written by hand.

Norms are asked for in two ways. Where units come or go they are to be compensated, which takes a scale of their own. If
their statistics just leave units out (`statistics`), any norm is one, and any mean, variance, extreme or softmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from espalier.edit.operands import groups_of
from espalier.graph.dims import Dim, axes_of
from espalier.graph.flow import operator_name
from espalier.graph.rules.registry import positive, refs_in
from espalier.graph.topology import TracePrediction
from espalier.graph.trace import Call, Ref

DEFAULT_EPS: Mapping[str, float] = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""What torch takes for an RMSNorm whose eps is None."""


_NORMS = ("native_layer_norm", "_fused_rms_norm", "rms_norm")
REDUCED = frozenset({"mean", "var", "std", "amax", "amin", "logsumexp", "_softmax", "_log_softmax"})
"""Operators that can be evaluated over some of the units."""


class NoCompensationError(Exception):
    """Growth across a norm cannot be made exact; says why."""


@dataclass(frozen=True)
class NormSite:
    """One normalisation across an axis."""

    kind: str
    """``mean`` (LayerNorm: a unit at the mean of the others is neutral) or ``zero`` (RMSNorm: a unit at zero is); of
    `statistics` also ``group`` (a group norm within whose groups the axis is) and ``reduced`` (a mean and its like)."""
    source: int
    """Number of the value that is normalised."""
    result: int
    """Number of the value after normalisation, scale and shift."""
    calls: frozenset[int]
    normal: tuple[Dim, ...]
    """The dimensions over which it runs."""
    weight: str
    """Of `statistics`: empty where there is none, or none that is known by itself."""
    offset: float
    """The scale is the weight plus this: 1.0 where code writes ``1 + weight``."""
    bias: str | None
    eps: float | None
    """As the operator got it; None for torch's default."""
    module: str


def norm_sites(prediction: TracePrediction, number: int) -> list[NormSite]:
    """All norms across an axis in one trace.

    Raises:
        NoCompensationError: a mean runs over the axis that belongs to no norm with a scale of its own.
    """
    return _Finder(prediction, number).find()


def statistics(prediction: TracePrediction, number: int) -> list[NormSite]:
    """All norms, means and their like that mix the units of an axis in one trace, with a scale or without."""
    return _Finder(prediction, number).statistics()


class _Finder:
    def __init__(self, prediction: TracePrediction, number: int) -> None:
        self._prediction = prediction
        self._number = number
        self._flow = prediction.flow

    def find(self) -> list[NormSite]:
        sites = []
        for index in self._flow.touching.get(self._number, ()):
            call = self._prediction.calls[index]
            name = operator_name(call)
            if name in _NORMS:
                arguments = call.arguments()
                if self._over(arguments["input"].index, len(arguments["normalized_shape"])):
                    sites.append(self._operator(call))
            elif name == "mean" and self._reduces(call):
                sites.append(self._handwritten(call))
        for site in sites:
            self._require_own_scale(site, sites)
        return sites

    def statistics(self) -> list[NormSite]:
        sites = []
        for index in self._flow.touching.get(self._number, ()):
            call = self._prediction.calls[index]
            name = operator_name(call)
            arguments = call.arguments()
            if name in _NORMS and self._over(arguments["input"].index, len(arguments["normalized_shape"])):
                sites.append(self._of_call(call, "mean" if "layer" in call.name else "zero"))
            elif name == "native_group_norm" and self._within_groups(call):
                sites.append(self._of_call(call, "group"))
            elif name in REDUCED and self._reduces(call):
                sites.append(self._of_call(call, "reduced"))
        return sites

    def _within_groups(self, call: Call) -> bool:
        dims = self._prediction.dims[call.arguments()["input"].index]
        held = [dim for dim in range(1, len(dims)) if self._number in axes_of(dims[dim])]
        return held == [1] and self._number not in groups_of(self._prediction, call)

    def _of_call(self, call: Call, kind: str) -> NormSite:
        """One call as a site, whatever comes behind it."""
        arguments, dims = call.arguments(), self._prediction.dims
        source = call.args[0].index
        weight, bias = (self._tensor(arguments.get(key)) for key in ("weight", "bias"))
        if kind == "reduced":
            normal = tuple(dims[source][dim] for dim in reduced_dims(self._prediction, call))
        elif kind == "group":
            normal = (dims[source][1],)
        else:
            normal = dims[source][-len(arguments["normalized_shape"]) :]
        inside, eps = frozenset((call.index,)), arguments.get("eps")
        return NormSite(kind, source, _result(call), inside, normal, weight or "", 0.0, bias, eps, call.module)

    def _over(self, source: int, count: int) -> bool:
        return any(self._number in axes_of(dim) for dim in self._prediction.dims[source][-count:])

    def _reduces(self, call: Call) -> bool:
        dims = self._prediction.dims[call.args[0].index]
        return any(self._number in axes_of(dims[dim]) for dim in reduced_dims(self._prediction, call))

    def _operator(self, call: Call) -> NormSite:
        arguments = call.arguments()
        source, count = arguments["input"].index, len(arguments["normalized_shape"])
        weight, bias = (self._tensor(arguments.get(key)) for key in ("weight", "bias"))
        if weight is None:
            raise NoCompensationError(f"the norm {call.where} has no scale parameter of its own")
        kind = "mean" if "layer" in call.name else "zero"
        normal = self._prediction.dims[source][-count:]
        inside = frozenset((call.index,))
        return NormSite(kind, source, _result(call), inside, normal, weight, 0.0, bias, arguments["eps"], call.module)

    def _handwritten(self, mean: Call) -> NormSite:
        """x * rsqrt(mean(x ** 2) + eps), then times a scale."""
        problem = NoCompensationError(f"the reduction {mean.where} belongs to no norm that is known")
        square = self._flow.maker(mean.args[0].index, mean.index)
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
        weight: tuple[str, float, list[int]] | None = None
        while weight is None:
            users = [one for one in self._flow.readers[_result(inside[-1])] if one > inside[-1].index]
            if len(users) != 1:
                raise problem
            user = self._prediction.calls[users[0]]
            if operator_name(user) == "mul":
                weight = next((found for ref in refs_in(user.args) if (found := self._scale(ref, user))), None)
                if weight is None:
                    raise problem
            elif operator_name(user) not in ("_to_copy", "clone"):
                raise problem
            inside.append(user)
        dims = self._prediction.dims[mean.args[0].index]
        normal = tuple(dims[dim] for dim in reduced_dims(self._prediction, mean))
        calls = frozenset((*(call.index for call in inside), *weight[2]))
        return NormSite(
            "zero", source.index, _result(inside[-1]), calls, normal, weight[0], weight[1], None, eps, mean.module
        )

    def _scale(self, ref: Ref, user: Call) -> tuple[str, float, list[int]] | None:
        """The parameter that a factor is: (name, what is added to it, calls in between)."""
        index, offset, calls = ref.index, 0.0, list[int]()
        at = user.index
        while index not in self._flow.names:
            maker = self._flow.maker(index, at)
            if maker is None or index not in self._flow.of_weights:
                return None
            numbers = [one for one in maker.args if isinstance(one, (int, float)) and not isinstance(one, bool)]
            if operator_name(maker) == "add" and len(numbers) == 1 and not maker.kwargs:
                offset += numbers[0]
            elif operator_name(maker) not in ("_to_copy", "clone", "view", "unsqueeze"):
                return None
            calls.append(maker.index)
            at = maker.index
            operands = refs_in(maker.args)
            if len(operands) != 1:
                return None
            index = operands[0].index
        return self._flow.names[index], offset, calls

    def _only_user(self, call: Call, name: str, problem: NoCompensationError) -> Call:
        users = [self._prediction.calls[at] for at in self._flow.readers[_result(call)] if at > call.index]
        if not users or operator_name(users[0]) != name:
            raise problem
        in_place = users[0].name.endswith("_")
        if len(users) > 1 and not in_place:
            raise problem
        return users[0]

    def _require_own_scale(self, site: NormSite, sites: list[NormSite]) -> None:
        """Nothing else may read the scale of a norm that is to be multiplied."""
        inside = {call for other in sites for call in other.calls if other.weight == site.weight}
        readers = self._flow.readers[self._prediction.tensors[site.weight]]
        if any(reader not in inside for reader in readers):
            raise NoCompensationError(f"{site.weight} is used for more than the norm in {site.module or 'the model'}")

    def _tensor(self, ref: Ref | None) -> str | None:
        return None if ref is None else self._flow.names.get(ref.index)


def reduced_dims(prediction: TracePrediction, call: Call) -> tuple[int, ...]:
    """The dimensions over which a mean, or one of `REDUCED`, runs, in order."""
    rank, dim = len(prediction.dims[call.args[0].index]), call.arguments().get("dim")
    chosen = range(rank) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return tuple(sorted(positive(one, rank) for one in chosen))


def _result(call: Call) -> int:
    assert call.outputs[0] is not None
    return call.outputs[0].index


def _is_square(call: Call) -> bool:
    if operator_name(call) == "pow":
        return bool(call.args[1] == 2)
    return operator_name(call) == "mul" and call.args[0] == call.args[1]
