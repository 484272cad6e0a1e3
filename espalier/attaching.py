"""`attach`: from a model and example inputs to its structure."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from espalier.compiled import uncompiled
from espalier.edit.apply import copy_of
from espalier.edit.changes import Limits, find_axis
from espalier.edit.interrupt import uninterrupted
from espalier.edit.optimizer import check as check_optimizer
from espalier.edit.whole import is_sharded
from espalier.errors import PlanError
from espalier.graph.cells import named_cells
from espalier.graph.named_tensors import tensor_table
from espalier.graph.solver import Reason
from espalier.graph.topology import Topology, infer
from espalier.parallel.wrapped import Model, unwrapped
from espalier.structure import Structure

LimitLike = Limits | tuple[int | None, int | None]


def attach(
    model: Model,
    example_inputs: Any,
    *,
    optimizer: Optimizer | None = None,
    keep: Iterable[str] = (),
    limits: Mapping[str, LimitLike] | None = None,
    follow: Sequence[nn.Module] = (),
    undo_limit: int = 100,
    cells: Sequence[str] = (),
) -> Structure:
    """Read the structure of a model. Changes nothing.

    Args:
        model: any module that runs on the example inputs, or what `torch.compile` made of one; or a
            DistributedDataParallel around one, which is made anew after every edit, on all ranks; or an
            `espalier.FullyShard`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. Only shapes, types and devices
            count.
        optimizer: the optimizer that trains the model; its state will follow every edit.
        keep: modules or axes, by name, that have to stay as they are.
        limits: axis -> (smallest, largest) size, None for no bound; or `Limits`, which can also ask for multiples of a
            number. A plan that would leave them is refused.
        follow: copies of the model, such as an averaged one, that share every edit.
        undo_limit: how many edits can be undone between two optimizer steps. What they removed, and old gradients and
            buffers, are kept that long; 0 keeps nothing.
        cells: patterns of paths, such as ``encoder.block*``, of modules that are cells besides those that are found.

    Raises:
        CaptureError: the model's forward failed.
        OptimizerError: the optimizer holds none of the model's parameters.
        PlanError: another wrapper is given instead of the model, or a name in `keep` or `limits` is unknown.
        ParallelError: the wrapper does what could not be done again after an edit.
    """
    inside = unwrapped(model, optimizer, follow)
    model, live = inside.model, inside.peers.live(inside.model)
    check_model(model)
    if type(undo_limit) is not int or undo_limit < 0:
        raise PlanError(f"undo_limit: expected a number of edits of at least 0, found {undo_limit!r}.")
    if optimizer is not None:
        check_optimizer(optimizer, live.named_parameters())
    with uninterrupted():
        topology = infer(model, example_inputs)
    structure = attached(
        model, example_inputs, topology, optimizer=optimizer, keep=keep, limits=limits, follow=follow,
        undo_limit=undo_limit, cells=cells, wrapper=inside.compiled,
    )  # fmt: skip
    return inside.bind(structure)


def attached(
    model: nn.Module,
    example_inputs: Any,
    topology: Topology,
    *,
    optimizer: Optimizer | None,
    keep: Iterable[str],
    limits: Mapping[str, LimitLike] | None,
    follow: Sequence[nn.Module],
    undo_limit: int = 100,
    cells: Sequence[str] = (),
    wrapper: nn.Module | None = None,
) -> Structure:
    """The structure of a model of which the topology is known; otherwise as `attach`."""
    topology = topology.frozen(_kept(model, topology, keep))
    bounds = {name: _limits(name, one) for name, one in (limits or {}).items()}
    for name in bounds:
        find_axis(topology, name)
    table = tensor_table(model)
    copies = [uncompiled(module) for module in follow]
    for module in copies:
        copy_of(table, module)
    named_cells(table.modules, cells)
    return Structure(model, example_inputs, topology, optimizer, bounds, copies, undo_limit, cells, wrapper)


def _limits(name: str, bounds: LimitLike) -> Limits:
    if isinstance(bounds, Limits):
        return bounds
    if not isinstance(bounds, tuple) or len(bounds) != 2:
        raise PlanError(f"limits of {name}: expected (smallest, largest), found {bounds!r}.")
    try:
        return Limits(*bounds)
    except PlanError as problem:
        raise PlanError(f"limits of {name}: {problem}") from None


def check_model(model: nn.Module) -> None:
    """Raise PlanError for a wrapper in place of the model, or for parameters that cannot be edited."""
    if not isinstance(model, nn.Module):
        raise PlanError(f"expected a torch.nn.Module, found {type(model).__name__}.")
    for path, module in model.named_modules():
        found = f"{path} is" if path else "this is"
        if isinstance(module, torch._dynamo.OptimizedModule):
            raise PlanError(
                f"{found} a compiled wrapper; compile modules inside of a model in place (module.compile()), so that "
                "their names stay, or the model as a whole."
            )
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise PlanError(
                f"{found} a {type(module).__name__} wrapper; attach to the model inside (wrapper.module), or to a "
                "DistributedDataParallel that is the outermost module: replicas would go on unsynchronised after an "
                "edit inside another wrapper."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise PlanError(
                f"{found} a TorchScript module, whose code cannot follow an edit; attach to the Python model."
            )
        if _is_one(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
            raise PlanError(
                f"{found} a FullyShardedDataParallel wrapper, whose flat parameters cannot be edited; give "
                "espalier.attach an espalier.FullyShard, which uses fully_shard (FSDP2)."
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_sharded(tensor):
            raise PlanError(
                f"{name} is sharded already; give espalier.attach an espalier.FullyShard of the plain model and of the "
                "function that shards it."
            )
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise PlanError(f"{name} has no shape yet; run the model once on real inputs before attach.")
        if tensor.is_inference():
            raise PlanError(
                f"{name} was made under torch.inference_mode(), so it cannot be trained; build the model outside."
            )


def _is_one(value: object, module: str, name: str) -> bool:
    """Whether a value is of a class in a module that is slow to import; nothing is before somebody has imported it."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _kept(model: nn.Module, topology: Topology, keep: Iterable[str]) -> dict[int, Reason]:
    if isinstance(keep, str):
        raise PlanError(f"keep is a list of names; write keep=[{keep!r}].")
    modules = {path for path, _ in model.named_modules() if path}
    reasons: dict[int, Reason] = {}
    for name in keep:
        numbers = [topology.by_name[name].number] if name in topology.by_name else []
        if name in modules:
            numbers += [
                record.number
                for record in topology.axes.values()
                if any(tensor.startswith(f"{name}.") for tensor, _, _ in record.slots)
            ]
        if not numbers and name not in modules:
            find_axis(topology, name)
        reasons.update({number: Reason("keep", f"is kept as asked for by keep={name!r}") for number in numbers})
    return reasons
