"""What replacing a layer takes for granted of the network around it, checked in every recorded pass."""

from __future__ import annotations

from torch import nn

from espalier.errors import PlanError
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.visits import Visit


def check_own(topology: Topology, module: nn.Module, path: str) -> None:
    """Raises PlanError unless nothing but a module itself, or what is in it, uses its tensors, and it runs."""
    inside = f"{path}."
    ran = any(visit.module == path for one in topology.predictions for visit in one.visits)
    if not ran:
        raise PlanError(f"{path} does not run in the forward pass, so nothing is known of what replacing it does.")
    names = {f"{inside}{name}" for name, _ in (*module.named_parameters(), *module.named_buffers())}
    for other, first in topology.aliases.items():
        if (other in names) is not (first in names):
            raise PlanError(f"{other} and {first} are one tensor: replacing {path} would untie them.")
    for prediction in topology.predictions:
        for name in names & prediction.tensors.keys():
            for reader in prediction.flow.readers[prediction.tensors[name]]:
                call = prediction.calls[reader]
                if not any(one == path or one.startswith(inside) for one in call.modules):
                    raise PlanError(f"{name} is read outside of {path}, {call.where}; it cannot be replaced.")


def check_connected(topology: Topology, first: str, second: str) -> None:
    """Raises PlanError unless what one module gives goes to another and nowhere else, whenever either runs."""
    ran = False
    for prediction in topology.predictions:
        runs = [[visit for visit in prediction.visits if visit.module == path] for path in (first, second)]
        if not any(runs):
            continue
        ran = True
        for path, found in zip((first, second), runs, strict=True):
            if len(found) != 1:
                raise PlanError(
                    f"{path} runs {len(found)} times in a forward pass; folding needs layers that run once."
                )
        problem = _problem(prediction, runs[0][0], runs[1][0])
        if problem:
            raise PlanError(f"{first} cannot be folded together with {second}: {problem}.")
    if not ran:
        raise PlanError(f"{first} and {second} do not run in the forward pass.")


def check_dimensions(topology: Topology, path: str, count: int) -> None:
    """Raises PlanError unless a module always gets values of so many dimensions."""
    for prediction in topology.predictions:
        for visit in prediction.visits:
            if visit.module == path:
                found = [len(prediction.dims[leaf.value]) for leaf in visit.entries]
                if found != [count]:
                    raise PlanError(f"{path} gets values of {found} dimensions, expected {count} to fold it.")


def _problem(prediction: TracePrediction, first: Visit, second: Visit) -> str | None:
    if first.result != "tensor" or len(second.entries) != 1:
        return "they do not hand on one tensor"
    value, flow = first.exits[0].value, prediction.flow
    if first.last > second.first or second.entries[0].value != value:
        return f"{second.module} does not get what {first.module} gives"
    if value in prediction.outputs:
        return f"what {first.module} gives is an output of the model too"
    stale = flow.is_stale(value, second.first) and not flow.is_stale(value, first.last)
    if stale or flow.version(value, first.last) != flow.version(value, second.first):
        return f"what {first.module} gives is changed in place before {second.module} gets it"
    for reader in flow.readers[value]:
        if reader >= first.last and not second.first <= reader < second.last:
            return f"what {first.module} gives is read elsewhere too, {prediction.calls[reader].where}"
    return None


__all__ = ["check_connected", "check_dimensions", "check_own"]
