"""A method is a frozen value made of parts: score, selection, initialiser and schedule. And the registry of methods.

A method proposes a plan and changes nothing; the session disposes. A new one is one file: a function that puts parts
together, under `@register`. Packages of others register theirs through an entry point of the group
``espalier.methods`` that names a module; it is imported when methods are first looked up.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ParamSpec, Protocol, get_args

import torch
from torch import Tensor

from espalier.edit.depth_edits import DepthEdit
from espalier.edit.plan import Plan, Remask, Resize
from espalier.errors import MethodError
from espalier.parts.budget import Sparsity
from espalier.parts.candidate import seeded
from espalier.parts.clock import Steps
from espalier.parts.depth.places import Places
from espalier.parts.depth.select import Rank
from espalier.parts.gates.gating import Gating, Planner
from espalier.parts.goal import Direction, Goal, Level, Scores, Selection
from espalier.parts.init import Init, Neutral
from espalier.parts.memory import Memory
from espalier.parts.score import Context, Score, check_layers, check_scores, derived_seed, spared
from espalier.parts.timing.recovery import Accept, Recovery
from espalier.parts.timing.schedule import Schedule
from espalier.parts.units.rounding import check_round_to
from espalier.parts.units.select import Select
from espalier.parts.weights.keep import Keep, check_entries

ENTRY_POINTS = "espalier.methods"
_SHIPPED = ("espalier.grow", "espalier.prune")
"""What imports all methods of this package; by name, since they stand below this module."""


class Penalty(Protocol):
    """A regulariser: what a method adds to the training loss."""

    def __call__(self, context: Context, /) -> Tensor | None:
        """A scalar to add to the loss of this step; None for nothing."""


@dataclass(frozen=True)
class Method:
    """One way to grow or to prune. Frozen; `repr` gives an expression of parts that evaluates to an equal value."""

    name: str
    direction: Direction
    score: Score
    select: Select | Keep
    schedule: Schedule
    init: Init = field(default_factory=Neutral)
    penalty: Penalty | None = None
    memory: Callable[[], Memory] | None = None
    """Makes what the method remembers between steps, once per session; None: nothing."""
    gating: Gating | None = None
    """How the training loss is evaluated, if not simply."""
    planner: Planner | None = None
    """Makes the whole plan of an event, in place of score, selection and initialiser."""
    recovery: Recovery = field(default_factory=Recovery)
    accept: Accept | None = None
    """What the held-out loss has to say for an event to be kept; None: it is kept."""
    grace: Steps | None = None
    """Units that came less than so many steps ago are not pruned."""
    axes: Sequence[str] | None = None
    """Names or patterns (`fnmatch`) of the axes to change; None: all that may change."""
    min_fraction: float = 0.1
    """Pruning leaves at least this part of the units that each axis had when the network was attached."""
    round_to: int = 1
    """Axes that change get sizes at which all matrices divide by this (`espalier.parts.units.rounding`)."""
    uniform: bool = False
    """Whether axes that play the same role in repeated layers keep one size (`espalier.parts.units.where.alike`)."""
    level: Level = "units"
    """``units`` of axes; or single ``weights``: scores have the shapes of parameters, `axes` are names of parameters,
    and the selection is a `Keep`; or whole ``layers`` and cells: `places` lists what may go or come, each has one
    score, `axes` are names of modules, and the selection is a `Rank`."""
    places: Places | None = None
    """At the level ``layers``: what may go or come, and what new layers are."""
    paper: str = field(default="", repr=False, compare=False)
    description: str = field(default="", repr=False, compare=False)
    """One line."""

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise MethodError(f"{self.name}: expected direction 'grow' or 'prune', found {self.direction!r}.")
        if isinstance(self.axes, str):
            raise MethodError(f"{self.name}: axes is a list of names or patterns; write axes=[{self.axes!r}].")
        if self.axes is not None:
            object.__setattr__(self, "axes", tuple(self.axes))
        if not 0 <= self.min_fraction <= 1:
            raise MethodError(f"{self.name}: expected min_fraction from 0 to 1, found {self.min_fraction!r}.")
        for what, value, kinds in (
            ("recovery", self.recovery, Recovery),
            ("accept", self.accept, (Accept, type(None))),
            ("grace", self.grace, (Steps, type(None))),
        ):
            if not isinstance(value, kinds):
                raise MethodError(f"{self.name}: {what}: found {value!r}; see espalier.methods.common.")
        check_round_to(self.round_to)
        self._check_level()

    def _check_level(self) -> None:
        if self.level not in get_args(Level):
            raise MethodError(f"{self.name}: expected level 'units', 'weights' or 'layers', found {self.level!r}.")
        single, budget = self.level == "weights", self.schedule.amount.budget
        whole = self.level == "layers"
        if isinstance(self.select, Keep) != single or isinstance(self.select, Rank) != whole:
            raise MethodError(f"{self.name}: the level {self.level!r} does not go with the selection {self.select!r}.")
        if isinstance(budget, Sparsity) != (single and self.schedule.amount.lasts):
            wanted = "Sparsity(0.9), for one," if single else "parameters, FLOPs, units or time"
            raise MethodError(f"{self.name}: a budget of {wanted} is for the level {self.level!r}, found {budget!r}.")
        if (self.places is not None) != whole:
            raise MethodError(f"{self.name}: places= lists layers, for the level 'layers' and for no other.")
        triggers = [one for one in self.schedule.triggers if "units" in one.needs]
        if self.level != "units" and triggers:
            raise MethodError(f"{self.name}: {triggers[0]!r} looks at units of axes; give one that looks at losses.")
        others = (
            single and not isinstance(self.init, Neutral), self.grace is not None, self.min_fraction,
            self.round_to != 1, self.uniform, self.recovery.slows,
        )  # fmt: skip
        if self.level != "units" and any(others):
            raise MethodError(
                f"{self.name}: init, grace, min_fraction, round_to, uniform and rates of new units are for the level "
                "'units'."
            )

    def propose(self, context: Context, goal: Goal) -> Plan:
        """The plan that this method would carry out; changes nothing.

        Raises:
            MethodError: the scores are no numbers or do not fit the axes.
        """
        if self.planner is not None:
            return self.planner(context, goal)
        scores = self.score(context, goal)
        if isinstance(self.select, Keep):
            check_entries(scores, goal, self.name)
            chosen_weights = self.select(scores, goal)
            changed = {
                name: live for name, live in chosen_weights.items() if not torch.equal(live, goal.weights[name].live)
            }
            return Plan((), seed=context.seed, masks=tuple(Remask.of(name, live) for name, live in changed.items()))
        check_scores(scores, context, goal, self.name)
        if self.level == "layers":
            check_layers(scores, goal, self.name)
            return self._of_layers(context, goal, self.select(scores, goal), scores)
        chosen = self.select(spared(scores, goal), goal)
        start = self.init(context, chosen, scores)
        if self.direction == "prune":
            edits = tuple(Resize(axis, remove=units) for axis, units in chosen.items())
        else:
            edits = tuple(Resize(axis, add=len(units)) for axis, units in chosen.items())
        return Plan(edits, seed=context.seed, values=start.values, deltas=start.deltas)

    def _of_layers(self, context: Context, goal: Goal, chosen: Selection, scores: Scores) -> Plan:
        """The plan in which these layers go or come; what they draw follows the seed."""
        edits: list[DepthEdit] = []
        first: dict[str, int] = {}
        for name in chosen:
            first[name] = len(edits)
            edits += seeded(goal.layers[name], derived_seed(context.seed, name))
        resizes = tuple(one for name in chosen for one in goal.layers[name].resizes)
        units = {one.axis: tuple(range(one.add)) for one in resizes}
        layers = {name: units for name, units in chosen.items() if not goal.layers[name].resizes}
        start = self.init(context, {**layers, **units}, scores)
        return Plan(
            resizes,
            seed=context.seed,
            values=start.values,
            deltas=start.deltas,
            depth=tuple(edits),
            starts={first[name]: values for name, values in start.layers.items()},
        )


P = ParamSpec("P")


@dataclass(frozen=True)
class Entry:
    """A registered method."""

    make: Callable[..., Method]
    """The function that makes it; every argument has a default."""
    method: Method
    """The method with all defaults, name, paper and description included."""

    @property
    def by_budget(self) -> bool:
        """Whether it takes the arguments that all methods share, a budget first of all; False where gates decide."""
        return self.method.planner is None

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The method's own arguments -> defaults; those that all methods share are in `espalier.methods.common`."""
        arguments = inspect.signature(self.make).parameters.values()
        return {one.name: one.default for one in arguments if one.kind is not one.VAR_KEYWORD}


class _Registry:
    """Methods by direction and name; those of this package and of others are imported once they are asked for."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], Entry] = {}
        self._loaded = False
        self._files: set[Path] = set()

    def add(self, entry: Entry) -> None:
        if not (entry.make.__module__ or "").startswith("espalier.methods."):
            _import_shipped()  # so that who takes a name of theirs is refused, and not they
        key = (entry.method.direction, entry.method.name)
        if key in self._entries:
            other = self._entries[key].make
            raise MethodError(
                f"there is a {key[0]} method {key[1]!r} already, from {other.__module__}; give this one another name."
            )
        self._entries[key] = entry

    def entries(self) -> Mapping[tuple[str, str], Entry]:
        _import_shipped()
        if not self._loaded:
            self._loaded = True
            for point in entry_points(group=ENTRY_POINTS):
                point.load()
        return self._entries

    def load(self, path: Path) -> None:
        path = path.resolve()
        if path in self._files:
            return
        if path.suffix != ".py" or not path.is_file():
            raise MethodError(f"methods are read from a Python file whose name ends in .py; found {path}.")
        _import_shipped()  # before what is there is noted, since they are imported only once
        spec = importlib.util.spec_from_file_location(f"espalier_methods_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module, before = importlib.util.module_from_spec(spec), dict(self._entries)
        sys.modules[module.__name__] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            self._entries = before
            raise MethodError(f"{path} could not be imported: {type(error).__name__}: {error}") from error
        if self._entries == before:
            raise MethodError(f"{path} registers no method; put @register over the function that makes one.")
        self._files.add(path)


def _import_shipped() -> None:
    for module in _SHIPPED:
        importlib.import_module(module)


_REGISTRY = _Registry()


def register(make: Callable[P, Method]) -> Callable[P, Method]:
    """Decorator: put the method that a function makes into the registry, under its name and direction.

    Raises:
        MethodError: that name is taken, or the function does not make a method without arguments.
    """
    try:
        method = make()  # type: ignore[call-arg]  # that all arguments have defaults is what is tried here
    except TypeError as error:
        raise MethodError(
            f"{make.__name__}: every argument of a registered method needs a default: {error}."
        ) from error
    if not isinstance(method, Method):
        raise MethodError(f"{make.__name__}: expected a function that returns a Method, found {method!r}.")
    _REGISTRY.add(Entry(make, method))
    return make


def load_methods(path: str | Path) -> None:
    """Import a Python file, whose methods are in the registry from then on; a file that was imported is left alone.

    Raises:
        MethodError: there is no such file, it cannot be imported, or it registers nothing or a name that is taken.
    """
    _REGISTRY.load(Path(path))


def methods(direction: Direction | None = None, level: Level | None = None) -> tuple[Entry, ...]:
    """All registered methods, or those of one direction or level, by direction and name."""
    found = sorted(_REGISTRY.entries().items())
    return tuple(entry for (way, _), entry in found if direction in (None, way) and level in (None, entry.method.level))


def find(direction: Direction, name: str) -> Entry:
    """The registered method of that name. Raises MethodError that lists those there are."""
    entry = _REGISTRY.entries().get((direction, name))
    if entry is None:
        known = ", ".join(one.method.name for one in methods(direction))
        raise MethodError(f"there is no {direction} method {name!r}; expected one of: {known}.")
    return entry


__all__ = ["ENTRY_POINTS", "Entry", "Method", "Penalty", "find", "load_methods", "methods", "register"]
