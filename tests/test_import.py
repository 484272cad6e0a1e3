"""Importing Espalier imports nothing that is optional."""

import subprocess
import sys

OPTIONAL = {
    "accelerate", "lightning", "mlflow", "modelopt", "onnx", "onnxruntime", "onnxscript", "pebble", "peft", "ray",
    "rich", "scipy", "sklearn", "submitit", "tensorboard", "timm", "torch_pruning", "torchao", "torchvision",
    "transformers", "wandb",
}  # fmt: skip
SCRIPT = """
import sys, torch
before = set(sys.modules)
import espalier
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_nothing_optional_is_imported() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    modules = set(found.stdout.split())
    assert "espalier" in modules
    assert not modules & OPTIONAL
