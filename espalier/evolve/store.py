"""Checkpoints and plans by their content: a folder's address is the SHA-256 of its files, and it never changes.

A folder is written aside and renamed to its address, so that a process that dies leaves whole folders only, and
processes that write the same content at the same time do not disturb each other.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from uuid import uuid4

from espalier.errors import RunError

_UNFINISHED = "unfinished-"


class Store:
    """A folder of folders."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, write: Callable[[Path], None]) -> str:
        """Keep what `write` puts into a folder; returns its address.

        Raises:
            StoreFull: there is no space left.
        """
        aside = self.root / f"{_UNFINISHED}{uuid4().hex}"
        try:
            aside.mkdir(parents=True)
            write(aside)
            address = _address(aside)
            self._move(aside, self.path(address))
        except Exception as error:
            if _no_space(error):
                raise StoreFull(
                    f"{self.root}: no space left for the checkpoint of a branch; make room and start the same search "
                    "again: it goes on from what was finished."
                ) from error
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return address

    def path(self, address: str) -> Path:
        """Where the folder of an address is, or would be."""
        return self.root / address

    def keep_only(self, addresses: Iterable[str]) -> None:
        """Remove all others, and what processes that died left."""
        kept = set(addresses)
        for one in self.root.iterdir() if self.root.exists() else ():
            if one.name not in kept:
                shutil.rmtree(one, ignore_errors=True)

    def _move(self, aside: Path, place: Path) -> None:
        if place.exists():
            return
        try:
            os.replace(aside, place)
        except OSError:
            if not place.exists():  # else another process was faster with the same content
                raise


class StoreFull(RunError):
    """No space is left for checkpoints; the search can go on when there is."""


def _address(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.sha256(file.read()).digest())
    return digest.hexdigest()[:32]


def _no_space(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


__all__ = ["Store", "StoreFull"]
