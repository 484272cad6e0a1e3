"""What layers and cells are worth by the scales of the norms in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from espalier.errors import MethodError
from espalier.graph.named_tensors import tensor_table
from espalier.parts.candidate import Candidate, Catalogue
from espalier.parts.depth.places import Removable
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context
from espalier.parts.units.scales import norm_scales
from espalier.structure import Structure


@dataclass(frozen=True)
class RemovableNormed:
    """The blocks that may go and have norms; at least `kept` of each stage stay."""

    kept: int = 1

    def __call__(self, structure: Structure, asked: Sequence[str] | None, /) -> Catalogue:
        """Raises MethodError for a block that is asked for and has none, or if there is no other one."""
        found = Removable(self.kept)(structure, asked)
        known = scales(structure, found.candidates)
        bare = [name for name, inside in known.items() if not inside]
        if bare and not structure.layers_moved and (asked is not None or len(bare) == len(known)):
            raise MethodError(
                f"layer-scales judges layers by the scales of the norms in them; {', '.join(bare[:6])} "
                f"{'has' if len(bare) == 1 else 'have'} no norm with a scale. Leave "
                f"{'it' if len(bare) == 1 else 'them'} out with axes=[...], or take ShortGPT or LayerTaylor."
            )
        return replace(found, candidates={name: one for name, one in found.candidates.items() if known[name]})


@dataclass(frozen=True)
class NormScales:
    """The mean of |scale| over the channels of a norm, and of that over the norms of a layer.

    That a layer is worth what its filters are worth by a criterion for filters is LayerPrune (Elkerdawy et al. 2020,
    arXiv:2007.05667). Of a block that does nothing once the scales of some norms are zero, the last one of each branch,
    only these count: what the others scale, these undo.
    """

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        tensors = tensor_table(context.structure.model).tensors
        values = {}
        for name, found in scales(context.structure, goal.layers).items():
            if not found:
                raise MethodError(f"{name} has no norm with a scale to judge it by; leave it out with axes=[...].")
            means = [(tensors[one].detach().double() + offset).abs().mean().cpu() for one, offset in found.items()]
            values[name] = torch.stack(means).mean(0, keepdim=True)
        return Scores(values)


def scales(structure: Structure, layers: Mapping[str, Candidate]) -> dict[str, dict[str, float]]:
    """Layer -> the parameters that scale its norms, those alone that silence it if any do -> what is added to them."""
    places = norm_scales(structure.topology, structure.topology.by_name)
    every = {one.tensor: one.offset for found in places.values() for one in found}
    silent = {site.name: site.silence or () for site in structure.sites()}
    result = {}
    for name, layer in layers.items():
        inside = {
            tensor: offset
            for tensor, offset in every.items()
            if any(tensor.startswith(f"{path}.") for path in layer.modules)
        }
        last = {tensor: inside[tensor] for tensor in silent.get(name, ()) if tensor in inside}
        result[name] = last or inside
    return result


__all__ = ["NormScales", "RemovableNormed", "scales"]
