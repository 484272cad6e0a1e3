"""The rank of an adapter, pruned and saved."""

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import espalier as esp
from espalier.adapters.lora import rank_axes, save_adapter

config = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(r=4, target_modules=["q_proj"]))
structure = esp.attach(model, {"input_ids": torch.ones(1, 5, dtype=torch.int64)})
structure.prune({rank_axes(structure)[0]: [0]})
save_adapter(structure, "adapter")
assert peft.PeftConfig.from_pretrained("adapter").rank_pattern
