"""What a run is asked to do: every option with the value that it has, so that a run can be told from another one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

import torch

from espalier.bench.models import MODELS
from espalier.bench.presets import Preset, default_model, find_preset
from espalier.bench.tasks import TASKS, Task, task
from espalier.errors import RunError
from espalier.method import find, load_methods
from espalier.parts.goal import Direction
from espalier.train.settings import SETTINGS, check_alone, without_budget

DEFAULT_TASK = "digits"
NONE = "none"
"""The word for no method."""

# a network that shall grow starts small; what it ends with is again a fraction of the full one
_WIDTHS: Mapping[str, float] = MappingProxyType({"growing": 0.25, "shrinking": 1.0, "constant": 0.5})
_SIZES: Mapping[str, float] = MappingProxyType({"growing": 6.0, "shrinking": 0.5, "constant": 1.0})
_LIVE = 0.1
"""The part of single weights that stays live, where methods of such are named."""


@dataclass(frozen=True)
class Options:
    """All that decides the result of a run."""

    task: str
    """A row of ``TASKS``, or the stem of the name of a .npz file."""
    data: str | None
    """The absolute path of a .npz file; None for the data set of the task."""
    model: str
    width: float
    """Factor on the units of every hidden layer at the start."""
    grow: str
    prune: str
    methods_from: str | None
    """The absolute path of a Python file that registers methods; None for none."""
    setting: str
    size: float | None
    """Parameters at the end as a multiple of those at the start; None where the method decides."""
    epochs: int
    batch_size: int
    lr: float
    """The largest learning rate of the task's schedule."""
    seed: int
    device: str
    static: bool
    """Whether the static network of the final size is trained too."""

    @property
    def source(self) -> str | Path:
        """What `espalier.bench.data.load` and `espalier.bench.tasks.task` take."""
        return self.task if self.data is None else Path(self.data)

    @property
    def names(self) -> dict[Direction, str | None]:
        """Direction -> method; None for none."""
        return {
            "grow": None if self.grow == NONE else self.grow,
            "prune": None if self.prune == NONE else self.prune,
        }

    @property
    def preset(self) -> Preset | None:
        """How a method that takes no budget trains this network, if there is a row for it."""
        return find_preset(self.model, [name for name in self.names.values() if name is not None], self.setting)

    def make_task(self) -> Task:
        """How to train: the row of the preset or the task with the values of these options."""
        row = task(self.source)
        if self.preset is not None:
            row = self.preset.of(row)
        return dataclasses.replace(row, epochs=self.epochs, batch_size=self.batch_size, learning_rate=self.lr)


def resolve(given: Mapping[str, Any]) -> Options:
    """The options of a new run: what is given, and the defaults of task and setting for what is None or absent.

    Raises:
        RunError: a value out of range, or a device that is not there.
        DataError: an unknown task or model.
        MethodError: an unknown method.
    """
    asked = {key: value for key, value in given.items() if value is not None}
    data = asked.get("data")
    if data is not None:
        data = str(Path(data).resolve())
        if Path(data).suffix != ".npz":
            raise RunError(f"--data: expected a file whose name ends in .npz, found {data}")
        if "task" in asked:
            raise RunError(f"the task '{asked['task']}' and --data {data} name two data sets: give only one of them")
    row = task(asked.get("task", DEFAULT_TASK) if data is None else Path(data))
    setting = asked.get("setting", SETTINGS[0])
    if setting not in SETTINGS:
        raise RunError(f"unknown setting '{setting}': expected one of {', '.join(SETTINGS)}")
    methods_from = asked.get("methods_from")
    if methods_from is not None:
        load_methods(methods_from)
    grow, prune = _methods(asked, setting)
    named = [name for name in (grow, prune) if name != NONE]
    model = asked.get("model", default_model(row.name, named) or row.model)
    preset = find_preset(model, named, setting)
    if preset is not None:
        row = preset.of(row)
    free = _decides(grow, prune) is not None
    options = Options(
        task=row.name,
        data=data,
        model=model,
        # gates begin with a full network, most of which may sleep
        width=asked.get("width", 1.0 if free else _WIDTHS[setting]),
        grow=grow,
        prune=prune,
        methods_from=None if methods_from is None else str(Path(methods_from).resolve()),
        setting=setting,
        size=asked.get("size", None if free else _default_size(setting, grow, prune)),
        epochs=asked.get("epochs", row.epochs),
        batch_size=asked.get("batch_size", row.batch_size),
        lr=asked.get("lr", row.learning_rate),
        seed=asked.get("seed", 0),
        device=asked.get("device", "cpu"),
        static=asked.get("static", True),
    )
    _check(options)
    return options


def _methods(asked: Mapping[str, Any], setting: str) -> tuple[str, str]:
    """The methods that grow and prune: the one of the setting that is named, or both."""
    if "method" in asked:
        both = [f"--{name}" for name in ("grow", "prune") if name in asked]
        if both:
            raise RunError(f"--method names the only method of a run; leave out {' and '.join(both)}, or --method")
        return _only(asked["method"], setting)
    grow = asked.get("grow", NONE if setting == "shrinking" else "random")
    # a method is called for where the setting cannot do without it; growing ends in a round of pruning
    alone = "prune" not in asked and _decides(grow, NONE) is not None
    return grow, asked.get("prune", NONE if alone else "magnitude")


def _only(method: str, setting: str) -> tuple[str, str]:
    if setting == "constant":
        raise RunError("--method names one method, and the setting 'constant' needs two: give --grow and --prune")
    return (method, NONE) if setting == "growing" else (NONE, method)


def _decides(grow: str, prune: str) -> Direction | None:
    return without_budget(None if grow == NONE else grow, None if prune == NONE else prune)


def _default_size(setting: str, grow: str, prune: str) -> float:
    named: tuple[tuple[Direction, str], ...] = (("grow", grow), ("prune", prune))
    levels = {find(direction, name).method.level for direction, name in named if name != NONE}
    return _LIVE if levels == {"weights"} else _SIZES[setting]


def differences(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What is given (not None) and differs from what a run was started with, in words."""
    asked = {key: value for key, value in given.items() if value is not None}
    for name in ("data", "methods_from"):
        if name in asked:
            asked[name] = str(Path(asked[name]).resolve())
    if "method" in asked:
        asked["grow"], asked["prune"] = _only(asked.pop("method"), asked.get("setting", str(recorded.get("setting"))))
    return [
        f"{key.replace('_', '-')} was {recorded.get(key)} and is {value} now"
        for key, value in asked.items()
        if recorded.get(key) != value
    ]


def recorded_options(config: Mapping[str, Any], place: Path) -> Options:
    """The options in a run's `config.json`.

    Raises:
        RunError: an option is missing or of another type, as in a folder of another version.
    """
    for name, kind in get_type_hints(Options).items():
        kinds = get_args(kind) or (kind,)
        if type(config.get(name)) not in kinds:
            expected = " or ".join(one.__name__ for one in kinds)
            raise RunError(
                f"{place}: '{name}' should be {expected}, found {config.get(name)!r}; the run was made by another "
                "version or its folder was changed: start a new run in another folder"
            )
    options = Options(**{field.name: config[field.name] for field in dataclasses.fields(Options)})
    _check(options)
    return options


def _check(options: Options) -> None:
    if options.data is None and options.task not in TASKS:
        raise RunError(f"unknown task '{options.task}': expected one of {', '.join(TASKS)}, or --data FILE.npz")
    if options.model not in MODELS:
        raise RunError(f"unknown model '{options.model}': expected one of {', '.join(MODELS)}")
    for name in ("epochs", "batch_size"):
        if getattr(options, name) < 1:
            raise RunError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(options, name)}")
    for name in ("width", "lr", "size"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise RunError(f"--{name}: expected a number above 0, found {value}")
    if not 0 <= options.seed < 2**63:
        raise RunError(f"--seed: expected a whole number from 0 to 2**63 - 1, found {options.seed}")
    if options.methods_from is not None:
        load_methods(options.methods_from)
    if options.grow != NONE:
        find("grow", options.grow)
    if options.prune != NONE:
        find("prune", options.prune)
    if options.grow == options.prune == NONE:
        raise RunError("neither --grow nor --prune names a method: give at least one of them")
    free = _decides(options.grow, options.prune)
    if free is not None:
        check_alone(free, options.setting, options.names, options.size)
    elif options.size is None:
        raise RunError(f"size: the methods of the setting '{options.setting}' need one; found none")
    check_device(options.device)


def check_device(name: str) -> None:
    """Raise RunError for a device that is not there."""
    try:
        torch.zeros(1, device=torch.device(name)).add_(1)
    # torch raises AssertionError where it was built without CUDA
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise RunError(f"--device {name}: no such device here ({reason}); 'cpu' always works") from error
