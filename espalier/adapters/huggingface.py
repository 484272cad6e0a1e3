"""Espalier in the Trainer of transformers: a callback. ``pip install espalier[huggingface]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from espalier.adapters.config import ConfigError
from espalier.adapters.driver import Driver, check_alone
from espalier.adapters.pretrained import follow_config
from espalier.method import Method
from espalier.structure import Structure
from espalier.train.events import Event
from espalier.train.outline import read_outline, write_outline
from espalier.train.session import Session

_FOLDER = "espalier"


def model_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The loss that a model of transformers computes itself, from the labels in a batch."""
    found: Tensor = model(**batch).loss
    return found


class EspalierCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]  # typed only where it is installed
    """Grows and prunes the model while the Trainer trains it; its checkpoints hold all that is needed to go on.

    Callbacks of the Trainer do not see batches; so the model's own inputs are taken down as it runs, and its loss gets
    the penalties of methods. After every event the model's configuration follows, wherever it can say what the model
    has become, so that checkpoints are read by `from_pretrained`.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        *,
        example: Any,
        loss: Callable[[nn.Module, Any], Tensor] = model_loss,
        metric: str | None = None,
        resume: str | Path | None = None,
        **options: Any,
    ) -> None:
        """Nothing happens before the Trainer is made.

        Args:
            methods: as for `espalier.Session`.
            example: example inputs of the model, as for `espalier.attach`.
            loss: model and the keyword arguments of its forward -> loss.
            metric: name of an evaluation metric that is told to methods; larger is better.
            resume: the checkpoint of the Trainer to go on from, the one that is given to `Trainer.train` too. The model
                has to be a fresh one, of the sizes that it had at first.
            options: `probe`, `seed`, `loggers`, `keep` and `limits` of `espalier.adapters.driver.Driver`.
        """
        self._driver = Driver(methods, example, loss, on_event=_followed, **options)
        self._metric, self._resume = metric, resume
        self._value: float | None = None
        self._batch: dict[str, Any] = {}
        self._share = 1.0
        self._acting = False
        self._handles: list[Any] = []

    @property
    def session(self) -> Session:
        """The session. Raises MethodError before the training has begun."""
        return self._driver.session

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sizes have to be right before the Trainer loads its checkpoint."""
        if self._resume is not None:
            model: Any = kwargs["model"]
            model.config.use_cache = args.use_cache  # as the Trainer does next: the model is read as it trains
            self._driver.reshape(model, read_outline(Path(self._resume) / _FOLDER))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer holds its state by now."""
        check_alone(max(args.world_size, args.n_gpu))
        model: nn.Module = kwargs["model"]
        self._driver.begin(model, real_optimizer(kwargs["optimizer"]), state.max_steps)
        self._handles = [
            model.register_forward_pre_hook(self._take_down, with_kwargs=True),
            model.register_forward_hook(self._hear, with_kwargs=True),
        ]
        self._share = 1 / args.gradient_accumulation_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step of the session for every step of the optimizer."""
        self._acting = True
        try:
            self.session.step()
        finally:
            self._acting = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the next end of an epoch tells methods."""
        if self._metric is not None:
            self._value = kwargs["metrics"].get(self._metric)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch of the session."""
        self.session.epoch_end(self._value)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the outline into the checkpoint that the Trainer has written."""
        if state.is_world_process_zero:
            write_outline(self.session, Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FOLDER)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model without hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _training(self, model: nn.Module) -> bool:
        """Whether it is the Trainer that runs the model now, to train it, and not a method."""
        return model.training and torch.is_grad_enabled() and not self._acting and not self.session.evaluates

    def _take_down(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._training(model):
            self._batch = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}

    def _hear(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not self._training(model) or not isinstance(output, dict) or output.get("loss") is None:
            return None
        # the Trainer divides the loss by the number of micro-batches, unless the model divides by the items of all
        share = self._share if kwargs.get("num_items_in_batch") is not None else 1.0
        output["loss"] = self.session.heard(self._batch, output["loss"], share)
        return output


def real_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside the wrapper of Accelerate."""
    from accelerate.optimizer import AcceleratedOptimizer

    found: Optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return found


def _followed(structure: Structure, event: Event) -> None:
    if event.action in ("grow", "prune"):
        with suppress(ConfigError):  # what it cannot say now it may be able to say at the end
            follow_config(structure)


__all__ = ["EspalierCallback", "model_loss", "real_optimizer"]
