"""Recurrent layers in single precision, where one operator runs a whole layer: attributes, flat weights, training."""

import pytest
import torch
from oracles import outputs, relative_error
from small_recurrent import Cells, Sequence
from torch import Tensor, nn

from espalier.attaching import attach
from espalier.graph.capture import capture
from espalier.structure import Structure

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {"batch_first": True},
    "without_biases": {"bias": False},
    "layers_and_directions": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "dropout": {"num_layers": 2, "dropout": 0.5},
}


def attached(model: nn.Module) -> tuple[Structure, Tensor, torch.optim.Optimizer]:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 3, dtype=next(model.parameters()).dtype)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, x, optimizer)
    return attach(model, x, optimizer=optimizer), x, optimizer


def train(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_layer_of_one_operator_changes_exactly_and_trains_on(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Sequence(nn.LSTM, **options)
    structure, x, optimizer = attached(model)
    assert "aten::mkldnn_rnn_layer" in {call.name for call in capture(model, x).calls}
    parameters = {name: id(one) for name, one in model.named_parameters()}
    before = outputs(model, x, False, 0)
    edit = structure.grow({"rnn": 3, "stem": 2})
    assert edit.contract == "exact"
    assert (model.rnn.hidden_size, model.rnn.input_size) == (7, 7)
    assert relative_error(outputs(model, x, False, 0), before) < 1e-5
    train(model, x, optimizer)
    structure.prune("rnn", [0, 5])
    assert model.rnn.hidden_size == 5
    model.rnn.flatten_parameters()
    assert all(one is getattr(model.rnn, name) for one, name in flat_weights(model.rnn))
    assert {name: id(one) for name, one in model.named_parameters()} == parameters
    train(model, x, optimizer)
    assert outputs(model, x, False, 0).isfinite().all()


def flat_weights(layer: nn.RNNBase) -> list[tuple[Tensor, str]]:
    return list(zip(layer._flat_weights, layer._flat_weights_names, strict=True))


def test_a_projection_keeps_its_own_size() -> None:
    model = Sequence(nn.LSTM, 8, proj_size=3).double()
    structure, x, optimizer = attached(model)
    cells, passed = structure.axis("rnn.weight_hr_l0", 1), structure.axis("rnn.weight_hr_l0", 0)
    assert (cells.size, passed.size) == (8, 3)
    structure.grow({cells.name: 1, passed.name: 2})
    assert (model.rnn.hidden_size, model.rnn.proj_size) == (9, 5)
    train(model, x, optimizer)


def test_cells_repeat_their_sizes() -> None:
    model = Cells()
    structure, x, optimizer = attached(model)
    structure.grow({"first": 2, "stem": 1})
    assert (model.first.input_size, model.first.hidden_size, model.second.input_size) == (6, 6, 6)
    train(model, x, optimizer)


def test_a_hidden_size_that_equals_the_input_size_is_not_mistaken_for_it() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GRU(4, 4, batch_first=True))
    structure = attach(model, torch.randn(4, 5, 3))
    structure.grow("0", by=1)
    assert (model[1].input_size, model[1].hidden_size) == (5, 4)


@pytest.mark.parametrize("silent", [("head.weight",), ("rnn.weight_hh_l0",), ("head.weight", "rnn.weight_hh_l0")])
def test_units_go_exactly_if_neither_the_head_nor_the_layer_itself_reads_them(silent: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = Sequence(nn.LSTM, batch_first=True)
    structure, x, _ = attached(model)
    with torch.no_grad():
        for name in silent:
            model.get_parameter(name)[:, 1] = 0.0
    before = outputs(model, x, False, 0)
    edit = structure.prune("rnn", [1])
    assert (edit.contract == "exact") == (len(silent) == 2)
    assert (relative_error(outputs(model, x, False, 0), before) < 1e-5) == (len(silent) == 2)
