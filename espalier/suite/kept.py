"""What cells gave, kept as JSON lines by content: what is there is not run again, whichever suite asks for it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier.bench.folder import finite
from espalier.errors import RunError

RECORDS = "records.jsonl"
Record = Mapping[str, Any]


class Kept:
    """The records of a folder, and those of files that were published with a suite."""

    def __init__(self, folder: Path, published: Sequence[Path] = ()) -> None:
        """Read what there is.

        Raises:
            RunError: a published file cannot be read.
        """
        self._path = folder / RECORDS
        self._found: dict[str, Record] = {}
        for path in published:
            if not path.is_file():
                raise RunError(f"{path}: expected a file of records, such as docs/results/cpu.jsonl; found none")
            self._read(path)
        self._cut = self._path.exists() and not self._read(self._path)
        """Whether the last line has no end."""

    def get(self, key: str) -> Record | None:
        """What a cell gave; None if it was not run."""
        return self._found.get(key)

    def put(self, record: Record) -> None:
        """Keep what a cell gave; on the disk when this returns.

        Raises:
            RunError: it cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(("\n" if self._cut else "") + json.dumps(finite(record), allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{self._path}: cannot be written ({error.strerror}); what was finished is kept") from error
        self._cut = False
        self._found[str(record["key"])] = record

    def _read(self, path: Path) -> bool:
        """All whole lines; one that was cut short is a cell that was interrupted. Whether the last line has an end."""
        text = path.read_text(encoding="utf-8")
        for line in text.split("\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("key"), str):
                self._found[record["key"]] = record
        return not text or text.endswith("\n")


__all__ = ["RECORDS", "Kept", "Record"]
