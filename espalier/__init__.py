"""Espalier grows and prunes neural networks while they train."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier import grow as grow
    from espalier import layers as layers
    from espalier import measure as measure
    from espalier import prune as prune
    from espalier.attaching import attach as attach
    from espalier.edit.changes import Limits as Limits
    from espalier.errors import EspalierError as EspalierError
    from espalier.errors import EspalierWarning as EspalierWarning
    from espalier.export.code import export_code as export_code
    from espalier.export.onnx import export_onnx as export_onnx
    from espalier.method import Method as Method
    from espalier.method import register as register
    from espalier.oneshot.expand import Expanded as Expanded
    from espalier.oneshot.expand import expand as expand
    from espalier.oneshot.result import Shrunk as Shrunk
    from espalier.oneshot.shrink import shrink as shrink
    from espalier.oneshot.tuning import Distillation as Distillation
    from espalier.oneshot.tuning import Tuning as Tuning
    from espalier.parallel.fully_shard import FullyShard as FullyShard
    from espalier.parts.budget import FLOPs as FLOPs
    from espalier.parts.budget import Latency as Latency
    from espalier.parts.budget import Memory as Memory
    from espalier.parts.budget import Parameters as Parameters
    from espalier.parts.budget import Sparsity as Sparsity
    from espalier.parts.budget import Units as Units
    from espalier.parts.clock import epochs as epochs
    from espalier.parts.clock import steps as steps
    from espalier.parts.depth.linear_fit import linearise as linearise
    from espalier.parts.depth.rank import rank_by_energy as rank_by_energy
    from espalier.parts.depth.rank import rank_by_error as rank_by_error
    from espalier.parts.goal import Goal as Goal
    from espalier.parts.goal import Scores as Scores
    from espalier.parts.recommend.advising import recommend as recommend
    from espalier.parts.recommend.criteria import WBIC as WBIC
    from espalier.parts.recommend.criteria import Criterion as Criterion
    from espalier.parts.recommend.recommendation import Recommendation as Recommendation
    from espalier.parts.recommend.recommendation import Recommendations as Recommendations
    from espalier.parts.score import Context as Context
    from espalier.parts.timing.recovery import Accept as Accept
    from espalier.parts.timing.recovery import Recovery as Recovery
    from espalier.parts.timing.trigger import Trigger as Trigger
    from espalier.parts.timing.trigger_losses import Futile as Futile
    from espalier.parts.timing.trigger_losses import Gap as Gap
    from espalier.parts.timing.trigger_losses import Plateau as Plateau
    from espalier.parts.timing.trigger_network import EffectiveRank as EffectiveRank
    from espalier.parts.timing.trigger_network import Reached as Reached
    from espalier.parts.timing.trigger_network import Stable as Stable
    from espalier.parts.units.scaled import scaled_plan as scaled_plan
    from espalier.parts.weights.keep import NM as NM
    from espalier.parts.weights.keep import Blocks as Blocks
    from espalier.train.checkpoint import load as load
    from espalier.train.checkpoint import save as save
    from espalier.train.session import Session as Session
    from espalier.version import __version__ as __version__

# The same once more, for imports on first use; tests/test_import.py compares them.
_NAMES = {
    "espalier": "grow layers measure prune",
    "espalier.attaching": "attach",
    "espalier.edit.changes": "Limits",
    "espalier.errors": "EspalierError EspalierWarning",
    "espalier.export.code": "export_code",
    "espalier.export.onnx": "export_onnx",
    "espalier.method": "Method register",
    "espalier.oneshot.expand": "Expanded expand",
    "espalier.oneshot.result": "Shrunk",
    "espalier.oneshot.shrink": "shrink",
    "espalier.oneshot.tuning": "Distillation Tuning",
    "espalier.parallel.fully_shard": "FullyShard",
    "espalier.parts.budget": "FLOPs Latency Memory Parameters Sparsity Units",
    "espalier.parts.clock": "epochs steps",
    "espalier.parts.depth.linear_fit": "linearise",
    "espalier.parts.depth.rank": "rank_by_energy rank_by_error",
    "espalier.parts.goal": "Goal Scores",
    "espalier.parts.recommend.advising": "recommend",
    "espalier.parts.recommend.criteria": "WBIC Criterion",
    "espalier.parts.recommend.recommendation": "Recommendation Recommendations",
    "espalier.parts.score": "Context",
    "espalier.parts.timing.recovery": "Accept Recovery",
    "espalier.parts.timing.trigger": "Trigger",
    "espalier.parts.timing.trigger_losses": "Futile Gap Plateau",
    "espalier.parts.timing.trigger_network": "EffectiveRank Reached Stable",
    "espalier.parts.units.scaled": "scaled_plan",
    "espalier.parts.weights.keep": "NM Blocks",
    "espalier.train.checkpoint": "load save",
    "espalier.train.session": "Session",
    "espalier.version": "__version__",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}


def _found(name: str) -> Any:
    """Import what is asked for: a public name, or a module of the package."""
    home = _HOMES.get(name, __name__)
    if home != __name__:
        value = getattr(import_module(home), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOMES)


if not TYPE_CHECKING:  # type checkers would take any misspelt name for one that is found
    __getattr__ = _found
    __all__ = sorted(name for name in _HOMES if not name.startswith("_"))
