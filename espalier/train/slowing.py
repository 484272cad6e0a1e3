"""New units that learn at a rate of their own: a scale on their part of every update of the optimizer.

Hooks before and after the optimizer's step do it, registered only while there are such units. For a part of a parameter
with the factor f they set p + f (p' - p), where the optimizer alone led from p to p'; where f is 1 nothing is touched.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from espalier.edit.births import Births
from espalier.graph.dims import IntArray, axes_of, labels
from espalier.graph.named_tensors import tensor_table
from espalier.parts.names import Names, renamed
from espalier.parts.timing.recovery import Recovery
from espalier.structure import Structure


@dataclass(frozen=True)
class Stage:
    """The units that came in one event and how they learn."""

    step: int
    """When they came."""
    axes: tuple[str, ...]
    warm: int
    """Steps until they learn at their full rate; 0: at once."""
    normed: tuple[str, ...]
    """Tensors whose new weights learn at a rate in proportion to their norm."""

    def lasts_at(self, step: int) -> bool:
        """Whether the optimizer step of that number is still another one because of it."""
        return bool(self.normed) or step - self.step < self.warm

    def warmth(self, step: int) -> float:
        """The part of their rate that is given to the units at the optimizer step of that number."""
        return min(1.0, (step - self.step) / self.warm) if self.warm else 1.0

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {"step": self.step, "axes": list(self.axes), "warm": self.warm, "normed": list(self.normed)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stage:
        """What `to_json` gave."""
        names = tuple(map(str, data["axes"])), tuple(map(str, data["normed"]))
        return cls(int(data["step"]), names[0], int(data["warm"]), names[1])


@dataclass(frozen=True)
class _Part:
    """Where a parameter holds the weights of each stage, and those that were there at first."""

    name: str
    parameter: Tensor
    stages: tuple[tuple[Stage, Tensor], ...]
    """Stages and masks."""
    first: Tensor


class Slowing:
    """All stages of a session whose units learn at rates of their own."""

    def __init__(self, structure: Structure, stages: Iterable[Stage] = ()) -> None:
        self._structure = structure
        self._stages = list(stages)
        self._births: Births | None = None
        self._parts: list[_Part] = []
        self._before: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self.refresh()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those whose units still learn at another rate."""
        return tuple(self._stages)

    @property
    def ends(self) -> int | None:
        """The first step after which a stage is over; None if none will be."""
        return min((one.step + one.warm - 1 for one in self._stages if not one.normed), default=None)

    def begin(self, axes: Iterable[str], recovery: Recovery) -> None:
        """Have the units that have just come in these axes learn as `recovery` says.

        Where several methods grow after the same step, the slower of their ways holds for what they added.
        """
        stage = Stage(self._structure.step, tuple(axes), 0 if recovery.warm is None else recovery.warm.count, ())
        if recovery.rates == "norm":
            parts = self._located([stage])
            normed = tuple(one.name for one in parts if bool((one.parameter.detach()[one.stages[0][1]] != 0).any()))
            stage = replace(stage, normed=normed)
        if self._stages and self._stages[-1].step == stage.step:
            other = self._stages.pop()
            merged = sorted({*other.axes, *stage.axes}), sorted({*other.normed, *stage.normed})
            stage = Stage(stage.step, tuple(merged[0]), max(other.warm, stage.warm), tuple(merged[1]))
        self._stages.append(stage)
        self.refresh()

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        """`Structure.births` follows."""

    def rename(self, names: Names, /) -> None:
        """Go on with the names of now. Layers that came whole learn at their full rate."""
        self._stages = [
            replace(one, axes=renamed(one.axes, names.axes), normed=renamed(one.normed, names.tensors))
            for one in self._stages
        ]
        self._births = None

    def state(self) -> dict[str, Any]:
        """All stages."""
        return {"stages": tuple(self._stages)}

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Become what `state` gave."""
        self._stages = list(state["stages"])
        self.refresh()

    def refresh(self) -> None:
        """Forget what is over; have hooks on the optimizer if anything is left, and none otherwise."""
        self._stages = [one for one in self._stages if one.lasts_at(self._structure.step + 1)]
        self._births = None
        if not self._stages:
            self.close()
        elif not self._hooks and self._structure.optimizer is not None:
            self._hooks = _hooked(self._structure.optimizer, self)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._parts, self._before = [], [], {}

    def before_step(self) -> None:
        """Remember the parameters that are to move less than the optimizer will move them."""
        if self._births is not self._structure.births:
            self._parts, self._births = self._located(self._stages), self._structure.births
        self._before = {one.name: one.parameter.detach().clone() for one in self._parts}

    def after_step(self) -> None:
        """Take back what new units moved too far."""
        step = self._structure.step + 1
        with torch.no_grad():
            for one in self._parts:
                old, new = self._before[one.name], one.parameter
                factor = torch.ones((), dtype=new.dtype, device=new.device)
                for stage, mask in one.stages:
                    rate = stage.warmth(step) * (_ratio(old, mask, one.first) if one.name in stage.normed else 1.0)
                    factor = torch.where(mask, rate, factor)
                new.copy_(torch.where(factor == 1, new, old + factor * (new - old)))
        self._before = {}

    def _located(self, stages: Iterable[Stage]) -> list[_Part]:
        """The parameters that hold units of these stages."""
        stages, topology = tuple(stages), self._structure.topology
        births: dict[int, IntArray] = {}
        for name, record in topology.by_name.items():
            own = [stage.step for stage in stages if name in stage.axes]
            steps = self._structure.births[name]
            if own and np.isin(steps, own).any():
                births[record.number] = np.where(np.isin(steps, own), steps, 0)
        parts = []
        tensors = tensor_table(self._structure.model).tensors
        for name in sorted(topology.parameters):
            dims = topology.tensors[name]
            if not any(axis in births for dim in dims for axis in axes_of(dim)):
                continue
            newest = torch.zeros((1,) * len(dims), dtype=torch.int64)
            for position, dim in enumerate(dims):
                shape = [-1 if other == position else 1 for other in range(len(dims))]
                for axis in set(axes_of(dim)) & births.keys():
                    units = labels(dim, topology.sizes, axis)
                    steps = np.where(units >= 0, births[axis][units], 0)
                    newest = torch.maximum(newest, torch.from_numpy(steps).view(shape))
            parameter = tensors[name]
            newest = newest.expand(parameter.shape).to(parameter.device)
            found = {stage.step: stage for stage in stages if bool((newest == stage.step).any())}
            masks = tuple((stage, newest == step) for step, stage in found.items())
            parts.append(_Part(name, parameter, masks, newest == 0))
        return [one for one in parts if one.stages]


def _ratio(tensor: Tensor, mask: Tensor, first: Tensor) -> Tensor | float:
    """|weights of a stage| / |weights that were there at first|; 1 where there are none of these."""
    base = tensor[first].norm()
    return torch.where(base > 0, tensor[mask].norm() / base, 1.0)


def _hooked(optimizer: Optimizer, slowing: Slowing) -> list[RemovableHandle]:
    """Hooks that do not keep the session alive, and do nothing once it is gone."""
    alive = weakref.ref(slowing)

    def before(*_: object) -> None:
        found = alive()
        if found is not None:
            found.before_step()

    def after(*_: object) -> None:
        found = alive()
        if found is not None:
            found.after_step()

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


__all__ = ["Slowing", "Stage"]
