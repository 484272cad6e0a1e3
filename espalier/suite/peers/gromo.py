"""gromo (Inria): TINY (Verbockhaven et al. 2024, arXiv:2405.19816) as gromo has it, on layers of gromo's own classes.

At every event the perceptron is written into gromo's layers, gromo makes the new units from training data, and the
weights are read back: between events the network trains in the same loop as all others.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.bench.data import batches
from espalier.bench.models import MLP
from espalier.bench.training import FORWARD_AND_BACKWARD, Training
from espalier.errors import RunError
from espalier.parts.score import derived_seed
from espalier.suite.peers.peer import in_turns
from espalier.suite.preparing import Prepared
from espalier.suite.watching import Watching

_BATCHES = 8
"""Training batches that new units are made from, and that their scale is chosen on."""
_SCALES = (0.03, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Of new weights, where 1 is the spread of the weights beside them."""


class Gromo:
    """Grows the two hidden layers of the perceptron by TINY's units, in turn, at the moments and to the sizes of
    Espalier's own growing: in proportion, once per period, along a line."""

    package = "gromo"

    def train(self, prepared: Prepared, watching: Watching) -> Training:
        """Grow the small network.

        Raises:
            RunError: the cell is not of the track ``growing``, the network is not the perceptron, or gromo is not
                installed.
        """
        cell = prepared.cell
        if cell.track != "growing":
            raise RunError(f"gromo adds units and removes none: it has nothing for the track {cell.track!r}")
        if cell.task.model != "mlp":
            raise RunError(
                f"gromo grows layers of its own classes; of these the perceptron 'mlp' is made here, and not "
                f"{cell.task.model!r}"
            )
        if importlib.util.find_spec("gromo") is None:
            raise RunError("gromo is not installed: pip install gromo")
        first = cell.point * cell.task.start

        def edit(training: Training, number: int, count: int) -> nn.Module:
            part = first + (cell.point - first) * (number + 1) / count
            wanted = prepared.scaled(part)
            assert isinstance(wanted, MLP)
            model = training.model
            for hidden, layer in ((0, wanted.fc1), (1, wanted.fc2)):
                model = _grown(prepared, training, cast(MLP, model), hidden, layer.out_features, number)
            return model

        return in_turns(prepared, watching, prepared.scaled(first), cell.contender.course.moments, edit, "gromo")


def _grown(prepared: Prepared, training: Training, model: MLP, hidden: int, size: int, number: int) -> MLP:
    """The network with so many units in a hidden layer, or fewer where TINY finds no more."""
    present = (model.fc1, model.fc2)[hidden].out_features
    if size <= present:
        return model
    layers = _written(model)
    generator = torch.Generator().manual_seed(derived_seed(prepared.cell.seed, "gromo", number, hidden))
    data, row = prepared.data, prepared.row
    drawn = batches(data.x_train, data.y_train, row.batch_size, generator, row.augment)
    seen = [(inputs.flatten(1), labels) for inputs, labels in islice(drawn, _BATCHES)]
    growing = layers[hidden + 1]
    growing.init_computation()
    for inputs, labels in seen:
        for layer in layers:
            layer.zero_grad()
        torch.autograd.backward(F.cross_entropy(_forward(layers, inputs), labels))
        growing.update_computation()
    # how many units are added follows the budget, not a threshold on what they promise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of covariances that have no inverse, which it knows to handle
        growing.compute_optimal_updates(
            maximum_added_neurons=size - present, compute_delta=False, statistical_threshold=0.0
        )
    growing.normalize_optimal_updates(normalization_type="match_extending_layer")
    growing.reset_computation()
    samples = sum(len(labels) for _, labels in seen)
    training.charge(samples, FORWARD_AND_BACKWARD)
    best = min(_SCALES, key=lambda scale: _loss(layers, growing, seen, scale))
    training.charge(samples, len(_SCALES))
    growing.apply_change(scaling_factor=best)
    return _read(model, layers)


def _written(model: MLP) -> list[Any]:
    from gromo.modules.linear_growing_module import LinearGrowingModule

    layers: list[Any] = []
    for number, linear in enumerate((model.fc1, model.fc2, model.head)):
        layer = LinearGrowingModule(
            linear.in_features,
            linear.out_features,
            post_layer_function=nn.Identity() if number == 2 else nn.ReLU(),
            previous_module=layers[-1] if layers else None,
            device=linear.weight.device,
            name=f"layer {number}",
        )
        layer.layer.load_state_dict(linear.state_dict())
        layers.append(layer)
    return layers


def _read(model: MLP, layers: list[Any]) -> MLP:
    changed = copy.deepcopy(model)
    for name, layer in zip(("fc1", "fc2", "head"), layers, strict=True):
        weight, bias = layer.layer.weight.detach(), layer.layer.bias.detach()
        linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        linear.load_state_dict({"weight": weight, "bias": bias})
        setattr(changed, name, linear)
    return changed


def _forward(layers: list[Any], inputs: Tensor) -> Tensor:
    for layer in layers:
        inputs = layer(inputs)
    return inputs


def _loss(layers: list[Any], growing: Any, seen: list[tuple[Tensor, Tensor]], scale: float) -> float:
    """The mean loss with the new units at a scale."""
    growing.scaling_factor = scale
    total = 0.0
    with torch.no_grad():
        for inputs, labels in seen:
            outputs, more = inputs, None
            for layer in layers:
                outputs, more = layer.extended_forward(outputs, more)
            total += float(F.cross_entropy(outputs, labels)) * len(labels)
    return total


__all__ = ["Gromo"]
