"""`esp.save` and `esp.load`: a network that was edited, with its optimizer, as safetensors and JSON.

A checkpoint is a normal form and not a log: the size of every axis, the attributes that edits changed and the values of
all tensors, so that a thousand edits load as fast as one. The user's code builds the model at its original size and
loading does the rest, on the user's own objects: parameters and optimizer keep their identity. Nothing is pickled.

Invariant: everything is read and checked before anything is touched, and what is touched goes through a journal, so
that a load that fails leaves model and optimizer as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from espalier.attaching import LimitLike
from espalier.errors import CheckpointError
from espalier.parallel.fully_shard import FullyShard
from espalier.parallel.wrapped import Model, Unwrapped, unwrapped
from espalier.structure import Structure
from espalier.train import checkpoint_files as files
from espalier.train.checkpoint_contents import contents_of
from espalier.train.checkpoint_loading import loaded
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
    if not isinstance(structure, Structure):
        raise CheckpointError(f"structure: expected what espalier.attach returned, found a {type(structure).__name__}.")
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


def _shared_out(structure: Structure) -> FullyShard | None:
    """The network as it is shared out among processes; None if it is not."""
    if structure.peers.whole:
        return None
    from espalier.parallel.shards import ShardStore  # slow to import

    assert isinstance(structure.surgery.store, ShardStore)
    return structure.surgery.store.fully


__all__ = ["load", "save"]
