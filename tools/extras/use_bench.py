"""The peer of the benchmark."""

import torch_pruning
from small import mlp, x

import espalier.suite.peers.torch_pruning  # noqa: F401

torch_pruning.DependencyGraph().build_dependency(mlp(), example_inputs=x)
