"""The removal oracle: a network from which units are removed is compared with one in which they are set to zero.

Setting every entry of a unit to zero, in all parameters and buffers, leaves its positions in the activations empty:
they are zero and nothing reads them. An operator that takes statistics over them (a norm, a mean, a softmax) still
counts them, though, which a network without the unit would not. `Emptied` therefore runs such operators over the other
positions only. Which positions are empty is found *by value*: those that are zero everywhere, and are not in the
untouched network. The oracle so relies on the positions of units in parameters, and on nothing that the topology says
of activations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from oracles import call
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.graph.named_tensors import tensor_table
from espalier.graph.trees import flatten_tensors
from espalier.structure import Structure

aten = torch.ops.aten
TOLERANCE = 1e-9
Units = Mapping[str, Sequence[int]]

_RANDOM_MASKS = {aten.bernoulli_.float, aten.bernoulli.p, aten.bernoulli.default}
_BY_A_NUMBER = {aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar, aten.div.Tensor,
                aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar}  # fmt: skip
_NARROW = {torch.float32, torch.float16, torch.bfloat16}
_LARGEST = {aten.amax.default, aten.max.default, aten.max.dim, aten.argmax.default, aten.topk.default,
            aten.logsumexp.default}  # fmt: skip
_SMALLEST = {aten.amin.default, aten.min.default, aten.min.dim, aten.argmin.default}
_MOMENTS = {aten.mean.default, aten.mean.dim, aten.var.correction, aten.std.correction, aten.var_mean.correction,
            aten.std_mean.correction}  # fmt: skip
_SOFTMAX = {aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default}
_BATCH_NORM = {aten.native_batch_norm.default, aten._native_batch_norm_legit.default,
               aten._native_batch_norm_legit.no_stats}  # fmt: skip
_NOT_ZERO_AT_ZERO = frozenset(
    "add sub rsub exp sigmoid cos softplus hardsigmoid reciprocal rsqrt log clamp clamp_min".split()
)
"""Elementwise operators that make something else of a zero, where the other operand has one position for all."""


class Held(TorchDispatchMode):
    """Runs a network so that two runs can be compared: no dropout, and float64 stays float64.

    Code that computes a norm or a softmax in float32 would round to 1e-7, and a change of 1e-9 would not be seen.

    Args:
        constants: what activations are multiplied by, in order, in place of the run's own numbers: the scale of a
            softmax follows the size of a head in some code.
    """

    def __init__(self, constants: Sequence[float] | None = None) -> None:
        super().__init__()
        self._constants = constants
        self._made: dict[int, Tensor] = {}
        """Tensors of no dimension that code made from numbers alone, by id."""
        self.constants: list[float] = []
        """The numbers that activations were multiplied or divided by in this run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return self.run(func, args, dict(kwargs or {}))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _RANDOM_MASKS:
            return args[0].fill_(1) if func is aten.bernoulli_.float else torch.ones_like(args[0])
        if func is aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if func is aten._to_copy.default and args[0].dtype == torch.float64 and kwargs.get("dtype") in _NARROW:
            kwargs["dtype"] = torch.float64
        if func in _BY_A_NUMBER and not isinstance(args[1], Tensor):
            args = (args[0], self._constant(args[1]), *args[2:])
        elif func in _BY_A_NUMBER and id(args[1]) in self._made and id(args[0]) not in self._made:
            args = (args[0], torch.full_like(args[1], self._constant(float(args[1]))), *args[2:])
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            scale = kwargs.get("scale")
            kwargs["scale"] = self._constant(args[0].shape[-1] ** -0.5 if scale is None else scale)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not result.dim() and self._from_numbers(func, args):
            self._made[id(result)] = result
        return result

    def _from_numbers(self, func: Any, args: tuple[Any, ...]) -> bool:
        tensors = [one for one in args if isinstance(one, Tensor)]
        return func is aten.lift_fresh.default or all(id(one) in self._made for one in tensors)

    def _constant(self, number: float) -> float:
        self.constants.append(number)
        place = len(self.constants) - 1
        return self._constants[place] if self._constants is not None and place < len(self._constants) else number


class _Watched(Held):
    """Numbers the places at which positions along a dimension are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.zero: list[Tensor] = []
        """For every place: which positions are zero everywhere."""

    def empty(self, x: Tensor, dim: int) -> Tensor | None:
        """Which positions of `x` along `dim` are empty; None if none is."""
        zero = ~x.detach().movedim(dim, 0).reshape(x.shape[dim], -1).ne(0).any(1)
        self.zero.append(zero)
        empty = self.judged(len(self.zero) - 1, zero)
        return empty if empty is not None and bool(empty.any()) and not bool(empty.all()) else None

    def judged(self, place: int, zero: Tensor) -> Tensor | None:
        """Which of the zero positions are empty."""
        return None

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if func in _MOMENTS:
            return self._over_living(func, args, kwargs, _dims(func, args, kwargs))
        if func in _SOFTMAX:
            x, dim = args[0], args[1]
            return self._put_back(
                x, [dim], lambda small, _: super(_Watched, self).run(func, (small, *args[1:]), kwargs)
            )
        if func in _LARGEST | _SMALLEST:
            worst = -float("inf") if func in _LARGEST else float("inf")
            return super().run(func, (self._filled(args[0], _dims(func, args, kwargs), worst), *args[1:]), kwargs)
        if func in (aten.native_layer_norm.default, aten._fused_rms_norm.default):
            return self._layer_norm(func, args, kwargs)
        if func is aten.native_group_norm.default:
            return self._group_norm(func, args, kwargs)
        if func in _BATCH_NORM and _trains(func, args):
            return self._batch_norm(func, args, kwargs)
        if name == "div" and isinstance(args[1], Tensor) and args[1].dim():
            # what is empty divided by its sum, which is empty too
            return super().run(func, (args[0], args[1].masked_fill((args[0] == 0) & (args[1] == 0), 1)), kwargs)
        if name in _NOT_ZERO_AT_ZERO and isinstance(args[0], Tensor) and args[0].is_floating_point():
            return self._emptied_again(func, args, kwargs)
        return super().run(func, args, kwargs)

    def _living(self, x: Tensor, dims: Iterable[int]) -> dict[int, Tensor]:
        """The positions that are not empty, for every dimension that has empty ones."""
        found = {dim % x.dim(): self.empty(x, dim) for dim in dims}
        return {dim: (~empty).nonzero().flatten() for dim, empty in found.items() if empty is not None}

    def _over_living(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dims: Sequence[int]) -> Any:
        small = _chosen(args[0], self._living(args[0], dims))
        return super().run(func, (small, *args[1:]), kwargs)

    def _put_back(self, x: Tensor, dims: Iterable[int], run: Callable[[Tensor, Mapping[int, Tensor]], Any]) -> Any:
        """`run` on what is not empty; its first result at the full size again, zero where `x` is empty."""
        living = self._living(x, dims)
        result = run(_chosen(x, living), living)
        if not living:
            return result
        first = result[0] if isinstance(result, tuple) else result
        full = x.new_zeros(x.shape, dtype=first.dtype)
        places = [living.get(dim, torch.arange(size)) for dim, size in enumerate(x.shape)]
        full[torch.meshgrid(*places, indexing="ij")] = first
        return (full, *result[1:]) if isinstance(result, tuple) else full

    def _filled(self, x: Tensor, dims: Sequence[int], value: float) -> Tensor:
        for dim in dims:
            empty = self.empty(x, dim)
            if empty is not None:
                x = x.index_fill(dim, empty.nonzero().flatten(), value)
        return x

    def _layer_norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, shape = args[0], list(args[1])
        first = x.dim() - len(shape)

        def run(small: Tensor, living: Mapping[int, Tensor]) -> Any:
            own = {dim - first: keep for dim, keep in living.items()}
            rest = [_chosen(one, own) if isinstance(one, Tensor) else one for one in args[2:]]
            return super(_Watched, self).run(func, (small, list(small.shape[first:]), *rest), kwargs)

        return self._put_back(x, range(first, x.dim()), run)

    def _group_norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight, bias, samples, channels, _, groups, eps = args
        empty = self.empty(x, 1)
        if empty is None:
            return super().run(func, args, kwargs)
        parts = x.reshape(samples, groups, channels // groups, -1)
        counted = (~empty).to(x.dtype).reshape(1, groups, -1, 1)
        number = (counted.sum((2, 3)) * parts.shape[3]).clamp_min(1)
        mean = (parts * counted).sum((2, 3)) / number
        apart = (parts - mean[:, :, None, None]) * counted
        rstd = ((apart**2).sum((2, 3)) / number + eps).rsqrt()
        result = (apart * rstd[:, :, None, None]).reshape(x.shape)
        per_channel = (1, channels, *[1] * (x.dim() - 2))
        if weight is not None:
            result = result * weight.reshape(per_channel)
        if bias is not None:
            result = result + bias.reshape(per_channel)
        return result, mean, rstd

    def _batch_norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        dims = [dim for dim in range(x.dim()) if dim != 1]
        return self._put_back(x, dims, lambda small, _: super(_Watched, self).run(func, (small, *args[1:]), kwargs))

    def _emptied_again(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is empty stays empty: `x - x.mean(1, keepdim=True)` would fill it, and the variance count it."""
        x, others = args[0], [one for one in args[1:] if isinstance(one, Tensor)]
        alone = [
            dim for dim in range(x.dim()) if x.shape[dim] > 1 and all(_single(one, dim - x.dim()) for one in others)
        ]
        empty = {dim: self.empty(x, dim) for dim in alone}
        result = super().run(func, args, kwargs)
        for dim, where in empty.items():
            if where is not None and result.shape == x.shape:
                result.index_fill_(dim, where.nonzero().flatten(), 0)
        return result


class Emptied(_Watched):
    """Runs a network in which units were set to zero, as if their positions were not there.

    Args:
        untouched: what a run of the untouched network saw: positions that are zero there too are no empty ones.
        always: what a run with other weights saw, if there was one: positions that are not zero there are not empty.
    """

    def __init__(self, untouched: Sequence[Tensor], always: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self._untouched, self._always = untouched, always

    def judged(self, place: int, zero: Tensor) -> Tensor | None:
        for seen, wanted in ((self._untouched, False), (self._always, True)):
            # networks that choose by value may take another path
            if seen is not None and place < len(seen) and seen[place].shape == zero.shape:
                zero = zero & (seen[place] == wanted)
        return zero


class RemovalOracle:
    """What a network has to compute once some of its units are removed. Made before the edit; keeps copies.

    Args:
        structure: of the network as it is before the edit, in float64.
        units: axis -> the units that will be removed.
    """

    def __init__(self, structure: Structure, units: Units) -> None:
        self._example = structure.example
        self._original = copy.deepcopy(structure.model)
        self._emptied = emptied(structure, units)
        self._constants: dict[bool, list[float]] = {}
        self._expected = {train: self._outputs(train, confirm=False) for train in (False, True)}
        self._confirmed = False

    def errors(self, model: nn.Module, hold_constants: bool = False) -> dict[bool, float]:
        """The largest difference to the outputs of `model` in eval and in train mode, relative to the largest one.

        `hold_constants`: with the numbers that activations are multiplied by as they were before the edit.
        """
        found = {}
        for train, expected in self._expected.items():
            mode = Held(self._constants[train] if hold_constants else None)
            found[train] = difference(held_outputs(model, self._example, train, mode), expected)
        if max(found.values()) <= TOLERANCE or self._confirmed:
            return found
        # a living unit may be zero everywhere by chance: look again with other weights
        self._confirmed = True
        self._expected = {train: self._outputs(train, confirm=True) for train in (False, True)}
        return self.errors(model, hold_constants)

    def error(self, model: nn.Module) -> float:
        """The larger of both."""
        return max(self.errors(model).values())

    def _outputs(self, train: bool, confirm: bool) -> list[Tensor]:
        watched = _Watched()
        held_outputs(self._original, self._example, train, watched)
        self._constants[train] = watched.constants
        always = None
        if confirm:
            other = Emptied(watched.zero)
            held_outputs(_signs_flipped(self._emptied), self._example, train, other)
            always = other.zero
        return held_outputs(self._emptied, self._example, train, Emptied(watched.zero, always))


def emptied(structure: Structure, units: Units) -> nn.Module:
    """A copy of the model in which every entry of these units is zero, in parameters and buffers."""
    model = copy.deepcopy(structure.model)
    tensors = tensor_table(model).tensors
    with torch.no_grad():
        for name, chosen in units.items():
            for slot in structure.axes[name].slots:
                if slot.role != "variance":  # has to stay positive
                    tensors[slot.tensor].index_fill_(slot.dim, torch.tensor(slot.index(chosen)), 0)
    return model


def held_outputs(model: nn.Module, example: Any, train: bool, mode: Held | None = None) -> list[Tensor]:
    """All floating-point outputs, in train or eval mode, without dropout; the model is left as it was."""
    model = copy.deepcopy(model).train(train)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), mode or Held():
        torch.manual_seed(0)
        result = call(model, example)
    return [tensor for _, tensor in flatten_tensors(result, "output") if tensor.is_floating_point()]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of the same output; infinite for NaN or other shapes."""
    if [one.shape for one in found] != [one.shape for one in expected]:
        return float("inf")
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if not ours.numel() or torch.equal(ours, theirs):
            continue
        finite = torch.isfinite(theirs)
        if not bool((finite | (ours == theirs)).all()) or not bool(finite.any()):  # an infinity may be the same
            return float("inf")
        apart, scale = float((ours - theirs)[finite].abs().max()), float(theirs[finite].abs().max())
        worst = max(worst, apart / scale if apart == apart and scale else float("inf"))
    return worst


def corruptions(structure: Structure) -> list[tuple[str, int]]:
    """Every parameter and dimension along which something is read from more than one position."""
    found = {
        (tensor, dim): None
        for record in structure.topology.axes.values()
        for tensor, dim, role in record.slots
        if role == "contract" and structure.topology.shape(tensor)[dim] > 1
    }
    return [place for place in found if place[0] in structure.topology.parameters]


def _signs_flipped(model: nn.Module) -> nn.Module:
    """A copy with other weights of the same size, zero where these are."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(torch.randint(0, 2, parameter.shape) * 2 - 1)
    return model


def _dims(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
    """The dimensions that a reduction runs over."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    dims = given.get("dim", -1 if func is aten.topk.default else None)
    if dims is None or (not isinstance(dims, int) and not len(dims)):
        return list(range(args[0].dim()))
    return [dims] if isinstance(dims, int) else list(dims)


def _trains(func: Any, args: tuple[Any, ...]) -> bool:
    return bool(args[3] if func is aten._native_batch_norm_legit.no_stats else args[5])


def _chosen(x: Tensor, living: Mapping[int, Tensor]) -> Tensor:
    for dim, keep in living.items():
        x = x.index_select(dim, keep)
    return x


def _single(x: Tensor, dim: int) -> bool:
    """Whether `x` has one position for all along a dimension counted from the end."""
    return x.dim() < -dim or x.shape[dim] == 1
