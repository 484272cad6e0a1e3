"""The callback in Lightning's Trainer."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from small import loss, mlp, pruning, x, y
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from espalier.adapters.lightning import EspalierCallback


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return loss(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


callback = EspalierCallback(pruning(), example=x[:1], loss=loss, part="net")
trainer = Trainer(max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu")
trainer.fit(Module(), DataLoader(TensorDataset(x, y), batch_size=8))
assert callback.session.events
