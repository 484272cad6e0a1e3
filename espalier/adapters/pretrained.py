"""Hugging Face models in and out: a changed model is saved so that `from_pretrained` reads it without Espalier."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.adapters.config import ConfigError, Facts, config_of, facts_made, shapes_of
from espalier.edit.plan import Plan, Resize
from espalier.errors import PlanError
from espalier.graph.dims import Dim, axes_of, size_of
from espalier.graph.trees import call_arguments, flatten_tensors
from espalier.measure.stats import without_a_trace
from espalier.parts.budget import Units
from espalier.parts.goal import UNBOUNDED, Cap, Goal
from espalier.parts.score import Context, GroupNorm, Score, check_scores
from espalier.parts.units.scaled import no_loss
from espalier.peers import check_whole
from espalier.structure import Structure

_WEIGHTS = GroupNorm()


def follow_config(structure: Structure) -> None:
    """Have the model and its modules hold a configuration that says what the model has become.

    To be called after edits where code reads the configuration: the loss of language models reads the size of the
    vocabulary.

    Raises:
        ConfigError: the configuration cannot say it; the model holds the one that it held.
    """
    _set(structure.model, config_of(structure))


def save_pretrained(structure: Structure, folder: str | Path, **options: Any) -> None:
    """Save the changed model as transformers does, for `from_pretrained` in a program that knows nothing of Espalier.

    Before anything is written, a model is built from the configuration that was found, given the weights and run on the
    example inputs in eval mode: its outputs have to be bitwise those of the changed model. It shares the parameters
    with the changed model; for a moment, parameters of that size are on the CPU as well.

    Args:
        structure: of a model of transformers.
        folder: where to.
        options: handed to the model's own `save_pretrained`.

    Raises:
        ConfigError: the configuration cannot say what the model has become; nothing was written.
        ParallelError: the network is sharded.
    """
    check_whole(structure.peers, "save_pretrained")
    config = config_of(structure)
    _check_outputs(structure, config)
    _set(structure.model, config)
    model: Any = structure.model
    model.save_pretrained(folder, **options)


def plan_to_config(structure: Structure, *, score: Score = _WEIGHTS, seed: int = 0, **settings: Any) -> Plan:
    """The plan that gives the model the sizes of another configuration: prunes what is larger, grows what is smaller.

    What it leads to can always be saved with `save_pretrained`, as long as the layers were alike before. The plan is
    not applied: `structure.check(plan)` says what it promises, `structure.apply(plan)` carries it out. Layers come and
    go by `structure.add_cell` and `structure.remove_layer`.

    Args:
        structure: of a model of transformers.
        score: what each unit is worth, to choose those that go; the norm of all their weights by default.
        seed: seeds what new units start from.
        settings: of the configuration, such as ``hidden_size=12, num_attention_heads=3``.

    Raises:
        ConfigError: the present configuration does not describe the model, or there is no model with these settings.
        PlanError: a setting is unknown, or asks for what no plan can do, or for another number of layers.
        ParallelError: the network is sharded.
    """
    check_whole(structure.peers, "plan_to_config")
    config = config_of(structure)
    for name in settings:
        if getattr(config, name, None) is None:
            known = ", ".join(key for key, value in config.to_dict().items() if type(value) is int)
            raise PlanError(f"{name}: {type(config).__name__} sets no such number; it sets: {known}.")
    sizes = _solved(structure, facts_made(structure.model, config, settings))
    now = {name: structure.topology.sizes[record.number] for name, record in structure.topology.by_name.items()}
    going = {name: now[name] - size for name, size in sizes.items() if size < now[name]}
    edits = [Resize(name, remove=units) for name, units in _least(structure, going, score, seed).items()]
    edits += [Resize(name, add=size - now[name]) for name, size in sizes.items() if size > now[name]]
    return Plan(tuple(edits), interface=True, seed=seed)


def _set(model: nn.Module, config: Any) -> None:
    """Give the modules that hold a configuration of this kind one with these settings; the user's own is left alone."""
    settings = config.to_dict()
    renewed: dict[int, Any] = {}
    for module in model.modules():
        held = vars(module).get("config")
        if type(held) is not type(config):
            continue
        if id(held) not in renewed:
            renewed[id(held)] = _updated(held, settings)
        vars(module)["config"] = renewed[id(held)]


def _updated(config: Any, settings: Mapping[str, Any]) -> Any:
    found = copy.deepcopy(config)
    before = config.to_dict()
    for name, value in settings.items():
        if before.get(name) != value:
            setattr(found, name, value)
    return found


def _check_outputs(structure: Structure, config: Any) -> None:
    """Raise ConfigError unless a model of this configuration gives the same outputs with the same weights."""
    model: Any = structure.model
    device = next(model.parameters()).device
    with torch.random.fork_rng():
        other = type(model)(config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    other.to(device)
    expected, found = _outputs(model, structure.example), _outputs(other, structure.example)
    for (name, left), (_, right) in zip(expected, found, strict=True):
        if not torch.equal(left, right):
            raise ConfigError(
                f"a model of the configuration that fits the shapes gives another {name} than the changed model, by up "
                f"to {float((left - right).abs().max()):.3g}: what no weight holds, {_other_buffers(model, other)}, "
                "is made anew from the configuration. Do without that edit, or use espalier.save."
            )


def _outputs(model: nn.Module, example: Any) -> list[tuple[str, Tensor]]:
    args, kwargs = call_arguments(example)
    with without_a_trace(model):
        model.eval()
        return [(name, one.clone()) for name, one in flatten_tensors(model(*args, **kwargs), "output")]


def _other_buffers(model: nn.Module, other: nn.Module) -> str:
    made = dict(other.named_buffers())
    names = [name for name, one in model.named_buffers() if name in made and not torch.equal(one, made[name])]
    return ", ".join(names) if names else "constants of its code"


def _solved(structure: Structure, facts: Facts) -> dict[str, int]:
    """Axis -> its size in a model of which these are the facts. Raises PlanError if there is no such size."""
    topology, shapes = structure.topology, shapes_of(facts)
    elsewhere = [name for name in topology.tensors if len(shapes.get(name, ())) != len(topology.tensors[name])]
    elsewhere += [name for name in shapes if name not in topology.tensors and name not in topology.aliases]
    if elsewhere:
        raise PlanError(
            f"{elsewhere[0]} would not be there before and afterwards; layers come by add_cell and go by remove_layer."
        )
    equations = [
        (f"dimension {dim} of {name}", term, shapes[name][dim])
        for name, dims in topology.tensors.items()
        for dim, term in enumerate(dims)
    ]
    for attribute, term in topology.attributes.items():
        size = facts.get((attribute.module, str(attribute.path[0]))) if len(attribute.path) == 1 else None
        if isinstance(size, int):
            equations.append((str(attribute), term, size))
    known: dict[int, int] = {}
    while _found_one(equations, known, topology.sizes):
        pass
    sizes = {**topology.sizes, **known}
    for where, term, size in equations:
        if size_of(term, sizes) != size:
            raise PlanError(f"{where} would have to become {size} with these settings, which no sizes of axes give.")
    return {topology.axes[axis].name: size for axis, size in known.items() if size != topology.sizes[axis]}


def _found_one(equations: list[tuple[str, Dim, int]], known: dict[int, int], present: Mapping[int, int]) -> bool:
    """Solve the next equation in which one axis is left; whether there was one. Sizes are linear in each axis."""
    for where, term, size in equations:
        unknown = set(axes_of(term)) - known.keys()
        if len(unknown) != 1:
            continue
        (axis,) = unknown
        one, two = (size_of(term, {**present, **known, axis: count}) for count in (1, 2))
        count, rest = divmod(size - one, two - one) if two != one else (0, 1)
        if rest or count < 0:
            raise PlanError(f"{where} cannot become {size}, whatever the size of its axis.")
        known[axis] = count + 1
        return True
    return False


def _least(structure: Structure, going: Mapping[str, int], score: Score, seed: int) -> dict[str, tuple[int, ...]]:
    """The units of least score of each axis, so many of it."""
    sizes = {name: structure.axes[name].size for name in going}
    cost = Units(1.0, of="initial").cost(structure.topology, tuple(sizes))
    reference = {name: float(size) for name, size in sizes.items()}
    goal = Goal("prune", sizes, dict.fromkeys(sizes, 1), sizes, reference, Cap(cost, UNBOUNDED))
    context = Context(structure, tuple(sizes), 0, 0, 0.0, seed, no_loss, None, ())
    scores = score(context, goal)
    check_scores(scores, context, goal, "plan_to_config")
    ranked = {name: scores.values[name].double().cpu().sort(stable=True).indices for name in going}
    return {name: tuple(sorted(ranked[name][:count].tolist())) for name, count in going.items()}


__all__ = ["ConfigError", "follow_config", "plan_to_config", "save_pretrained"]
