"""Hands "these units have to be zero" (or at the mean of the others) backwards, operator by operator, to parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from espalier.edit.moves import LostError, Moves, Part, Region
from espalier.edit.norms import NormSite
from espalier.edit.operands import Operand, groups_of, origin
from espalier.edit.starts import Chosen, NotNeutralError, Place, Policy, Start, written
from espalier.graph.dims import axes_of
from espalier.graph.flow import operator_name
from espalier.graph.rules.registry import positive
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.trace import Call, Ref

_ZERO_AT_ZERO = frozenset(
    "relu gelu silu mish tanh abs hardtanh hardswish leaky_relu elu celu selu sin tan asin atan sinh asinh erf erfinv "
    "sqrt expm1 log1p sign sgn round floor ceil trunc softshrink hardshrink square native_dropout _prelu_kernel "
    "max_pool2d_with_indices max_pool3d_with_indices".split()
)
_LINEAR = frozenset(
    "neg avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d "
    "reflection_pad2d replication_pad1d replication_pad2d cumsum".split()
)
"""Operators that treat every unit alike and linearly; they work along other dimensions."""
_ZERO = Start("zero")


@dataclass(frozen=True)
class Task:
    """Units of the axis along one dimension of a value, as a call finds it, have to hold something."""

    value: int
    at: int
    """Number of the call that reads the value."""
    dim: int | None
    """None where the value does not know the axis."""
    region: Region
    want: Start


class Handing:
    """Hands what is asked of the units of one axis backwards through one trace.

    The answers come from a policy, which is shared between traces. With `left_out` the norms leave the units out of
    their statistics, so that what is in front of them does not matter.
    """

    def __init__(
        self,
        topology: Topology,
        number: int,
        prediction: TracePrediction,
        edited: frozenset[int],
        policy: Policy,
        tensors: Mapping[str, Tensor],
        sites: Sequence[NormSite],
        *,
        left_out: bool = False,
    ) -> None:
        self._topology = topology
        self._number = number
        self._dims = prediction.dims
        self._prediction = prediction
        self._flow = prediction.flow
        self._moves = Moves(prediction, topology.sizes, edited, number)
        self._policy = policy
        self._tensors = tensors
        self._norms = {max(site.calls): site for site in sites}
        self._left_out = left_out
        self._met: dict[tuple[object, ...], None] = {}
        self._hopeless: dict[tuple[object, ...], str] = {}
        """What cannot be had, whatever else is asked for, and why; no errors, whose tracebacks hold all that ran."""
        self._missing: tuple[int, set[tuple[object, ...]]] = (0, set())
        """What does not hold, at a state of the policy."""
        self._may_ask = True

    # --- Asking ------------------------------------------------------------------------------------------------------

    def need(self, task: Task) -> None:
        """Ask for something. Raises NotNeutralError, with nothing asked, if it cannot be had."""
        self.either([[task]])

    def either(self, alternatives: Sequence[Sequence[Task]]) -> None:
        """Ask for all tasks of the first alternative that can be had.

        Raises:
            NotNeutralError: that of the first one, if none can.
        """
        problem, final = "", True
        for tasks in alternatives:
            met, mark = len(self._met), self._policy.mark()
            try:
                self._run(tasks)
            except NotNeutralError as error:
                problem, final = problem or str(error), final and error.final
                if error.final and len(tasks) == 1:
                    self._hopeless[self._key(tasks[0])] = str(error)
                self._policy.back_to(mark)
                self._missing = (0, set())
                while len(self._met) > met:
                    self._met.popitem()
            else:
                return
        raise NotNeutralError(problem, final=final)

    def attempt(self, tasks: Sequence[Task]) -> None:
        """Ask for something, and leave it if it cannot be had."""
        try:
            self.either([tasks])
        except NotNeutralError:
            return

    def holds(self, task: Task) -> bool:
        """Whether something is so already, without asking for more."""
        key, met, mark, may_ask = self._key(task), len(self._met), self._policy.mark(), self._may_ask
        if self._missing[0] != mark:
            self._missing = (mark, set())
        if key in self._missing[1]:
            return False
        self._may_ask = False
        try:
            self._run([task])
        except NotNeutralError:
            self._missing[1].add(key)
            while len(self._met) > met:
                self._met.popitem()
            return False
        finally:
            self._may_ask = may_ask
        return True

    def asked_by(self, task: Task) -> list[tuple[Place, Start]]:
        """What a task would ask for by itself; nothing if it cannot be had."""
        policy, met, missing = self._policy, self._met, self._missing
        alone = Chosen()
        self._policy, self._met, self._missing = alone, {}, (0, set())
        try:
            self._run([task])
        except NotNeutralError:
            return []
        finally:
            self._policy, self._met, self._missing = policy, met, missing
        return alone.asked_since(0)

    def forget(self) -> None:
        """Forget what is known to hold: some start has changed."""
        self._met.clear()
        self._missing = (0, set())

    def _run(self, tasks: Sequence[Task]) -> None:
        pending = list(tasks)
        while pending:
            task = pending.pop()
            if task.dim is None or self._number not in axes_of(self._dims[task.value][task.dim]):
                raise NotNeutralError("something that is the same for all units is added or written")
            key = self._key(task)
            if key in self._hopeless:
                raise NotNeutralError(self._hopeless[key])
            if key not in self._met:
                self._met[key] = None
                pending.extend(self._handed(task))

    def _key(self, task: Task) -> tuple[object, ...]:
        region = None if task.region is None else tuple(mask.tobytes() for mask in task.region)
        return task.value, self._flow.version(task.value, task.at), task.dim, region, task.want

    # --- Handing on --------------------------------------------------------------------------------------------------

    def _handed(self, task: Task) -> list[Task]:
        call = self._flow.maker(task.value, task.at)
        if self._flow.is_stale(task.value, task.at, zeroed=task.want.how == "zero"):
            raise NotNeutralError(f"it is written in place through a view {call.where if call else ''}".rstrip())
        if call is None:
            self._ask(task)
            return []
        site = self._norms.get(call.index)
        if site is not None and task.value == site.result:
            return self._behind_statistics(task, site, call) if self._left_out else self._behind_norm(task, site, call)
        part = Part(task.value, task.dim, task.region)
        try:
            moved = self._moves.back(call, part)
        except LostError as problem:
            raise NotNeutralError(f"{problem} {call.where}") from None
        if moved is not None:
            return [Task(one.value, call.index, one.dim, one.region, task.want) for one in moved]
        found = self._by_operator(task, call)
        if found is None:
            state = "zero" if task.want.how == "zero" else "at the mean of the others"
            raise NotNeutralError(f"new units do not stay {state} {call.where}")
        return found

    def _dims_of(self, value: int) -> list[int]:
        return [dim for dim, term in enumerate(self._dims[value]) if self._number in axes_of(term)]

    def _ask(self, task: Task) -> None:
        name = self._flow.names.get(task.value)
        if name is None:
            raise NotNeutralError("it comes from the model's inputs or from constants")
        assert task.dim is not None
        if not task.want.over <= set(axes_of(self._dims[task.value][task.dim])):
            raise NotNeutralError(f"the mean of the others is not taken along one dimension of {name}")
        where = None if task.region is None else written(task.region[task.dim])
        mark = self._policy.mark()
        self._policy.ask((name, task.dim), Start(task.want.how, task.want.over, where, task.want.soft))
        if not self._may_ask and self._policy.mark() != mark:
            self._policy.back_to(mark)
            raise NotNeutralError(f"nothing asks {name} for it", final=False)

    def _by_operator(self, task: Task, call: Call) -> list[Task] | None:
        assert task.dim is not None
        name, zero = operator_name(call), task.want.how == "zero"
        if name in _LINEAR or (zero and name in _ZERO_AT_ZERO):
            return [self._same_place(task, call, call.args[0])] if call.outputs[0] == Ref(task.value) else None
        handler = _HANDLERS.get(name)
        if handler is not None:
            return handler(self, task, call)
        found = origin(self._prediction, call, task.dim, self._number)
        if found is None or call.outputs[0] != Ref(task.value):
            return None
        if zero and found.constant_bias:
            return None
        bias = [] if found.bias is None else [self._operand(task, call, found.bias)]
        if zero:
            return [*self._one_of(task, call, found.either), *bias]
        if len(found.either) != 1 or any(self._knows(ref, task.want.over) for ref in found.others):
            return None
        if found.constant_bias:
            return None
        return [self._operand(task, call, found.either[0]), *bias]

    def _knows(self, ref: Ref, axes: frozenset[int]) -> bool:
        return any(not axes.isdisjoint(axes_of(dim)) for dim in self._dims[ref.index])

    def _operand(self, task: Task, call: Call, operand: Operand) -> Task:
        """The same part of one dimension of an operand; its other dimensions count whole."""
        assert task.dim is not None
        region: Region = None
        if task.region is not None:
            masks = list(self._moves.whole(operand.ref.index))
            if len(masks[operand.dim]) == len(task.region[task.dim]):
                masks[operand.dim] = task.region[task.dim]
            region = tuple(masks)
        return Task(operand.ref.index, call.index, operand.dim, region, task.want)

    def _one_of(self, task: Task, call: Call, operands: Sequence[Operand]) -> list[Task]:
        """The task of the first operand that can be zero: activations first, so that scales stay as they are."""
        ordered = sorted(operands, key=lambda one: one.ref.index in self._flow.of_weights)
        tasks = [self._operand(task, call, one) for one in ordered]
        if len(tasks) == 1:
            return tasks
        self._first_of(tasks)
        return []

    def _first_of(self, tasks: Sequence[Task]) -> None:
        """One of several tasks: one that holds already, if there is any."""
        if any(self.holds(one) for one in tasks):
            return
        if not self._may_ask:
            raise NotNeutralError("none of the factors is zero", final=False)
        self.either([[one] for one in tasks])

    def _same_place(self, task: Task, call: Call, ref: Ref) -> Task:
        """The operand of an operator that works on every unit alike; other dimensions may have other sizes."""
        assert task.dim is not None
        if self._dims[ref.index][task.dim] != self._dims[task.value][task.dim]:
            raise NotNeutralError(f"its dimension changes {call.where}")
        return self._operand(task, call, Operand(ref, task.dim))

    def _aligned(self, task: Task, call: Call, ref: Ref) -> Task:
        part = self._moves.aligned(Part(task.value, task.dim, task.region), ref)
        return Task(part.value, call.index, part.dim, part.region, task.want)

    def _behind_norm(self, task: Task, site: NormSite, call: Call) -> list[Task]:
        """Units that are neutral in front of a norm hold its shift behind it."""
        assert task.dim is not None
        if site.bias is None:
            shift: list[Task] = []
        else:
            shift = [Task(self._prediction.tensors[site.bias], call.index, 0, None, task.want)]
        if task.want.how == "zero":
            # In front of a LayerNorm units are at the mean, which is asked for there.
            reading = min(call for call in site.calls if Ref(site.source) in self._flow.operands[call])
            source = [Task(site.source, reading, dim, None, task.want) for dim in self._dims_of(site.source)]
            return [*shift, *(source if site.kind == "zero" else [])]
        # The mean over the units of w x + b, with x of mean zero, is that of b if all w are equal.
        even = site.kind == "mean" and frozenset(axes_of(site.normal[-1])) == task.want.over and len(site.normal) == 1
        if not even or not _is_even(self._tensors[site.weight]):
            raise NotNeutralError(f"the scale of the norm in {site.module or 'the model'} in front of it is not even")
        if site.bias is not None and not bool(self._tensors[site.bias].any()):
            return [Task(one.value, one.at, one.dim, one.region, _ZERO) for one in shift]
        return shift

    def _behind_statistics(self, task: Task, site: NormSite, call: Call) -> list[Task]:
        """Units that a norm leaves out are zero behind it by its scale and shift; behind an RMSNorm as they are."""
        assert task.dim is not None
        if task.want.how != "zero" or site.kind == "reduced":
            raise NotNeutralError(f"new units do not stay zero {call.where}")
        bias = call.arguments().get("bias")
        factors = [] if site.weight == "" else [self._prediction.tensors[site.weight]]
        if site.kind == "zero":
            factors.append(site.source)
        if not factors:
            raise NotNeutralError(f"new units do not stay zero {call.where}")
        tasks = [Task(one, call.index, dim, None, task.want) for one in factors[:1] for dim in self._dims_of(one)]
        tasks += [] if bias is None else [self._aligned(task, call, bias)]
        return tasks

    # --- Operators by name -------------------------------------------------------------------------------------------

    def _sum(self, task: Task, call: Call) -> list[Task] | None:
        found = []
        for one in call.args[:2]:
            if not isinstance(one, Ref):
                if task.want.how == "zero" and one != 0:
                    return None
                continue
            operand = self._aligned(task, call, one)
            if operand.dim is not None:
                found.append(operand)
            elif task.want.how == "zero" or self._knows(one, task.want.over):
                return None
        return found

    def _product(self, task: Task, call: Call) -> list[Task] | None:
        operands = [one for one in call.args[:2] if isinstance(one, Ref)]
        if task.want.how != "zero":
            known = [one for one in operands if self._knows(one, task.want.over)]
            if len(known) > 1 and any(one.index in self._flow.of_weights for one in known):
                raise NotNeutralError(f"each of the others has a scale of its own {call.where}")
            return [self._aligned(task, call, known[0])] if len(known) == 1 else None
        tasks = [one for ref in operands if (one := self._aligned(task, call, ref)).dim is not None]
        tasks.sort(key=lambda one: one.value in self._flow.of_weights)
        if len(tasks) < 2:
            return tasks or None
        self._first_of(tasks)
        return []

    def _quotient(self, task: Task, call: Call) -> list[Task] | None:
        numerator, denominator = call.args[:2]
        if not isinstance(numerator, Ref):
            return None
        if task.want.how != "zero" and isinstance(denominator, Ref) and self._knows(denominator, task.want.over):
            return None
        return [self._aligned(task, call, numerator)]

    def _power(self, task: Task, call: Call) -> list[Task] | None:
        base, exponent = call.args[:2]
        positive_number = isinstance(exponent, (int, float)) and exponent > 0
        return [self._aligned(task, call, base)] if task.want.how == "zero" and positive_number else None

    def _where(self, task: Task, call: Call) -> list[Task] | None:
        if task.want.how != "zero":
            return None
        return [self._aligned(task, call, ref) for ref in call.args[1:3]]

    def _masked_fill(self, task: Task, call: Call) -> list[Task] | None:
        filled = task.want.how == "zero" and call.args[2] == 0
        return [self._aligned(task, call, call.args[0])] if filled else None

    def _padded(self, task: Task, call: Call) -> list[Task] | None:
        a = call.arguments()
        source = a["self"]
        assert task.dim is not None
        if self._dims[source.index][task.dim] == self._dims[task.value][task.dim]:
            zero = a["value"] == 0 or task.want.how != "zero"
        else:
            zero = task.want.how == "zero"  # constants beside the units, not in them
        return [Task(source.index, call.index, task.dim, None, task.want)] if zero else None

    def _reduced(self, task: Task, call: Call) -> list[Task] | None:
        """A sum or mean over other dimensions."""
        assert task.dim is not None
        source = call.args[0]
        rank = len(self._dims[source.index])
        chosen = call.arguments().get("dim") or list(range(rank))
        gone = {positive(dim, rank) for dim in ([chosen] if isinstance(chosen, int) else chosen)}
        left = list(range(rank)) if call.arguments().get("keepdim") else [n for n in range(rank) if n not in gone]
        dim = left[task.dim]
        if any(not task.want.over.isdisjoint(axes_of(self._dims[source.index][one])) for one in gone):
            return None
        return [self._operand(task, call, Operand(source, dim))]

    def _gated(self, task: Task, call: Call) -> list[Task] | None:
        """`glu`: the first half times a gate."""
        assert task.dim is not None
        dim = positive(call.arguments()["dim"], len(self._dims[task.value]))
        if task.want.how != "zero":
            return None
        source = call.args[0].index
        region = list(task.region or self._moves.whole(task.value))
        half = region[dim]
        region[dim] = np.concatenate([half, np.zeros(self._moves.shape(source)[dim] - len(half), dtype=np.bool_)])
        return [Task(source, call.index, task.dim, tuple(region), task.want)]

    def _looked_up(self, task: Task, call: Call) -> list[Task] | None:
        if task.dim != len(self._dims[task.value]) - 1:
            return None
        return [self._operand(task, call, Operand(call.args[0], 1))]

    def _batch_normed(self, task: Task, call: Call) -> list[Task] | None:
        """Zero only with a scale and a shift of zero."""
        a = call.arguments()
        if task.want.how != "zero" or task.dim != 1 or a["weight"] is None or a["bias"] is None:
            return None
        return [self._operand(task, call, Operand(a[key], 0)) for key in ("weight", "bias")]

    def _group_normed(self, task: Task, call: Call) -> list[Task] | None:
        """A whole new group of zeros, which normalises itself."""
        a = call.arguments()
        known = self._number in groups_of(self._prediction, call) and task.dim == 1
        if task.want.how != "zero" or not known:
            return None
        bias = [] if a["bias"] is None else [self._operand(task, call, Operand(a["bias"], 0))]
        return [self._operand(task, call, Operand(a["input"], 1)), *bias]

    def _normed_elsewhere(self, task: Task, call: Call) -> list[Task] | None:
        """A norm over other dimensions: of zeros, it gives its shift."""
        a = call.arguments()
        if task.want.how != "zero" or a.get("bias") is not None or call.outputs[0] != Ref(task.value):
            return None
        return [self._operand(task, call, Operand(a["input"], task.dim or 0))]

    def _weight_normed(self, task: Task, call: Call) -> list[Task] | None:
        """v g / |v|: g is zero, or v where the norm runs."""
        a = call.arguments()
        if task.want.how != "zero":
            return None
        along = task.dim == positive(a["dim"], len(self._dims[task.value]))
        return [self._operand(task, call, Operand(a["g"] if along else a["v"], task.dim or 0))]


Handler = Callable[[Handing, Task, Call], "list[Task] | None"]
_HANDLERS: Mapping[str, Handler] = {
    **dict.fromkeys(("add", "sub"), Handing._sum),
    "mul": Handing._product,
    "div": Handing._quotient,
    "pow": Handing._power,
    "where": Handing._where,
    "masked_fill": Handing._masked_fill,
    "constant_pad_nd": Handing._padded,
    **dict.fromkeys(("sum", "mean"), Handing._reduced),
    "glu": Handing._gated,
    "embedding": Handing._looked_up,
    **dict.fromkeys(
        ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit",
         "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_batch_norm_no_update"),
        Handing._batch_normed,
    ),
    "native_group_norm": Handing._group_normed,
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), Handing._normed_elsewhere),
    "_weight_norm_interface": Handing._weight_normed,
}  # fmt: skip


def _is_even(tensor: Tensor) -> bool:
    """Whether all entries are the same, up to rounding."""
    if tensor.device.type == "meta":
        return False
    least, most = torch.aminmax(tensor.detach())
    return bool(most - least <= 4 * torch.finfo(tensor.dtype).eps * most.abs())


__all__ = ["Handing", "Task"]
