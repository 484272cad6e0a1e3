"""A fresh model, and its optimizer, made what a checkpoint says: read and checked first, changed through a journal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from espalier.attaching import LimitLike, attached, check_model
from espalier.compiled import uncompiled
from espalier.edit.apply import copy_of
from espalier.edit.attributes import AttributeChange
from espalier.edit.changes import Changes
from espalier.edit.depth import replay
from espalier.edit.interrupt import uninterrupted
from espalier.edit.journal import Journal
from espalier.edit.known import Known
from espalier.edit.masks import Masks
from espalier.edit.optimizer import check as check_optimizer
from espalier.edit.optimizer import check_shapes, plan_state
from espalier.edit.plan import Plan, Resize
from espalier.edit.refresh import different
from espalier.edit.verify import attributes_set, changed_attribute, resized_example
from espalier.errors import CaptureError, CheckpointError
from espalier.graph.dims import NEW
from espalier.graph.named_tensors import TensorTable, tensor_table
from espalier.graph.topology import INTERFACE, Topology, infer
from espalier.measure.cost import cost_of
from espalier.parallel.wrapped import Unwrapped
from espalier.record import Edit
from espalier.structure import Structure
from espalier.train import checkpoint_optimizer
from espalier.train.checkpoint_network import (
    SavedNetwork,
)
from espalier.train.checkpoint_optimizer import RestoredOptimizer
from espalier.train.checkpoint_values import (
    Replacement,
    checked,
    follower_replacements,
    masks_of,
    prefix_of,
    replacements_of,
    values_of,
)


def loaded(
    contents: Mapping[str, Any],
    inside: Unwrapped,
    example_inputs: Any,
    optimizer: Optimizer | None,
    keep: Iterable[str],
    limits: Mapping[str, LimitLike] | None,
    follow: Sequence[nn.Module],
) -> Structure:
    """As `load` in one process, from what `contents_of` gave; of a network that is sharded, all but the shards."""
    network = SavedNetwork.parsed(contents["network.json"])
    model, hollow = inside.model, not inside.peers.whole
    follow = [uncompiled(module) for module in follow]
    check_model(model)
    if optimizer is not None:
        check_optimizer(optimizer, inside.peers.live(model).named_parameters())
    if hollow and (network.depth or "masks.safetensors" in contents):
        raise CheckpointError("the saved network has masks, or layers came or went in it; load it without FullyShard.")
    here = None if hollow else optimizer
    journal = Journal()
    try:
        with uninterrupted():
            replay(journal, model, network.depth, [optimizer] if optimizer is not None else [], _roots(model, follow))
            table = tensor_table(model)
            network.check_tensors(table)
            values = checked(values_of(contents["network.safetensors"], table, network, hollow), network.tensors)
            masks = masks_of(contents.get("masks.safetensors", {}), network.tensors, table)
            attributes = network.attribute_changes(model)
            structure, after, found = _described_by(
                network, attributes, model, inside.compiled, example_inputs,
                optimizer=optimizer, keep=keep, limits=limits, follow=follow,
            )  # fmt: skip
            replacements = replacements_of(table.tensors, values, network.tensors)
            settings = [(model, change) for change in attributes]
            if follow and network.followers and len(follow) != len(network.followers):
                raise CheckpointError(
                    f"follow: {len(network.followers)} copies were saved, found {len(follow)}; pass all or none."
                )
            for number, module in enumerate(follow):
                replacements += follower_replacements(number, module, network, values, contents)
                path = prefix_of(module, network).removesuffix(".")
                settings += [
                    (module, replace(one, module=".".join(filter(None, (path, one.module))))) for one in attributes
                ]
            restored = _restored(here, table, contents)
            before = after if network.depth else structure.topology
            _commit(journal, replacements, settings, here, restored, _changes(before, after))
            _take_over(structure, after, found, attributes, network, masks)
            structure.surgery.compiled.renew(layers=bool(network.depth))
    except BaseException:
        journal.rollback()
        raise
    return structure


def _roots(model: nn.Module, follow: Sequence[nn.Module]) -> list[nn.Module]:
    table = tensor_table(model)
    return [copy_of(table, module).root for module in follow]


def _described_by(
    network: SavedNetwork,
    attributes: Sequence[AttributeChange],
    model: nn.Module,
    wrapper: nn.Module | None,
    example: Any,
    *,
    optimizer: Optimizer | None,
    keep: Iterable[str],
    limits: Mapping[str, LimitLike] | None,
    follow: Sequence[nn.Module],
) -> tuple[Structure, Topology, Topology]:
    """The structure of the fresh model; its topology at the saved sizes, without and with what was found since.

    A network to which layers came, or from which they went, is read at its saved sizes: at those that it has when it is
    built, what is left of it need not fit together.
    """
    if not network.depth:
        topology = infer(model, example)
        structure = attached(
            model, example, topology, optimizer=optimizer, keep=keep, limits=limits, follow=follow, wrapper=wrapper
        )
        network.check_axes(structure.initial_sizes)
        after = _resized(structure.topology, network)
        _verify(structure, after, attributes)
        return structure, after, network.with_findings(after)
    shapes = {name: one.shape for name, one in network.tensors.items()}
    with attributes_set(model, attributes):
        try:
            after = infer(model, network.resized(example), shapes=shapes)
        except CaptureError as problem:
            raise CheckpointError(
                f"at the saved sizes the model would not run: {problem} Build the model with the code that it was "
                "saved with."
            ) from problem
    network.check_sizes({record.name: after.sizes[number] for number, record in after.axes.items()})
    structure = attached(
        model, network.resized(example), after, optimizer=optimizer, keep=keep, limits=limits, follow=follow,
        wrapper=wrapper,
    )  # fmt: skip
    return structure, after, network.with_findings(structure.surgery.known.topology)


def _resized(topology: Topology, network: SavedNetwork) -> Topology:
    """The topology of the fresh model at the saved sizes."""
    after = topology.resized({topology.by_name[name].number: axis.size for name, axis in network.axes.items()})
    after = after.rebuilt({name: one.shape for name, one in network.tensors.items() if after.may_be_rebuilt(name)})
    for name, saved in network.tensors.items():
        if after.shape(name) != saved.shape:
            raise CheckpointError(
                f"{name}: expected shape {after.shape(name)} at the saved sizes of its axes, found {saved.shape}. "
                "Build the model with the code that it was saved with."
            )
    for number, record in topology.axes.items():
        if after.sizes[number] == topology.sizes[number]:
            continue
        own = [reason.text for reason in record.reasons if reason.kind not in (*INTERFACE, "keep")]
        if own:
            raise CheckpointError(
                f"the checkpoint has {after.sizes[number]} units in {record.name}, which may not change from "
                f"{topology.sizes[number]}: it {own[0]}. Build the model with the code that it was saved with."
            )
    return after


def _verify(structure: Structure, after: Topology, attributes: Sequence[AttributeChange]) -> None:
    mismatch = different(structure.surgery.subject(), after, attributes)
    if mismatch is not None:
        raise CheckpointError(
            f"at the saved sizes the model would not run as the saved one did: {mismatch.where}: {mismatch.text}. "
            "Build the model with the code that it was saved with."
        )


def _restored(optimizer: Optimizer | None, table: TensorTable, contents: Mapping[str, Any]) -> RestoredOptimizer | None:
    if optimizer is None or "optimizer.json" not in contents:
        return None
    data, tensors = contents["optimizer.json"], contents["optimizer.safetensors"]
    return checkpoint_optimizer.restored(optimizer, table.names, data, tensors)


def _changes(before: Topology, after: Topology) -> Changes:
    """The changes of size as an edit that drops the last units, or appends new ones."""
    axes = {}
    for number in before.axes:
        old, new = before.sizes[number], after.sizes[number]
        if old != new:
            added = np.full(max(0, new - old), NEW, dtype=np.int64)
            axes[number] = np.concatenate([np.arange(min(old, new), dtype=np.int64), added])
    return Changes(axes, before, after)


def _commit(
    journal: Journal,
    replacements: Sequence[Replacement],
    settings: Sequence[tuple[nn.Module, AttributeChange]],
    optimizer: Optimizer | None,
    restored: RestoredOptimizer | None,
    changes: Changes,
) -> None:
    named = [(one.name, one.tensor) for one in replacements]
    try:
        for one in replacements:
            entries: Mapping[str, Any] = {}
            if optimizer is not None and restored is None and one.tensor in optimizer.state:
                sources = changes.sources(one.name) or (None,) * one.tensor.dim()
                entries = plan_state(optimizer, one.tensor, sources, one.new, one.name)
            journal.replace_tensor(one.tensor, one.new, None, one.name)
            if optimizer is not None:
                journal.replace_state(optimizer, one.tensor, entries, one.name)
        for module, change in settings:
            journal.set_attribute(*changed_attribute(module, change))
        if optimizer is not None:
            if restored is not None:
                journal.set_attribute(optimizer, "state", restored.state)
            check_shapes(optimizer, named)
    except Exception as error:
        raise CheckpointError(f"the checkpoint could not be loaded, and nothing was changed: {error}") from error
    if optimizer is not None and restored is not None:
        for group, options in zip(optimizer.param_groups, restored.options, strict=True):
            group.update(options)


def _take_over(
    structure: Structure,
    after: Topology,
    found: Topology,
    attributes: Sequence[AttributeChange],
    network: SavedNetwork,
    masks: Masks,
) -> None:
    """Have the structure of the fresh model describe the loaded one."""
    before = structure.surgery.known.topology
    sizes = {
        record.name: (before.sizes[number], after.sizes[number])
        for number, record in before.axes.items()
        if before.sizes[number] != after.sizes[number]
    }
    if sizes or attributes or network.depth:
        resizes = tuple(Resize(name, tuple(range(new, old)), max(0, new - old)) for name, (old, new) in sizes.items())
        plan = Plan(resizes, interface=True, depth=tuple(one.edit for steps in network.depth for one in steps))
        why = "loaded from a checkpoint"
        units = {one.axis: tuple(range(sizes[one.axis][1] - one.add)) + (NEW,) * one.add for one in resizes}
        edit = Edit(plan, "changing", why, sizes, cost_of(before), cost_of(after), tuple(attributes), units)
        structure.surgery.history.append(edit)
    known = structure.surgery.known
    structure.surgery.known = Known(
        found,
        resized_example(structure.example, after.predictions[0], after),
        {**network.limits, **known.limits},
        {record.name: np.zeros(found.sizes[number], np.int64) for number, record in found.axes.items()},
        {name: one.original for name, one in network.axes.items()},
        {name: one.original for name, one in network.tensors.items()},
        MappingProxyType(masks),
        tuple(attributes),
        network.depth,
        settled=True,
    )
    structure.surgery.enforcer.enforce(masks, tensor_table(structure.model).tensors)
    structure.surgery.youth.look()


__all__ = ["loaded"]
