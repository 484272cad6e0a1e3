"""Whether a network can be trained, found out on fake tensors: a forward and a backward pass without arithmetic.

An operator that writes in place what another one keeps for its backward pass runs forward, and fails only there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from espalier.graph.caches import drop_caches
from espalier.graph.named_tensors import StandIns, TensorTable
from espalier.graph.trees import call_arguments, flatten_tensors, map_tensors
from espalier.graph.undisturbed import undisturbed


def backward_problem(model: nn.Module, example: Any, table: TensorTable) -> str | None:
    """What a backward pass in train mode would fail with; None if it would run, or if nothing depends on a parameter.

    The model is left exactly as it was.
    """
    with undisturbed(table.modules.values(), training=True):
        stand_ins = StandIns(table, {})
        drop_caches(table.modules.values())
        fakes = [table.fake(name, one.shape) for name, one in table.tensors.items() if one.requires_grad]
        args, kwargs = map_tensors(call_arguments(example), stand_ins.of_input)
        try:
            with torch.enable_grad(), stand_ins.fakes.mode:
                for fake in fakes:
                    fake.requires_grad_(True)
                found = [one for _, one in flatten_tensors(model(*args, **kwargs), "") if one.requires_grad]
                if found:
                    sum(one.sum() for one in found).backward()  # type: ignore[union-attr]
        except RuntimeError as error:
            return str(error).strip().splitlines()[0]
        finally:
            for fake in fakes:
                fake.grad = None
                fake.requires_grad_(False)
    return None


__all__ = ["backward_problem"]
