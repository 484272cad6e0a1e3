"""Optimizer state under an edit: every tensor of it follows the index map of its parameter, or the edit is refused.

New entries start with first moments of zero. Their second moments are made of their own gradients over their first
steps (`espalier.edit.young`), and until then are the mean of their neighbours in the same tensor: `step` counts per
tensor, so that zero late in training would make the first hundred steps of Adam 3 to 6.5 times too large (no bias
correction is left to make up for it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, TypeAlias

from torch import Tensor
from torch.optim import LBFGS, Optimizer, RMSprop

from espalier.edit.tensors import Sources, gather, memory_order, neighbours_mean
from espalier.edit.young import AGE, ages
from espalier.errors import OptimizerError


class Start(Enum):
    """What the new entries of a state start from."""

    ZERO = "zero"  # means and directions of gradients
    MEAN = "mean"  # sizes of gradients or steps: the neighbours' mean
    VALUE = "value"  # the parameter's own new values
    NEWBORN = "newborn"  # ages
    KEPT = "kept"  # one number for the whole tensor


MASKED: Final = frozenset({Start.ZERO, Start.VALUE})
"""What is zero where a mask holds the parameter at zero."""

StateDims: TypeAlias = Callable[[int], tuple[int | None, ...]]


def _every(ndim: int) -> tuple[int | None, ...]:
    return tuple(range(ndim))


def _none(ndim: int) -> tuple[int | None, ...]:
    return ()


@dataclass(frozen=True)
class Rule:
    """How one state follows its parameter.

    `dims` maps the number of dimensions of the parameter to those that the state has, in order; None is a dimension
    that was reduced to size 1. If an edit multiplies entries of the parameter by c, and the network computes the same,
    their gradients are divided by c, and the state is multiplied by c to the `power`. Sizes of steps stay as they are.
    """

    start: Start
    dims: StateDims = _every
    power: int = 0


_ZERO: Final = Rule(Start.ZERO, power=-1)
_MEAN: Final = Rule(Start.MEAN, power=-2)
_STEP: Final = Rule(Start.MEAN)
_KEPT: Final = Rule(Start.KEPT, _none)

RULES: Final[Mapping[str, Rule]] = {
    "step": _KEPT,
    "momentum_buffer": _ZERO,  # SGD, RMSprop, Muon
    "exp_avg": _ZERO,  # Adam, AdamW, Adamax, NAdam, RAdam, SparseAdam, Adafactor of transformers
    "exp_avg_sq": _MEAN,  # Adam, AdamW, NAdam, RAdam, SparseAdam, Adafactor of transformers
    "max_exp_avg_sq": _MEAN,  # amsgrad
    "mu_product": _KEPT,  # NAdam
    "exp_inf": Rule(Start.ZERO, power=-1),  # Adamax: the largest of their own
    "square_avg": _MEAN,  # RMSprop, Adadelta
    "grad_avg": _ZERO,  # centered RMSprop
    "acc_delta": _STEP,  # Adadelta
    "sum": _MEAN,  # Adagrad
    "prev": _ZERO,  # Rprop: no previous sign, so that the first step is of the size below
    "step_size": _STEP,  # Rprop
    "ax": Rule(Start.VALUE, power=1),  # ASGD: the average of the parameter over time
    "eta": _KEPT,  # ASGD
    "mu": _KEPT,  # ASGD
    "variance": _MEAN,  # Adafactor, one dimension
    "row_var": Rule(Start.MEAN, lambda ndim: (*range(ndim - 1), None), power=-2),  # Adafactor
    "col_var": Rule(Start.MEAN, lambda ndim: (*range(ndim - 2), None, ndim - 1), power=-2),  # Adafactor
    "exp_avg_sq_row": Rule(Start.MEAN, lambda ndim: tuple(range(ndim - 1)), power=-2),  # the same
    "exp_avg_sq_col": Rule(
        Start.MEAN, lambda ndim: (*range(ndim - 2), ndim - 1), power=-2
    ),  # Adafactor of transformers
    "RMS": _KEPT,  # Adafactor of transformers
    AGE: Rule(Start.NEWBORN),
}


def check(optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raise OptimizerError if this is no optimizer of the model's parameters; some that it does not hold are fine."""
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(
            f"Expected a torch.optim.Optimizer, got {type(optimizer).__name__}; pass the optimizer itself, not its "
            "scheduler, its parameters or its class."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = [parameter for _, parameter in named_parameters]
    if not any(id(parameter) in held for parameter in parameters):
        raise OptimizerError(
            f"The {type(optimizer).__name__} optimizer holds {len(held)} parameters, but none of the "
            f"{len(parameters)} of the model; build it from model.parameters(), after moving the model to its device "
            "and before attaching, and pass that very model and optimizer."
        )


def plan_state(
    optimizer: Optimizer,
    parameter: Tensor,
    sources: Sources,
    new_value: Tensor,
    name: str = "a parameter",
    factor: Tensor | None = None,
    zero: Tensor | None = None,
) -> dict[str, Tensor]:
    """State entries that the parameter needs after the edit; nothing is changed, entries not named stay as they are.

    `parameter` is still of its old shape, `new_value` holds its new entries; both have the sources between them.
    `factor`, which broadcasts to the new shape, is what the edit multiplies the entries by. `zero`, of the new shape,
    is True where a mask holds or held the parameter at zero: directions are zero there, sizes of steps left alone.
    Raises OptimizerError for state that cannot follow: of a shape or kind that no rule explains.
    """
    if isinstance(optimizer, LBFGS) and optimizer.state and _is_resized(sources, factor):
        raise OptimizerError(
            f"LBFGS keeps directions over all parameters as flat vectors, which cannot follow the edit of {name}; "
            "build a new LBFGS after the edit, or train with an optimizer that keeps its state per parameter."
        )
    entries = aged(optimizer, parameter, sources)
    return followed(type(optimizer), entries, parameter, sources, new_value, name, factor, zero)


def aged(optimizer: Optimizer, parameter: Tensor, sources: Sources) -> dict[str, Any]:
    """The state of a parameter before an edit; with the ages of its entries, if new ones come."""
    state = dict(optimizer.state.get(parameter, {}))
    if AGE not in state and any(source is not None and bool((source < 0).any()) for source in sources):
        grown_up = ages(optimizer, parameter)
        state |= {} if grown_up is None else {AGE: grown_up}
    return state


def followed(
    kind: type[Optimizer],
    entries: Mapping[str, Any],
    parameter: Tensor,
    sources: Sources,
    new_value: Tensor,
    name: str,
    factor: Tensor | None,
    zero: Tensor | None,
) -> dict[str, Tensor]:
    """As `plan_state`, of some entries of the state of one parameter in an optimizer of that kind."""
    resized = _is_resized(sources, factor)
    if not resized and zero is None:
        return {}
    planned: dict[str, Tensor] = {}
    for key, value in entries.items():
        if not isinstance(value, Tensor) and not _holds_tensors(value):
            continue
        rule = _rule(key, value, parameter) if isinstance(value, Tensor) else None
        if rule is None and not resized:
            continue
        if rule is None:
            raise OptimizerError(
                f"{kind.__name__} state {key!r} of {name} is {_describe(value)}, which fits neither the "
                f"parameter of shape {tuple(parameter.shape)} nor a known factor of it, so it cannot follow an edit to "
                f"{tuple(new_value.shape)}; keep this parameter as it is, or clear optimizer.state of it before the "
                "edit, if it may start anew."
            )
        if rule.start is not Start.KEPT and (resized or rule.start in MASKED):
            planned[key] = _followed(value, rule, parameter, sources, new_value)
            if factor is not None:
                # RMSprop's momentum is of steps, not of gradients.
                power = 0 if (kind, key) == (RMSprop, "momentum_buffer") else rule.power
                planned[key].mul_(_state_factor(factor, rule, new_value, power).to(planned[key]))
            if zero is not None and rule.start in MASKED and planned[key].shape == zero.shape:
                planned[key].masked_fill_(zero, 0)
    return planned


def _is_resized(sources: Sources, factor: Tensor | None) -> bool:
    return factor is not None or any(source is not None for source in sources)


def _state_factor(factor: Tensor, rule: Rule, new_value: Tensor, power: int) -> Tensor:
    """`factor` to a power, in the dimensions that a state has; over those that it sums over, the mean."""
    result = factor.pow(power).expand(new_value.shape)
    dims = rule.dims(new_value.dim())
    for dim in reversed(range(new_value.dim())):
        if dim not in dims:
            result = result.mean(dim, keepdim=None in dims)
    return result


def check_shapes(optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raise OptimizerError if a known state does not have the shape that its parameter asks for.

    To be called after every edit and load: fused optimizers write past the end of state that is too small, and are
    silently wrong where its memory layout differs from the parameter's. Names are for the message only.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    for group, place, parameter in _held(optimizer):
        name = names.get(id(parameter), place)
        fused = bool(group.get("fused"))
        for key, value in optimizer.state.get(parameter, {}).items():
            rule = RULES.get(key, _KEPT)
            if not isinstance(value, Tensor) or rule.start is Start.KEPT or (value.dim() == 0 and not fused):
                continue
            expected = _state_shape(rule, parameter)
            if tuple(value.shape) != expected:
                raise OptimizerError(
                    f"{type(optimizer).__name__} state {key!r} of {name} should have shape {expected}, since the "
                    f"parameter has {tuple(parameter.shape)}, but it has {tuple(value.shape)}; load a state that was "
                    "saved with the model at this size, or clear optimizer.state of this parameter."
                )
            if fused and _layout(value) != _layout(parameter):
                raise OptimizerError(
                    f"{type(optimizer).__name__} state {key!r} of {name} has strides {value.stride()}, the parameter "
                    f"{parameter.stride()}; with fused=True they must be laid out alike in memory: replace the state "
                    "by a copy with the parameter's layout, or use fused=False."
                )


def dims_of_state(key: str, value: Tensor, parameter: Tensor) -> tuple[int | None, ...] | None:
    """The dimensions of the parameter that a state of it has, in order: None for one that was reduced to size 1.

    () for one number for the whole tensor; None where no rule explains the state.
    """
    rule = _rule(key, value, parameter)
    return None if rule is None else rule.dims(parameter.dim())


def _rule(key: str, value: Tensor, parameter: Tensor) -> Rule | None:
    """The rule that this state follows; None if nothing explains its shape."""
    known = RULES.get(key, _KEPT)
    elementwise = value.shape == parameter.shape
    if known.start is not Start.KEPT and tuple(value.shape) == _state_shape(known, parameter):
        return known
    if value.numel() == 1 and (key in RULES or value.dim() == 0 or not elementwise):
        return _KEPT
    if known.start is Start.KEPT and elementwise:  # a name that nobody told us about, of one entry per weight
        sizes = value.is_floating_point() and bool((value >= 0).all()) and bool(value.any())
        return _STEP if sizes else Rule(Start.ZERO)
    return None


def _followed(value: Tensor, rule: Rule, parameter: Tensor, sources: Sources, new_value: Tensor) -> Tensor:
    dims = rule.dims(parameter.dim())
    own_sources = [None if dim is None else sources[dim] for dim in dims]
    like = parameter if value.shape == parameter.shape else None
    if rule.start is Start.MEAN:
        return neighbours_mean(value, own_sources, like)
    return gather(value, own_sources, new_value if rule.start is Start.VALUE else 0.0, like)


def _state_shape(rule: Rule, parameter: Tensor) -> tuple[int, ...]:
    return tuple(1 if dim is None else parameter.shape[dim] for dim in rule.dims(parameter.dim()))


def _layout(tensor: Tensor) -> list[int]:
    return [dim for dim in memory_order(tensor) if tensor.shape[dim] > 1]


def _held(optimizer: Optimizer) -> Iterator[tuple[Mapping[str, Any], str, Tensor]]:
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            yield group, f"parameter {position} of group {number}", parameter


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensors(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(item) for item in value)
    return isinstance(value, Tensor)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__} that holds tensors"
