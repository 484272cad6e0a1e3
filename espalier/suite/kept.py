"""What cells gave, kept as JSON lines by content: what is there is not run again, whichever suite asks for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier.bench.folder import finite
from espalier.errors import RunError

SUFFIX = ".jsonl"
Record = Mapping[str, Any]
_TABLES = ("curve", "edits")
"""What a result has a list of records for; in a file each is a table, a list per column."""


class Kept:
    """The records of a folder, one file per task, and those that were published with a suite."""

    def __init__(self, folder: Path, published: Sequence[Path] = ()) -> None:
        """Read what there is.

        Args:
            folder: where new records go, into files TASK.jsonl.
            published: more of such files, or folders of them; they are only read.

        Raises:
            RunError: a published file cannot be read.
        """
        self._folder = folder
        self._found: dict[str, Record] = {}
        for path in published:
            files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
            if not files or not all(one.is_file() for one in files):
                raise RunError(f"{path}: expected a file of records, or a folder of *{SUFFIX}; found none")
            for one in files:
                self._read(one)
        self._cut = {path for path in sorted(folder.glob(f"*{SUFFIX}")) if not self._read(path)}
        """Files whose last line has no end."""

    def get(self, key: str) -> Record | None:
        """What a cell gave; None if it was not run."""
        return self._found.get(key)

    def put(self, record: Record) -> None:
        """Keep what a cell gave; on the disk when this returns.

        Raises:
            RunError: it cannot be written.
        """
        path = self._folder / f"{record['cell']['task']}{SUFFIX}"
        line = json.dumps(finite(_narrow(record)), allow_nan=False, separators=(",", ":"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(("\n" if path in self._cut else "") + line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror}); what was finished is kept") from error
        self._cut.discard(path)
        self._found[str(record["key"])] = record

    def _read(self, path: Path) -> bool:
        """All whole lines; one that was cut short is a cell that was interrupted. Whether the last line has an end."""
        text = path.read_text(encoding="utf-8")
        for line in text.split("\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            try:
                self._found[record["key"]] = _wide(record)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise RunError(
                    f"{path}: expected lines that `espalier bench run` wrote, found {line[:80]!r}"
                ) from error
        return not text or text.endswith("\n")


def _narrow(record: Record) -> Record:
    """As it is written: names of columns once per table and not once per row."""
    return _with_tables(record, lambda rows: {name: [row[name] for row in rows] for name in rows[0]} if rows else {})


def _wide(record: Record) -> Record:
    """As it was before it was written."""
    return _with_tables(
        record,
        lambda columns: [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
    )


def _with_tables(record: Record, converted: Callable[[Any], Any]) -> Record:
    if "result" not in record:
        return record
    result = record["result"]
    return {**record, "result": {**result, **{name: converted(result[name]) for name in _TABLES}}}


__all__ = ["SUFFIX", "Kept", "Record"]
