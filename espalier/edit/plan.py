"""Plans: frozen, printable, serialisable lists of edits.

A plan names axes and units, nothing that is live; making one changes nothing. Its structure is JSON; the values that
new units and layers start from and what is added to weights that stay (if a method gives any) are tensors beside it,
which `Plan.save` puts into a safetensors file.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from espalier.edit.depth_edits import NO_STARTS, DepthEdit, Insert, Remove, Replace, Starts, from_json, to_json
from espalier.errors import PlanError

FORMAT = 1
_VALUE, _DELTA, _START = "value:", "delta:", "start:"


@dataclass(frozen=True, slots=True)
class Resize:
    """Remove units of one axis and append new ones to it."""

    axis: str
    remove: tuple[int, ...] = ()
    """Old unit indices, ascending."""
    add: int = 0
    """Number of new units, which come after those that stay."""

    def __post_init__(self) -> None:
        if not isinstance(self.axis, str):
            raise PlanError(f"expected the name of an axis, found {self.axis!r}.")
        if type(self.add) is not int or self.add < 0:
            raise PlanError(f"{self.axis}: expected a number of units to add, found {self.add!r}.")
        if not isinstance(self.remove, tuple) or any(type(unit) is not int for unit in self.remove):
            raise PlanError(f"{self.axis}: expected a tuple of unit indices to remove, found {self.remove!r}.")

    def __str__(self) -> str:
        parts = []
        if self.remove:
            shown = ", ".join(map(str, self.remove[:8])) + (", ..." if len(self.remove) > 8 else "")
            parts.append(f"remove {len(self.remove)} ({shown})")
        if self.add:
            parts.append(f"add {self.add}")
        return f"{self.axis}: {' and '.join(parts) or 'nothing'}"


@dataclass(frozen=True, slots=True)
class Remask:
    """Give a parameter a mask in place of the one that it may have, or take its mask away.

    Entries that are not live are zero and stay so; those that were not live before start at zero.
    """

    tensor: str
    shape: tuple[int, ...] = ()
    """Shape of the mask: that of the parameter after the resizes of the same plan."""
    live: bytes | None = field(default=None, repr=False)
    """One bit per entry in row-major order, 1 for live, as `numpy.packbits` packs them; None: no mask any more."""

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, str):
            raise PlanError(f"expected the name of a parameter, found {self.tensor!r}.")
        expected = 0 if self.live is None else -(-math.prod(self.shape) // 8)
        if len(self.live or b"") != expected:
            raise PlanError(
                f"{self.tensor}: a mask of shape {self.shape} has {expected} bytes, found {len(self.live or b'')}."
            )

    @classmethod
    def of(cls, tensor: str, live: Tensor) -> Remask:
        """From a boolean tensor of the parameter's shape, True for live. Raises PlanError for anything else."""
        if not isinstance(live, Tensor) or live.dtype != torch.bool:
            found = live.dtype if isinstance(live, Tensor) else type(live).__name__
            raise PlanError(f"{tensor}: a mask is a tensor of torch.bool, True for what is live; found {found}.")
        return cls(tensor, tuple(live.shape), np.packbits(live.detach().cpu().numpy()).tobytes())

    @property
    def mask(self) -> Tensor | None:
        """The mask as a boolean tensor on the CPU; None for no mask."""
        if self.live is None:
            return None
        bits = np.unpackbits(np.frombuffer(self.live, np.uint8), count=math.prod(self.shape))
        return torch.from_numpy(bits.astype(np.bool_)).view(self.shape)

    def __str__(self) -> str:
        if self.live is None:
            return f"{self.tensor}: no mask"
        count, size = sum(byte.bit_count() for byte in self.live), math.prod(self.shape)
        return f"{self.tensor}: mask {size - count:,} of {size:,} weights ({1 - count / max(size, 1):.1%})"


_NO_VALUES: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Plan:
    """Edits that are applied together or not at all."""

    edits: tuple[Resize, ...]
    interface: bool = False
    """Whether axes of the model's own inputs, outputs and lookup tables may change."""
    seed: int = 0
    """Seeds the random part of what new units start from."""
    values: Mapping[str, Tensor] = field(default_factory=lambda: _NO_VALUES, compare=False)
    """Tensor name -> values that broadcast to its new shape, read at the new positions only."""
    deltas: Mapping[str, Tensor] = field(default_factory=lambda: _NO_VALUES, compare=False)
    """Tensor name -> what is added to it, in a form that broadcasts to its new shape."""
    masks: tuple[Remask, ...] = ()
    """Masks that parameters get, or lose, after they were resized."""
    depth: tuple[DepthEdit, ...] = ()
    """Layers and cells that come or go after all else; modules go by their paths before the plan."""
    starts: Starts = field(default_factory=lambda: NO_STARTS, compare=False)
    """Number of an edit in `depth` -> parameters of the layer that it brings, by their names in it, -> values that they
    start from in place of those of the recipe."""
    hold_norms: bool = True
    """Whether norms across an axis are compensated by scale and eps, so that units which say nothing come and go
    without a change. Else their statistics are simply over the units there are, as under gates that shut the others."""

    def __post_init__(self) -> None:
        for one in self.depth:
            if not isinstance(one, (Insert, Remove, Replace)):
                raise PlanError(f"expected an Insert, a Remove or a Replace among edits of layers, found {one!r}.")
        for number in self.starts:
            if type(number) is not int or not 0 <= number < len(self.depth) or isinstance(self.depth[number], Remove):
                raise PlanError(
                    f"starts: expected numbers of edits of layers that bring a layer, below {len(self.depth)}, found "
                    f"{number!r}."
                )

    def __str__(self) -> str:
        return "\n".join(str(edit) for edit in (*self.edits, *self.masks, *self.depth)) or "nothing"

    def __bool__(self) -> bool:
        return bool(self.masks or self.depth or self.deltas) or any(edit.remove or edit.add for edit in self.edits)

    def to_json(self) -> str:
        """The structure of the plan as JSON, masks included, without values, deltas and starts."""
        edits = [{"axis": one.axis, "remove": list(one.remove), "add": one.add} for one in self.edits]
        masks = [
            {
                "tensor": one.tensor,
                "shape": list(one.shape),
                "live": None if one.live is None else base64.b64encode(one.live).decode(),
            }
            for one in self.masks
        ]
        depth = [to_json(one) for one in self.depth]
        return json.dumps(
            {
                "format": FORMAT, "edits": edits, "interface": self.interface, "seed": self.seed, "masks": masks,
                "depth": depth, "hold_norms": self.hold_norms,
            }
        )  # fmt: skip

    @classmethod
    def from_json(
        cls,
        text: str,
        values: Mapping[str, Tensor] = _NO_VALUES,
        deltas: Mapping[str, Tensor] = _NO_VALUES,
        starts: Starts = NO_STARTS,
    ) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            PlanError: the text is not a plan of this format.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise PlanError(f"this plan has format {data['format']!r}; this version of Espalier reads {FORMAT}.")
            edits = tuple(_resize(one) for one in data["edits"])
            masks = tuple(_remask(one) for one in data["masks"])
            depth = tuple(from_json(one) for one in data["depth"])
            interface, seed = _typed(data["interface"], bool), _typed(data["seed"], int)
            hold_norms = _typed(data["hold_norms"], bool)
            return cls(edits, interface, seed, values, deltas, masks, depth, starts, hold_norms)
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"this is not a plan in JSON: {type(error).__name__}: {error}.") from error

    def save(self, path: str | Path) -> None:
        """Write `path` (JSON) and, if there are any tensors, `path` with the suffix ``.safetensors`` beside it."""
        path = Path(path)
        path.write_text(self.to_json())
        starts = {f"{number}:{name}": one for number, found in self.starts.items() for name, one in found.items()}
        kinds = ((_VALUE, self.values), (_DELTA, self.deltas), (_START, starts))
        tensors = {kind + name: one.detach().contiguous() for kind, found in kinds for name, one in found.items()}
        if tensors:
            save_file(tensors, path.with_suffix(".safetensors"))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan that `save` wrote. Raises PlanError if it is not one."""
        path = Path(path)
        sidecar = path.with_suffix(".safetensors")
        tensors = load_file(sidecar) if sidecar.exists() else {}
        values, deltas, numbered = (
            {name.removeprefix(kind): one for name, one in tensors.items() if name.startswith(kind)}
            for kind in (_VALUE, _DELTA, _START)
        )
        starts: dict[int, dict[str, Tensor]] = {}
        for key, one in numbered.items():
            number, _, name = key.partition(":")
            if not number.isdecimal():
                raise PlanError(f"{sidecar}: {_START}{key} does not name an edit of layers; save the plan again.")
            starts.setdefault(int(number), {})[name] = one
        return cls.from_json(path.read_text(), values, deltas, starts)


def _resize(data: Mapping[str, Any]) -> Resize:
    remove = tuple(_typed(unit, int) for unit in data["remove"])
    return Resize(_typed(data["axis"], str), remove, _typed(data["add"], int))


def _remask(data: Mapping[str, Any]) -> Remask:
    shape = tuple(_typed(size, int) for size in data["shape"])
    try:
        live = None if data["live"] is None else base64.b64decode(data["live"], validate=True)
    except binascii.Error as error:
        raise ValueError(f"a mask is packed bits in base64: {error}") from error
    return Remask(_typed(data["tensor"], str), shape, live)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {value!r}")
    return value


def prune_plan(units: Mapping[str, Iterable[int]], *, interface: bool = False) -> Plan:
    """A plan that removes the given units of each axis."""
    edits = tuple(Resize(axis, _indices(axis, chosen)) for axis, chosen in units.items())
    return Plan(edits, interface)


def grow_plan(
    counts: Mapping[str, int], *, interface: bool = False, seed: int = 0, values: Mapping[str, Tensor] = _NO_VALUES
) -> Plan:
    """A plan that appends the given number of new units to each axis."""
    for axis, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise PlanError(f"{axis}: expected a number of units to add of at least 1, found {count!r}.")
    return Plan(tuple(Resize(axis, add=count) for axis, count in counts.items()), interface, seed, values)


def mask_plan(masks: Mapping[str, Tensor | None]) -> Plan:
    """A plan that gives parameters these masks (True = live); None takes a mask away."""
    return Plan((), masks=tuple(Remask(name) if one is None else Remask.of(name, one) for name, one in masks.items()))


def _indices(axis: str, units: Iterable[int]) -> tuple[int, ...]:
    """Unit indices as ascending ints: from any sequence of integers, an integer array or tensor."""
    if isinstance(units, (Tensor, np.ndarray)):
        if units.ndim != 1 or str(units.dtype).endswith("bool"):
            hint = "convert a mask with mask.nonzero().flatten()" if units.ndim == 1 else "give a list of indices"
            raise PlanError(
                f"{axis}: expected unit indices, found {units.dtype} of shape {tuple(units.shape)}; {hint}."
            )
        units = units.tolist()
    if not isinstance(units, Iterable):
        raise PlanError(
            f"{axis}: expected a list of unit indices, found {units!r}; for one unit write units=[{units!r}]."
        )
    found = []
    for unit in units:
        if isinstance(unit, (bool, np.bool_)):
            raise PlanError(
                f"{axis}: expected unit indices, found {unit!r}; convert a mask with mask.nonzero().flatten()."
            )
        try:
            found.append(operator.index(unit))
        except TypeError:
            raise PlanError(f"{axis}: expected unit indices, found {unit!r} ({type(unit).__name__}).") from None
    return tuple(sorted(found))
