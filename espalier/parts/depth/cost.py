"""What layers and cells cost, in the currency of any budget: a sum, since each brings or takes what is its own."""

from __future__ import annotations

from espalier.errors import MethodError
from espalier.graph.topology import Topology
from espalier.parts.budget import Budget, FLOPs, Latency, Parameters, Polynomial, Units
from espalier.parts.candidate import Candidate, Catalogue
from espalier.parts.goal import Direction, Goal


def layer_sizes(direction: Direction, catalogue: Catalogue) -> dict[str, int]:
    """1 for every layer that may go, 0 for every one that may come."""
    return dict.fromkeys(catalogue.candidates, 1 if direction == "prune" else 0)


def layers_cost(direction: Direction, budget: Budget, topology: Topology, catalogue: Catalogue) -> Polynomial:
    """The cost of the network by which of the candidates are there; in `Units` by their number.

    Raises MethodError for a budget that does not say what a layer costs.
    """
    prices = {name: _price(budget, one) for name, one in catalogue.candidates.items()}
    if isinstance(budget, Units):
        total = catalogue.present
    else:
        sizes = {record.name: topology.sizes[record.number] for record in topology.axes.values()}
        total = budget.cost(topology, ()).at(sizes)
    if direction == "prune":
        total -= sum(prices.values())
    return Polynomial({(): total, **{(name,): price for name, price in prices.items()}})


def least_layers(goal: Goal) -> dict[str, int]:
    """The sizes of a pruning goal at which it costs least: every stage keeps its cheapest layers."""
    sizes, spare = dict(goal.sizes), dict(goal.spare)
    for name in sorted(sizes, key=lambda name: -goal.target.cost.terms[(name,)]):
        stage = goal.layers[name].stage
        if spare[stage] > 0:
            sizes[name] = 0
            spare[stage] -= 1
    return sizes


def _price(budget: Budget, candidate: Candidate) -> int:
    match budget:
        case Units():
            return candidate.layers
        case Parameters():
            return candidate.parameters
        case FLOPs() | Latency():
            return candidate.flops
    raise MethodError(f"{budget!r} does not say what a layer costs; expected Parameters, FLOPs, Units or Latency.")


__all__ = ["layer_sizes", "layers_cost", "least_layers"]
