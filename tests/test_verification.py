"""Code that holds sizes: an edit is refused, or what it leaves is the masked original; never silently wrong.

Comparing output shapes would not see these: the wrong reshapes here run and give outputs of the right shape.
"""

import math
import random
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from snapshots import differences, snapshot
from torch import Tensor, nn

from espalier.attaching import attach
from espalier.edit import stage as staging
from espalier.edit.verify import Verification
from espalier.errors import EspalierError, PlanError
from espalier.graph.named_tensors import tensor_table
from espalier.record import Edit
from espalier.structure import Structure

BATCH, TOKENS, WIDTH, HEADS, HEAD_DIM = 8, 5, 12, 4, 6


class Attention(nn.Module):
    """`view(B, T, 3, heads, -1)`: with too few heads in the code, head_dim is doubled and everything still fits."""

    def __init__(self, heads: Callable[["Attention"], int]) -> None:
        super().__init__()
        self.h = HEADS
        self._heads = heads
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self._heads(self), -1).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1)) / math.sqrt(HEAD_DIM)
        return self.out((attention.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, t, -1))


def network(heads: Callable[[Attention], int]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, WIDTH), Attention(heads), nn.Linear(WIDTH, 2)).double()
    return model, torch.randn(BATCH, TOKENS, 6, dtype=torch.float64)


def heads_axis(structure: Structure) -> str:
    (found,) = [axis.name for axis in structure.axes.values() if axis.size == HEADS and axis.name.startswith("1.qkv")]
    return found


def without_units(model: nn.Module, structure: Structure, axis: str, units: list[int], x: Tensor) -> Tensor:
    """What the model gives without some units: all that makes them and all that reads them is zero there."""
    tensors = tensor_table(model).tensors
    saved = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        for slot in structure.axes[axis].slots:
            if slot.role in ("contract", "produce", "shift"):
                tensors[slot.tensor].index_fill_(slot.dim, torch.tensor(slot.index(units)), 0.0)
        result = model(x)
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
    return result


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_heads_that_the_code_reads_from_an_attribute_are_repaired_and_right():
    model, x = network(lambda module: module.h)
    structure = attach(model, x)
    axis = heads_axis(structure)
    wanted = without_units(model, structure, axis, [0, 2], x)
    edit = structure.prune(axis, [0, 2])
    assert model[1].h == 2
    assert [str(change) for change in edit.attributes if change.path == ("h",)] == ["1.h: 4 -> 2"]
    assert model[1].qkv.weight.shape == (3 * 2 * HEAD_DIM, WIDTH)
    assert relative_error(outputs(model, x), wanted) <= 1e-11
    structure.undo()
    assert model[1].h == HEADS


def literal() -> Callable[[Attention], int]:
    """The number of heads in a closure, out of reach of every attribute."""
    heads = HEADS
    return lambda module: heads


def test_heads_that_the_code_holds_are_refused_and_nothing_changes():
    model, x = network(literal())
    optimizer = torch.optim.Adam(model.parameters())
    structure = attach(model, x, optimizer=optimizer)
    axis = heads_axis(structure)
    before = snapshot(model, optimizer, structure)
    assert not structure.axes[axis].prunable
    with pytest.raises(PlanError) as refusal:
        structure.prune(axis, [0, 2])
    text = str(refusal.value)
    line = Attention.forward.__code__.co_firstlineno + 2
    assert axis in text
    assert f"in 1 (test_verification.py:{line}, view)" in text
    assert differences(before, snapshot(model, optimizer, structure)) == []


def test_without_verification_the_same_edit_would_be_wrong_in_the_right_shape(monkeypatch):
    """So the refusal is not overcautious: this is the error that it prevents."""
    model, x = network(literal())
    monkeypatch.setattr(staging, "repaired", lambda *_: ([], Verification(None)))
    structure = attach(model, x)
    axis = heads_axis(structure)
    wanted = without_units(model, structure, axis, [0, 2], x)
    structure.prune(axis, [0, 2])
    wrong = outputs(model, x)
    assert wrong.shape == wanted.shape
    assert relative_error(wrong, wanted) > 0.01


# --- Other sizes in code ---------------------------------------------------------------------------------------------


class Coded(nn.Module):
    """conv/linear layers around one piece of code with literal sizes; `body` is called with the module and x."""

    def __init__(self, layers: Mapping[str, nn.Module], body: Callable[["Coded", Tensor], Tensor]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def literal_view(m: Coded, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(x).view(-1, 4, 2)).flatten(1))


def view_into_the_batch(m: Coded, x: Tensor) -> Tensor:
    return m.c(m.a(x).reshape(-1, 8))


def literal_slice(m: Coded, x: Tensor) -> Tensor:
    return m.c(torch.tanh(m.a(x))[:, :8])


def literal_slices_joined(m: Coded, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.c(torch.cat([h[:, 4:8], h[:, :4]], dim=1))


def every_second(m: Coded, x: Tensor) -> Tensor:
    return m.d(torch.tanh(m.a(x))[:, ::2])


def literal_split(m: Coded, x: Tensor) -> Tensor:
    left, right = torch.split(m.a(x), [4, 4], dim=1)
    return m.d(left * torch.sigmoid(right))


def literal_index(m: Coded, x: Tensor) -> Tensor:
    return m.c(m.a(x)[:, [7, 6, 5, 4, 3, 2, 1, 0]])


def literal_select(m: Coded, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(h * h[:, 3:4])


def literal_roll(m: Coded, x: Tensor) -> Tensor:
    return m.c(torch.roll(m.a(x), 1, dims=1))


def literal_flip(m: Coded, x: Tensor) -> Tensor:
    return m.c(m.a(x).flip(1))


def literal_repeat(m: Coded, x: Tensor) -> Tensor:
    return m.e(m.a(x).repeat(1, 2))


def literal_pad(m: Coded, x: Tensor) -> Tensor:
    return m.e(F.pad(m.a(x), (0, 8)))


def sum_over_units(m: Coded, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.c(h) + h.sum(1, keepdim=True)


def literal_mean(m: Coded, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.c(h) + h.sum(1, keepdim=True) / 8


def cumulative(m: Coded, x: Tensor) -> Tensor:
    return m.c(m.a(x).cumsum(1))


def sorted_units(m: Coded, x: Tensor) -> Tensor:
    return m.c(m.a(x).sort(1).values)


def outer(m: Coded, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.f((h[:, :, None] * h[:, None, :]).flatten(1))


def constant_weights(m: Coded, x: Tensor) -> Tensor:
    return m.c(m.a(x) * torch.linspace(0.5, 1.5, 8, dtype=x.dtype))


def literal_ones(m: Coded, x: Tensor) -> Tensor:
    return m.c(m.a(x)) + F.linear(m.a(x), torch.ones(3, 8, dtype=x.dtype))


def functional_norm(m: Coded, x: Tensor) -> Tensor:
    return m.c(F.layer_norm(m.a(x), (8,)))


def literal_groups(m: Coded, x: Tensor) -> Tensor:
    return m.c(F.group_norm(m.a(x), 4))


def transposed_with_the_batch(m: Coded, x: Tensor) -> Tensor:
    return m.c((m.a(x).t() * torch.linspace(0.5, 1.5, BATCH, dtype=x.dtype)).t())


def tokens_from_units(m: Coded, x: Tensor) -> Tensor:
    return m.d(m.a(x).view(x.shape[0], 2, -1).mean(1))


def softmax_over_units(m: Coded, x: Tensor) -> Tensor:
    return m.c(m.a(x).softmax(1))


TRAPS: tuple[Callable[[Coded, Tensor], Tensor], ...] = (
    *(literal_view, view_into_the_batch, literal_slice, literal_slices_joined, every_second, literal_split),
    *(literal_index, literal_select, literal_roll, literal_flip, literal_repeat, literal_pad, sum_over_units),
    *(literal_mean, cumulative, sorted_units, outer, constant_weights, literal_ones, functional_norm),
    *(literal_groups, transposed_with_the_batch, tokens_from_units, softmax_over_units),
)
MIXING = frozenset({functional_norm, literal_groups, softmax_over_units})
"""Removing a unit of zeros changes the others, and the contract has to say so."""


def trap(body: Callable[[Coded, Tensor], Tensor]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(2)
    layers = {
        "a": nn.Linear(6, 8),
        "b": nn.Linear(2, 2),
        "c": nn.Linear(8, 3),
        "d": nn.Linear(4, 3),
        "e": nn.Linear(16, 3),
        "f": nn.Linear(64, 3),
    }
    model = Coded(layers, body).double()
    x = torch.randn(BATCH, 6, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    return model, x


def attempt(edit: Callable[[], Edit]) -> Edit | EspalierError:
    try:
        return edit()
    except EspalierError as refusal:
        return refusal


@pytest.mark.parametrize("body", TRAPS, ids=lambda body: body.__name__)
def test_an_axis_that_says_that_it_may_change_can_and_is_right(body):
    """Each axis pruned by one unit and by half of them, and grown: outputs as the contract says."""
    model, x = trap(body)
    structure = attach(model, x)
    rng = random.Random(0)
    for name in list(structure.axes):
        for share in (0.0, 0.5, None):
            axis = structure.axes[name]
            if not (axis.growable if share is None else axis.prunable):
                continue
            wanted = outputs(model, x)
            if share is None:
                found = structure.grow(name, by=2)
            else:
                units = rng.sample(range(axis.size), max(1, int(share * axis.size)))
                wanted = without_units(model, structure, name, units, x)
                found = structure.prune(name, units)
            may_differ = found.contract == "changing" and (share is None or body in MIXING)
            assert may_differ or relative_error(outputs(model, x), wanted) <= 1e-11, (name, found)
            structure.undo()


@pytest.mark.parametrize("body", [literal_flip, literal_index, constant_weights, sorted_units, cumulative])
def test_what_moves_or_mixes_units_is_frozen_from_the_start(body):
    model, x = trap(body)
    axis = attach(model, x).axis("a.weight", 0)
    assert not axis.prunable
    assert not axis.growable
    assert f"(test_verification.py:{body.__code__.co_firstlineno + 1}" in axis.reason


@pytest.mark.parametrize("body", [literal_view, literal_slices_joined, literal_split, view_into_the_batch])
def test_a_refusal_names_the_line_and_the_axis(body):
    model, x = trap(body)
    structure = attach(model, x)
    texts = []
    for axis in structure.axes.values():
        if not any(slot.tensor == "a.weight" and slot.dim == 0 for slot in axis.slots):
            continue
        if axis.reason is not None:
            texts.append(f"{axis.name}: {axis.reason}")
            continue
        found = attempt(lambda axis=axis: structure.prune(axis.name, [0]))
        if isinstance(found, EspalierError):
            assert axis.name in str(found)
            texts.append(str(found))
        else:
            structure.undo()
    assert texts
    for text in texts:
        assert "(test_verification.py:" in text, text


class Caching(nn.Module):
    """Attention biases that are indexed once in eval mode and forgotten in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 2)
        self.table = nn.Parameter(torch.randn(5, 3))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Caching":
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        biases = self.table.sum(1) if self.training else self.cache.setdefault("biases", self.table.sum(1))
        return self.last(self.first(x) + biases)


def test_what_a_module_keeps_between_passes_is_forgotten_with_an_edit():
    model, x = Caching().double().eval(), torch.randn(BATCH, 6, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
    structure = attach(model, x)
    assert structure.axes["first"].growable
    structure.grow("first", by=3)
    with torch.no_grad():
        assert relative_error(model(x), wanted) <= 1e-11
    assert not model.training
    structure.undo()
    with torch.no_grad():
        assert relative_error(model(x), wanted) <= 1e-11


class Remembering(nn.Module):
    """Positions that are computed in the first pass only, kept in a buffer or in a plain attribute."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 2)
        if buffer:
            self.register_buffer("positions", torch.zeros(1, 1, dtype=torch.float64), persistent=False)
        else:
            self.positions = torch.zeros(1, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        if self.positions.shape[0] != x.shape[0]:
            self.positions = torch.linspace(0, 1, x.shape[0], dtype=x.dtype)[:, None] * 2
        return self.last(self.first(x) + self.positions)


@pytest.mark.parametrize("buffer", [True, False])
def test_a_model_that_runs_other_operators_after_its_first_pass_is_read_anew(buffer):
    model, x = Remembering(buffer).double(), torch.randn(BATCH, 6, dtype=torch.float64)
    structure = attach(model, x)
    assert structure.axes["first"].growable
    with torch.no_grad():
        wanted = model(x)
    for count in (1, 2):
        structure.grow("first", by=count)
        with torch.no_grad():
            assert relative_error(model(x), wanted) <= 1e-11
