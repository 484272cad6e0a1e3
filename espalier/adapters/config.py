"""The configuration of a Hugging Face model whose sizes were changed: found by trying, believed only after comparing.

Nothing here knows an architecture. The model is built on the meta device with each number of its configuration doubled
in turn, and what doubles with it is what that number stands for; so the changed model tells what it would have to be.
Whether the configuration that is found is right is then a matter of comparing every shape, every module and every
attribute that the forward reads or edits changed.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from espalier.errors import EspalierError
from espalier.structure import Structure

Place: TypeAlias = tuple[str, str | tuple[str, int]]
"""Path of a module, and what of it is meant: an attribute, or a dimension of a tensor."""
Facts: TypeAlias = Mapping[Place, Any]

_MODULE, _COUNT = "", "number of layers"
_ROUNDS = 8
_PROBE = 96
"""Even, so that it can be a size of rotary heads, and larger than most small numbers."""
_ABSENT = ("head_dim",)
"""What attention of many architectures reads if a configuration has it, and derives from others if it has not."""


class ConfigError(EspalierError):
    """The configuration of this architecture cannot say what the model has become; the message lists where."""


def config_of(structure: Structure) -> Any:
    """A copy of the model's configuration that makes a model of its sizes, layers and constants.

    Values are not looked at: `espalier.adapters.pretrained.save_pretrained` compares outputs too.

    Raises:
        ConfigError: the model is none of transformers, or has become what its configuration cannot express.
    """
    model = structure.model
    config = vars(model).get("config")
    if config is None or not callable(getattr(config, "to_dict", None)):
        raise ConfigError(
            f"{type(model).__name__} has no configuration; give the structure of a model of transformers, without a "
            "wrapper around it."
        )
    wanted, why = _wanted(structure), ""
    config = copy.deepcopy(config)
    made = _made(model, config)
    for _ in range(_ROUNDS):
        if not wrong_places(wanted, made):
            return config
        try:
            better = _better(model, config, wanted, made)
            if better is None:
                break
            made, config = _made(model, better), better
        except ConfigError as problem:
            why = f" ({problem})"
            break
    raise ConfigError(
        f"the configuration of {type(model).__name__} cannot express what the model has become{why}:\n"
        f"{_listed(wanted, made)}\nKeep layers alike with uniform=True, choose sizes by plan_to_config, or use "
        "espalier.save, which keeps any structure."
    )


def wrong_places(wanted: Facts, made: Facts) -> list[Place]:
    """Where a model is not what is wanted, in the order of its modules, and what it has that is not wanted."""
    wrong = [place for place, value in wanted.items() if made.get(place) != value]
    return wrong + [place for place in made if not _is_attribute(place) and place not in wanted]


def shapes_of(facts: Facts) -> dict[str, tuple[int, ...]]:
    """Parameter or buffer -> its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for (path, what), size in facts.items():
        if isinstance(what, tuple):  # the dimensions of a tensor follow one another
            name = ".".join(filter(None, (path, what[0])))
            shapes[name] = (*shapes.get(name, ()), size)
    return shapes


def facts_made(model: nn.Module, config: Any, settings: Mapping[str, Any]) -> Facts:
    """What the model would be with other settings of its configuration. Raises ConfigError if there is none such."""
    return _made(model, _with(config, settings))


def _facts(model: nn.Module) -> dict[Place, Any]:
    """What can be compared of a model without its values: modules, shapes, and attributes that are plain."""
    found: dict[Place, Any] = {}
    for path, module in model.named_modules():
        found[path, _MODULE] = type(module).__qualname__
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            found[path, _COUNT] = len(module)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.update({(path, (name, dim)): size for dim, size in enumerate(tensor.shape)})
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, (int, float, str)) and name != "training":
                found[path, name] = value
    return found


def _wanted(structure: Structure) -> dict[Place, Any]:
    """What of the model a configuration has to make: all but attributes that nobody reads and no edit changed."""
    read = {(one.module, one.path[0]) for one in structure.topology.attributes if len(one.path) == 1}
    changed = {(one.module, one.path[0]) for one in structure.surgery.known.attributes if len(one.path) == 1}
    facts = _facts(structure.model)
    return {place: value for place, value in facts.items() if not _is_attribute(place) or place in read | changed}


def _is_attribute(place: Place) -> bool:
    return isinstance(place[1], str) and place[1] not in (_MODULE, _COUNT)


def _made(model: nn.Module, config: Any) -> dict[Place, Any]:
    """What a model of the same class is with a configuration. Raises ConfigError if there is none."""
    try:
        with torch.device("meta"):
            built = type(model)(copy.deepcopy(config))
    except Exception as problem:  # whatever the code of an architecture raises says that it refuses
        raise ConfigError(f"{type(model).__name__} refuses its configuration: {problem}.") from problem
    return _facts(built)


def _better(model: nn.Module, config: Any, wanted: Facts, made: Facts) -> Any | None:
    """The configuration with settings that bring it nearer to what is wanted; None if there are none."""
    exact: dict[str, Any] = {}
    scaled: dict[str, Any] = {}
    for name, value in _numbers(config):
        moved = _moved(model, config, made, {name: 2 * value}, wanted)
        same = [place for place in moved if made[place] == value]
        if same:
            new = _most(wanted[place] for place in same)
            if new != value:
                exact[name] = new
        elif moved:
            new = value * _most(wanted[place] / made[place] for place in moved)
            if new == int(new) and new != value:
                scaled[name] = int(new)
    found = exact or dict(list(scaled.items())[:1]) or _from_nothing(model, config, wanted, made)
    return _with(config, found) if found else None


def _moved(model: nn.Module, config: Any, made: Facts, settings: Mapping[str, Any], wanted: Facts) -> Sequence[Place]:
    """The numbers, of those that are wanted, that double with settings."""
    try:
        other = _made(model, _with(config, settings))
    except ConfigError:
        return ()  # it is refused, so nothing can be told by it
    numbers = [place for place, value in made.items() if isinstance(value, (int, float)) and value and place in wanted]
    return [place for place in numbers if other.get(place) == 2 * made[place]]


def _from_nothing(model: nn.Module, config: Any, wanted: Facts, made: Facts) -> dict[str, Any]:
    """The first setting that the configuration leaves open, so that others are derived, and that has to be given."""
    wrong = [place for place in wanted if place in made and made[place] != wanted[place]]
    for name in _open(config):
        try:
            other = _made(model, _with(config, {name: _PROBE}))
        except ConfigError:
            continue
        held = [wanted[place] for place in wrong if other.get(place) == _PROBE]
        if held:
            return {name: _most(held)}
    return {}


def _numbers(config: Any) -> Iterator[tuple[str, Any]]:
    """The settings that may say how large something is."""
    for name, value in config.to_dict().items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value and not name.endswith("token_id"):
            yield name, value
    if getattr(config, "num_labels", None):
        yield "num_labels", config.num_labels


def _open(config: Any) -> Iterator[str]:
    settings = config.to_dict()
    yield from (name for name in _ABSENT if settings.get(name) is None)
    yield from (name for name, value in settings.items() if value is None and not name.endswith("token_id"))


def _with(config: Any, settings: Mapping[str, Any]) -> Any:
    """A copy with other settings; lists with an entry per layer follow the number of layers."""
    found = copy.deepcopy(config)
    for name, value in settings.items():
        before = getattr(config, name, None)
        try:
            setattr(found, name, value)
        except Exception as problem:  # configurations check themselves, each in its own way
            raise ConfigError(f"{name}={value!r} is refused: {problem}.") from problem
        for other, entries in config.to_dict().items() if "layer" in name else ():
            if isinstance(entries, list) and "layer" in other and len(entries) == before:
                setattr(found, other, [*entries[:value], *entries[-1:] * (value - len(entries))])
    return found


def _most(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _listed(wanted: Facts, made: Facts) -> str:
    """A line for each module that differs: by its tensors, or else by its other numbers."""
    places = wrong_places(wanted, made)
    lines = []
    for path in dict.fromkeys(path for path, _ in places):
        whats = dict.fromkeys(what for where, what in places if where == path)
        tensors = dict.fromkeys(what[0] for what in whats if isinstance(what, tuple))
        said = [f"{name} {_shape(wanted, path, name)} for {_shape(made, path, name)}" for name in tensors]
        for what in () if said else whats:
            said.append(f"{what or 'a module'} {wanted.get((path, what), 'none')} for {made.get((path, what), 'none')}")
        lines.append(f"  {path or 'the model'}: the model has {', '.join(said)}")
    return "\n".join(lines)


def _shape(facts: Facts, path: str, tensor: str) -> tuple[int, ...]:
    return shapes_of({place: size for place, size in facts.items() if place[0] == path}).get(
        ".".join(filter(None, (path, tensor))), ()
    )


__all__ = ["ConfigError", "Facts", "config_of", "facts_made", "shapes_of"]
