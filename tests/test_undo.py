"""A hundred random edits, then a hundred undos: every byte of model and optimizer is as it was, at every step back."""

import random
from collections.abc import Callable, Iterable

import pytest
import torch
from effort import NIGHTLY
from networks import DOMAINS, build
from oracles import FixedDropout
from snapshots import differences, snapshot
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from training import edited, train
from zoo_small import ZOO

from espalier.attaching import attach
from espalier.errors import SurgeryError
from espalier.structure import Structure

Make = Callable[[Iterable[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd momentum": lambda parameters: SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True),
    "adam": lambda parameters: Adam(parameters, lr=1e-3, amsgrad=True),
    "adamw fused": lambda parameters: AdamW(parameters, lr=1e-3, fused=True),
    "adagrad": lambda parameters: Adagrad(parameters, lr=1e-2),
}


def attached(model: nn.Module, x: object, make: Make) -> Structure:
    """Trained for two steps, one parameter frozen, one without gradient."""
    parameters = list(model.parameters())
    parameters[len(parameters) // 2].requires_grad_(False)
    optimizer = make(model.parameters())
    train(model, x, optimizer, 2)
    parameters[0].grad = None
    return attach(model, x, optimizer=optimizer)


CASES = [
    (5, "image", "sgd momentum"),
    (17, "image", "adamw fused"),
    (8, "vector", "adagrad"),
    (11, "sequence", "adam"),
    (4, "text", "adamw fused"),
]
if NIGHTLY:
    CASES = [(seed, domain, name) for seed in range(12) for domain in DOMAINS for name in OPTIMIZERS]


@pytest.mark.parametrize(("seed", "domain", "name"), CASES)
def test_a_hundred_edits_and_a_hundred_undos_give_back_every_byte(seed, domain, name):
    model, x = build(seed, 4, domain)
    if domain == "image":
        model.to(memory_format=torch.channels_last)
    structure = attached(model, x, OPTIMIZERS[name])
    before = edited(structure, random.Random(seed), 100)
    assert len(structure.history) == 100
    for wanted in reversed(before):
        structure.undo()
        found = differences(wanted, snapshot(model, structure.optimizer, structure))
        assert found == []
    train(model, x, structure.optimizer, 1)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vit", "encoder_batch_first", "tied_embeddings"])
def test_edits_of_known_networks_give_back_every_byte(name):
    model, x = ZOO[name]()
    structure = attached(model, x, OPTIMIZERS["adamw fused"])
    for wanted in reversed(edited(structure, random.Random(0), 15)):
        structure.undo()
        assert differences(wanted, snapshot(model, structure.optimizer, structure)) == []


def test_undo_after_a_forward_and_a_backward_pass_keeps_statistics_that_no_edit_touched():
    """Only the edited tensors go back: a network that ran since then has newer statistics elsewhere."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.BatchNorm1d(3))
    x = torch.randn(8, 4)
    structure = attach(model, x)
    structure.grow("0", by=2)
    model(x).sum().backward()
    elsewhere = model[3].running_mean.clone()
    structure.undo()
    assert model[1].running_mean.shape == (5,)
    assert torch.equal(model[3].running_mean, elsewhere)


def test_undo_ends_with_the_next_optimizer_step():
    model, x = build(8, 4, "vector")
    structure = attached(model, x, OPTIMIZERS["adam"])
    edited(structure, random.Random(0), 3)
    train(model, x, structure.optimizer, 1)
    before = snapshot(model, structure.optimizer, structure)
    with pytest.raises(SurgeryError, match="nothing to undo"):
        structure.undo()
    assert differences(before, snapshot(model, structure.optimizer, structure)) == []


def test_undo_and_apply_again_gives_the_same_bytes():
    model, x = build(5, 4, "image")
    structure = attached(model, x, OPTIMIZERS["adam"])
    edited(structure, random.Random(1), 5)
    last = structure.history[-1].plan
    done = {name: value.clone() for name, value in model.state_dict().items()}
    structure.undo()
    structure.apply(last)
    assert all(torch.equal(value, done[name]) for name, value in model.state_dict().items())


def test_the_comparison_sees_one_bit_of_everything():
    """Of a parameter, a buffer, a gradient, an attribute, an option, a state, a layout, and the order of the state."""
    model, x = build(5, 4, "image")
    assert any(isinstance(module, FixedDropout | nn.BatchNorm2d) for module in model.modules())
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, x, optimizer, 2)
    weight = next(parameter for parameter in model.parameters() if parameter.dim() == 4 and parameter.shape[1] > 1)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    state = optimizer.state[weight]

    def changed(change: Callable[[], object]) -> list[str]:
        before = snapshot(model, optimizer)
        with torch.no_grad():
            change()
        return differences(before, snapshot(model, optimizer))

    assert changed(lambda: None) == []
    assert changed(lambda: weight.view(-1)[0].nextafter_(torch.tensor(9.0, dtype=torch.float64))) != []
    assert changed(lambda: norm.running_var[0].add_(1e-12)) != []
    assert changed(lambda: weight.grad.view(-1)[0].add_(1e-9)) != []
    assert changed(lambda: setattr(norm, "num_features", norm.num_features + 1)) != []
    assert changed(lambda: optimizer.param_groups[0].__setitem__("lr", 0.5)) != []
    assert changed(lambda: state["exp_avg"].view(-1)[0].add_(1e-9)) != []
    assert changed(lambda: state["step"].add_(1)) != []
    assert changed(lambda: state.__setitem__("exp_avg", state.pop("exp_avg"))) != []
    assert changed(lambda: setattr(weight, "data", weight.data.to(memory_format=torch.channels_last))) != []
    assert changed(lambda: weight.requires_grad_(False)) != []
    assert changed(lambda: setattr(weight, "grad", None)) != []
