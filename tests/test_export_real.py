"""Pruned and grown networks of Hugging Face in ONNX Runtime, and as plain code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import espalier as esp
from espalier.structure import Structure

transformers = pytest.importorskip("transformers")


def resnet50() -> nn.Module:
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=10))


def vit() -> nn.Module:
    """ViT-Ti/16."""
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, image_size=64)
    )


def bert() -> nn.Module:
    """BERT-small."""
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=1000, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048
        )
    )


IMAGES = {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
TOKENS = {"input_ids": torch.randint(0, 1000, (2, 16), generator=torch.Generator().manual_seed(0))}
NETWORKS: dict[str, tuple[Any, Any]] = {"resnet50": (resnet50, IMAGES), "vit": (vit, IMAGES), "bert": (bert, TOKENS)}


def edited(name: str) -> Structure:
    torch.manual_seed(0)
    build, example = NETWORKS[name]
    model = build().eval()
    structure = esp.attach(model, example)
    structure.apply(esp.scaled_plan(structure, esp.Parameters(0.7, of="initial")))
    growable = [axis.name for axis in structure.axes.values() if axis.growable]
    structure.grow(dict.fromkeys(growable[1 :: max(1, len(growable) // 4)], 8))
    pruned, grown = (edit.sizes for edit in structure.history)
    assert pruned
    assert all(after < before for before, after in pruned.values())
    assert grown
    assert all(after == before + 8 for before, after in grown.values())
    return structure


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_agrees(name: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    assert esp.export_onnx(edited(name), tmp_path / "network.onnx") < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_plain_code_agrees(name: str, tmp_path: Path) -> None:
    structure = edited(name)
    text = esp.export_code(structure, tmp_path, NETWORKS[name][0]).read_text()
    assert "ATTRIBUTES" in text
    assert "def load()" in text
