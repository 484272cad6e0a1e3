"""Espalier in Lightning: a callback. ``pip install espalier[lightning]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor, nn

from espalier.adapters.driver import Driver, check_alone
from espalier.errors import MethodError
from espalier.method import Method
from espalier.train.outline import reshaped
from espalier.train.session import Session

_OUTLINE = "outline"


class EspalierCallback(Callback):  # type: ignore[misc, unused-ignore]  # Lightning may not be installed
    """Grows and prunes the model while Lightning trains it; Lightning's checkpoints hold all that it needs to go on.

    The loss that `training_step` returns gets the penalties of methods and is heard by triggers. A method with gates
    draws them while it evaluates the loss itself: then `training_step` is not run, and the loss is the one given here.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        *,
        example: Any,
        loss: Callable[[nn.Module, Any], Tensor],
        part: str = "",
        metric: str | None = None,
        **options: Any,
    ) -> None:
        """Nothing happens before `Trainer.fit`.

        Args:
            methods: as for `espalier.Session`.
            example: example inputs of what is changed, as for `espalier.attach`.
            loss: what is changed, and a batch of the loader -> loss; it logs nothing.
            part: path of the module to change; the whole LightningModule by default.
            metric: name of a logged metric that is told to methods after every epoch; larger is better.
            options: `probe`, `seed`, `loggers`, `keep` and `limits` of `espalier.adapters.driver.Driver`.
        """
        self._driver = Driver(methods, example, loss, **options)
        self._part, self._metric = part, metric
        self._steps = 0
        self._undo: list[Callable[[], None]] = []

    @property
    def session(self) -> Session:
        """The session. Raises MethodError before the training has begun."""
        return self._driver.session

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lightning loads the model's state right after `on_load_checkpoint`: sizes have to be right by then."""
        if stage != "fit":
            return
        check_alone(trainer.world_size)
        original = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            state = checkpoint["callbacks"].get(self.state_key, {})
            if _OUTLINE in state:
                self._driver.reshape(self._changed(pl_module), state[_OUTLINE])
            original(checkpoint)

        self._replace(pl_module, "on_load_checkpoint", on_load_checkpoint)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Optimizers hold their state by now."""
        if len(trainer.optimizers) != 1:
            raise MethodError(f"expected one optimizer, found {len(trainer.optimizers)}.")
        steps = int(trainer.estimated_stepping_batches)
        session = self._driver.begin(self._changed(pl_module), trainer.optimizers[0], steps)
        self._steps = trainer.global_step
        original = pl_module.training_step

        @wraps(original)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            if session.evaluates:
                return session.loss(batch)
            found = original(batch, *args, **kwargs)
            if isinstance(found, Tensor):
                return session.heard(batch, found)
            return found if found is None else {**found, "loss": session.heard(batch, found["loss"])}

        self._replace(pl_module, "training_step", training_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step of the session for every step of the optimizer, which may take several batches."""
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.session.step()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """An epoch of the session."""
        value = None if self._metric is None else trainer.callback_metrics.get(self._metric)
        self.session.epoch_end(None if value is None else float(value))

    def state_dict(self) -> dict[str, Any]:
        """What Lightning keeps of this callback in its checkpoints."""
        return {_OUTLINE: self._driver.outline()} if self._driver.running else {}

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was found."""
        while self._undo:
            self._undo.pop()()

    def _changed(self, pl_module: Any) -> nn.Module:
        found: nn.Module = pl_module.get_submodule(self._part)
        return found

    def _replace(self, pl_module: Any, name: str, method: Callable[..., Any]) -> None:
        """Put a function in place of a method of this one module, until `teardown`."""
        vars(pl_module)[name] = method
        self._undo.append(lambda: vars(pl_module).pop(name, None))


def load_checkpoint(path: str, pl_module: Any, example: Any, *, part: str = "") -> None:
    """Give a freshly built LightningModule the sizes and the values of a checkpoint, for anything but `Trainer.fit`.

    Raises:
        CheckpointError: the checkpoint is of another model.
        MethodError: it was written without an `EspalierCallback`.
    """
    import torch

    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    outlines = [one[_OUTLINE] for one in checkpoint["callbacks"].values() if _OUTLINE in one]
    if not outlines:
        raise MethodError(f"{path} was written without an EspalierCallback; load it with load_from_checkpoint.")
    reshaped(outlines[0], pl_module.get_submodule(part), example)
    pl_module.load_state_dict(checkpoint["state_dict"])


__all__ = ["EspalierCallback", "load_checkpoint"]
