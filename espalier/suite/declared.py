"""Suites as files: one readable TOML file each, in which nothing is guessed.

Top-level keys are the fields of `espalier.suite.suite.Suite`; ``[[tasks]]``, ``[[contenders]]``, ``[[conditions]]``,
``[[comparisons]]`` and ``[[grids]]`` those of the values that they stand for. ``based_on`` names another suite, or the
path of its file seen from this one: its keys hold wherever this file has none of that name.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from espalier.errors import RunError
from espalier.suite.suite import Suite

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser, before it was taken into the standard library
    import tomli as tomllib

SHIPPED = Path(__file__).parent / "suites"
T = TypeVar("T")


def shipped() -> tuple[str, ...]:
    """The names of the suites that come with Espalier."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.toml")))


def find_suite(name: str) -> Suite:
    """The suite of that name, or that of a file.

    Raises:
        RunError: there is none, or the file says something that is unknown or out of range.
    """
    path = _path(name, Path())
    return read_suite(path.read_text(encoding="utf-8"), path)


def read_suite(text: str, path: Path) -> Suite:
    """The suite that a text declares; `path` is what errors call it, and from where it names others.

    Raises:
        RunError: as `find_suite`.
    """
    suite = _read(Suite, _keys(text, path, ()), str(path))
    _check(suite, str(path))
    return suite


def _path(name: str, folder: Path) -> Path:
    path = folder / name if name.endswith(".toml") else SHIPPED / f"{name}.toml"
    if not path.is_file():
        raise RunError(
            f"there is no suite {name!r}: expected one of {', '.join(shipped())}, or the path of a .toml file"
        )
    return path


def _keys(text: str, path: Path, on_the_way: tuple[Path, ...]) -> dict[str, Any]:
    """What a file says, with what it is based on."""
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"{path} is no TOML: {error}") from error
    if "based_on" not in data:
        return data
    base, on_the_way = data.pop("based_on"), (*on_the_way, path.resolve())
    if not isinstance(base, str):
        raise RunError(f"{path}: based_on: expected the name of a suite or the path of its file, found {base!r}")
    below = _path(base, path.parent)
    if below.resolve() in on_the_way:
        raise RunError(f"{path}: based_on: {base!r} is based on this file itself")
    return {**_keys(below.read_text(encoding="utf-8"), below, on_the_way), **data}


def _read(kind: type[T], data: Mapping[str, Any], place: str) -> T:
    """A dataclass from a table that names its fields."""
    hints = get_type_hints(kind)
    fields = {one.name: one for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = [name for name in data if name not in fields]
    if unknown:
        raise RunError(f"{place}: unknown key {unknown[0]!r}; expected some of {', '.join(fields)}")
    missing = [
        name
        for name, one in fields.items()
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING and name not in data
    ]
    if missing:
        raise RunError(f"{place}: {missing[0]!r} is missing")
    return kind(**{name: _value(hints[name], value, f"{place}: {name}") for name, value in data.items()})


def _value(hint: Any, value: Any, place: str) -> Any:
    """A value of a type that fields have."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _value(next(one for one in arguments if one is not NoneType), value, place)
    if origin is Literal:
        if value not in arguments:
            raise RunError(f"{place}: expected one of {', '.join(map(str, arguments))}, found {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise RunError(f"{place}: expected a list, found {value!r}")
        return tuple(_value(arguments[0], one, f"{place}[{at}]") for at, one in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise RunError(f"{place}: expected a table, found {value!r}")
        return _read(hint, value, f"{place} {value['name']!r}" if "name" in value else place)  # type: ignore[arg-type]
    if origin is not None:  # options of a method: a table of plain values
        if not isinstance(value, dict) or not all(isinstance(one, (str, int, float, bool)) for one in value.values()):
            raise RunError(f"{place}: expected a table of plain values, found {value!r}")
        return value
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise RunError(f"{place}: expected {hint.__name__}, found {value!r}")
    if hint is float and not math.isfinite(value):
        raise RunError(f"{place}: expected a finite number, found {value!r}")
    return float(value) if hint is float else value


def _check(suite: Suite, place: str) -> None:
    """Refuse numbers out of range, and names that stand for nothing or for two things."""
    for what, names in (
        ("tasks", [one.name for one in suite.tasks]),
        ("contenders", [one.name for one in suite.contenders]),
    ):
        double = {name for name in names if names.count(name) > 1}
        if double:
            raise RunError(f"{place}: {what}: the name {min(double)!r} stands for two; give each its own")
    for what, values in (("seeds", suite.seeds), ("points", suite.points), ("tasks", suite.tasks)):
        if not values:
            raise RunError(f"{place}: {what}: expected at least one")
    if not (suite.contenders or suite.grids):
        raise RunError(f"{place}: expected [[contenders]] or [[grids]], found neither")
    for grid in suite.grids:
        if grid.modulus < 1 or grid.relations < 1:
            raise RunError(f"{place}: grids {grid.name!r}: modulus and relations: expected numbers of at least 1")
    wrong = [point for point in suite.points if not 0 < point <= 1]
    if wrong:
        raise RunError(f"{place}: points: expected parts of the large network, above 0 and at most 1, found {wrong[0]}")
    if set(suite.seeds) & set(suite.confirm_seeds):
        raise RunError(f"{place}: confirm_seeds: expected fresh ones, found some of seeds")
    if any(seed < 0 for seed in (*suite.seeds, *suite.confirm_seeds)):
        raise RunError(f"{place}: seeds: expected whole numbers from 0 on")
    if not 1 <= suite.looks <= 100:
        raise RunError(f"{place}: looks: expected 1 to 100, found {suite.looks}")
    for task in suite.tasks:
        if not re.fullmatch(r"[\w-][\w.-]*", task.name):  # its records go into a file of that name
            raise RunError(f"{place}: tasks: expected names of letters, digits, '-' and '_', found {task.name!r}")
        for name in ("epochs", "width", "batch_size", "learning_rate", "samples", "pixels", "start", "seconds"):
            value = getattr(task, name)
            if value is not None and not value > 0:
                raise RunError(f"{place}: tasks {task.name!r}: {name}: expected a number above 0, found {value!r}")
        if task.start >= 1:
            raise RunError(f"{place}: tasks {task.name!r}: start: expected a part below 1, found {task.start!r}")


__all__ = ["SHIPPED", "find_suite", "read_suite", "shipped"]
