"""LoRA adapters of peft whose ranks grew and shrank: ``pip install espalier[peft]``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from espalier.adapters.config import ConfigError
from espalier.peers import check_whole
from espalier.structure import Structure


def rank_axes(structure: Structure) -> list[str]:
    """The axes that are ranks of adapters, in the order in which they run."""
    found = []
    for axis in structure.axes.values():
        sides = {part for slot in axis.slots for part in slot.tensor.split(".")}
        if {"lora_A", "lora_B"} <= sides and axis.reason is None:
            found.append(axis.name)
    return found


def follow_ranks(structure: Structure, adapter: str = "default") -> None:
    """Have the modules and the configuration of peft say which rank each layer has become.

    An edit holds the factor that a layer multiplies its adapter with, alpha / rank or alpha / sqrt(rank); so alpha
    follows the rank.

    Raises:
        ConfigError: the model has no such adapter.
    """
    model: Any = structure.model
    config = getattr(model, "peft_config", {}).get(adapter)
    if config is None:
        raise ConfigError(f"{type(model).__name__} has no adapter {adapter!r}; give the structure of a model of peft.")
    for path, module in model.named_modules():
        thin = vars(module).get("_modules", {}).get("lora_A")
        if not isinstance(thin, nn.ModuleDict) or adapter not in thin:
            continue
        rank = thin[adapter].get_parameter("weight").shape[0]
        if module.r[adapter] != rank:
            module.r[adapter] = rank
            module.lora_alpha[adapter] = module.scaling[adapter] * (rank**0.5 if config.use_rslora else rank)
            name = f"^{re.escape(path.removeprefix('base_model.model.'))}"
            config.rank_pattern[name] = rank
            config.alpha_pattern[name] = module.lora_alpha[adapter]


def save_adapter(structure: Structure, folder: str | Path, adapter: str = "default", **options: Any) -> None:
    """Save an adapter as peft does, for `PeftModel.from_pretrained` in a program that knows nothing of Espalier.

    Args:
        structure: of a model of peft of which only ranks were changed.
        folder: where to.
        adapter: its name.
        options: handed to the model's own `save_pretrained`.

    Raises:
        ConfigError: the model has no such adapter.
        ParallelError: the network is sharded.
    """
    check_whole(structure.peers, "save_adapter")
    follow_ranks(structure, adapter)
    model: Any = structure.model
    model.save_pretrained(folder, selected_adapters=[adapter], **options)


__all__ = ["follow_ranks", "rank_axes", "save_adapter"]
