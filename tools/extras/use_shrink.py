"""ONNX Runtime as what a latency is measured on."""

from small import mlp, x

import espalier as esp

assert esp.measure.OnnxRuntime(threads=1).ready(mlp(), x)() is not None
