"""Parameters that come and go join and leave the groups that an optimizer has: new groups would break schedulers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.edit.journal import Journal


def follow(
    journal: Journal,
    optimizer: Optimizer,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    origins: Mapping[str, str],
    at: Mapping[str, str],
) -> None:
    """Have an optimizer hold the parameters that there are now, in the groups that it has.

    A new parameter goes right after the one that decides its group: the one that it is a copy of, else the nearest that
    the optimizer holds, outwards from where it was inserted, and that is a matrix (or more) as it is, or a vector as it
    is. A copy of one that the optimizer does not hold, which is frozen or belongs to another one, is not held either.

    Args:
        journal: takes the changes.
        optimizer: whose groups.
        before: parameters by name, as they were; `after` as they are.
        after: parameters by name, as they are.
        origins: new parameter -> name that the one had that it is a copy of.
        at: new parameter -> path, as it was, of the module beside which it came.
    """
    known, present = {id(one) for one in before.values()}, {id(one) for one in after.values()}
    groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    names = {id(one): name for name, one in after.items()}
    joining: dict[int, list[Tensor]] = {}
    for name, tensor in after.items():
        if id(tensor) in known or not isinstance(tensor, nn.Parameter):
            continue
        guide = before.get(origins.get(name, "")) if name in origins else _nearest(tensor, at[name], before, groups)
        if guide is not None and id(guide) in groups:
            joining.setdefault(id(guide), []).append(tensor)
    for group in optimizer.param_groups:
        parameters: list[Tensor] = []
        for one in group["params"]:
            if id(one) not in known or id(one) in present:
                parameters.append(one)
            parameters += joining.get(id(one), ())
        journal.set_group(optimizer, group, parameters, names)


def _nearest(tensor: Tensor, at: str, before: Mapping[str, Tensor], held: Mapping[int, object]) -> Tensor | None:
    """The parameter whose group a new one shares."""
    path = at
    while True:
        inside = [one for name, one in before.items() if id(one) in held and (not path or name.startswith(f"{path}."))]
        alike = _of_kind(inside, tensor) or (inside if not path else [])
        if alike or not path:
            return next(iter(alike), None)
        path = path.rpartition(".")[0]


def _of_kind(found: Sequence[Tensor], tensor: Tensor) -> list[Tensor]:
    return [one for one in found if (one.dim() > 1) == (tensor.dim() > 1)]


__all__ = ["follow"]
