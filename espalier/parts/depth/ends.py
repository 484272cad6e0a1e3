"""What goes into layers and comes out of them while the network runs, seen by hooks, which are gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from espalier.edit.layers import at, put
from espalier.errors import MethodError
from espalier.graph.dims import axes_of
from espalier.graph.regions import Boundaries, Region
from espalier.graph.visits import Place
from espalier.parts.candidate import Candidate
from espalier.structure import Structure

Seen = Callable[[str, Tensor, Tensor], Tensor | None]
"""(name, what went in, what came out) -> what is to go on in place of that; None: the same."""


@contextmanager
def watched(structure: Structure, layers: Mapping[str, Candidate], seen: Seen) -> Iterator[None]:
    """Call `seen` for every run of these layers in the body.

    Raises:
        MethodError: one of them is none that turns one tensor into another one of its size.
    """
    boundaries, modules = Boundaries(structure.topology), dict(structure.model.named_modules())
    entered: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str, entry: Place, exit: Place, first: str, last: str) -> None:
        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # a copy, since modules may write into what they get
            entered[name] = at({**dict(enumerate(args)), **kwargs}, entry).clone()

        def after(module: Any, args: tuple[Any, ...], result: Any) -> Any:
            replaced = seen(name, entered.pop(name), at(result, exit))
            return None if replaced is None else put(result, exit, replaced)

        hooks.append(modules[first].register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(modules[last].register_forward_hook(after))

    try:
        for name, one in layers.items():
            first, last = boundaries.region(one.modules[0]), boundaries.region(one.modules[-1])
            if not isinstance(first, Region) or not isinstance(last, Region) or not (first.entry or first.takes):
                raise MethodError(f"{name}: what goes into it is not known; leave it out with axes=[...].")
            entry = first.entry if len(one.modules) == 1 and first.entry is not None else first.takes[0]
            watch(name, entry, last.exit, one.modules[0], one.modules[-1])
        yield
    finally:
        for hook in hooks:
            hook.remove()


def features(structure: Structure, layers: Mapping[str, Candidate]) -> dict[str, tuple[int, ...]]:
    """The dimensions of what each layer gives that hold features; the others are samples and positions."""
    boundaries, topology = Boundaries(structure.topology), structure.topology
    found = {}
    for name, one in layers.items():
        region = boundaries.region(one.modules[-1])
        assert isinstance(region, Region)
        prediction, visit = next(
            (each, visit)
            for each in topology.predictions
            for visit in each.visits
            if visit.module == one.modules[-1]
        )  # fmt: skip
        value = next(leaf.value for leaf in visit.exits if leaf.place == region.exit)
        dims = prediction.dims[value]
        wide = [
            number for number, dim in enumerate(dims) if number and any(axis in topology.axes for axis in axes_of(dim))
        ]
        found[name] = tuple(wide) or tuple(range(1, len(dims)))
    return found


__all__ = ["Seen", "features", "watched"]
