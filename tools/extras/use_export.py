"""A pruned network as ONNX."""

from small import mlp, x

import espalier as esp

structure = esp.attach(mlp(), x[:2])
structure.prune({"0": [1, 2]})
assert esp.export_onnx(structure, "network.onnx") < 1e-4
