"""Growing an axis that a LayerNorm or RMSNorm reads, without changing what the network computes.

A norm over d units that grows to D sees other statistics, unless the new units are neutral: at the mean of the others
(LayerNorm) or zero (RMSNorm). Then its variance (mean square) shrinks by d / D exactly, which a scale multiplied by
sqrt(d / D) and an eps multiplied by d / D undo::

    LayerNorm   x' = (x, mean, ..., mean):  var' = var d/D,  (x - mean) / sqrt(var' + eps d/D) sqrt(d/D) = as before
    RMSNorm     x' = (x, 0, ..., 0):        ms'  = ms d/D,   x / sqrt(ms' + eps d/D) sqrt(d/D)           = as before

New units are neutral if everything that writes to the stream is linear in units that start at the mean of the others
(or at zero). That is decided here, by following the state of the new units through the recorded operators; where it
cannot be shown, there is no compensation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from espalier.edit.attributes import AttributeChange
from espalier.graph.capture import Call, Ref
from espalier.graph.dims import Leaf, axes_of
from espalier.graph.rules.registry import refs_in
from espalier.graph.topology import Topology, TracePrediction

_MOVES = frozenset(
    "view _unsafe_view reshape _reshape_alias permute transpose t unsqueeze squeeze expand slice select clone alias "
    "detach _to_copy contiguous split split_with_sizes unbind copy lift_fresh index gather".split()
)
_ZERO_AT_ZERO = _MOVES | frozenset(
    "relu gelu silu tanh neg abs hardtanh leaky_relu elu selu native_dropout mul div mean sum".split()
)


@dataclass(frozen=True)
class NormSite:
    """One normalisation across an axis, written as an operator or by hand."""

    kind: str
    """``mean`` (LayerNorm: neutral units are at the mean) or ``zero`` (RMSNorm)."""
    source: int
    """Value that is normalised."""
    result: int
    """Value after normalisation and scale."""
    calls: frozenset[int]
    weight: str | None
    bias: str | None
    eps: float | None
    module: str


@dataclass(frozen=True)
class Compensation:
    """What makes growth of a normalised axis exact."""

    kind: str
    neutral: frozenset[str]
    """Tensors whose new positions along the axis start at the mean of the old ones (``mean``) or at zero (``zero``)."""
    scaled: frozenset[str]
    """Scales of norms: all entries are multiplied by sqrt(d / D)."""
    zero: frozenset[str]
    """Shifts of norms: new positions start at zero."""
    readers: frozenset[str]
    """Parameters that only read zeros from the new units: they start at random values, or nothing could learn."""
    eps: tuple[tuple[str, float], ...]
    """(module, eps): multiplied by d / D."""


class _NoCompensation(Exception):
    pass


def compensation_of(topology: Topology, number: int) -> Compensation | str:
    """The compensation for growing an axis that norms read, or why there is none."""
    parts: list[Compensation] = []
    try:
        for prediction in topology.predictions:
            parts.append(_Stream(topology, number, prediction).follow())
    except _NoCompensation as problem:
        return str(problem)
    first, second = parts[0], parts[-1]
    if first.kind != second.kind or first.neutral & second.readers or second.neutral & first.readers:
        return "train and eval mode differ"
    return Compensation(
        first.kind,
        first.neutral | second.neutral,
        first.scaled | second.scaled,
        first.zero | second.zero,
        first.readers & second.readers,
        tuple(dict.fromkeys((*first.eps, *second.eps))),
    )


class _Stream:
    """Follows the new units of one axis through one trace."""

    def __init__(self, topology: Topology, number: int, prediction: TracePrediction) -> None:
        self._number = number
        self._prediction = prediction
        self._names = _tensor_names(topology, prediction)
        self._origins: dict[int, frozenset[str]] = {ref: frozenset((name,)) for ref, name in self._names.items()}
        self._slots = {(tensor, role) for tensor, _, role in topology.axes[number].slots}
        self.state: dict[int, str] = {}

    def follow(self) -> Compensation:
        sites = self._sites()
        kinds = {site.kind for site in sites}
        if len(kinds) != 1:
            raise _NoCompensation("norms of different kinds read it" if kinds else "its reduction is no known norm")
        kind = kinds.pop()
        by_source = {call: site for site in sites for call in site.calls}
        neutral: set[str] = set()
        readers: dict[str, bool] = {}
        for call in self._prediction.calls:
            site = by_source.get(call.index)
            if site is not None:
                self._enter(site, call, kind)
            else:
                self._pass(call, kind, neutral, readers)
        for site in sites:
            if site.weight is None or site.eps is None:
                raise _NoCompensation(f"the norm in {site.module} has no scale or no eps of its own")
        return Compensation(
            kind,
            frozenset(neutral),
            frozenset(site.weight for site in sites if site.weight),
            frozenset(site.bias for site in sites if site.bias),
            frozenset(name for name, only_zeros in readers.items() if only_zeros),
            tuple(dict.fromkeys((site.module, site.eps) for site in sites if site.eps is not None)),
        )

    def _holds(self, index: int) -> bool:
        return any(self._number in axes_of(dim) for dim in self._prediction.dims.get(index, ()))

    def _enter(self, site: NormSite, call: Call, kind: str) -> None:
        if self.state.get(site.source) not in (kind, "zero" if kind == "zero" else kind):
            raise _NoCompensation(f"what the norm in {site.module} reads is not neutral in the new units")
        for ref in call.outputs:
            if ref is not None and self._holds(ref.index):
                self.state[ref.index] = "zero" if ref.index == site.result else "inside"

    def _pass(self, call: Call, kind: str, neutral: set[str], readers: dict[str, bool]) -> None:
        name = call.name.removeprefix("aten::").removesuffix("_")
        inputs = refs_in((call.args, call.kwargs))
        if all(ref.index in self._origins for ref in inputs) and inputs:
            origin = frozenset().union(*(self._origins[ref.index] for ref in inputs))
            for out in call.outputs:
                if out is not None:
                    self._origins.setdefault(out.index, origin)
            return
        holding = [ref for ref in inputs if self._holds(ref.index)]
        weights = [ref for ref in holding if ref.index in self._origins]
        streams = [ref for ref in holding if ref.index not in self._origins]
        states = [self.state.get(ref.index, "any") for ref in streams]
        if name in ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "mv") and weights:
            for ref in weights:
                for tensor in self._origins[ref.index]:
                    if (tensor, "contract") in self._slots and streams:
                        readers[tensor] = readers.get(tensor, True) and all(state == "zero" for state in states)
        for out in call.outputs:
            if out is not None and self._holds(out.index):
                self.state[out.index] = self._after(name, call, kind, weights, streams, states, neutral)

    def _after(
        self, name: str, call: Call, kind: str, weights: list[Ref], streams: list[Ref], states: list[str],
        neutral: set[str],
    ) -> str:  # fmt: skip
        made = frozenset().union(*(self._origins[ref.index] for ref in weights)) if weights else frozenset()
        if name in ("mm", "addmm", "linear", "embedding") and not (streams and name == "embedding"):
            produced = {tensor for tensor in made if (tensor, "contract") not in self._slots or name == "embedding"}
            if produced and all(self._is_plain(tensor) for tensor in produced):
                neutral.update(produced)
                return kind
            if made and all(self._is_plain(tensor) for tensor in made) and self._both_sides(made):
                neutral.update(made)
                return kind
            return "any"
        others = refs_in((call.args, call.kwargs))
        if name in ("add", "sub") and all(state == kind for state in states) and streams:
            broadcast_only = [ref for ref in others if not self._holds(ref.index)]
            if kind == "zero" and (broadcast_only or any(isinstance(arg, (int, float)) for arg in call.args[1:])):
                return "any"
            neutral.update(made)
            return kind
        if name in ("mul", "div") and streams:
            if all(state == "zero" for state in states):
                return "zero"
            if len(streams) == 1 and not weights and states == [kind]:
                other = [ref for ref in others if ref not in streams]
                return kind if not other or not self._holds(other[0].index) else "any"
            return "any"
        if name in _MOVES and len(set(states)) == 1 and not weights:
            return states[0]
        if name in ("cat", "stack") and set(states) == {kind}:
            return kind
        if name in _MOVES and weights and not streams:
            neutral.update(made)
            return kind
        if states and all(state == "zero" for state in states) and name in _ZERO_AT_ZERO and not weights:
            return "zero"
        return "any"

    def _is_plain(self, tensor: str) -> bool:
        return True

    def _both_sides(self, tensors: frozenset[str]) -> bool:
        """Square layers on one stream: their rows are produced, their columns contracted."""
        return all(sum(1 for other, _ in self._slots if other == tensor) > 1 for tensor in tensors)

    def _sites(self) -> list[NormSite]:
        sites: list[NormSite] = []
        users = self._users()
        for call in self._prediction.calls:
            name = call.name.removeprefix("aten::")
            if name in ("native_layer_norm", "_fused_rms_norm", "rms_norm"):
                arguments = call.arguments()
                source = arguments["input"].index
                if not self._holds(source):
                    continue
                if self._prediction.dims[source][-1] != Leaf(self._number) or len(arguments["normalized_shape"]) > 1:
                    raise _NoCompensation("it is one of several parts of a normalised dimension")
                result = call.outputs[0]
                assert result is not None
                sites.append(
                    NormSite(
                        "mean" if "layer" in name else "zero",
                        source,
                        result.index,
                        frozenset((call.index,)),
                        self._tensor(arguments.get("weight")),
                        self._tensor(arguments.get("bias")),
                        arguments["eps"],
                        call.modules[-1] if call.modules else "",
                    )
                )
            elif name == "mean" and self._reduces(call):
                sites.append(self._handwritten(call, users))
        return sites

    def _reduces(self, call: Call) -> bool:
        source, result = call.args[0].index, call.outputs[0]
        return self._holds(source) and result is not None and not self._holds(result.index)

    def _handwritten(self, mean: Call, users: Mapping[int, list[Call]]) -> NormSite:
        """x * rsqrt(mean(x ** 2) + eps), then a scale: the usual RMSNorm."""
        calls = self._prediction.calls
        made_by = {out.index: call for call in calls for out in call.outputs if out is not None}
        where = f"the reduction {mean.where} is no RMSNorm"
        if self._prediction.dims[mean.args[0].index][-1] != Leaf(self._number):
            raise _NoCompensation(where)
        square = made_by.get(mean.args[0].index)
        if square is None or not self._squares(square):
            raise _NoCompensation(where)
        shifted = self._only(users, mean, "add", where)
        eps = next((arg for arg in shifted.args[1:] if isinstance(arg, float)), None)
        root = self._only(users, shifted, "rsqrt", where)
        product = self._only(users, root, "mul", where)
        source = square.args[0].index
        if source not in (ref.index for ref in refs_in(product.args)):
            raise _NoCompensation(where)
        last, weight = product, None
        while weight is None:
            following = [call for call in users.get(last.outputs[0].index, [])]  # type: ignore[union-attr]
            if len(following) != 1:
                break
            names = [self._names.get(ref.index) for ref in refs_in(following[0].args)]
            name = following[0].name.removeprefix("aten::")
            if name == "mul" and any(names):
                weight, last = next(one for one in names if one), following[0]
            elif name in ("_to_copy", "clone"):
                last = following[0]
            else:
                break
        assert last.outputs[0] is not None
        inside = frozenset(call.index for call in (square, mean, shifted, root, product))
        result = last.outputs[0].index
        return NormSite("zero", source, result, inside | {last.index}, weight, None, eps, mean.modules[-1])

    def _squares(self, call: Call) -> bool:
        name = call.name.removeprefix("aten::")
        if name == "pow":
            return bool(call.args[1] == 2)
        return name == "mul" and len(call.args) == 2 and call.args[0] == call.args[1]

    def _users(self) -> dict[int, list[Call]]:
        users: dict[int, list[Call]] = {}
        for call in self._prediction.calls:
            for ref in refs_in((call.args, call.kwargs)):
                users.setdefault(ref.index, []).append(call)
        return users

    def _only(self, users: Mapping[int, list[Call]], call: Call, name: str, problem: str) -> Call:
        result = call.outputs[0]
        following = users.get(result.index, []) if result is not None else []
        if len(following) != 1 or following[0].name != f"aten::{name}":
            raise _NoCompensation(problem)
        return following[0]

    def _tensor(self, ref: Ref | None) -> str | None:
        return None if ref is None else self._names.get(ref.index)


def _tensor_names(topology: Topology, prediction: TracePrediction) -> dict[int, str]:
    return {index: name for name, index in prediction.tensors.items()}


def eps_changes(compensation: Compensation, values: Mapping[str, Mapping[str, object]], ratio: float) -> list[AttributeChange]:
    """The attributes that hold each norm's eps, multiplied by `ratio` = d / D."""
    changes = []
    for module, eps in compensation.eps:
        for name, value in values[module].items():
            if isinstance(value, float) and value == eps:
                changes.append(AttributeChange(module, (name,), value, value * ratio))
    return changes
