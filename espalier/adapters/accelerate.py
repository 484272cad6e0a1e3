"""Espalier with Accelerate, in a loop of one's own: ``pip install espalier[huggingface]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from espalier.adapters.driver import Driver, check_alone
from espalier.adapters.huggingface import real_optimizer
from espalier.method import Method
from espalier.train.outline import read_outline, write_outline
from espalier.train.session import Session

_FOLDER = "espalier"


class Growing:
    """The session of a prepared model and optimizer; `save_state` and `load_state` of the accelerator know of it."""

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: Any,
        methods: Sequence[Method],
        *,
        example: Any,
        loss: Callable[[nn.Module, Any], Tensor],
        total_steps: int,
        **options: Any,
    ) -> None:
        """Attach to what `accelerator.prepare` gave.

        Args:
            accelerator: of one process.
            model: what it made of the model.
            optimizer: what it made of the optimizer.
            methods, total_steps: as for `espalier.Session`.
            example: example inputs, as for `espalier.attach`.
            loss: the model inside, and a batch -> loss.
            options: `probe`, `seed`, `loggers`, `keep` and `limits` of `espalier.adapters.driver.Driver`.

        Raises:
            MethodError: there are several processes.
        """
        check_alone(accelerator.num_processes)
        self._driver = Driver(methods, example, loss, **options)
        self._model = accelerator.unwrap_model(model)
        self._optimizer, self._total_steps = real_optimizer(optimizer), total_steps
        self._begun: Session | None = self._driver.begin(self._model, self._optimizer, total_steps)
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    @property
    def session(self) -> Session:
        """The session; another one after `load_state`."""
        if self._begun is None:
            self._begun = self._driver.begin(self._model, self._optimizer, self._total_steps)
        return self._begun

    def _save(self, models: Any, weights: Any, folder: str) -> None:
        write_outline(self.session, Path(folder) / _FOLDER)

    def _load(self, models: Any, folder: str) -> None:
        """Values are loaded right after this; the session goes on when it is next asked for."""
        self._begun = None
        self._driver.reshape(self._model, read_outline(Path(folder) / _FOLDER), optimizer=self._optimizer)


__all__ = ["Growing"]
