"""The parameters and buffers of a model by name, and the fake tensors that stand in for them in a capture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from espalier.graph.fakes import Fakes
from espalier.graph.trace import Shape


@dataclass(frozen=True)
class TensorTable:
    """The parameters and buffers of a model, each object once, with the other names that it has."""

    tensors: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]
    """Second and further names of tied tensors -> the first name."""
    places: Mapping[str, tuple[tuple[nn.Module, str, bool], ...]]
    """First name -> every (module, attribute, is parameter) at which it is registered."""
    modules: Mapping[str, nn.Module]
    """By path, the model itself first."""
    fakes: Fakes = field(default_factory=Fakes, repr=False, compare=False)
    _made: dict[tuple[str, Shape], torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def names(self) -> dict[int, str]:
        """id of a tensor -> its first name."""
        return {id(tensor): name for name, tensor in self.tensors.items()}

    def fake(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The fake tensor of that shape which stands in for a tensor: made once, for all captures with this table."""
        key = name, tuple(shape)
        found = self._made.get(key)
        if found is None or found.shape != key[1]:
            tensor = self.tensors[name]
            found = self._made[key] = self.fakes.like(tensor, shape)
            if isinstance(tensor, nn.Parameter):
                found._is_param = True
        return found


def tensor_table(model: nn.Module) -> TensorTable:
    """Find the parameters and buffers of `model`, persistent or not, and where they are registered."""
    first: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    places: dict[str, list[tuple[nn.Module, str, bool]]] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        for store, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for key, tensor in store.items():
                if tensor is None:
                    continue
                name = first.setdefault(id(tensor), prefix + key)
                if name == prefix + key:
                    tensors[name] = tensor
                else:
                    aliases[prefix + key] = name
                places.setdefault(name, []).append((module, key, is_parameter))
    return TensorTable(tensors, aliases, {name: tuple(found) for name, found in places.items()}, modules)


class StandIns:
    """Fake tensors in place of real ones, the same for the same; those of parameters and buffers are put into place."""

    def __init__(self, table: TensorTable, shapes: Mapping[str, Shape]) -> None:
        self.fakes = table.fakes
        self.names: dict[int, str] = {}
        """id of the fake tensor of a parameter or buffer -> its name."""
        self.values: dict[int, torch.Tensor] = {}
        """id of a fake tensor -> the real one, where that has the same shape."""
        self.data: dict[int, torch.Tensor] = {}
        """id of the fake tensor of a parameter, a buffer or an input -> the real one."""
        self.constants: dict[int, torch.Tensor] = {}
        """id of the fake tensor of what some code brought along -> the real one."""
        self._fakes: dict[int, torch.Tensor] = {}
        self._alive: list[torch.Tensor] = []
        for name, tensor in table.tensors.items():
            fake = self._kept(tensor, table.fake(name, shapes.get(name, tensor.shape)), self.data)
            self.names[id(fake)] = name
            if name not in shapes:
                self.values[id(fake)] = tensor
            for module, key, is_parameter in table.places[name]:
                (module._parameters if is_parameter else module._buffers)[key] = fake  # type: ignore[assignment]

    def of_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stand-in of an example input."""
        found = self._fakes.get(id(tensor))
        return self._kept(tensor, self.fakes.like(tensor, tensor.shape), self.data) if found is None else found

    def of_any(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stand-in of a tensor that some code brought along; fake ones stand for themselves."""
        if isinstance(tensor, FakeTensor):
            return tensor
        found = self._fakes.get(id(tensor))
        return self._kept(tensor, self.fakes.mode.from_tensor(tensor), self.constants) if found is None else found

    def _kept(self, tensor: torch.Tensor, fake: torch.Tensor, kind: dict[int, torch.Tensor]) -> torch.Tensor:
        self._fakes[id(tensor)] = fake
        kind[id(fake)] = tensor
        self._alive.append(tensor)
        return fake
