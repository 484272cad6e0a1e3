"""Growing and pruning in several processes:

    torchrun --nproc-per-node 2 examples/distributed.py [--shard] [--checkpoint FOLDER]

Replicas under DistributedDataParallel, or with --shard a network that FSDP2 shares out. It goes on from a checkpoint
that is there, on any number of ranks.
"""

import argparse
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import espalier as esp

EXAMPLE = torch.zeros(1, 16)
STEPS, EVERY = 240, 40
METHODS = [
    esp.grow.Random(amount=0.2, every=esp.steps(60), start=esp.steps(30), until=esp.steps(160)),
    esp.prune.Taylor(amount=0.1, every=esp.steps(60), start=esp.steps(60), until=esp.steps(190)),
]


def build() -> nn.Sequential:
    torch.manual_seed(0)  # the same values on every rank
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 4))


def shard(model: nn.Module) -> None:
    """Any mesh, mixed precision and resharding that you use go here: it is called again after every edit."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)


def loss_of(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    rank, size = dist.get_rank(), dist.get_world_size()

    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(1280, 16, generator=generator)
    data = TensorDataset(inputs, (inputs @ torch.randn(16, 4, generator=generator)).argmax(1))
    sampler = DistributedSampler(data, shuffle=True, drop_last=True)
    loader = DataLoader(data, batch_size=32 // size, sampler=sampler, drop_last=True)

    model = esp.FullyShard(build(), shard) if options.shard else DistributedDataParallel(build())
    optimizer = torch.optim.AdamW((model.model if options.shard else model).parameters(), lr=3e-3)
    there = options.checkpoint is not None and (options.checkpoint / "manifest.json").exists()
    if there:
        structure = esp.load(options.checkpoint, model, EXAMPLE, optimizer=optimizer)
    else:
        structure = esp.attach(model, EXAMPLE, optimizer=optimizer)
    session = esp.Session(structure, METHODS, loss=loss_of, total_steps=STEPS)
    if there:
        session.load(options.checkpoint)

    last = torch.zeros(())
    while session.steps_done < STEPS:
        sampler.set_epoch(session.steps_done)
        for batch in loader:
            loss = session.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(session.model.parameters(), 1.0)  # session.model: the live one
            optimizer.step()
            session.step()
            last = loss.detach() / size
            if options.checkpoint is not None and session.steps_done % EVERY == 0:
                esp.save(structure, options.checkpoint, session=session)
                if rank == 0:
                    print(f"saved at step {session.steps_done}", flush=True)
            if session.steps_done == STEPS:
                break

    dist.all_reduce(last)
    if rank == 0:
        for event in session.events:
            print(event)
        print(f"loss {float(last):.4f} after {session.steps_done} steps on {size} ranks: {structure.cost()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
