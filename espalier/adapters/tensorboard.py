"""Events of a session in TensorBoard: ``pip install espalier[tensorboard]``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class TensorBoard:
    """Writes to a folder of TensorBoard, or with a writer that is there."""

    def __init__(self, folder: str | Path | None = None, *, writer: Any = None) -> None:
        if writer is None:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder) if folder is not None else None)
        self.writer = writer

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """As scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """As a histogram."""
        self.writer.add_histogram(name, values, step)

    def text(self, step: int, name: str, text: str) -> None:
        """As text."""
        self.writer.add_text(name, text, step)
        self.writer.flush()


__all__ = ["TensorBoard"]
