"""Events in Weights & Biases, offline."""

import wandb
from small import log

from espalier.adapters.wandb import WandB

with wandb.init(mode="offline", project="espalier") as run:
    log(WandB(run))
