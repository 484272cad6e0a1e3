"""Growing an axis that a LayerNorm or RMSNorm reads, without changing what the network computes.

A norm over d units that grow to D sees other statistics, unless the new units are neutral: at the mean of the others
(LayerNorm) or at zero (RMSNorm). Then its variance (mean square) shrinks by exactly d / D, which a scale multiplied by
sqrt(d / D) and an eps multiplied by d / D undo::

    LayerNorm   x' = (x, mean, ..., mean):  var' = var d/D,  (x - mean) / sqrt(var' + eps d/D) sqrt(d/D) = as before
    RMSNorm     x' = (x, 0, ..., 0):        ms'  = ms d/D,   x / sqrt(ms' + eps d/D) sqrt(d/D)           = as before

New units are neutral if everything that writes to the stream is linear in units that start at the mean of the others
(or at zero). Whether that is so is decided by following the state of the new units through the recorded operators.
Where it cannot be shown (dropout on a stream that LayerNorm reads, a post-norm stream) there is no compensation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from espalier.edit.norms import NoCompensationError, NormSite, norm_sites
from espalier.graph.capture import Call, Ref
from espalier.graph.dims import axes_of
from espalier.graph.rules.registry import refs_in
from espalier.graph.topology import Topology, TracePrediction

_MOVES = frozenset(
    "view _unsafe_view reshape _reshape_alias permute transpose t unsqueeze squeeze expand slice select clone alias "
    "detach _to_copy split split_with_sizes unbind copy lift_fresh index gather cat stack".split()
)
_ZERO_AT_ZERO = frozenset("relu gelu silu tanh neg abs hardtanh leaky_relu elu selu sin sqrt mean sum".split())
_CONTRACTIONS = frozenset("mm addmm bmm baddbmm linear convolution mv".split())

Place = tuple[str, int]
"""A dimension of a tensor."""


@dataclass(frozen=True)
class Compensation:
    """What makes growth of a normalised axis exact."""

    starts: Mapping[Place, str]
    """How new positions start there: ``mean`` of the old ones, ``zero`` or ``random``."""
    scaled: frozenset[str]
    """Scales of norms: all their entries are multiplied by sqrt(d / D)."""
    eps: tuple[tuple[str, float | None], ...]
    """(module of a norm, its eps): multiplied by d / D."""


def compensation_of(topology: Topology, number: int) -> Compensation | str:
    """The compensation for growing an axis that norms read, or why there is none."""
    try:
        first, *others = [_Stream(topology, number, prediction).follow() for prediction in topology.predictions]
        for other in others:
            first = _joined(first, other)
    except NoCompensationError as problem:
        return str(problem)
    return first


def _joined(a: Compensation, b: Compensation) -> Compensation:
    starts = dict(a.starts)
    for place, start in b.starts.items():
        if starts.setdefault(place, start) != start:
            raise NoCompensationError(f"{place[0]} is used differently in train and in eval mode")
    return Compensation(starts, a.scaled | b.scaled, tuple(dict.fromkeys((*a.eps, *b.eps))))


class _Stream:
    """Follows the new units of one axis through one trace.

    The state of a value that has the axis: ``neutral``, ``zero`` or ``any``. For RMSNorm zero is neutral, and
    ``neutral`` does not occur.
    """

    def __init__(self, topology: Topology, number: int, prediction: TracePrediction) -> None:
        self._number = number
        self._prediction = prediction
        self._places: dict[str, list[tuple[int, str]]] = {}
        for tensor, dim, role in topology.axes[number].slots:
            self._places.setdefault(tensor, []).append((dim, role))
        self._origins = {index: frozenset((name,)) for name, index in prediction.tensors.items()}
        self._states: dict[int, str] = {}
        self._neutral: set[Place] = set()
        self._readers: dict[Place, bool] = {}
        self._sites = norm_sites(prediction, number)
        self._start = "mean"

    def follow(self) -> Compensation:
        kinds = {site.kind for site in self._sites}
        if len(kinds) > 1:
            raise NoCompensationError("both a LayerNorm and an RMSNorm read it")
        if kinds == {"zero"}:
            self._start = "zero"
        inside = {call: site for site in self._sites for call in site.calls}
        for call in self._prediction.calls:
            site = inside.get(call.index)
            if site is None:
                self._pass(call)
            else:
                self._normalise(site, call)
        return self._result()

    def _result(self) -> Compensation:
        starts = {place: "random" if only_zeros else "zero" for place, only_zeros in self._readers.items()}
        for place in self._neutral:
            if starts.get(place) == "zero" and self._start != "zero":
                raise NoCompensationError(f"{place[0]} both writes it and reads it before a norm")
            starts[place] = self._start
        for site in self._sites:
            if site.bias is not None:
                starts[site.bias, 0] = "zero"
        eps = tuple(dict.fromkeys((site.module, site.eps) for site in self._sites))
        return Compensation(starts, frozenset(site.weight for site in self._sites), eps)

    def _holds(self, index: int) -> bool:
        return any(self._number in axes_of(dim) for dim in self._prediction.dims[index])

    def _normalise(self, site: NormSite, call: Call) -> None:
        neutral = "zero" if self._start == "zero" else "neutral"
        if self._state(site.source) != neutral:
            raise NoCompensationError(
                f"what the norm in {site.module or 'the model'} reads is not neutral in new units"
            )
        for out in call.outputs:
            if out is not None and self._holds(out.index):
                self._states[out.index] = "zero" if out.index == site.result else "any"

    def _state(self, index: int) -> str:
        """The state of a value; parameters can be made neutral, which is noted."""
        if index in self._origins:
            for tensor in self._origins[index]:
                self._neutral.update((tensor, dim) for dim, role in self._places.get(tensor, ()) if role != "contract")
            return "zero" if self._start == "zero" else "neutral"
        return self._states.get(index, "any")

    def _pass(self, call: Call) -> None:
        operands = refs_in((call.args, call.kwargs))
        if operands and all(ref.index in self._origins for ref in operands):
            origins = frozenset().union(*(self._origins[ref.index] for ref in operands))
            for out in call.outputs:
                if out is not None:
                    self._origins.setdefault(out.index, origins)
            return
        holders = [ref for ref in operands if self._holds(ref.index)]
        if not holders:
            return
        state = self._after(call, call.name.removeprefix("aten::").removesuffix("_"), operands, holders)
        for out in call.outputs:
            if out is not None and self._holds(out.index):
                self._states[out.index] = state

    def _after(self, call: Call, name: str, operands: list[Ref], holders: list[Ref]) -> str:
        neutral = "zero" if self._start == "zero" else "neutral"
        if name in _CONTRACTIONS:
            return self._contracted(holders, neutral)
        if name == "embedding":
            (table,) = holders
            for tensor in self._origins.get(table.index, ()):
                self._neutral.update((tensor, dim) for dim, role in self._places.get(tensor, ()))
            return neutral
        if name in ("add", "sub"):
            # A number, or an operand without the axis, moves all units alike: the mean moves along, zero does not stay.
            moved = len(holders) < len(call.args[:2])
            if all(self._state(ref.index) == neutral for ref in holders):
                return "any" if moved and neutral == "zero" else neutral
            return "any"
        if name in ("mul", "div", "native_dropout"):
            if any(ref.index not in self._origins and self._state(ref.index) == "zero" for ref in holders):
                return "zero"
            return self._state(holders[0].index) if len(holders) == 1 and name != "native_dropout" else "any"
        states = {self._state(ref.index) for ref in holders}
        if name in _MOVES and len(states) == 1:
            return states.pop()
        return "zero" if name in _ZERO_AT_ZERO and states == {"zero"} else "any"

    def _contracted(self, holders: list[Ref], neutral: str) -> str:
        """A product with parameters: what they read of the stream, and whether what they write is neutral."""
        streams = [ref for ref in holders if ref.index not in self._origins]
        weights = [ref for ref in holders if ref.index in self._origins]
        zeros = all(self._states.get(ref.index, "any") == "zero" for ref in streams)
        for ref in weights:
            for tensor in self._origins[ref.index]:
                for dim, role in self._places.get(tensor, ()):
                    if role == "contract" and streams:
                        self._readers[tensor, dim] = self._readers.get((tensor, dim), True) and zeros
                    elif role != "contract":
                        self._neutral.add((tensor, dim))
        # A filter of its own for every unit (a depthwise convolution) takes units away from the mean of the others.
        roles = {
            role for ref in weights for tensor in self._origins[ref.index] for _, role in self._places.get(tensor, ())
        }
        return neutral if weights and not roles & {"filter", "group"} else "any"
