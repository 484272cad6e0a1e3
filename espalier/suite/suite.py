"""What a benchmark consists of, as frozen values: a suite, and the cells that it stands for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from espalier.train.settings import Course, Measure

PROTOCOL = 1
"""Counts up when a cell would give other numbers for another reason than its own content."""

Track = Literal["growing", "shrinking", "constant", "unstructured"]
Kind = Literal["methods", "static", "no-op", "retrained", "peer", "surgeon"]
Role = Literal["candidate", "default", "control", "peer"]
StaticSize = Literal["final", "large", "small"]
BudgetKind = Literal["training_flops", "samples", "seconds"]
Claim = Literal["better", "not worse"]
Value = Literal["accuracy", "loss"]
Scalar: TypeAlias = str | int | float | bool


@dataclass(frozen=True)
class SuiteTask:
    """Data, the large network, and how it is trained."""

    name: str
    data: str
    """A data set of `espalier.bench.data`, or NAME of a file NAME.npz in the folder that ESPALIER_DATA names."""
    like: str
    """The row of `espalier.bench.tasks.TASKS` that says with which optimizer, schedule and augmentation."""
    model: str
    """A network of `espalier.bench.models`."""
    epochs: float
    """The budget: what so many passes of the large network over the training data take."""
    width: float = 1.0
    """Of the large network."""
    batch_size: int | None = None
    """None, and so for the next two: as in the row."""
    learning_rate: float | None = None
    weight_decay: float | None = None
    samples: int | None = None
    """Of the training data, the first so many after a shuffle that never changes, and a sixth as many to validate;
    None: all."""
    pixels: int | None = None
    """Images are averaged down to so many on a side; None: as they are."""
    start: float = 0.25
    """What a growing network starts with, as a part of what it ends with."""
    seconds: float | None = None
    """The budget where it is wall time, for the machine of the suite."""
    bfloat16: bool = False
    """Whether forward passes are in bfloat16."""


@dataclass(frozen=True)
class Contender:
    """What is compared: methods of a setting, a static network, or a package of others."""

    name: str
    tracks: tuple[Track, ...]
    kind: Kind = "methods"
    role: Role = "candidate"
    """What it is to the reader; changes nothing."""
    grow: str | None = None
    prune: str | None = None
    grow_options: Mapping[str, Scalar] = field(default_factory=dict)
    prune_options: Mapping[str, Scalar] = field(default_factory=dict)
    periods: int = 16
    """This and the next three: see `espalier.train.settings.Course`."""
    until: float = 0.6
    swing: float = 0.15
    order: Literal["alternating", "grow first", "prune first"] = "alternating"
    static: StaticSize = "final"
    """Of the kind ``static``: which size."""
    of: str | None = None
    """Of the kind ``retrained``: the contender whose final architecture is trained from scratch."""
    peer: str | None = None
    """Of the kind ``peer``: a name of `espalier.suite.peers`."""
    proposals: Literal["recommended", "random"] = "recommended"
    """Of the kind ``surgeon``: which edits are tried. It begins with the static network of the point; the size that it
    ends with is its own choice."""
    cycles: int = 3
    """Of the kind ``surgeon``: how often."""
    tuning: str = ""
    """How its options were chosen, and what that cost; changes nothing."""

    @property
    def course(self) -> Course:
        """When its methods act."""
        return Course(self.periods, self.until, self.swing, self.order)


@dataclass(frozen=True)
class Condition:
    """What is equal between contenders: the final size in one measure, and what training may take."""

    size: Measure = "parameters"
    budget: BudgetKind = "training_flops"
    scale: float = 1.0
    """Times the task's budget."""
    tasks: tuple[str, ...] | None = None
    """Those that are run under it; None, and so for the next four: all."""
    tracks: tuple[Track, ...] | None = None
    contenders: tuple[str, ...] | None = None
    points: tuple[float, ...] | None = None
    seeds: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """What is equal, in words."""
        size = {"parameters": "parameters", "flops": "inference FLOPs"}[self.size]
        budget = {"training_flops": "training FLOPs", "samples": "samples", "seconds": "wall time"}[self.budget]
        return f"{size}, {budget}" + ("" if self.scale == 1 else f" x {self.scale:g}")


@dataclass(frozen=True)
class Comparison:
    """A claim to be tested, named before the runs."""

    of: str
    other: str
    track: Track
    claim: Claim = "better"
    margin: float = 0.005
    """Of ``not worse``: how much worse still counts as equal."""
    value: Value = "accuracy"
    """Of the test data: ``accuracy``, or minus the ``loss``."""
    other_scale: float | None = None
    """The scale of the other's budget; None: that of the condition. So "reaches the loss of the large network with 0.6
    of its training FLOPs" is a comparison under a condition of scale 0.6 with the other's scale 1."""


@dataclass(frozen=True)
class Grid:
    """Contenders that are all combinations of levels, or a regular fraction of these."""

    name: str
    """Written before the levels in the names of the contenders."""
    tracks: tuple[Track, ...]
    grow: tuple[str, ...]
    prune: tuple[str, ...]
    periods: tuple[int, ...] = (16,)
    swing: tuple[float, ...] = (0.15,)
    order: tuple[Literal["alternating", "grow first", "prune first"], ...] = ("alternating",)
    until: float = 0.6
    modulus: int = 1
    """A prime number of levels, such as 3, for a fraction of the combinations; 1 for all."""
    relations: int = 1
    """One of ``modulus ** relations`` combinations is kept: those with levels x_f, counted from 0, of the factors f = 0
    (grow) to 4 (order) for which every sum over f of f^r x_f, r = 0, 1, ... below `relations`, is a multiple of the
    modulus. Factors of so many levels then have each level equally often, in every combination of the others."""


@dataclass(frozen=True)
class Suite:
    """A benchmark, as one file declares it."""

    name: str
    about: str
    takes: str
    """How long it takes on which machine."""
    seeds: tuple[int, ...]
    points: tuple[float, ...]
    """Final sizes, as parts of the large network's; of single weights, what stays live."""
    tasks: tuple[SuiteTask, ...]
    contenders: tuple[Contender, ...] = ()
    conditions: tuple[Condition, ...] = (Condition(),)
    comparisons: tuple[Comparison, ...] = ()
    grids: tuple[Grid, ...] = ()
    confirm: tuple[str, ...] = ()
    """Contenders that are run on `confirm_seeds` as well, named before these runs, and all that they are compared with;
    under conditions that have no seeds of their own."""
    confirm_seeds: tuple[int, ...] = ()
    looks: int = 12
    """Times that a training is looked at on held-out data, each at a half more of the budget than the one before."""
    timed: tuple[str, ...] = ()
    """Contenders whose final networks `espalier bench speed` times, eager, compiled and in ONNX Runtime."""


@dataclass(frozen=True)
class Cell:
    """One training: a function of these values."""

    task: SuiteTask
    contender: Contender
    track: Track
    point: float
    size: Measure
    budget: BudgetKind
    scale: float
    seed: int
    looks: int = 12

    def names(self) -> dict[str, Any]:
        """What tells a cell from the others of its suite."""
        data = {name: getattr(self, name) for name in ("track", "point", "size", "budget", "scale", "seed")}
        return {"task": self.task.name, "contender": self.contender.name, **data}

    def content(self) -> dict[str, Any]:
        """All that decides the numbers, as what JSON can hold; cells of equal content are one."""
        data, kind = asdict(self), self.contender.kind
        data["contender"] = {name: data["contender"][name] for name in ("kind", *_DECIDES[kind])}
        del data["task"]["name"]
        ignored: tuple[str, ...] = {"retrained": ("track", "point", "size")}.get(kind, ())
        if kind in ("static", "surgeon"):
            ignored = ("track",)
        if kind == "static" and self.contender.static == "large":
            ignored = ("track", "point", "size")
        return {name: value for name, value in data.items() if name not in ignored}


_COURSE = ("periods", "until", "swing", "order")
_DECIDES: Mapping[Kind, tuple[str, ...]] = MappingProxyType(
    {
        "methods": ("grow", "prune", "grow_options", "prune_options", *_COURSE),
        "static": ("static",),
        "no-op": _COURSE,
        "retrained": (),  # the sizes of the architecture are the job's
        "peer": ("peer", *_COURSE),
        "surgeon": ("proposals", "cycles"),
    }
)
"""Kind of a contender -> the fields that make a difference."""


def digest(data: Any) -> str:
    """The same for equal values that JSON can hold."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:24]


__all__ = [
    "PROTOCOL", "BudgetKind", "Cell", "Claim", "Comparison", "Condition", "Contender", "Grid", "Kind", "Role", "Scalar",
    "StaticSize", "Suite", "SuiteTask", "Track", "Value", "digest",
]  # fmt: skip
