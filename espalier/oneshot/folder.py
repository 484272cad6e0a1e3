"""Rounds that are done, in a folder, so that an interrupted `shrink` goes on after the last of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier.errors import ShrinkError
from espalier.measure.repeated import Reading
from espalier.oneshot.rounds import Round
from espalier.structure import Structure
from espalier.train.checkpoint import save


class Kept:
    """What is in a folder; with None, nothing is kept."""

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]) -> None:
        """Open a folder, or begin one.

        Raises:
            ShrinkError: it holds rounds with other settings.
        """
        self._folder = None if folder is None else Path(folder)
        self._settings = json.loads(json.dumps(settings))
        self.rounds: list[Round] = []
        self.initial: Reading | None = None
        self.found: dict[str, Any] = {}
        if self._folder is None or not self._file.exists():
            return
        data = json.loads(self._file.read_text(encoding="utf-8"))
        different = [name for name, value in data["settings"].items() if self._settings.get(name) != value]
        if different:
            name = different[0]
            raise ShrinkError(
                f"{self._folder} holds a shrinking with {name}={data['settings'][name]!r}, and this one has "
                f"{name}={self._settings.get(name)!r}; give another folder."
            )
        self.rounds = [Round.from_json(one) for one in data["rounds"]]
        self.found = data["found"]

    def checkpoint(self, number: int) -> Path:
        """Where the network of a round is."""
        assert self._folder is not None
        return self._folder / f"round-{number}"

    def add(self, one: Round, structure: Structure, found: Mapping[str, Any]) -> None:
        """Keep a round and its network; the network first, so that what is listed is there."""
        self.rounds.append(one)
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if one.number:
            save(structure, self.checkpoint(one.number))
        data = {
            "settings": self._settings, "found": dict(found), "rounds": [each.to_json() for each in self.rounds],
        }  # fmt: skip
        written = self._file.with_suffix(".new")
        written.write_text(json.dumps(data, indent=1), encoding="utf-8")
        os.replace(written, self._file)

    @property
    def _file(self) -> Path:
        assert self._folder is not None
        return self._folder / "rounds.json"


def sizes_of(structure: Structure) -> dict[str, int]:
    """Axis -> its size."""
    return {name: axis.size for name, axis in structure.axes.items()}


def done(rounds: Sequence[Round]) -> int:
    """How many rounds were trained."""
    return max((one.number for one in rounds), default=0)


__all__ = ["Kept", "done", "sizes_of"]
