"""Constants of the forward that follow a size, held by weights: the softmax scale 1/sqrt(head_dim), above all.

If head_dim changes from d to D, code that computes its scale from the size (the fused operator does by default) divides
by sqrt(D) where it divided by sqrt(d): every attention of the layer gets another temperature. Multiplying the query by
sqrt(D/d) undoes that. The factor is followed backwards through operators that pass it on (views, rotary embeddings,
sums, ReLU) to the weights and biases, or the scale of a norm, that the query comes from; and nothing else may read what
it changes.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from espalier.edit.changes import Changes
from espalier.edit.moves import LostError, Mask, Moves, Part, Region
from espalier.edit.operands import is_attention
from espalier.graph.dims import classes, size_of
from espalier.graph.flow import operator_name
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.trace import Call, Ref

_HOMOGENEOUS = frozenset("neg relu leaky_relu native_dropout abs".split())
"""f(c x) = c f(x) for positive c."""
_MOST_SIDES = 4
"""Products for which the operand that takes the factor is chosen one by one."""
_FOLDED = frozenset(
    "full scalar_tensor lift_fresh _to_copy clone detach alias sqrt rsqrt reciprocal pow mul div add sub neg".split()
)
Version: TypeAlias = tuple[int, int]
"""A value and how often it was written."""


class UnheldError(Exception):
    """A constant follows a size and no parameter can take the change; says where."""


@dataclass(frozen=True)
class Constant:
    """A number in the forward that is another one than recorded, before an edit or after it."""

    trace: int
    call: int
    recorded: float
    present: float
    new: float


@dataclass(frozen=True)
class Demand:
    """What a call reads has to be multiplied by a factor."""

    trace: int
    call: int
    value: int
    factor: float
    text: str


@dataclass(frozen=True)
class Scaled:
    """A part of a parameter that is multiplied by a factor."""

    tensor: str
    factor: float
    where: tuple[tuple[bool, ...] | None, ...]
    """For every dimension the classes of positions (see `dims.classes`, edited axes dropped); None for all."""

    def factors(self, topology: Topology, edited: frozenset[int]) -> Tensor:
        """What every entry is multiplied by, at the sizes of a topology: of a shape that broadcasts."""
        inside = torch.ones((), dtype=torch.bool)
        for dim, chosen in zip(topology.tensors[self.tensor], self.where, strict=True):
            if chosen is None:
                inside = inside[..., None]
            else:
                mask = np.asarray(chosen, dtype=np.bool_)[classes(dim, topology.sizes, edited)]
                inside = inside[..., None] & torch.from_numpy(mask)
        return torch.ones(inside.shape, dtype=torch.float64).masked_fill_(inside, self.factor)


def size_scales(changes: Changes, constants: Sequence[Constant]) -> list[Demand]:
    """What has to be multiplied by what, so that constants which follow a size make no difference.

    Args:
        changes: the edit.
        constants: the numbers in the forward that the edit changes.

    Raises:
        UnheldError: a constant that is no factor.
    """
    demands: list[Demand] = []
    for trace, prediction in enumerate(changes.before.predictions):
        changed: dict[int, dict[float, Constant]] = defaultdict(dict)
        for one in constants:
            if one.trace == trace:
                changed[one.call][one.recorded] = one
        demands += _Constants(changes, trace, prediction, changed).demands()
    return demands


class _Constants:
    """Works out numbers that are computed from changed ones, up to where they meet values of the network."""

    def __init__(
        self, changes: Changes, trace: int, prediction: TracePrediction, changed: Mapping[int, Mapping[float, Constant]]
    ) -> None:
        self._changes = changes
        self._trace = trace
        self._prediction = prediction
        self._changed = changed
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def demands(self) -> list[Demand]:
        found = []
        attentions = self._of_attention()
        if not self._changed:
            return list(attentions)
        for call in self._prediction.calls:
            operands = self._prediction.flow.operands[call.index]
            inside = [ref for ref in operands if ref.index in self._known]
            if call.index not in self._changed and not inside:
                continue
            if len(inside) == len(operands) and operator_name(call) in _FOLDED:
                self._fold(call)
            elif inside or any(one.present != one.new for one in self._changed[call.index].values()):
                found.append(self._demand(call, [ref for ref in operands if ref not in inside]))
        return [*attentions, *(one for one in found if not math.isclose(one.factor, 1.0, rel_tol=1e-14))]

    def _of_attention(self) -> Iterator[Demand]:
        """The fused operator's own scale, where code gives none."""
        before, after = self._changes.before.sizes, self._changes.after.sizes
        for call in self._prediction.calls:
            if is_attention(call) and call.arguments().get("scale") is None:
                dim = self._prediction.dims[call.args[0].index][3]
                old, new = size_of(dim, before), size_of(dim, after)
                if old != new:
                    text = f"{1 / old**0.5:.4g} becomes {1 / new**0.5:.4g}"
                    yield Demand(self._trace, call.index, call.args[0].index, (new / old) ** 0.5, text)

    def _fold(self, call: Call) -> None:
        results = []
        for number in range(2):
            if operator_name(call) == "lift_fresh":
                results.append(torch.tensor(self._at(call, call.args[0], number), dtype=torch.float64))
                continue
            kwargs = {key: self._at(call, value, number) for key, value in call.kwargs.items()}
            results.append(call.op(*(self._at(call, value, number) for value in call.args), **kwargs))
        if results[0].dim() != 0 or results[0].device.type == "meta":
            raise self._unheld(call)
        for out in call.outputs:
            if out is not None:
                self._known[out.index] = (results[0], results[1])

    def _at(self, call: Call, value: Any, number: int) -> Any:
        """An argument as it is before (0) or after (1) the edit."""
        if isinstance(value, Ref):
            return self._known[value.index][number]
        changed = self._changed.get(call.index, {})
        if isinstance(value, (int, float)) and value in changed:
            return changed[value].new if number else changed[value].present
        return value

    def _demand(self, call: Call, others: Sequence[Ref]) -> Demand:
        name, arguments = operator_name(call), call.arguments()
        pairs = self._changed.get(call.index, {})
        if name in ("mul", "div") and len(others) == 1:
            first, second = call.args[:2]
            factor = second if first == others[0] else first
            if name == "mul" or first == others[0]:
                ratio = self._ratio(call, factor)
                return self._to_undo(call, others[0], ratio if name == "mul" else 1 / ratio)
        if is_attention(call) and arguments.get("scale") in pairs:
            return self._to_undo(call, call.args[0], self._ratio(call, arguments["scale"]))
        if name == "baddbmm" and arguments["alpha"] in pairs:
            return self._to_undo(call, call.args[1], self._ratio(call, arguments["alpha"]))
        raise self._unheld(call)

    def _ratio(self, call: Call, factor: Any) -> float:
        old, new = (float(self._at(call, factor, number)) for number in range(2))
        if old * new <= 0:
            raise self._unheld(call)
        return new / old

    def _to_undo(self, call: Call, ref: Ref, ratio: float) -> Demand:
        return Demand(self._trace, call.index, ref.index, 1 / ratio, self._text(call))

    def _text(self, call: Call) -> str:
        pairs = [f"{one.present:.4g} becomes {one.new:.4g}" for one in self._changed.get(call.index, {}).values()]
        return ", ".join(pairs) or "it is computed from one that changes"

    def _unheld(self, call: Call) -> UnheldError:
        return UnheldError(f"a constant follows the size {call.where}: {self._text(call)}")


def held(changes: Changes, demands: Sequence[Demand]) -> tuple[Scaled, ...]:
    """The parts of parameters that take the demanded factors.

    Raises:
        UnheldError: one of them has no such parameter, or something else reads what it would change.
    """
    found: list[frozenset[Scaled]] = []
    edited = frozenset(changes.axes)
    for trace, prediction in enumerate(changes.before.predictions):
        scaled: set[Scaled] = set()
        # Several demands with the same factor may meet in one parameter (a layer that is used twice).
        for factor in dict.fromkeys(one.factor for one in demands if one.trace == trace):
            here = [one for one in demands if (one.trace, one.factor) == (trace, factor)]
            scaled.update(_parts(changes.before, prediction, edited, here))
        found.append(frozenset(scaled))
    if any(one != found[0] for one in found):
        raise UnheldError("a constant that follows the size has another effect in train than in eval mode")
    return tuple(sorted(found[0], key=lambda one: (one.tensor, one.factor))) if found else ()


def _parts(
    topology: Topology, prediction: TracePrediction, edited: frozenset[int], demands: Sequence[Demand]
) -> list[Scaled]:
    """The parts that take one factor, module by module if that can be, since most have an attention of their own."""
    by_module: dict[str, list[Demand]] = defaultdict(list)
    for one in demands:
        by_module[prediction.calls[one.call].module].append(one)
    try:
        return [part for found in by_module.values() for part in _parts_together(topology, prediction, edited, found)]
    except UnheldError:
        if len(by_module) == 1:
            raise
        return _parts_together(topology, prediction, edited, demands)


def _parts_together(
    topology: Topology, prediction: TracePrediction, edited: frozenset[int], demands: Sequence[Demand]
) -> list[Scaled]:
    """The parts that take one factor: of products the left operand (the query), or else the right one."""
    first: UnheldError | None = None
    sides = itertools.product((False, True), repeat=min(len(demands), _MOST_SIDES))
    for right in sides:
        try:
            return list(_Following(topology, prediction, edited, demands, right).parts())
        except UnheldError as problem:
            first = first or problem
    assert first is not None
    raise first


class _Following:
    """Follows one factor backwards through one trace."""

    def __init__(
        self,
        topology: Topology,
        prediction: TracePrediction,
        edited: frozenset[int],
        demands: Sequence[Demand],
        right: tuple[bool, ...],
    ) -> None:
        self._right = right
        self._sides: dict[int, bool] = {}
        """Product -> whether its right operand takes the factor."""
        self._side = right[0]
        self._topology = topology
        self._prediction = prediction
        self._flow = prediction.flow
        self._moves = Moves(prediction, topology.sizes, edited, None)
        self._demands = demands
        self._regions: dict[Version, tuple[Mask, ...]] = {}

    def parts(self) -> Iterator[Scaled]:
        """The parts of parameters that have to be multiplied.

        Raises:
            UnheldError: there are none.
        """
        for number, demand in enumerate(self._demands):
            call = self._prediction.calls[demand.call]
            self._side = self._right[number % len(self._right)]
            try:
                self._follow([(demand.value, demand.call, None)])
            except (LostError, UnheldError) as problem:
                raise UnheldError(f"a constant follows the size {call.where}: {demand.text}, and {problem}") from None
        for (value, version), region in self._regions.items():
            self._check_readers(value, version, region)
        for (value, version), region in self._regions.items():
            name = self._flow.names.get(value)
            if version == 0 and name is not None:
                where = tuple(None if mask.all() else tuple(bool(one) for one in mask) for mask in region)
                yield Scaled(name, self._demands[0].factor, where)

    def _follow(self, pending: list[tuple[int, int, Region]]) -> None:
        while pending:
            value, at, region = pending.pop()
            masks = self._moves.whole(value) if region is None else region
            if not all(mask.any() for mask in masks):
                continue
            version = (value, self._flow.version(value, at))
            known = self._regions.get(version)
            if known is not None:
                masks = _joined(known, masks)
                if all(np.array_equal(a, b) for a, b in zip(known, masks, strict=True)):
                    continue
            if self._flow.is_stale(value, at, zeroed=True):
                raise UnheldError("what it scales is written in place")
            self._regions[version] = masks
            call = self._flow.maker(value, at)
            if call is not None:
                self._sides.setdefault(call.index, self._side)
                pending.extend((part.value, call.index, part.region) for part in self._sources(call, value, masks))
            elif self._flow.names.get(value) not in self._topology.parameters:
                raise UnheldError("what it scales does not come from parameters alone")

    def _sources(self, call: Call, value: int, region: tuple[Mask, ...]) -> list[Part]:
        """The parts of operands that have to be multiplied for a part of a result to be."""
        part = Part(value, None, region)
        moved = self._moves.back(call, part)
        if moved is not None:
            return moved
        name = operator_name(call)
        if name in _HOMOGENEOUS and call.outputs[0] == Ref(value):
            return [self._moves.aligned(part, call.args[0])]
        handler = _HANDLERS.get(name)
        if handler is None or call.outputs[0] != Ref(value):
            raise UnheldError(f"a factor does not pass {call.where}")
        return handler(self, call, part)

    def _check_readers(self, value: int, version: int, region: tuple[Mask, ...]) -> None:
        """Whatever reads a multiplied part hands the factor on, or asked for it."""
        asking = {(one.call, one.value) for one in self._demands}
        writers = self._flow.writers.get(value, [])
        first = writers[version - 1] if version else -1
        last = writers[version] if version < len(writers) else len(self._flow.calls)
        for index in self._flow.readers[value]:
            if not first < index <= last or (index, value) in asking:
                continue
            call = self._flow.calls[index]
            for out in call.outputs:
                if out is None or not (self._flow.readers.get(out.index) or out.index in self._prediction.outputs):
                    continue
                if not self._is_handed_on(call, out, value, region):
                    raise UnheldError(f"what holds a constant that follows the size is read {call.where} as well")

    def _is_handed_on(self, call: Call, out: Ref, value: int, region: tuple[Mask, ...]) -> bool:
        seen = self._read(call, out.index, None, value)
        if seen is None:
            seen = self._moves.whole(value)
        common = tuple(a & b for a, b in zip(seen, region, strict=True))
        demanded = self._regions.get((out.index, self._flow.version(out.index, call.index + 1)))
        handed = None if demanded is None else self._read(call, out.index, demanded, value)
        if handed is None:
            return not all(mask.any() for mask in common)
        return all(np.array_equal(a, b) for a, b in zip(common, handed, strict=True))

    def _read(self, call: Call, out: int, region: Region, value: int) -> tuple[Mask, ...] | None:
        """The part of an operand that a part of a result is made of; None if the factor does not come from it."""
        masks = self._moves.whole(out) if region is None else region
        try:
            parts = [part for part in self._sources(call, out, masks) if part.value == value]
        except (LostError, UnheldError):
            return None
        if not parts:
            return None
        found = [self._moves.whole(value) if part.region is None else part.region for part in parts]
        result = found[0]
        for one in found[1:]:
            result = _joined(result, one)
        return result

    # --- Operators by name -------------------------------------------------------------------------------------------

    def _weights_first(self, call: Call, refs: Iterable[Ref]) -> list[Ref]:
        """Of the factors of a product: those that are parameters, then the others in order, without constants."""
        ordered = list(refs)[:: -1 if self._sides.get(call.index, False) else 1]
        with_parameters = [ref for ref in ordered if self._is_parameter(ref, call.index)]
        others = [ref for ref in ordered if ref not in with_parameters and ref.index not in self._constant]
        return [*with_parameters, *others]

    @cached_property
    def _constant(self) -> set[int]:
        """Values that no parameter and no input has a part in, such as tables of angles."""
        found = {index for index, name in self._flow.names.items() if name not in self._topology.parameters}
        for call in self._flow.calls:
            if all(ref.index in found for ref in self._flow.operands[call.index]):
                found.update(out.index for out in call.outputs if out is not None)
        return found

    def _is_parameter(self, ref: Ref, at: int) -> bool:
        """Whether a value is a parameter, or one that was only moved."""
        index = ref.index
        while (maker := self._flow.maker(index, at)) is not None:
            try:
                parts = self._moves.back(maker, Part(index, None, None))
            except LostError:
                return False
            if parts is None or len(parts) != 1:
                return False
            index, at = parts[0].value, maker.index
        return self._flow.names.get(index) in self._topology.parameters

    def _product(self, call: Call, part: Part) -> list[Part]:
        refs = [ref for ref in call.args[:2] if isinstance(ref, Ref)]
        if len(refs) == 2 and refs[0] == refs[1]:
            raise UnheldError(f"a factor is squared {call.where}")
        chosen = self._weights_first(call, refs) or refs
        return [self._moves.aligned(part, chosen[0])]

    def _quotient(self, call: Call, part: Part) -> list[Part]:
        if not isinstance(call.args[0], Ref):
            raise UnheldError(f"a factor does not pass {call.where}")
        return [self._moves.aligned(part, call.args[0])]

    def _sum(self, call: Call, part: Part) -> list[Part]:
        if any(not isinstance(one, Ref) and one != 0 for one in call.args[:2]):
            raise UnheldError(f"a constant is added {call.where}")
        return [self._moves.aligned(part, ref) for ref in call.args[:2] if isinstance(ref, Ref)]

    def _reduced(self, call: Call, part: Part) -> list[Part]:
        """A sum, mean or maximum of values that all get the factor."""
        assert part.region is not None
        if not all(bool(mask.all()) for mask in part.region):
            raise UnheldError(f"a factor does not pass {call.where}")
        return [Part(call.args[0].index, None, None)]

    def _multiplied(self, call: Call, part: Part) -> list[Part]:
        """A matrix product: one factor takes it all, that of parameters if it has the rows or columns of the part."""
        assert part.region is not None
        if len(part.region) < 2:
            raise UnheldError(f"a factor does not pass {call.where}")
        name = operator_name(call)
        bias = call.args[0] if name.startswith(("add", "badd")) else call.arguments().get("bias")
        left, right = call.args[1:3] if name.startswith(("add", "badd")) else call.args[:2]
        *batch, rows, columns = part.region
        found: list[Part] = []
        for ref in self._weights_first(call, (left, right)):
            whole = self._moves.whole(ref.index)
            if ref == left and bool(columns.all()):
                found.append(Part(ref.index, None, (*part.region[:-1], whole[-1])))
            elif ref == right and name == "linear" and all(bool(mask.all()) for mask in (*batch, rows)):
                found.append(Part(ref.index, None, (columns, whole[-1])))
            elif ref == right and name != "linear" and bool(rows.all()):
                found.append(Part(ref.index, None, (*batch, whole[-2], columns)))
        if not found:
            raise UnheldError(f"a factor does not pass {call.where}")
        return [found[0], *([] if bias is None else [self._moves.aligned(part, bias)])]

    def _convolved(self, call: Call, part: Part) -> list[Part]:
        assert part.region is not None
        a = call.arguments()
        if any(not mask.all() for dim, mask in enumerate(part.region) if dim != 1) or a["transposed"]:
            raise UnheldError(f"a factor does not pass {call.where}")
        channels = part.region[1]
        weight = (channels, *self._moves.whole(a["weight"].index)[1:])
        found = [Part(a["weight"].index, None, weight)]
        return found if a["bias"] is None else [*found, Part(a["bias"].index, None, (channels,))]

    def _normed(self, call: Call, part: Part) -> list[Part]:
        """A norm hands the factor to its scale and shift."""
        a = call.arguments()
        if a["weight"] is None:
            raise UnheldError(f"a factor does not pass {call.where}")
        return [self._moves.aligned(part, a[key]) for key in ("weight", "bias") if a.get(key) is not None]

    def _batch_normed(self, call: Call, part: Part) -> list[Part]:
        assert part.region is not None
        a = call.arguments()
        if a["weight"] is None or any(not mask.all() for dim, mask in enumerate(part.region) if dim != 1):
            raise UnheldError(f"a factor does not pass {call.where}")
        refs = [a[key] for key in ("weight", "bias") if a.get(key) is not None]
        return [Part(ref.index, None, (part.region[1],)) for ref in refs]


def _joined(a: tuple[Mask, ...], b: tuple[Mask, ...]) -> tuple[Mask, ...]:
    """Both regions as one.

    Raises:
        LostError: they differ in more than one dimension, and neither holds the other.
    """
    if all(bool((one >= other).all()) for one, other in zip(a, b, strict=True)):
        return a
    if all(bool((one <= other).all()) for one, other in zip(a, b, strict=True)):
        return b
    if sum(not np.array_equal(one, other) for one, other in zip(a, b, strict=True)) > 1:
        raise LostError("the parts that it scales are no block")
    return tuple(one | other for one, other in zip(a, b, strict=True))


_HANDLERS: Mapping[str, Callable[[_Following, Call, Part], list[Part]]] = {
    "mul": _Following._product,
    "div": _Following._quotient,
    **dict.fromkeys(("add", "sub"), _Following._sum),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "linear"), _Following._multiplied),
    "convolution": _Following._convolved,
    **dict.fromkeys(("sum", "mean", "amax", "amin"), _Following._reduced),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), _Following._normed),
    **dict.fromkeys(
        ("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit",
         "_native_batch_norm_legit_no_training", "_batch_norm_with_update"),
        _Following._batch_normed,
    ),
}  # fmt: skip


__all__ = ["Demand", "Scaled", "UnheldError", "held", "size_scales"]
