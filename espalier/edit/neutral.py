"""Which starts make new units invisible to everything that combines units, and still able to learn.

Every operator that combines the units of an axis asks for something that makes new units invisible to it:

    LayerNorm         at the mean of the others   var' = var d/D: undone by scale * sqrt(d/D) and eps * d/D
    RMSNorm           zero                        ms'  = ms  d/D: undone likewise
    q . k             zero on one side
    sum, norm of a vector                         zero
    weights           zero weights, or zero units

What is asked for is followed backwards through the recorded operators to the parameters that new units come from: a sum
is zero if all terms are, a product if one factor is, and a linear operator hands both on to its weights. Where an
operator is met that does not hand it on (dropout on a stream that a LayerNorm reads, a norm with an uneven scale on a
post-norm stream), there is no such start, and the edit says so.

The same questions put to units that are to go (what do they hold already?) tell whether their removal is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from espalier.edit.handing import Handing, Task
from espalier.edit.norms import NoCompensationError, NormSite, norm_sites, statistics
from espalier.edit.operands import Operand, groups_of, is_attention, summed, summing_weights, sums_over
from espalier.edit.starts import Chosen, NotNeutralError, Place, Policy, Present, Start
from espalier.graph.dims import Dim, IntArray, Leaf, Product, axes_of
from espalier.graph.flow import operator_name
from espalier.graph.rules.registry import positive
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.trace import Call

_SUMS = frozenset("sum nansum linalg_vector_norm norm".split())
_REDUCTIONS = frozenset(
    "all amax amin aminmax any argmax argmin count_nonzero logsumexp max mean median min nanmedian prod std std_mean "
    "var var_mean".split()
)
_BATCH_NORMS = frozenset(
    "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit "
    "_native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_no_update".split()
)
_NORMS = frozenset({"native_layer_norm", "_fused_rms_norm", "rms_norm"})
_SOFTMAX = frozenset({"_softmax", "_log_softmax", "_safe_softmax"})
_ZERO, _SMALL = Start("zero"), Start("zero", soft=True)

PER_UNIT = frozenset({"contract", "batch_norm"})
"""Roles of taps that are no obstacle: units are read with weights, or each treated on its own."""
WORDS: Mapping[str, str] = {
    "bilinear": "is summed over between two activations",
    "softmax": "is normalised by a softmax",
    "layer_norm": "is normalised by a LayerNorm",
    "rms_norm": "is normalised by an RMSNorm",
    "group_norm": "is normalised within groups",
    "reduce": "is reduced",
    "sum": "is summed",
    "scale_of_size": "sets the softmax scale",
}
"""What is done along an axis, by role of the tap."""


@dataclass(frozen=True)
class Invisible:
    """What makes an edit of one axis exact."""

    starts: Mapping[Place, tuple[Start, ...]]
    """How new units start there; elsewhere as the role of the place says."""
    sites: tuple[NormSite, ...]
    """The norms whose scale and eps follow the size."""


def invisible_growth(
    topology: Topology, number: int, edited: frozenset[int], tensors: Mapping[str, Tensor]
) -> Invisible | str:
    """The starts with which new units of an axis change nothing, or why there are none."""
    chosen = Chosen()
    try:
        passes = [_Pass(topology, number, one, edited, chosen, tensors) for one in topology.predictions]
        for one in passes:
            one.ask()
        for one in passes:
            one.ask_products()
        for one in passes:
            one.keep_alive(chosen)
        for one in passes:
            one.silence_norms()
        for one in passes:
            one.silence_readers()
        for one in passes:
            one.free_readers(chosen)
    except (NotNeutralError, NoCompensationError) as problem:
        return str(problem)
    return Invisible(chosen.starts(), tuple(dict.fromkeys(site for one in passes for site in one.sites)))


def invisible_removal(
    topology: Topology, number: int, units: IntArray, edited: frozenset[int], tensors: Mapping[str, Tensor]
) -> Invisible | str:
    """What follows the size if units that contribute nothing go, or through what they contribute."""
    present = Present(topology, number, units, edited, tensors)
    try:
        passes = [_Pass(topology, number, one, edited, present, tensors) for one in topology.predictions]
        for one in passes:
            one.silence_readers()
        for one in passes:
            one.ask()
            one.ask_products()
        if not any(one.is_read() for one in passes):
            return "has no reader whose weights show what it contributes"
    except (NotNeutralError, NoCompensationError) as problem:
        return str(problem)
    return Invisible({}, tuple(dict.fromkeys(site for one in passes for site in one.sites)))


@dataclass(frozen=True)
class Absence:
    """What makes units of an axis as if they were not there."""

    zero: Mapping[Place, tuple[Start, ...]]
    """Where they have to be zero."""
    sites: tuple[tuple[TracePrediction, NormSite], ...]
    """The norms, means and their like that have to leave them out, with the trace that each is of."""


def absence(topology: Topology, number: int) -> Absence | str:
    """What makes any units of an axis absent, whatever the weights are, or why nothing does."""
    chosen = Chosen()
    try:
        passes = [_Pass(topology, number, one, frozenset((number,)), chosen, {}, left_out=True)
                  for one in topology.predictions]  # fmt: skip
        for one in passes:
            one.ask_sums()
            one.ask_products()
        for one in passes:
            one.silence_readers()
        if not any(one.is_read() for one in passes):
            return "nothing sums over it"
    except NotNeutralError as problem:
        return str(problem)
    return Absence(chosen.starts(), tuple((one.prediction, site) for one in passes for site in one.sites))


@dataclass(frozen=True)
class _Product:
    """A sum over the axis of the products of two operands."""

    call: Call
    left: Operand
    right: Operand


class _Pass:
    """One trace, and what its operators ask of the units of one axis."""

    def __init__(
        self,
        topology: Topology,
        number: int,
        prediction: TracePrediction,
        edited: frozenset[int],
        policy: Policy,
        tensors: Mapping[str, Tensor],
        *,
        left_out: bool = False,
    ) -> None:
        self._number = number
        self.prediction = prediction
        self._tensors = tensors
        self._blocking = {
            (tap.operator, tap.where): tap.role for tap in topology.axes[number].taps if tap.role not in PER_UNIT
        }
        self.sites = statistics(prediction, number) if left_out else norm_sites(prediction, number)
        self._handing = Handing(topology, number, prediction, edited, policy, tensors, self.sites, left_out=left_out)
        self._inside = {call for site in self.sites for call in site.calls}
        self._bilinear: list[_Product] = []
        self._readers: list[_Product] = []
        self._sums: list[tuple[Call, bool]] = []
        self._own: list[tuple[Call, Operand]] = []
        """Weights with which operators of their own kind sum over the axis, or whose length along it counts."""
        for index in prediction.flow.touching.get(number, ()):
            if index not in self._inside:
                self._sort(prediction.calls[index])

    def is_read(self) -> bool:
        """Whether anything sums over the units."""
        return bool(self._readers or self._bilinear or self._sums or self._own or self.sites)

    # --- What combines units -----------------------------------------------------------------------------------------

    def _sort(self, call: Call) -> None:
        """Note what a call asks for, or raise if it combines units in a way that nothing makes blind to new ones."""
        dims, name = self.prediction.dims, operator_name(call)
        product = summed(self.prediction, call)
        if product is not None:
            if is_attention(call) and any(self._has(ref.index, 2) for ref in call.args[1:3]):
                raise self._problem(call, "softmax")
            if sums_over(self.prediction, call, product, self._number):
                of_weights = [one.ref.index in self.prediction.flow.of_weights for one in (product.left, product.right)]
                (self._readers if any(of_weights) else self._bilinear).append(
                    _Product(call, product.left, product.right)
                )
        elif name in _SOFTMAX:
            x = call.args[0].index
            if dims[x] and self._has(x, positive(call.args[1], len(dims[x]))):
                raise self._problem(call, "softmax")
        elif name in _BATCH_NORMS:
            x = call.arguments()["input"].index
            if any(self._has(x, dim) for dim in range(len(dims[x])) if dim != 1):
                raise self._problem(call, "reduce")
        elif name == "native_group_norm":
            x = call.arguments()["input"].index
            held = any(self._has(x, dim) for dim in range(1, len(dims[x])))
            if held and self._number not in groups_of(self.prediction, call):
                raise self._problem(call, "group_norm")
        elif name in _SUMS or name in _REDUCTIONS:
            if not any(self._has(call.args[0].index, dim) for dim in gone_dims(self.prediction, call)):
                return
            if name not in _SUMS:
                raise self._problem(call, "reduce")
            self._sums.append((call, name in ("linalg_vector_norm", "norm") and call.args[1:2] in ((), (2,))))
        elif name == "_weight_norm_interface":
            weight, along = call.args[0], positive(call.arguments()["dim"], len(dims[call.args[0].index]))
            others = [dim for dim in range(len(dims[weight.index])) if dim != along]
            self._own += [(call, Operand(weight, dim)) for dim in others if self._has(weight.index, dim)]
        elif weights := summing_weights(self.prediction, call):
            self._own += [(call, one) for one in weights if self._has(one.ref.index, one.dim)]
            if any(one.ref.index not in self.prediction.flow.of_weights for _, one in self._own):
                raise self._problem(call, "bilinear")
        elif name not in _NORMS and (call.name, call.where) in self._blocking:
            raise self._problem(call, self._blocking[call.name, call.where])

    def _has(self, value: int, dim: int) -> bool:
        return self._number in axes_of(self.prediction.dims[value][dim])

    def _problem(self, call: Call, role: str) -> NotNeutralError:
        return NotNeutralError(f"{WORDS[role]} {call.where}")

    # --- What is asked for -------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """What norms and sums ask for."""
        self.ask_norms()
        self.ask_sums()

    def ask_norms(self) -> None:
        """Units in front of a norm have to be zero, or at the mean of the others."""
        for site in self.sites:
            first = self.prediction.calls[min(site.calls)]
            reading = next(index for index in sorted(site.calls) if self._reads(index, site.source))
            try:
                for dim in self._dims_of(site.source):
                    self._handing.need(Task(site.source, reading, dim, None, self._wanted(site, first)))
            except NotNeutralError as problem:
                role = "layer_norm" if site.kind == "mean" else "rms_norm"
                raise NotNeutralError(f"{WORDS[role]} {first.where}, and {problem}") from None

    def ask_sums(self) -> None:
        """What is summed has to be zero."""
        for call, soft in self._sums:
            source = call.args[0].index
            for dim in gone_dims(self.prediction, call):
                if self._has(source, dim):
                    try:
                        self._handing.need(Task(source, call.index, dim, None, Start("zero", soft=soft)))
                    except NotNeutralError as problem:
                        raise NotNeutralError(f"{WORDS['sum']} {call.where}, and {problem}") from None

    def _reads(self, index: int, value: int) -> bool:
        return any(ref.index == value for ref in self.prediction.flow.operands[index])

    def _dims_of(self, value: int) -> list[int]:
        return [dim for dim in range(len(self.prediction.dims[value])) if self._has(value, dim)]

    def _wanted(self, site: NormSite, call: Call) -> Start:
        """What a norm asks of its input: zero, or the mean of the others over the one dimension that it runs over."""
        if site.kind == "zero":
            return _SMALL
        if len(site.normal) != 1 or not all(isinstance(one, Leaf) for one in _factors(site.normal[0])):
            raise NotNeutralError("it runs over more than this axis")
        return Start("mean", frozenset(axes_of(site.normal[0])))

    def ask_products(self) -> None:
        """Sums over the products of two activations: one side has to be zero."""
        for product in self._bilinear:
            if self._is_zero(product, product.right) or self._is_zero(product, product.left):
                continue
            try:
                self._handing.either([[self._task(product, side)] for side in (product.right, product.left)])
            except NotNeutralError as problem:
                raise NotNeutralError(f"{WORDS['bilinear']} {product.call.where}, and {problem}") from None

    def _task(self, product: _Product, side: Operand, want: Start = _ZERO) -> Task:
        return Task(side.ref.index, product.call.index, side.dim, None, want)

    def _is_zero(self, product: _Product, side: Operand, want: Start = _ZERO) -> bool:
        return self._handing.holds(self._task(product, side, want))

    def keep_alive(self, chosen: Chosen) -> None:
        """Products whose sides both start at zero never learn: one side starts faint, if only its square counts."""
        self._handing.forget()
        for product in (*self._bilinear, *self._readers):
            sides = [side for side in (product.left, product.right) if self._is_zero(product, side, _SMALL)]
            asked = {side: self._handing.asked_by(self._task(product, side)) for side in (product.left, product.right)}
            if len(sides) == 2:
                self._make_faint(product, chosen, asked)
                self._handing.forget()
            elif sides and product in self._bilinear:
                (other,) = (side for side in (product.left, product.right) if side not in sides)
                free = [one for one in asked[other] if not chosen.at(one[0])]
                if free and all(self._tensors[place[0]].dim() == 1 for place, _ in free):
                    for place, start in free:
                        chosen.ask(place, Start("noise", where=start.where))

    def _make_faint(
        self, product: _Product, chosen: Chosen, asked: Mapping[Operand, list[tuple[Place, Start]]]
    ) -> None:
        for side, other in ((product.left, product.right), (product.right, product.left)):
            own = [
                (place, start)
                for place, start in asked[side]
                if not any(place == there and start.meets(one) for there, one in asked[other])
            ]
            if own and all(one.soft for place, start in own for one in chosen.at(place) if one.meets(start)):
                for place, start in own:
                    chosen.make_faint(place, start)
                return
        raise NotNeutralError(f"is summed over {product.call.where}, and zero on both sides it could never learn")

    def silence_norms(self) -> None:
        """Behind a norm new units are zero where nothing speaks against it: then their readers are free to start."""
        for site in self.sites:
            last = max(site.calls) + 1
            self._handing.attempt([Task(site.result, last, dim, None, _ZERO) for dim in self._dims_of(site.result)])

    def silence_readers(self) -> None:
        """Weights that read new units are zero, unless the units are."""
        self._handing.forget()
        for call, weight in self._own:
            self._handing.need(Task(weight.ref.index, call.index, weight.dim, None, _ZERO))
        for product in self._readers:
            sides = sorted((product.left, product.right), key=self._is_weight)
            if not self._is_zero(product, sides[0]):
                self._handing.either([[self._task(product, side)] for side in reversed(sides)])

    def _is_weight(self, side: Operand) -> bool:
        return side.ref.index in self.prediction.flow.of_weights

    def free_readers(self, chosen: Chosen) -> None:
        """Weights that read nothing but zero start at random, so that the units can learn."""
        for product in self._readers:
            stream, weight = sorted((product.left, product.right), key=self._is_weight)
            if self._is_weight(stream):
                continue
            for place, start in self._handing.asked_by(self._task(product, weight)):
                if not any(one.meets(start) for one in chosen.at(place)):
                    chosen.ask(place, Start("random", where=start.where))


def _factors(dim: Dim) -> tuple[Dim, ...]:
    return tuple(inner for one in dim.factors for inner in _factors(one)) if isinstance(dim, Product) else (dim,)


def gone_dims(prediction: TracePrediction, call: Call) -> list[int]:
    """The dimensions over which a reduction runs."""
    rank = len(prediction.dims[call.args[0].index])
    arguments = call.arguments()
    chosen = arguments.get("dims", arguments.get("dim"))
    if chosen is None or chosen == []:
        return list(range(rank))
    return sorted({positive(dim, rank) for dim in ([chosen] if isinstance(chosen, int) else chosen)})


__all__ = ["PER_UNIT", "WORDS", "Absence", "Invisible", "absence", "gone_dims", "invisible_growth", "invisible_removal"]
