"""Events of a session in Weights & Biases: ``pip install espalier[wandb]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class WandB:
    """Writes to a run that `wandb.init` made, offline ones included.

    Steps of a run only rise, and are the run's own; so what is written has the session's step as ``espalier/step``.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._events: list[tuple[int, str]] = []
        run.define_metric("espalier/*", step_metric="espalier/step")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """As numbers of the history."""
        self._run.log({**values, "espalier/step": step})

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """As a histogram."""
        import wandb

        self._run.log({name: wandb.Histogram(values.tolist()), "espalier/step": step})

    def text(self, step: int, name: str, text: str) -> None:
        """As a table of all events."""
        import wandb

        self._events.append((step, text))
        self._run.log({name: wandb.Table(columns=["step", "event"], data=self._events), "espalier/step": step})


__all__ = ["WandB"]
