"""Changes to the tree of modules, each through the journal: where layers and cells really come and go.

In an `nn.Sequential`, and among the entries of an `nn.ModuleList`, modules are inserted and deleted as a user would do
it, and those that follow move up or down. Elsewhere code calls a module by its name: there a removed one leaves a
`Bypass`, and new ones become its children and run by a hook, so that all names stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from espalier.edit.journal import Journal
from espalier.edit.layers import AFTER, BEFORE, Inserted, run_after, run_before
from espalier.errors import PlanError
from espalier.graph.visits import Place

_LISTS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Spot:
    """A module and where it is registered."""

    parent: nn.Module
    module: nn.Module

    @classmethod
    def at(cls, root: nn.Module, path: str) -> Spot:
        """Raises PlanError if there is no module of that path."""
        parent_path, _, key = path.rpartition(".")
        try:
            parent = root.get_submodule(parent_path)
            module = parent.get_submodule(key)
        except AttributeError:
            raise PlanError(f"there is no module {path!r} in the model.") from None
        if not path:
            raise PlanError("expected the path of a module in the model, found ''.")
        return cls(parent, module)

    @property
    def key(self) -> str:
        """The name under which the parent has the module now."""
        return next(key for key, one in self.parent._modules.items() if one is self.module)

    @property
    def is_list(self) -> bool:
        """Whether entries of the parent run by their order."""
        return isinstance(self.parent, _LISTS)

    @property
    def is_sequential(self) -> bool:
        """Whether the parent runs its entries one after the other."""
        return is_sequential(self.parent)


def is_sequential(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other, and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def insert(
    journal: Journal, spot: Spot, new: nn.Module, places: tuple[Place, ...], *, before: bool, as_entry: bool
) -> None:
    """Put a new module right after (before) the one at a spot.

    Args:
        journal: takes the changes.
        spot: where.
        new: the module.
        places: where the tensor that it runs on is, among the results (arguments) of the one at the spot.
        before: whether it runs before it.
        as_entry: whether it becomes an entry of the list that the other one is in.
    """
    if as_entry:
        _insert_entry(journal, spot, new, before=before)
        return
    if is_sequential(spot.module):
        children = spot.module._modules
        key = _unused(str(len(children)), spot.module)
        added = {key: new, **children} if before else {**children, key: new}
        journal.set_modules(spot.module, _renumbered(added, list(children)))
        return
    name = BEFORE if before else AFTER
    present = spot.module._modules.get(name)
    if present is None:
        present = Inserted(places)
        journal.set_modules(spot.module, {**spot.module._modules, name: present})
        if before:
            journal.keep_hook(spot.module.register_forward_pre_hook(run_before, with_kwargs=True))
        else:
            journal.keep_hook(spot.module.register_forward_hook(run_after))
    if not isinstance(present, Inserted) or present.places != places:
        raise PlanError(f"{type(spot.module).__name__} has a child {name!r} already, which would run elsewhere.")
    entries = list(present._modules.values())
    entries = [*entries, new] if before else [new, *entries]
    journal.set_modules(present, {str(position): one for position, one in enumerate(entries)})


def remove_entry(journal: Journal, spot: Spot) -> None:
    """Delete an entry of a list."""
    kept = {key: one for key, one in spot.parent._modules.items() if one is not spot.module}
    journal.set_modules(spot.parent, _renumbered(kept, list(spot.parent._modules)))


def replace(journal: Journal, spot: Spot, new: nn.Module) -> None:
    """Put a new module in place of the one at a spot."""
    children = {key: new if one is spot.module else one for key, one in spot.parent._modules.items()}
    journal.set_modules(spot.parent, children)


def _insert_entry(journal: Journal, spot: Spot, new: nn.Module, *, before: bool) -> None:
    children: dict[str, nn.Module | None] = {}
    for key, one in spot.parent._modules.items():
        fresh = _unused(f"{key}_{'before' if before else 'after'}", spot.parent)
        if one is spot.module and before:
            children[fresh] = new
        children[key] = one
        if one is spot.module and not before:
            children[fresh] = new
    journal.set_modules(spot.parent, _renumbered(children, list(spot.parent._modules)))


def _unused(name: str, parent: nn.Module) -> str:
    while name in parent._modules:
        name += "_"
    return name


def _renumbered(children: dict[str, nn.Module | None], keys: list[str]) -> dict[str, nn.Module | None]:
    """The children numbered from 0, if they were before."""
    if keys != [str(position) for position in range(len(keys))]:
        return children
    return {str(position): one for position, one in enumerate(children.values())}


__all__ = ["Spot", "insert", "remove_entry", "replace"]
