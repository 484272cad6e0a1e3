"""Plans that fold a layer away: which of its neighbours it can become a part of."""

from __future__ import annotations

from espalier.edit.depth_edits import DepthEdit, Remove, Replace
from espalier.edit.recipes.base import Lookup
from espalier.edit.recipes.folded import BATCH_NORMS, Folded
from espalier.errors import PlanError
from espalier.graph.topology import Topology
from espalier.graph.visits import Leaf

_MOST_PROBLEMS = 3
"""As many are named in an error."""


def fold_plan(topology: Topology, module: Lookup, path: str, into: str | None = None) -> tuple[DepthEdit, ...]:
    """The edits that make a layer a part of another one, or, for an `nn.Sequential`, one layer of all in it.

    The two must be linear one after the other, in the same places: linear layers, convolutions of which one is 1 x 1,
    a batch norm after or before one of them. Nothing but what does nothing may be between them, and nothing else may
    get what the first one gives: what `Folded` promises is checked in every recorded pass.

    Args:
        topology: what is known of the network.
        module: its modules.
        path: the layer that goes.
        into: the layer that takes it in; None for the one before or, failing that, the one after it, if that is no
            batch norm.

    Raises:
        PlanError: there is no such layer; the message says why.
    """
    if into is None:
        children = [name for name, _ in module(path).named_children()]
        if children:
            Folded().promise(topology, module, path, before=False)
            return (Replace(path, Folded()),)
    choices = [(into, True), (into, False)] if into is not None else _neighbours(topology, module, path)
    problems: list[str] = []
    for other, after in choices:
        by = Folded(path, after)
        try:
            by.promise(topology, module, other, before=False)
        except PlanError as problem:
            problems.append(str(problem))
        else:
            return Replace(other, by), Remove(path)
    reasons = " ".join(dict.fromkeys(problems[:_MOST_PROBLEMS])) or "no layer runs right before or after it."
    raise PlanError(f"{path} cannot be folded away: {reasons}")


def _neighbours(topology: Topology, module: Lookup, path: str) -> list[tuple[str, bool]]:
    """Modules that give what a module gets, with True, then those that get what it gives, with False."""
    pairs = [
        (own, other)
        for prediction in topology.predictions
        for own in prediction.visits
        if own.module == path
        for other in prediction.visits
        if other.module != path and not isinstance(module(other.module), BATCH_NORMS)
    ]
    found = [
        (other.module, True) for own, other in pairs if other.last <= own.first and _meet(other.exits, own.entries)
    ]
    found += [
        (other.module, False) for own, other in pairs if own.last <= other.first and _meet(own.exits, other.entries)
    ]
    return list(dict.fromkeys(found))


def _meet(exits: tuple[Leaf, ...], entries: tuple[Leaf, ...]) -> bool:
    return not {leaf.value for leaf in exits}.isdisjoint(leaf.value for leaf in entries)


__all__ = ["fold_plan"]
