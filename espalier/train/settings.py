"""Ready-made combinations of a growing and a pruning method: growing, shrinking, constant; sparse training.

In the first three, growing and pruning take turns, half a period apart, so that new units have learnt before they are
judged, and a round of pruning comes last. What the network costs follows the pruning method's budget; growing goes
beyond it by a little each time, so that there is something to choose from. A `Course` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from espalier.errors import MethodError
from espalier.method import Method, find
from espalier.parts.budget import Budget, FLOPs, Parameters, Sparsity
from espalier.parts.clock import Epochs, Steps
from espalier.parts.goal import Direction
from espalier.parts.timing.amount import Shape
from espalier.parts.units.select import Scope
from espalier.parts.weights.densities import Density

Setting = Literal["growing", "shrinking", "constant"]
Measure = Literal["parameters", "flops"]
SETTINGS: tuple[str, ...] = get_args(Setting)

_SIZES = {"growing": 2.0, "shrinking": 0.5, "constant": 1.0}
_SHAPES: dict[str, Shape] = {"growing": "linear", "shrinking": "cubic", "constant": "constant"}
_NEEDS: dict[str, tuple[Direction, ...]] = {
    "growing": ("grow",),
    "shrinking": ("prune",),
    "constant": ("grow", "prune"),
}
_LIVE = 0.1
_RIGL_EVERY = Steps(100)
Order = Literal["alternating", "grow first", "prune first"]


@dataclass(frozen=True)
class Course:
    """When methods act in a setting, how much of the network changes at a time, and in which order."""

    periods: int = 16
    """In the whole training; methods act once in each until `until`."""
    until: float = 0.6
    """The part of the training after which nothing grows any more; pruning ends half a period later."""
    swing: float = 0.15
    """How far growing goes beyond what pruning leaves, or pruning below what growing restores, as a part of it."""
    order: Order = "alternating"
    """``grow first`` grows in the first half of the window and prunes in the second, ``prune first`` the other way."""

    def __post_init__(self) -> None:
        if isinstance(self.periods, bool) or not isinstance(self.periods, int) or self.periods < 2:
            raise MethodError(f"periods: expected a whole number of at least 2, found {self.periods!r}.")
        for name, part in (("until", self.until), ("swing", self.swing)):
            if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part < 1:
                raise MethodError(f"{name}: expected a part between 0 and 1, found {part!r}.")
        if self.order not in get_args(Order):
            raise MethodError(f"order: expected one of {', '.join(get_args(Order))}, found {self.order!r}.")

    @property
    def moments(self) -> tuple[float, ...]:
        """The parts of the training after which methods act, those that grow in ``alternating`` order."""
        return tuple(at / self.periods for at in range(1, int(self.until * self.periods + 1e-9) + 1))


_COURSE = Course()
_NO_OPTIONS: Mapping[Direction, Mapping[str, Any]] = MappingProxyType({})


def build(
    setting: str,
    grow: str | None,
    prune: str | None,
    *,
    total_steps: int,
    size: float | None = None,
    measure: Measure = "parameters",
    scope: Scope | None = None,
    axes: Sequence[str] | None = None,
    course: Course = _COURSE,
    options: Mapping[Direction, Mapping[str, Any]] = _NO_OPTIONS,
) -> list[Method]:
    """The methods of a setting, growing before pruning.

    Args:
        setting: one of `SETTINGS`.
        grow: name of a growing method; None for none (shrinking only).
        prune: name of a pruning method; None for none (growing only).
        total_steps: optimizer steps of the whole training.
        size: what the network costs in the end, as a fraction of what it costs at first; by default 2 when growing,
            0.5 when shrinking, 1 when constant. Of methods of single weights the part that stays live; by default 0.1.
            Methods that take no budget, such as ``npn``, take none.
        measure: what costs are counted in, ``parameters`` or ``flops``.
        scope: whether pruning cuts all axes in proportion (``axis``) or lets them compete (``global``); None for what
            the method does by itself.
        axes: names or patterns of the axes (of methods of layers: of the modules) to change; None for all that may.
        course: when they act, how far they swing and in which order; not for methods that take no budget.
        options: direction -> arguments of the method that grows, or prunes, beside those that follow from the setting,
            over which they go.

    Raises:
        MethodError: an unknown setting or method, a method that the setting needs is None, a size that is on the
            wrong side of 1, or one for a method that takes none.
    """
    if setting not in SETTINGS:
        raise MethodError(f"unknown setting {setting!r}: expected one of {', '.join(SETTINGS)}.")
    names: dict[Direction, str | None] = {"grow": grow, "prune": prune}
    for direction in _NEEDS[setting]:
        if names[direction] is None:
            raise MethodError(f"the setting {setting!r} needs a method to {direction}; name one, such as 'random'.")
    free = without_budget(grow, prune)
    if free is not None:
        return [_free(free, setting, names, options, size=size, measure=measure, scope=scope, axes=axes)]
    levels = {find(direction, name).method.level for direction, name in names.items() if name is not None}
    if "weights" in levels:
        if len(levels) > 1:
            raise MethodError(
                f"grow={grow!r} and prune={prune!r}: one changes units and the other one single weights, and a setting "
                "knows one budget for both; take two of a kind, or put them into an espalier.Session with budgets of "
                "their own."
            )
        if measure != "parameters" or scope == "axis":
            raise MethodError(
                f"methods of single weights, grow={grow!r} and prune={prune!r}, are measured in parameters and compete "
                f"over all tensors; expected measure='parameters' and scope='global', found {measure!r} and {scope!r}."
            )
        return _of_weights(
            setting, grow, prune, options, course, total_steps=total_steps, size=size, scope=scope, axes=axes
        )
    if "layers" in levels and (scope is not None or (axes is not None and len(levels) > 1)):
        raise MethodError(
            f"grow={grow!r} and prune={prune!r}: layers have no scope, and names of axes mean axes to one method and "
            "modules to the other; leave scope= and axes= out, or put the methods into an espalier.Session."
        )
    final = _SIZES[setting] if size is None else size
    if (setting == "growing" and final <= 1) or (setting == "shrinking" and not 0 < final < 1) or final <= 0:
        raise MethodError(
            f"size: the setting {setting!r} cannot end at {final!r} times the cost that it starts with; expected more "
            "than 1 for growing, less than 1 for shrinking."
        )
    return _taking_turns(
        setting, names, final, total_steps, measure=measure, scope=scope, axes=axes, course=course, options=options
    )


def _taking_turns(
    setting: str,
    names: Mapping[Direction, str | None],
    final: float,
    total_steps: int,
    *,
    measure: Measure,
    scope: Scope | None,
    axes: Sequence[str] | None,
    course: Course,
    options: Mapping[Direction, Mapping[str, Any]],
) -> list[Method]:
    """Growing and pruning in the windows that the course leaves them."""
    grow, prune, swing = names["grow"], names["prune"], course.swing
    both = grow is not None and prune is not None
    restoring = both and course.order == "prune first"
    period = max(2, total_steps // course.periods)
    turn, last = period // 2, max(period, int(course.until * total_steps))
    middle = (period + last) // 2 if both and course.order != "alternating" else None
    methods = []
    if grow is not None:
        if setting == "growing" or restoring:
            beyond = final * (1 + swing) if both and not restoring else final
            amount: dict[str, Any] = {"budget": _budget(measure, beyond), "shape": "linear"}
        else:
            amount = {"per_event": 1} if find("grow", grow).method.level == "layers" else {"amount": swing}
        first = middle + turn if restoring and middle is not None else period
        ends = last if middle is None or restoring else middle
        when = {"every": Steps(period), "start": Steps(first), "until": Steps(max(first, ends))}
        methods.append(_made("grow", grow, axes=axes, **{**amount, **when, **options.get("grow", {})}))
    if prune is not None:
        target: dict[str, Any] = {"budget": _budget(measure, final), "shape": _SHAPES[setting]}
        if restoring:
            target = {"amount": swing}
            if setting == "shrinking":
                target = {"budget": _budget(measure, final * (1 - swing)), "shape": "cubic"}
        if find("prune", prune).method.level == "units":
            target["scope"] = scope
        first = period + turn if middle is None else period if restoring else middle + turn
        ends = last + turn if middle is None or not restoring else middle
        when = {"every": Steps(period), "start": Steps(first), "until": Steps(max(first, ends))}
        methods.append(_made("prune", prune, axes=axes, **{**target, **when, **options.get("prune", {})}))
    return methods


def sparse_training(
    grow: str = "rigl",
    prune: str = "weights-magnitude",
    *,
    sparsity: float = 0.9,
    density: Density = "erk",
    fraction: float = 0.3,
    every: Steps | Epochs = _RIGL_EVERY,
    until: float = 0.75,
    axes: Sequence[str] | None = None,
) -> list[Method]:
    """Training at a constant number of live weights: random masks at first, then prune some and grow as many, again.

    With the defaults this is RigL, with ``grow="set"`` SET. Evci et al. 2020 (arXiv:1911.11134).

    Args:
        grow: name of a growing method of the level ``weights``.
        prune: name of a pruning method of that level.
        sparsity: the fraction of weights that is masked, from the first step on.
        density: how live weights are shared out among parameters.
        fraction: of the live weights of each parameter, what goes and comes at first; it falls to zero by a cosine.
        every: steps(n) or epochs(n).
        until: the fraction of the training after which masks stay as they are.
        axes: names or patterns of parameters; None for all matrices and filters.

    Raises:
        MethodError: an unknown method, or an argument that is not what it should be.
    """
    target, when = Sparsity(sparsity), {"every": every, "until": until, "start": 0.0, "axes": axes}
    return [
        _made("prune", "weights-random", budget=target, density=density, axes=axes),
        _made("prune", prune, amount=fraction, fading=True, density="present", **when),
        _made("grow", grow, budget=target, density=density, **when),
    ]


def without_budget(grow: str | None, prune: str | None) -> Direction | None:
    """Which of two methods decides by itself how large the network becomes, as those with gates do; None if neither.

    Raises MethodError for an unknown method.
    """
    named: tuple[tuple[Direction, str | None], ...] = (("grow", grow), ("prune", prune))
    return next((way for way, name in named if name is not None and not find(way, name).by_budget), None)


def check_alone(direction: Direction, setting: str, names: Mapping[Direction, str | None], size: float | None) -> None:
    """Raise MethodError for what does not go with a method that takes no budget: another method, or a size."""
    name = names[direction]
    other = next((f"{way}={one!r}" for way, one in names.items() if way != direction and one is not None), None)
    if other is not None or _NEEDS[setting] != (direction,):
        wanted = "growing" if direction == "grow" else "shrinking"
        raise MethodError(
            f"the {direction} method {name!r} decides by itself which units there are and works alone, in the setting "
            f"{wanted!r}; found the setting {setting!r} with {other or 'no other method'}."
        )
    if size is not None:
        raise MethodError(
            f"the {direction} method {name!r} takes no size, since its penalty decides how large the network becomes; "
            f"found size={size!r}. Leave it out, or give the method another penalty= in an espalier.Session."
        )


def _free(
    direction: Direction,
    setting: str,
    names: Mapping[Direction, str | None],
    options: Mapping[Direction, Mapping[str, Any]],
    *,
    size: float | None,
    measure: Measure,
    scope: Scope | None,
    axes: Sequence[str] | None,
) -> Method:
    """A method that takes no budget, with its own stages."""
    check_alone(direction, setting, names, size)
    if measure != "parameters" or scope is not None:
        raise MethodError(
            f"the {direction} method {names[direction]!r} takes no budget; leave measure= and scope= out, found "
            f"{measure!r} and {scope!r}."
        )
    return _made(direction, str(names[direction]), axes=axes, **options.get(direction, {}))


def _of_weights(
    setting: str,
    grow: str | None,
    prune: str | None,
    options: Mapping[Direction, Mapping[str, Any]],
    course: Course,
    *,
    total_steps: int,
    size: float | None,
    scope: Scope | None,
    axes: Sequence[str] | None,
) -> list[Method]:
    live = _LIVE if size is None else size
    if setting == "growing" or not 0 < live < 1 or (setting == "shrinking") != (grow is None) or prune is None:
        raise MethodError(
            f"methods of single weights, grow={grow!r} and prune={prune!r}, at size={live!r}: 'shrinking' takes one "
            "that prunes and 'constant' both; the size is the part of the weights that stays live, less than 1."
        )
    if grow is not None:
        if options:
            raise MethodError(f"grow={grow!r} and prune={prune!r} together take no options, found {dict(options)!r}.")
        every = Steps(max(2, total_steps // course.periods))
        return sparse_training(grow, prune, sparsity=1 - live, every=every, until=course.until, axes=axes)
    density = {} if scope is None else {"density": scope}
    ready: dict[str, Any] = {"budget": Sparsity(1 - live), "axes": axes, **density}
    return [_made("prune", prune, **{**ready, **options.get("prune", {})})]


def _budget(measure: Measure, fraction: float) -> Budget:
    if measure not in get_args(Measure):
        raise MethodError(f"measure: expected one of {', '.join(get_args(Measure))}, found {measure!r}.")
    return (Parameters if measure == "parameters" else FLOPs)(fraction, of="initial")


def _made(direction: Direction, name: str, **options: Any) -> Method:
    try:
        return find(direction, name).make(**options)
    except TypeError as error:
        raise MethodError(
            f"the {direction} method {name!r} does not take the arguments that all of them share "
            f"(espalier.methods.common): {error}."
        ) from error


__all__ = [
    "SETTINGS",
    "Course",
    "Measure",
    "Order",
    "Setting",
    "build",
    "check_alone",
    "sparse_training",
    "without_budget",
]
