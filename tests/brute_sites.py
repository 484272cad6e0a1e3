"""What is permissible, found out by trying: every module replaced by each of its arguments, and joined by a copy.

This knows nothing of Espalier but the classes that its surgery puts into a network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[Any, ...]


def tensors(tree: Any, place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """The tensors in tuples, lists and dictionaries."""
    if isinstance(tree, Tensor):
        yield place, tree
    elif isinstance(tree, (tuple, list)):
        for position, item in enumerate(tree):
            yield from tensors(item, (*place, position))
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from tensors(item, (*place, key))


def at(tree: Any, place: Place) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def put(tree: Any, place: Place, new: Any) -> Any:
    """`tree` with something else at a place."""
    if not place:
        return new
    items = {**tree} if isinstance(tree, dict) else list(tree)
    items[place[0]] = put(items[place[0]], place[1:], new)
    return items if isinstance(tree, dict) else type(tree)(items)


def given(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[Any, Any]:
    return {**dict(enumerate(args)), **kwargs}


class Stub(nn.Module):
    """Gives back one of its arguments; if the module that it replaces gave a tuple or a list, in such a one."""

    def __init__(self, entry: Place, like: Any, exit: Place) -> None:
        super().__init__()
        self.entry, self.exit = entry, exit
        self.like = like if isinstance(like, Tensor) else type(like)([None] * len(like))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = at(given(args, kwargs), self.entry)
        return value if not self.exit else put(self.like, self.exit, value)


@contextmanager
def replaced(model: nn.Module, path: str, new: nn.Module) -> Iterator[None]:
    """Another module at a path during the body."""
    parent_path, _, key = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    old = parent._modules[key]
    parent._modules[key] = new
    try:
        yield
    finally:
        parent._modules[key] = old


def outcome(model: nn.Module, x: Tensor, training: bool, backward: bool = False) -> list[Tensor] | None:
    """The tensors that a network gives, with the same random numbers each time; None if it fails."""
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.default_generator.manual_seed(0)
    before = x.clone()
    try:
        with torch.set_grad_enabled(backward):
            found = [tensor for _, tensor in tensors(model.train(training)(x))]
            for tensor in found:
                if tensor.requires_grad:
                    tensor.sum().backward(retain_graph=True)
    except Exception:
        return None
    finally:
        model.zero_grad()
        for name, buffer in model.named_buffers():
            if name in state:
                buffer.copy_(state[name])
        untouched = torch.equal(before, x)
        x.copy_(before)
    return [tensor.detach() for tensor in found] if untouched else None


def shapes(found: list[Tensor] | None) -> list[tuple[Any, ...]] | None:
    return None if found is None else [(tuple(tensor.shape), tensor.dtype) for tensor in found]


def equal(one: list[Tensor] | None, other: list[Tensor] | None) -> bool:
    return one is not None and other is not None and len(one) == len(other) and all(map(torch.equal, one, other))


def close(one: list[Tensor] | None, other: list[Tensor] | None) -> bool:
    """Equal up to the rounding of float64."""
    return shapes(one) == shapes(other) and one is not None and other is not None and all(map(_is_close, one, other))


def _is_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-11, atol=1e-11)


def observed(model: nn.Module, x: Tensor) -> dict[str, list[tuple[dict[Any, Any], Any]]]:
    """What every module gets and gives, in eval mode: path -> (arguments, result) of each run."""
    found: dict[str, list[tuple[dict[Any, Any], Any]]] = {}
    handles = []
    for path, module in model.named_modules():

        def note(_: nn.Module, args: Any, kwargs: Any, result: Any, path: str = path) -> None:
            found.setdefault(path, []).append((given(args, kwargs), result))

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


def twin(x: Tensor) -> Tensor:
    """A copy with the very strides, as far into its memory, so that what runs on it rounds as before."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().clone(), x.storage_offset(), x.size(), x.stride())


Wanted = dict[bool, list[Tensor] | None]
"""Mode -> what a network gives."""


def wanted_of(model: nn.Module, x: Tensor) -> Wanted:
    return {mode: outcome(model, x, mode) for mode in (False, True)}


def removals(
    model: nn.Module, x: Tensor, wanted: Wanted, path: str, seen: Sequence[tuple[dict[Any, Any], Any]]
) -> list[Place]:
    """The arguments of a module which could take the place of its result: the network runs and gives what it gave."""
    if not seen:
        return []
    arguments, result = seen[0]
    exits = [place for place, _ in tensors(result) if len(place) <= 1] if isinstance(result, (tuple, list)) else [()]
    if not isinstance(result, (Tensor, tuple, list)):
        return []
    working = []
    for entry, _ in tensors(arguments):
        for exit in exits:
            with replaced(model, path, Stub(entry, result, exit)):
                if all(shapes(outcome(model, x, mode)) == shapes(wanted[mode]) for mode in (False, True)):
                    working.append(entry)
                    break
    return working


def joined(
    model: nn.Module, x: Tensor, wanted: Wanted, path: str, after: Sequence[Place], before: Sequence[Place] = ()
) -> bool:
    """Whether the network runs and gives the very same with an identity at some results, and some arguments, of a
    module: at all places of one value the same copy of it."""
    module = model.get_submodule(path)

    def copied(tree: Any, places: Sequence[Place]) -> Any:
        new = twin(at(tree, places[0])) if places else None
        for place in places:
            tree = put(tree, place, new)
        return tree

    def ahead(_: nn.Module, args: Any, kwargs: Any) -> Any:
        found = copied(given(args, kwargs), before)
        return tuple(found[number] for number in range(len(args))), {key: found[key] for key in kwargs}

    handles = (
        module.register_forward_pre_hook(ahead, with_kwargs=True),
        module.register_forward_hook(lambda _, args, result: copied(result, after)),
    )
    try:
        return all(equal(outcome(model, x, mode), wanted[mode]) for mode in (False, True))
    finally:
        for handle in handles:
            handle.remove()
