"""The folder of a run: which files are in it, and how they change so that an interruption at any moment harms nothing.

    config.json        the options, the command, versions: written once
    metrics.jsonl      one record per line (see `records`)
    network/           the trained network, as `espalier.save` writes it
    report.html        the page
    checkpoint.json    where an interrupted run goes on: present only until the run is finished
    checkpoint-N/      what belongs to it

A checkpoint is a new folder first; replacing `checkpoint.json`, which names it, makes it count. Records that were
written after the last checkpoint are cut off when the run goes on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from espalier.errors import RunError

CONFIG, METRICS, NETWORK, POINTER = "config.json", "metrics.jsonl", "network", "checkpoint.json"
FORMAT = 1


class RunFolder:
    """The files of one run; made by `create` or `reopen`."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> RunFolder:
        """A folder for a new run.

        Raises:
            RunError: there is something at this path already, or it cannot be written.
        """
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise RunError(_occupied(path))
            path.mkdir(parents=True, exist_ok=True)
            _replace(path / CONFIG, json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise RunError(f"{path}: cannot write a run there ({error.strerror}); choose another --out") from error
        return cls(path, config)

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """The folder of a run that was started before.

        Raises:
            RunError: there is no run in it.
        """
        config = _read_json(
            path / CONFIG, f"{path} holds no run to resume; without --resume a new one is started there"
        )
        return cls(path, config)

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end."""
        return _ends(self.path / METRICS)

    @property
    def network(self) -> Path:
        """Where the trained network is saved."""
        return self.path / NETWORK

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record to `metrics.jsonl`; numbers that are not finite become null, which JSON can hold."""
        line = json.dumps(finite(record), allow_nan=False) + "\n"
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(line)

    def write_checkpoint(self, state: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """Keep a state (JSON) and what `write` puts into a folder; this replaces the checkpoint before it.

        Raises:
            OSError: the disk is full, for one; the checkpoint before it stays.
        """
        before = self._pointer()
        number = 0 if before is None else int(before["number"]) + 1
        folder = self.path / f"checkpoint-{number}"
        self._clear(keep=None if before is None else int(before["number"]))
        folder.mkdir()
        write(folder)
        metrics = self.path / METRICS
        with metrics.open("rb") as file:
            os.fsync(file.fileno())
        pointer = {"format": FORMAT, "number": number, "metrics_bytes": metrics.stat().st_size, "state": state}
        _replace(self.path / POINTER, json.dumps(pointer))
        self._clear(keep=number)

    def read_checkpoint(self) -> tuple[Mapping[str, Any], Path] | None:
        """The state and the folder of the last checkpoint; None if none was reached. Later records are cut off.

        Raises:
            RunError: the checkpoint is of another version or damaged.
        """
        pointer = self._pointer()
        if pointer is None:
            self._cut(0)
            return None
        folder = self.path / f"checkpoint-{pointer['number']}"
        if not folder.is_dir():
            raise RunError(f"{self.path / POINTER} names {folder.name}, which is not there; start a new run")
        self._cut(int(pointer["metrics_bytes"]))
        return pointer["state"], folder

    def finish(self) -> None:
        """Remove what only an interrupted run needs."""
        (self.path / POINTER).unlink(missing_ok=True)
        self._clear(keep=None)

    def _pointer(self) -> Mapping[str, Any] | None:
        path = self.path / POINTER
        if not path.exists():
            return None
        fix = "start a new run in another folder"
        pointer = _read_json(path, f"{path} cannot be read; {fix}")
        kinds = {"format": int, "number": int, "metrics_bytes": int, "state": dict}
        wrong = [key for key, kind in kinds.items() if type(pointer.get(key)) is not kind]
        if wrong or pointer["format"] != FORMAT:
            raise RunError(f"{path}: expected a checkpoint of format {FORMAT}, found {str(pointer)[:80]}; {fix}")
        return pointer

    def _cut(self, size: int) -> None:
        path = self.path / METRICS
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise RunError(f"{path}: expected at least {size} bytes, found {found}; records were lost, start a new run")
        with path.open("ab") as file:
            file.truncate(size)

    def _clear(self, keep: int | None) -> None:
        for folder in self.path.glob("checkpoint-*"):
            if folder.is_dir() and folder.name != f"checkpoint-{keep}":
                shutil.rmtree(folder)


def next_free(parent: Path, stem: str) -> Path:
    """The first of ``stem-1``, ``stem-2``, ... that is not there yet."""
    number = 1
    while (parent / f"{stem}-{number}").exists():
        number += 1
    return parent / f"{stem}-{number}"


def _occupied(path: Path) -> str:
    if not path.is_dir():
        return f"{path} is a file: choose a folder for --out"
    if not (path / CONFIG).exists():
        return f"{path} holds other files: choose an empty or a new folder for --out"
    if _ends(path / METRICS):
        return f"{path} holds a finished run: choose another --out, or remove the folder to run again"
    return f"{path} holds a run that has not ended: continue it with --resume, or choose another --out"


def _ends(metrics: Path) -> bool:
    """Whether the last whole line is the record of the end."""
    try:
        lines = metrics.read_bytes().rsplit(b"\n", 2)
    except OSError:
        return False
    try:
        record = json.loads(lines[-2]) if len(lines) > 1 else None
    except ValueError:
        return False
    return isinstance(record, dict) and record.get("kind") == "end"


def finite(value: Any) -> Any:
    """What JSON can hold: numbers that are not finite become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _read_json(path: Path, problem: str) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{problem} ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise RunError(f"{problem} (expected a JSON object, found {type(value).__name__})")
    return value


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(f"{path.suffix}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
