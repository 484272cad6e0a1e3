"""The callback in the Trainer of transformers, its checkpoint without Espalier, and Accelerate."""

import torch
from accelerate import Accelerator
from small import WHEN, loss, mlp, pruning, x, y
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import espalier as esp
from espalier.adapters.accelerate import Growing
from espalier.adapters.huggingface import EspalierCallback

tokens = torch.randint(3, 40, (16, 8))
data = [{"input_ids": one, "labels": one[0] % 2} for one in tokens]
config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
halved = esp.prune.Magnitude(budget=esp.Units(0.5, of="initial"), axes=["*intermediate.dense"], uniform=True, **WHEN)
callback = EspalierCallback([halved], example={"input_ids": tokens[:2]})
arguments = TrainingArguments(
    "trainer", max_steps=4, per_device_train_batch_size=4, save_steps=4, report_to=[], use_cpu=True
)
Trainer(BertForSequenceClassification(config), arguments, train_dataset=data, callbacks=[callback]).train()
assert BertForSequenceClassification.from_pretrained("trainer/checkpoint-4").config.intermediate_size == 16

accelerator = Accelerator(cpu=True)
model = mlp()
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2))
growing = Growing(accelerator, model, optimizer, pruning(), example=x[:1], loss=loss, total_steps=4)
for _ in range(4):
    accelerator.backward(growing.session.loss((x, y)))
    optimizer.step()
    growing.session.step()
assert growing.session.events
