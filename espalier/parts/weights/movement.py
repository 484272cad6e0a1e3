"""Movement: how much a weight was pushed away from zero since the memory began (Sanh et al. 2020, arXiv:2005.07683).

    S = - sum over steps of w * dL/dw

is large where gradient descent makes |w| grow. The gradient is that of `.grad` after the optimizer's step (clipped if
it was clipped) and w the weight after that step, so S is off by the learning rate times the squared gradient. In the
paper weights below the cut keep values of their own and may come back; here they are zero, and their S stands still.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.edit.tensors import gather
from espalier.errors import MethodError
from espalier.graph.dims import IntArray, axes_of, source
from espalier.graph.topology import Topology
from espalier.parts.goal import Goal, Scores
from espalier.parts.names import Names, carried
from espalier.parts.score import Context


class Movement:
    """The memory: S of every weight, which follows edits as the weights do; new ones start at zero."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}
        self._edits: list[Mapping[str, IntArray]] = []

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        """Remember the edit until the network is at hand, which says where its axes lie in each parameter."""
        self._edits.append(dict(units))

    def rename(self, names: Names, /) -> None:
        """S stays with its weights, and starts at zero in those that are new; everywhere, if axes that changed since
        the last step are no more, since nobody knows then where they were."""
        now = names.axes
        changed = {axis for units in self._edits for axis in units}
        apart = [now.get(axis, axis) for axis in self._sizes]
        if any(now.get(axis, axis) is None or apart.count(now.get(axis, axis)) > 1 for axis in changed):
            self._sums, self._sizes, self._edits = {}, {}, []
            return
        self._sums, self._sizes = carried(self._sums, names.tensors), carried(self._sizes, now)
        self._edits = [carried(units, now) for units in self._edits]

    def after_step(self, context: Context, /) -> None:
        """Add what this step says."""
        sums = self.sums(context)
        with torch.no_grad():
            for name in context.axes:
                weight = context.structure.model.get_parameter(name)
                if weight.grad is not None:
                    total = sums.get(name)
                    if total is None:
                        exact = torch.promote_types(weight.dtype, torch.float32)
                        total = torch.zeros_like(weight, requires_grad=False, dtype=exact)
                    sums[name] = total.to(weight.device).sub_(weight.to(total.dtype) * weight.grad)

    def sums(self, context: Context) -> dict[str, Tensor]:
        """S by parameter, at the present sizes."""
        topology = context.structure.topology
        for units in self._edits:
            self._resize(topology, units)
        self._edits = []
        if self._sizes.keys() != topology.by_name.keys():
            self._sizes = {name: topology.sizes[record.number] for name, record in topology.by_name.items()}
        return self._sums

    def state(self) -> dict[str, Any]:
        """The sums as packed bytes in base64, since they are as many as weights."""
        sums = {
            name: [list(one.shape), one.element_size(), base64.b64encode(one.cpu().numpy().tobytes()).decode()]
            for name, one in self._sums.items()
        }
        edits = [{axis: units.tolist() for axis, units in one.items()} for one in self._edits]
        return {"sums": sums, "sizes": dict(self._sizes), "edits": edits}

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Become what `state` gave."""
        self._sums = {
            str(name): torch.from_numpy(np.frombuffer(base64.b64decode(data), f"f{size}").copy()).reshape(shape)
            for name, (shape, size, data) in state["sums"].items()
        }
        self._sizes = {str(axis): int(size) for axis, size in state["sizes"].items()}
        self._edits = [{str(axis): np.array(units, np.int64) for axis, units in one.items()} for one in state["edits"]]

    def _resize(self, topology: Topology, units: Mapping[str, IntArray]) -> None:
        numbers = {topology.by_name[axis].number: found for axis, found in units.items()}
        sizes = {**topology.sizes, **{topology.by_name[axis].number: size for axis, size in self._sizes.items()}}
        for name, total in self._sums.items():
            sources = [
                source(dim, sizes, numbers) if any(axis in numbers for axis in axes_of(dim)) else None
                for dim in topology.tensors[name]
            ]
            if any(one is not None for one in sources):
                self._sums[name] = gather(total, sources, 0.0)
        self._sizes = {**self._sizes, **{axis: len(found) for axis, found in units.items()}}


@dataclass(frozen=True)
class Moved:
    """The score: S."""

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        assert isinstance(context.memory, Movement)
        sums = context.memory.sums(context)
        missing = [name for name in goal.weights if name not in sums]
        if missing:
            raise MethodError(
                f"{missing[0]}: there was no gradient after any optimizer step; call session.step() before "
                "optimizer.zero_grad()."
            )
        return Scores({name: sums[name].clone() for name in goal.weights})


__all__ = ["Moved", "Movement"]
