"""What jobs gave, kept in SQLite: a search that starts again asks here first and computes only what is missing."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from espalier.errors import RunError

_TABLES = (
    "CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, result TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS search (one INTEGER PRIMARY KEY CHECK (one = 1), description TEXT NOT NULL)",
)


class Ledger:
    """Key of a job -> what it gave, as JSON. Only the process that runs the search writes."""

    def __init__(self, path: Path, search: str) -> None:
        """Open or make the ledger of the search that is described so.

        Raises:
            RunError: the file is no ledger, or that of another search, or cannot be written.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connected()) as found, found:
                for table in _TABLES:
                    found.execute(table)
                found.execute("INSERT OR IGNORE INTO search VALUES (1, ?)", (search,))
                known = found.execute("SELECT description FROM search").fetchone()[0]
        except (sqlite3.Error, OSError) as error:
            raise RunError(f"{path}: no ledger of a search, or not to be written ({error}).") from error
        if known != search:
            raise RunError(
                f"{path} is the ledger of another search:\n  {known}\nand not of\n  {search}\ngive another folder."
            )

    def get(self, key: str) -> Mapping[str, Any] | None:
        """What the job gave; None if it has not ended.

        Raises:
            RunError: it could not be read.
        """
        try:
            with closing(self._connected()) as found:
                row = found.execute("SELECT result FROM results WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._refused(error) from error
        return None if row is None else dict(json.loads(row[0]))

    def put(self, key: str, result: Mapping[str, Any]) -> None:
        """Keep what a job gave; on the disk when this returns.

        Raises:
            RunError: it could not be written.
        """
        try:
            with closing(self._connected()) as found, found:
                found.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (key, json.dumps(result)))
        except sqlite3.Error as error:
            raise self._refused(error) from error

    def __len__(self) -> int:
        with closing(self._connected()) as found:
            return int(found.execute("SELECT COUNT(*) FROM results").fetchone()[0])

    def _refused(self, error: sqlite3.Error) -> RunError:
        return RunError(
            f"{self._path}: {error}; make room or give access, and start the same search again: it goes on."
        )

    def _connected(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path)


__all__ = ["Ledger"]
