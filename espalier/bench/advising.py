"""`espalier recommend`: the network of a run, a saved one, or anybody's, beside the data that it was trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.attaching import attach
from espalier.bench.data import Dataset, batches, load
from espalier.bench.folder import CONFIG, RunFolder
from espalier.bench.models import MODELS, build
from espalier.bench.options import recorded_options
from espalier.bench.targets import find_target, is_function, made_by
from espalier.errors import DataError, RunError
from espalier.parts.recommend.recommendation import Recommendations
from espalier.structure import Structure
from espalier.train import checkpoint as network_files

SPLITS = ("validation", "training")


@dataclass(frozen=True)
class Wanted:
    """What the command line says of a network and its data."""

    target: str
    data: str | None = None
    """A task, or a .npz file."""
    model: str | None = None
    """What a saved network was built as."""
    width: float = 1.0
    """Of that, where it is a built-in one."""
    split: str = SPLITS[0]
    batches: int = 4
    batch_size: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Subject:
    """A network, and what recommendations are made from."""

    structure: Structure
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Sequence[Any]
    samples: int | None
    """That it was trained on; None if that is not known."""


def find_subject(wanted: Wanted) -> Subject:
    """The network that a target names and data for it.

    A target is the folder of a run; a folder that `espalier.save` wrote, with the model that it was built as; a name as
    `espalier inspect` takes it, with data; or a function ``package.module:function`` that returns a model, example
    inputs, a loss function and batches.

    Raises:
        DataError: a network or data that are not there, or do not fit each other.
        RunError: a run that has left no network yet, or options that do not go together.
        CheckpointError: the saved network is damaged or of another model.
        CaptureError: the network does not run.
    """
    folder = Path(wanted.target)
    if folder.is_dir():
        return _of_run(folder, wanted) if (folder / CONFIG).exists() else _saved(folder, wanted)
    if wanted.model is not None:
        raise RunError(f"--model says what a saved network was built as, and {wanted.target} is no folder")
    if is_function(wanted.target):
        made = made_by(wanted.target)
        if isinstance(made, tuple) and len(made) == 4:
            if wanted.data is not None:
                raise RunError(f"{wanted.target} brings batches of its own: leave out --data")
            model, example, loss, own = made
            return Subject(attach(model, example), loss, list(islice(own, wanted.batches)), None)
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
            raise DataError(
                f"{wanted.target} should return a model and its example inputs, or these with a loss function and "
                f"batches, found {type(made).__name__}"
            )
        return _with_data(attach(*made), _data(wanted), wanted)
    data = _data(wanted)
    model, example = _built(wanted.target, data, wanted)
    return _with_data(attach(model, example), data, wanted)


def write_plans(found: Recommendations, folder: Path) -> None:
    """Write the plan of every recommendation into a folder: a file that `Plan.load` reads, by rank, kind and place."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(found, 1):
        place = re.sub(r"[^\w.-]+", "_", one.site)
        one.plan.save(folder / f"{number:02d}-{one.kind}-{place}.json")


def _of_run(path: Path, wanted: Wanted) -> Subject:
    if wanted.model is not None or wanted.data is not None:
        raise RunError(f"{path} is a run, which knows its model and its data: leave out --model and --data")
    folder = RunFolder.reopen(path)
    options = recorded_options(folder.config, path / CONFIG)
    if not folder.network.is_dir():
        raise RunError(f"{path} holds a run that has left no network yet: continue it with --resume first")
    data = load(options.source, seed=options.seed)
    model = build(options.model, data.input_shape, data.classes, width=options.width, seed=options.seed)
    return _with_data(network_files.load(folder.network, model, data.example), data, wanted)


def _saved(folder: Path, wanted: Wanted) -> Subject:
    if wanted.model is None:
        raise RunError(f"{folder} is no run; if it is a saved network, say what it was built as: --model NAME")
    data = _data(wanted)
    model, example = _built(wanted.model, data, wanted)
    return _with_data(network_files.load(folder, model, example), data, wanted)


def _built(name: str, data: Dataset, wanted: Wanted) -> tuple[nn.Module, Any]:
    if name in MODELS:
        model = build(name, data.input_shape, data.classes, width=wanted.width, seed=wanted.seed)
        return model, data.example
    target = find_target(name)
    return target.model, target.example_inputs


def _data(wanted: Wanted) -> Dataset:
    if wanted.data is None:
        raise RunError(
            "recommendations need data: --data TASK or --data FILE.npz; or a function that returns a model, example "
            "inputs, a loss function and batches"
        )
    path = Path(wanted.data)
    return load(path if path.suffix == ".npz" else wanted.data)


def _with_data(structure: Structure, data: Dataset, wanted: Wanted) -> Subject:
    held_out = wanted.split == SPLITS[0]
    inputs, labels = (data.x_val, data.y_val) if held_out else (data.x_train, data.y_train)
    size = min(wanted.batch_size, len(inputs))
    drawn = batches(inputs, labels, size, torch.Generator().manual_seed(wanted.seed))
    return Subject(structure, _cross_entropy, list(islice(drawn, wanted.batches)), len(data.x_train))


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    scores = model(batch[0])
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise DataError(
            f"the model should give scores of shape (samples, classes), found {found}; for another loss give a "
            "function that returns a model, example inputs, a loss function and batches"
        )
    return F.cross_entropy(scores, batch[1])


__all__ = ["SPLITS", "Subject", "Wanted", "find_subject", "write_plans"]
