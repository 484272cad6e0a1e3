"""`esp.save` and `esp.load`: a network that was edited, with its optimizer, as safetensors and JSON.

A checkpoint is a normal form and not a log: the size of every axis, the attributes that edits changed and the values of
all tensors, so that a thousand edits load as fast as one. The user's code builds the model at its original size and
loading does the rest, on the user's own objects: parameters and optimizer keep their identity. Nothing is pickled.

Invariant: everything is read and checked before anything is touched, and what is touched goes through a journal, so
that a load that fails leaves model and optimizer as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
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
from espalier.graph.capture import TensorTable, tensor_table
from espalier.graph.dims import NEW
from espalier.graph.topology import INTERFACE, Topology, infer
from espalier.measure.cost import cost_of
from espalier.parallel.fully_shard import FullyShard, empty
from espalier.parallel.wrapped import Model, Unwrapped, unwrapped
from espalier.record import Edit
from espalier.structure import Structure
from espalier.train import checkpoint_files as files
from espalier.train import checkpoint_optimizer
from espalier.train.checkpoint_network import (
    SavedAxis,
    SavedNetwork,
    SavedTensor,
    found_since_attach,
    interface_of,
    saved_attributes,
)
from espalier.train.checkpoint_optimizer import RestoredOptimizer, laid_out
from espalier.train.session import Session


def save(structure: Structure, folder: str | Path, *, session: Session | None = None) -> None:
    """Write network, optimizer and followers to `folder`, in place of a checkpoint that is there; all or nothing.

    With a session its state too, for `Session.load`.

    All parameters and buffers are saved, those that are not persistent too, and the optimizer's state and options.
    Gradients, random state, schedulers and train or eval mode are not. Of replicas rank 0 alone writes, and nobody
    waits for it; of a network that is sharded every rank writes its part, all of them have to call this, and whatever
    number of ranks, or one process, can load it. An interrupted save leaves the folder with the
    earlier checkpoint or with the new one, whole. Other files in the folder are left alone.

    Raises:
        CheckpointError: the files could not be written, something cannot be held by JSON and safetensors, or the
            session is one of another structure.
        SurgeryError: the model's tensors were resized by something else than this structure.
    """
    fully = _shared_out(structure)
    if fully is None and not structure.peers.leads:
        return
    contents = contents_of(structure, session)
    writers = {name: files.writer(name, one) for name, one in contents.items()}
    if fully is None:
        files.write(Path(folder), writers)
    else:
        from espalier.train.checkpoint_shards import save_shards  # slow to import

        save_shards(fully, structure.peers, structure.optimizer, Path(folder), writers)


def contents_of(structure: Structure, session: Session | None = None) -> dict[str, Any]:
    """What `save` writes: name of a file -> what JSON can hold, or tensors by name. Tensors are the live ones.

    Of a network that is sharded, without parameters and optimizer.

    Raises:
        CheckpointError, SurgeryError: as `save`.
    """
    model, optimizer = structure.model, structure.optimizer
    if session is not None and session.structure is not structure:
        raise CheckpointError("session: expected the session of this structure, found one of another.")
    table = tensor_table(model)
    structure.surgery.check_untouched(table)
    _check_extra_state(model)
    followers = [tensor_table(module).tensors for module in structure.surgery.follow]
    network, whole = _described(structure, table, followers), structure.peers.whole
    tensors = table.tensors if whole else _buffers(table)
    contents: dict[str, Any] = {"network.json": network.to_json(), "network.safetensors": tensors}
    if structure.masks:
        contents["masks.safetensors"] = {
            name: torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in structure.masks.items()
        }
    if followers:
        contents["followers.safetensors"] = {
            f"{number}:{name}": one for number, found in enumerate(followers) for name, one in found.items()
        }
    if optimizer is not None and whole:
        described = checkpoint_optimizer.described(optimizer, _names(table))
        contents["optimizer.json"], contents["optimizer.safetensors"] = described
    if session is not None:
        contents["session.json"], contents["session.safetensors"] = session.state_parts()
    return contents


def load(
    folder: str | Path,
    model: Model,
    example_inputs: Any,
    *,
    optimizer: Optimizer | None = None,
    keep: Iterable[str] = (),
    limits: Mapping[str, LimitLike] | None = None,
    follow: Sequence[nn.Module] = (),
) -> Structure:
    """Attach to a freshly built model and make it, and its optimizer, what `save` saw; all or nothing.

    Outputs and the next training step are bitwise those of the saved network. Values go to the devices on which the
    model is. The parameters and the optimizer stay the user's objects. In the history of the structure all earlier
    edits are one. Copies in `follow` that were not saved start as copies of the loaded model; an optimizer that was not
    saved keeps what state it has, resized. All units count as there from the start (`Structure.births`) until the state
    of a session says otherwise.

    Args:
        folder: what `save` was given.
        model: built by the same code as the saved one, at the sizes that it had before all edits; or a
            DistributedDataParallel around it or an `espalier.FullyShard` of it, as for `attach`, on any number of
            ranks.
        example_inputs: as for `attach`, at the original size of the interface.
        optimizer: of the saved type and built from this model's parameters in the same groups; None to leave it out.
        keep: modules or axes that have to stay as they are, besides those that were kept when it was saved.
        limits: axis -> (smallest, largest) size, in place of the saved limits of the same axes.
        follow: copies of the fresh model, as many as were saved, or none.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, of another version, or for another model or optimizer.
            Nothing was changed.
        CaptureError, OptimizerError, PlanError: as `attach`.
    """
    inside = unwrapped(model, optimizer, follow)
    peers = inside.peers
    try:
        paths = files.read(Path(folder))
        structure = loaded(_stored(paths, inside), inside, example_inputs, optimizer, keep, limits, follow)
        if inside.fully is not None:
            from espalier.train.checkpoint_shards import fill  # slow to import

            fill(paths, inside.fully, optimizer)
            structure.surgery.youth.look()
    except Exception as error:
        peers.settle("loading a checkpoint", error)
        raise
    peers.settle("loading a checkpoint", None)
    peers.rebind()
    return inside.bind(structure)


def _stored(paths: Mapping[str, Path], inside: Unwrapped) -> files.Stored:
    """What the files hold, with what was saved as shards unless each process is to read its own."""
    if "shards.json" not in paths or not inside.peers.whole:
        return files.Stored(paths)
    from espalier.train.checkpoint_shards import Together  # slow to import

    return Together(paths)


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
            values = _checked(_values(contents["network.safetensors"], table, network, hollow), network.tensors)
            masks = _masks(contents.get("masks.safetensors", {}), network.tensors, table)
            attributes = network.attribute_changes(model)
            structure, after, found = _described_by(
                network, attributes, model, inside.compiled, example_inputs,
                optimizer=optimizer, keep=keep, limits=limits, follow=follow,
            )  # fmt: skip
            replacements = _replacements(table.tensors, values, network.tensors)
            settings = [(model, change) for change in attributes]
            if follow and network.followers and len(follow) != len(network.followers):
                raise CheckpointError(
                    f"follow: {len(network.followers)} copies were saved, found {len(follow)}; pass all or none."
                )
            for number, module in enumerate(follow):
                replacements += _follower_replacements(number, module, network, values, contents)
                path = _prefix(module, network).removesuffix(".")
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


def _shared_out(structure: Structure) -> FullyShard | None:
    """The network as it is shared out among processes; None if it is not."""
    if structure.peers.whole:
        return None
    from espalier.parallel.shards import ShardStore  # slow to import

    assert isinstance(structure.surgery.store, ShardStore)
    return structure.surgery.store.fully


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


@dataclass(frozen=True)
class _Replacement:
    """A tensor of the user and the values that it will have."""

    name: str
    tensor: Tensor
    new: Tensor


def described(structure: Structure) -> SavedNetwork:
    """All but the values that a checkpoint says of a network. Raises CheckpointError or SurgeryError, as `save`."""
    table = tensor_table(structure.model)
    structure.surgery.check_untouched(table)
    _check_extra_state(structure.model)
    return _described(structure, table, [])


def _described(structure: Structure, table: TensorTable, followers: Sequence[Mapping[str, Tensor]]) -> SavedNetwork:
    topology = structure.topology
    known, sizes = structure.surgery.known, {one.name: topology.sizes[n] for n, one in topology.axes.items()}
    return SavedNetwork(
        {name: SavedTensor.of(tensor, known.initial_shapes[name]) for name, tensor in table.tensors.items()},
        table.aliases,
        {name: SavedAxis(size, sizes[name]) for name, size in structure.initial_sizes.items()},
        found_since_attach(topology),
        saved_attributes(structure.model, known.attributes),
        structure.limits,
        [{name: SavedTensor.of(one, tuple(one.shape)) for name, one in tensors.items()} for tensors in followers],
        known.depth,
        interface_of(topology),
    )


def _check_extra_state(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"{path or 'the model'} ({type(module).__name__}) keeps extra state outside of parameters and buffers, "
                "which a checkpoint does not hold; register it as a buffer."
            )


def _checked(values: Mapping[str, Tensor], saved: Mapping[str, SavedTensor], prefix: str = "") -> dict[str, Tensor]:
    """The values of the tensors in `saved`, whose file must hold just these shapes and types."""
    for name, one in saved.items():
        value = values.get(prefix + name)
        if value is None or tuple(value.shape) != one.shape or str(value.dtype) != f"torch.{one.dtype}":
            found = "nothing" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
            raise CheckpointError(f"{name}: the checkpoint lists {one.dtype} of shape {one.shape}, but holds {found}.")
    return {name: values[prefix + name] for name in saved}


def _masks(packed: Mapping[str, Tensor], saved: Mapping[str, SavedTensor], table: TensorTable) -> dict[str, Tensor]:
    """The masks, which are saved as one bit per weight."""
    masks: dict[str, Tensor] = {}
    for name, bits in packed.items():
        one, count = saved.get(name), 0 if name not in saved else math.prod(saved[name].shape)
        if one is None or bits.dtype != torch.uint8 or tuple(bits.shape) != (-(-count // 8),):
            raise CheckpointError(
                f"{name}: the checkpoint holds a mask of {bits.numel()} bytes that fits no parameter."
            )
        mask = torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(np.bool_))
        masks[name] = mask.view(one.shape).to(table.tensors[name].device)
    return masks


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


def _replacements(
    tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], saved: Mapping[str, SavedTensor]
) -> list[_Replacement]:
    try:
        return [
            _Replacement(name, tensor, _laid_out(values[name], saved[name].order, tensor.device))
            for name, tensor in tensors.items()
        ]
    except ValueError as error:
        raise CheckpointError(f"network.json is damaged: {error}.") from error


def _laid_out(value: Tensor, order: Sequence[int], device: torch.device) -> Tensor:
    """See `laid_out`; what holds no values takes no memory either."""
    return value if 0 in value.stride() else laid_out(value, order, device)


def _values(
    found: Mapping[str, Tensor], table: TensorTable, network: SavedNetwork, hollow: bool
) -> Mapping[str, Tensor]:
    """The saved tensors; without the values of parameters, for a model that is to have none."""
    if not hollow:
        return found
    known = {name: one for name, one in table.tensors.items() if name in network.tensors}
    return {
        name: empty(one, network.tensors[name].shape) if isinstance(one, nn.Parameter) else found[name]
        for name, one in known.items()
    }


def _buffers(table: TensorTable) -> dict[str, Tensor]:
    """What of a plain model has values, where its parameters are sharded."""
    return {name: one for name, one in table.tensors.items() if not isinstance(one, nn.Parameter)}


def _follower_replacements(
    number: int,
    module: nn.Module,
    network: SavedNetwork,
    values: Mapping[str, Tensor],
    contents: Mapping[str, Any],
) -> list[_Replacement]:
    """What a copy of the model will hold: what it held when it was saved, or else the values of the model."""
    tensors, prefix = tensor_table(module).tensors, _prefix(module, network)
    if not network.followers:
        return [
            _Replacement(name, one, laid_out(values[name].to(one.dtype), network.tensors[name].order, one.device))
            for name in network.tensors
            for one in (tensors[prefix + name],)
        ]
    saved = network.followers[number]
    different = sorted(set(saved) ^ set(tensors))
    if different:
        raise CheckpointError(f"follow: copy {number} and the saved one are not alike: only one has {different[0]}.")
    for name, one in tensors.items():
        of_model = network.tensors.get(name.removeprefix(prefix))
        fresh, then = (of_model.original, of_model.shape) if of_model else (saved[name].shape, tuple(one.shape))
        if (tuple(one.shape), str(one.dtype)) != (fresh, f"torch.{saved[name].dtype}") or saved[name].shape != then:
            raise CheckpointError(
                f"follow: {name} of copy {number}: expected {saved[name].dtype} of shape {fresh}, found {one.dtype} of "
                f"shape {tuple(one.shape)}; pass a copy of the freshly built model."
            )
    found = _checked(contents["followers.safetensors"], saved, f"{number}:")
    return _replacements(tensors, found, saved)


def _prefix(module: nn.Module, network: SavedNetwork) -> str:
    """What a wrapper puts before the model's own names; `attach` has checked that it is one of two."""
    names = tensor_table(module).tensors
    return "" if all(name in names for name in network.tensors) else "module."


def _restored(optimizer: Optimizer | None, table: TensorTable, contents: Mapping[str, Any]) -> RestoredOptimizer | None:
    if optimizer is None or "optimizer.json" not in contents:
        return None
    data, tensors = contents["optimizer.json"], contents["optimizer.safetensors"]
    return checkpoint_optimizer.restored(optimizer, _names(table), data, tensors)


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
    replacements: Sequence[_Replacement],
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


def _names(table: TensorTable) -> dict[int, str]:
    return {id(tensor): name for name, tensor in table.tensors.items()}


__all__ = ["contents_of", "described", "load", "loaded", "save"]
