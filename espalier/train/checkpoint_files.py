"""The files of a checkpoint: replaced all or none, and believed only if size and SHA-256 are those of the manifest.

A save writes every file beside the present one under the suffix ``.new``, and then renames the new manifest to
``manifest.json.new``: that one rename is the save. Before it, the earlier checkpoint holds; after it, the new one does,
wherever its files have got to on the way to their final names (`read` looks in both places, the next save finishes).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from espalier.errors import CheckpointError

FORMAT: Final = 1
FILES: Final = (
    "network.json",
    "network.safetensors",
    "masks.safetensors",
    "followers.safetensors",
    "optimizer.json",
    "optimizer.safetensors",
    "session.json",
    "session.safetensors",
    "shards.json",
)
"""Every file that a checkpoint can have, apart from its manifest; other files of the folder are left alone."""

_MANIFEST: Final = "manifest.json"
_NEW: Final = ".new"

Writer = Callable[[Path], None]


def write(folder: Path, writers: Mapping[str, Writer]) -> None:
    """Replace the checkpoint in `folder` by the files that `writers` write, all or none.

    Raises:
        CheckpointError: the files could not be written; the folder holds a whole checkpoint if it held one before.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _finish(folder)
        _commit(folder, writers)
        _finish(folder)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint could not be written to {folder}: {error}. A checkpoint that was there before still "
            "holds; make sure that this is a folder that may be written to, with enough space for a second checkpoint."
        ) from error


def read(folder: Path) -> dict[str, Path]:
    """The files of the checkpoint in `folder`, by name; every byte is as it was written. Changes nothing.

    Raises:
        CheckpointError: there is no checkpoint, or one of another version, or a file is missing, cut short or changed.
    """
    try:
        return _checked_paths(folder)
    except OSError as error:
        raise CheckpointError(f"the checkpoint in {folder} cannot be read: {error}.") from error


class Stored(Mapping[str, Any]):
    """What the files of a checkpoint hold, by name; each is read when it is asked for."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = paths

    def __getitem__(self, name: str) -> Any:
        path = self.paths[name]
        return read_json(path) if name.endswith(".json") else read_tensors(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def writer(name: str, content: Mapping[str, Any]) -> Writer:
    """Writes a file of that name: JSON, or tensors."""
    return json_writer(content) if name.endswith(".json") else tensors_writer(content)


def json_writer(data: Mapping[str, Any]) -> Writer:
    """Writes `data` as JSON."""

    def writer(path: Path) -> None:
        path.write_text(json.dumps(data, indent=1), encoding="utf-8")

    return writer


def tensors_writer(tensors: Mapping[str, Tensor]) -> Writer:
    """Writes tensors of any memory layout, shared storage included, as safetensors. Raises CheckpointError."""

    def writer(path: Path) -> None:
        storages: set[int] = set()
        plain: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            plain_layout = tensor.layout is torch.strided and not tensor.is_quantized
            if is_traceable_wrapper_subclass(tensor) or not plain_layout or tensor.is_conj() or tensor.is_neg():
                raise CheckpointError(
                    f"{name} is a {type(tensor).__name__} of layout {tensor.layout}, or a conjugate or negative view; "
                    "only plain dense tensors can be saved."
                )
            value = tensor.detach().cpu().contiguous()
            if value.untyped_storage().data_ptr() in storages:
                value = value.clone()
            storages.add(value.untyped_storage().data_ptr())
            plain[name] = value
        try:
            save_file(plain, path)
        except (KeyError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path.name}: safetensors cannot hold these tensors: {error}.") from error

    return writer


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}. Load another checkpoint.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} should hold a JSON object, but holds a {type(data).__name__}.")
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, on the CPU, in memory that may be the file's. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}. Load another checkpoint.") from error


def _checked_paths(folder: Path) -> dict[str, Path]:
    manifest, pending = _manifest(folder)
    paths: dict[str, Path] = {}
    for name, (size, digest) in _entries(manifest).items():
        path = folder / (name + _NEW)
        if not (pending and path.is_file()):
            path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {manifest.name} lists it. Copy the whole folder.")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path} should have {size} bytes, but has {path.stat().st_size}: it was cut short or replaced. Copy "
                "the file again, or load another checkpoint."
            )
        if _digest(path) != digest:
            raise CheckpointError(
                f"{path} does not have the SHA-256 that {manifest.name} lists: it was changed or damaged after it was "
                "saved. Copy the file again, or load another checkpoint."
            )
        paths[name] = path
    return paths


def _commit(folder: Path, writers: Mapping[str, Writer]) -> None:
    written = [folder / (name + _NEW) for name in writers]
    draft = folder / (_MANIFEST + ".tmp")
    try:
        entries = {}
        for path, (name, writer) in zip(written, writers.items(), strict=True):
            writer(path)
            _synchronise(path)
            entries[name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        json_writer({"format": FORMAT, "files": entries})(draft)
        _synchronise(draft)
        _synchronise(folder)
        os.replace(draft, folder / (_MANIFEST + _NEW))
    except Exception:
        for path in (*written, draft):
            path.unlink(missing_ok=True)
        raise
    _synchronise(folder)


def _finish(folder: Path) -> None:
    """Give the files of a save that was made their final names; does nothing if they have them."""
    pending = folder / (_MANIFEST + _NEW)
    if not pending.exists():
        return
    names = _entries(pending)
    for name in names:
        if (folder / (name + _NEW)).exists():
            os.replace(folder / (name + _NEW), folder / name)
    _synchronise(folder)
    os.replace(pending, folder / _MANIFEST)
    _synchronise(folder)
    for name in FILES:
        if name not in names:
            (folder / name).unlink(missing_ok=True)


def _manifest(folder: Path) -> tuple[Path, bool]:
    """The manifest that holds, and whether its files may still have their provisional names."""
    pending, settled = folder / (_MANIFEST + _NEW), folder / _MANIFEST
    if pending.is_file():
        return pending, True
    if not settled.is_file():
        found = "there is no such folder" if not folder.is_dir() else f"it has no {_MANIFEST}"
        raise CheckpointError(f"there is no checkpoint in {folder}: {found}. Give a folder that esp.save wrote.")
    return settled, False


def _entries(manifest: Path) -> dict[str, tuple[int, str]]:
    """Name -> (bytes, SHA-256) of every file that a manifest lists."""
    data = read_json(manifest)
    version = data.get("format")
    if version != FORMAT:
        raise CheckpointError(
            f"{manifest} has format {version!r}; this version of Espalier reads format {FORMAT}. Load it with the "
            "version of Espalier that wrote it."
        )
    try:
        entries = {str(name): (int(one["bytes"]), str(one["sha256"])) for name, one in data["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{manifest} is damaged: {type(error).__name__}: {error}.") from error
    unknown = sorted(set(entries) - set(FILES))
    missing = [name for name in FILES[:2] if name not in entries]
    halves = [(f"{one}.json" in entries) != (f"{one}.safetensors" in entries) for one in ("optimizer", "session")]
    if unknown or missing or any(halves):
        raise CheckpointError(f"{manifest} is damaged: it lists the files {sorted(entries)}; expected some of {FILES}.")
    return entries


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _synchronise(path: Path) -> None:
    """Have the operating system put a file, or the names in a folder, on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["FILES", "FORMAT", "json_writer", "read", "read_json", "read_tensors", "tensors_writer", "write"]
