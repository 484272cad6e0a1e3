"""Torch-Pruning (Fang et al. 2023, DepGraph, arXiv:2301.12900): the group norm of coupled units, in the same turns."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from torch import nn

from espalier.bench.training import Training
from espalier.errors import RunError
from espalier.parts.budget import Parameters
from espalier.parts.timing.amount import Ramp
from espalier.suite.peers.peer import in_turns
from espalier.suite.preparing import Prepared
from espalier.suite.watching import Watching

_BISECTIONS = 10


class TorchPruning:
    """Removes the units of smallest group L2 norm, as many in every layer, at the moments and to the sizes of
    Espalier's own pruning (`espalier.train.settings`): once per period, along the cubic way."""

    package = "torch-pruning"

    def train(self, prepared: Prepared, watching: Watching) -> Training:
        """Shrink the large network.

        Raises:
            RunError: the cell is not of the track ``shrinking``, or Torch-Pruning is not installed.
        """
        cell = prepared.cell
        if cell.track != "shrinking":
            raise RunError(
                f"Torch-Pruning removes units and cannot add any: it has nothing for the track {cell.track!r}"
            )
        if importlib.util.find_spec("torch_pruning") is None:
            raise RunError("Torch-Pruning is not installed: pip install torch-pruning")
        model = prepared.large()
        start = getattr(prepared.large_cost, cell.size)
        limit = int(cell.point * start)
        ramp = Ramp(Parameters(cell.point, of="initial"), "cubic")

        def edit(training: Training, number: int, count: int) -> nn.Module:
            target = ramp.target((number + 1) / count, start, start, limit, -1)
            return _shrunk(prepared, training.model, target)

        course = cell.contender.course
        moments = tuple(at + 0.5 / course.periods for at in course.moments)
        return in_turns(prepared, watching, model, moments, edit, "torch-pruning")


def _shrunk(prepared: Prepared, model: nn.Module, target: int) -> nn.Module:
    """The network, or a copy, that costs as nearly the target as one ratio for all layers allows."""
    low, high = 0.0, 1.0
    present: int = getattr(prepared.cost(model), prepared.cell.size)
    found = [(abs(present - target), model)]  # any ratio above 0 removes a unit of every layer
    for _ in range(_BISECTIONS):
        ratio = (low + high) / 2
        tried = _pruned(prepared, model, ratio)
        cost = getattr(prepared.cost(tried), prepared.cell.size)
        found.append((abs(cost - target), tried))
        low, high = (low, ratio) if cost <= target else (ratio, high)
    return min(found, key=lambda one: one[0])[1]


def _pruned(prepared: Prepared, model: nn.Module, ratio: float) -> nn.Module:
    import torch_pruning

    changed = copy.deepcopy(model)
    training = changed.training
    outputs = [one for one in changed.modules() if isinstance(one, nn.Linear)][-1:]
    importance: Any = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    torch_pruning.pruner.BasePruner(
        changed, prepared.example, importance=importance, pruning_ratio=ratio, ignored_layers=outputs
    ).step()
    try:
        with torch.no_grad():
            changed.eval()(prepared.example)
    except RuntimeError as error:
        raise RunError(f"the network does not run any more after Torch-Pruning changed it: {error}") from error
    return changed.train(training)


__all__ = ["TorchPruning"]
