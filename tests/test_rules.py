"""Every operator rule against the operator itself, on real tensors.

What the rules say of each case in `rule_cases` is compared with its text first; then, with the operator at hand, so
that the text cannot be wrong in the same way as the rule:

- perturbation: changing the inputs at the positions of one unit changes the outputs at that unit's positions alone;
- removal: taking a unit out of the inputs takes exactly its positions out of the outputs, if what sums over it sees
  zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rule_cases import CASES, ELEMENTWISE, OTHER_DEVICES, RECURRENT, VALUES, WHOLE, elementwise_case
from torch import Tensor, nn
from zoo_small import ZOO

from espalier.graph.capture import capture
from espalier.graph.courses import passes
from espalier.graph.dims import Concat, Dim, Fixed, Leaf, Product, axes_of, labels, size_of, source
from espalier.graph.named_tensors import tensor_table
from espalier.graph.reading import read
from espalier.graph.rules import known_operators, registry, rule, rule_for
from espalier.graph.rules.registry import Event, Reading, Result
from espalier.graph.solver import Var, compiled, variables
from espalier.graph.topology import Topology, infer
from espalier.graph.trace import Call, Trace

MIXING = {"softmax", "layer_norm", "rms_norm", "group_norm", "reduce", "sum", "norm", "bilinear"}
"""Roles under which units of an axis see each other."""


# --- What the rules say of a function --------------------------------------------------------------------------------


class Function(nn.Module):
    """A function of tensors that are all parameters or, if they hold integers, buffers."""

    def __init__(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.function = function
        self.count = len(tensors)
        for number, tensor in enumerate(tensors):
            if tensor.is_floating_point() or tensor.is_complex():
                self.register_parameter(f"t{number}", nn.Parameter(tensor))
            else:
                self.register_buffer(f"t{number}", tensor)

    def forward(self) -> Any:
        return self.function(*(getattr(self, f"t{number}") for number in range(self.count)))


@dataclass
class Said:
    """What the rules say: the dimensions of every input and output, which axes are free, and what is done to them."""

    inputs: list[tuple[Dim, ...]]
    outputs: list[tuple[Dim, ...]]
    sizes: dict[int, int]
    reasons: dict[int, list[str]]
    roles: dict[int, set[str]]
    unknown: Mapping[str, int]
    trace: Trace
    events: list[Event] = field(default_factory=list)

    @property
    def free(self) -> list[int]:
        """The axes of the inputs that may change."""
        present = {axis for dims in self.inputs for dim in dims for axis in axes_of(dim)}
        return [number for number in self.sizes if not self.reasons[number] and number in present]

    def text(self) -> str:
        names: dict[int, str] = {}

        def shown(dim: Dim) -> str:
            match dim:
                case Fixed(n):
                    return str(n)
                case Leaf(axis):
                    name = names.setdefault(axis, "abcdefghijklmnop"[len(names)])
                    return name + ("!" if self.reasons[axis] else "")
                case Product(factors):
                    return f"({'x'.join(map(shown, factors))})"
                case Concat(pieces):
                    return f"[{'|'.join(map(shown, pieces))}]"

        sides = ["; ".join(" ".join(map(shown, dims)) for dims in side) for side in (self.inputs, self.outputs)]
        return " -> ".join(sides)


def said(function: Callable[..., Any], tensors: Sequence[Tensor], training: bool = False) -> Said:
    model = Function(function, tensors)
    table = tensor_table(model)
    trace = capture(model, (), training=training, table=table)
    solved = read(model, table, [trace], {})
    (reading,) = solved.readings
    numbers: dict[Var, int] = {}
    inputs = [tuple(compiled(term, numbers) for term in solved.tensors[f"t{number}"]) for number in range(len(tensors))]
    outputs = [tuple(compiled(term, numbers) for term in reading.of(ref)) for ref in trace.outputs.values()]
    roles: dict[int, set[str]] = {number: set() for number in numbers.values()}
    for event in reading.events:
        for var in variables(event.term):
            if var in numbers:
                roles[numbers[var]].add(event.role)
    return Said(
        inputs,
        outputs,
        {number: var.size for var, number in numbers.items()},
        {number: [one.text for one in var.reasons if one.kind != "output"] for var, number in numbers.items()},
        roles,
        solved.unknown,
        trace,
        reading.events,
    )


# --- Oracles ---------------------------------------------------------------------------------------------------------


def results(function: Callable[..., Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    found = function(*(tensor.clone() for tensor in tensors))
    return [found] if isinstance(found, Tensor) else list(found)


def _repeats(dim: Dim, axis: int) -> bool:
    match dim:
        case Product(factors):
            return sum(_count(factor, axis) > 0 for factor in factors) > 1 or any(_repeats(f, axis) for f in factors)
        case Concat(pieces):
            return any(_repeats(piece, axis) for piece in pieces)
        case _:
            return False


def _count(dim: Dim, axis: int) -> int:
    match dim:
        case Leaf(number):
            return int(number == axis)
        case Product(parts) | Concat(parts):
            return sum(_count(part, axis) for part in parts)
        case _:
            return 0


def _mask(dims: Sequence[Dim], sizes: Mapping[int, int], axis: int, unit: int) -> Tensor:
    """Where a tensor belongs to one unit of an axis, along any of its dimensions."""
    shape = [size_of(dim, sizes) for dim in dims]
    found = torch.zeros(shape, dtype=torch.bool)
    for position, dim in enumerate(dims):
        here = torch.from_numpy(labels(dim, sizes, axis) == unit)
        found |= here.reshape([-1 if other == position else 1 for other in range(len(dims))])
    return found


def _without(tensor: Tensor, dims: Sequence[Dim], sizes: Mapping[int, int], change: dict[int, np.ndarray]) -> Tensor:
    for position, dim in enumerate(dims):
        tensor = tensor.index_select(position, torch.from_numpy(source(dim, sizes, change)))
    return tensor


def check_perturbation(function: Callable[..., Any], tensors: Sequence[Tensor], what: Said) -> None:
    before = results(function, tensors)
    for axis in what.free:
        if what.roles[axis] & MIXING or any(_repeats(dim, axis) for dims in what.outputs for dim in dims):
            continue
        for unit in range(what.sizes[axis]):
            changed = []
            for tensor, dims in zip(tensors, what.inputs, strict=True):
                mask = _mask(dims, what.sizes, axis, unit)
                noise = 1 + torch.rand(tensor.shape, dtype=torch.float64)
                changed.append(torch.where(mask, tensor * noise, tensor) if tensor.is_floating_point() else tensor)
            after = results(function, changed)
            for old, new, dims in zip(before, after, what.outputs, strict=True):
                if any(_count(dim, axis) for dim in dims):
                    moved = ~torch.isclose(old.double(), new.double(), rtol=1e-9, atol=1e-12, equal_nan=True)
                    outside = moved & ~_mask(dims, what.sizes, axis, unit)
                    assert not outside.any(), f"unit {unit} of {what.sizes[axis]} reaches other units of its axis"


def check_removal(function: Callable[..., Any], tensors: Sequence[Tensor], what: Said) -> None:
    for axis in what.free:
        size = what.sizes[axis]
        for unit in range(size if size > 1 else 0):
            change = {axis: np.delete(np.arange(size), unit)}
            silent = list(tensors)
            if "contract" in what.roles[axis]:
                silent = [
                    tensor.masked_fill(_mask(dims, what.sizes, axis, unit), 0)
                    for tensor, dims in zip(tensors, what.inputs, strict=True)
                ]
            before = results(function, silent)
            smaller = [_without(t, dims, what.sizes, change) for t, dims in zip(silent, what.inputs, strict=True)]
            after = results(function, smaller)
            for old, new, dims in zip(before, after, what.outputs, strict=True):
                expected = _without(old, dims, what.sizes, change)
                assert new.shape == expected.shape
                if not what.roles[axis] & MIXING:
                    torch.testing.assert_close(new, expected, equal_nan=True)


# --- Cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    one = CASES[name]
    tensors = one.tensors()
    what = said(one.function, tensors)
    assert what.unknown == {}
    assert what.text() == one.text
    for dims, tensor in zip(what.outputs, results(one.function, tensors), strict=True):
        assert tuple(size_of(dim, what.sizes) for dim in dims) == tuple(tensor.shape)
    if one.random:
        return
    check_perturbation(one.function, tensors, what)
    if one.generic:
        check_removal(one.function, tensors, what)


# --- Elementwise operators, all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_operator(name: str) -> None:
    one = elementwise_case(name)
    tensors = one.tensors()
    what = said(one.function, tensors)
    assert what.unknown == {}
    assert what.text() == one.text
    assert name in operators_of(what.trace)
    if not one.random:
        check_perturbation(one.function, tensors, what)
        check_removal(one.function, tensors, what)


# --- Operators of other devices: on fake tensors only ----------------------------------------------------------------


@pytest.mark.parametrize("name", OTHER_DEVICES)
def test_rule_of_other_devices(name: str) -> None:
    one = OTHER_DEVICES[name]
    what = said(one.function, [tensor.float() for tensor in one.tensors()])
    assert what.unknown == {}
    assert what.text() == one.text
    assert name in operators_of(what.trace)


def said_of_recurrent(name: str) -> Said:
    one = RECURRENT[name]
    with torch.library._scoped_library("aten", "IMPL") as library:
        # The one operator of these that torch has no sizes for: on a CUDA device it runs on real tensors.
        library.impl("_thnn_fused_gru_cell", lambda x, h, state, *biases: (state + 0, x.new_empty(1)), "Meta")
        return said(one.function, [tensor.float() for tensor in one.tensors()])


@pytest.mark.parametrize("name", RECURRENT)
def test_rule_of_recurrent_layers(name: str) -> None:
    one, what = RECURRENT[name], said_of_recurrent(name)
    assert what.unknown == {}
    assert what.text() == one.text


@pytest.mark.parametrize("name", WHOLE)
def test_operators_that_some_devices_do_not_take_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espalier.graph.recorder._is_composite", lambda func: False)
    one = WHOLE[name]
    with torch.inference_mode():
        what = said(one.function, one.tensors())
    assert [call.name for call in what.trace.calls] == [f"aten::{name}"]
    assert what.unknown == {}
    assert what.text() == one.text


# --- Which operators there are ---------------------------------------------------------------------------------------


def operators_of(trace: Trace) -> set[str]:
    """Names of the rules that the calls of a trace use, and of operators without one."""
    names = {call.name.removeprefix("aten::") for call in trace.calls}
    known = set(known_operators())
    return {name if name in known or name.rstrip("_") not in known else name.rstrip("_") for name in names}


def test_every_rule_is_tested() -> None:
    met: set[str] = {*OTHER_DEVICES, *WHOLE}
    for name in RECURRENT:
        met |= operators_of(said_of_recurrent(name).trace)
    for one in [*CASES.values(), *map(elementwise_case, ELEMENTWISE)]:
        model = Function(one.function, one.tensors())
        met |= operators_of(capture(model, ()))
    for one in VALUES.values():  # each checked in test_real_capture
        model = Function(one.function, one.tensors())
        met |= operators_of(passes(model, (), tensor_table(model), {}).traces[0])
    of_torch = {name for name in known_operators() if "::" not in name}  # others: see test_real_capture
    assert sorted(of_torch - met) == []


@pytest.mark.parametrize("training", [False, True])
def test_every_operator_of_the_zoo_has_a_rule(training: bool) -> None:
    missing: dict[str, set[str]] = {}
    for name, make in ZOO.items():
        model, example = make()
        for call in capture(model, example, training=training).calls:
            if rule_for(call) is None:
                missing.setdefault(call.name, set()).add(name)
    assert missing == {}


def test_every_operator_of_the_architectures_in_the_benchmark_has_a_rule() -> None:
    """Their names are written down by benchmarks/zoo_operators.py."""
    known = set(known_operators())
    names = (Path(__file__).parent / "zoo_operators.txt").read_text().split()
    plain = [name.removeprefix("aten::") for name in names]
    assert len(plain) > 100
    assert [name for name in plain if name not in known and name.removesuffix("_") not in known] == []


LAYERS: dict[tuple[int, ...], list[nn.Module]] = {
    (4, 6): [
        nn.BatchNorm1d(6), nn.PReLU(), nn.RReLU(), nn.CELU(), nn.Softmax(1), nn.GLU(), nn.AlphaDropout(),
        nn.FeatureAlphaDropout(), nn.Hardsigmoid(), nn.Softsign(),
    ],
    (4, 6, 10): [
        nn.InstanceNorm1d(6, affine=True, track_running_stats=True), nn.GroupNorm(2, 6), nn.ConvTranspose1d(6, 6, 3),
        nn.Conv1d(6, 6, 3, padding="same", padding_mode="circular"), nn.AdaptiveMaxPool1d(2), nn.LPPool1d(2, 2),
        nn.ReflectionPad1d(1), nn.Flatten(), nn.RMSNorm(10), nn.LayerNorm([6, 10]), nn.Dropout1d(),
    ],
    (4, 6, 8, 8): [
        nn.InstanceNorm2d(6), nn.LocalResponseNorm(3), nn.ChannelShuffle(2), nn.Softmax2d(), nn.Dropout2d(),
        nn.Conv2d(6, 6, 3, padding_mode="reflect", padding=1, groups=3), nn.UpsamplingBilinear2d(scale_factor=2),
        nn.SyncBatchNorm(6), nn.Unfold(2), nn.Unflatten(1, (2, 3)), nn.AdaptiveAvgPool2d((None, 3)),
    ],
    (2, 6, 4, 4, 4): [nn.ConvTranspose3d(6, 4, 2, groups=2), nn.MaxPool3d(2), nn.BatchNorm3d(6)],
}  # fmt: skip


@pytest.mark.parametrize(("shape", "layer"), [(shape, layer) for shape, found in LAYERS.items() for layer in found])
def test_layers_of_torch_need_no_more_rules(shape: tuple[int, ...], layer: nn.Module) -> None:
    firsts = [nn.Linear(6, 6), nn.Conv1d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv3d(6, 6, 1)]
    topology = infer(nn.Sequential(firsts[len(shape) - 2], layer), torch.randn(shape))
    assert topology.unknown == {}
    assert topology.axes


def test_transformer_of_torch_needs_no_more_rules() -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    topology = infer(model, (torch.randn(2, 3, 8), torch.randn(2, 4, 8)))
    assert topology.unknown == {}
    free = {record.name for record in topology.axes.values() if not record.reasons}
    assert {"encoder.layers.0.linear1", "decoder.layers.0.linear1"} <= free


# --- What no rule covers ---------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, 2)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.second(self.function(self.first(x)))


def reasons_of(topology: Topology, name: str) -> str:
    return "; ".join(reason.text for reason in topology.by_name[name].reasons)


def test_an_unknown_operator_freezes_what_it_touches_and_is_named() -> None:
    topology = infer(Around(lambda x: torch.renorm(x, 2.0, 0, 1.0)), torch.randn(8, 5))
    assert topology.unknown == {"aten::renorm": 1}
    for name in ("first", "second:inputs"):
        assert "is touched by the unknown operator aten::renorm in the model" in reasons_of(topology, name)


def test_a_custom_operator_of_a_known_name_is_unknown() -> None:
    with torch.library._scoped_library("espalier_test", "FRAGMENT") as library:
        library.define("relu(Tensor x) -> Tensor")
        library.impl("relu", lambda x: x.flip(-1), "CompositeExplicitAutograd")
        topology = infer(Around(lambda x: torch.ops.espalier_test.relu(x)), torch.randn(8, 5))
    assert topology.unknown == {"espalier_test::relu": 1}
    assert topology.by_name["first"].reasons


@pytest.mark.parametrize("error", [KeyError("self"), IndexError("tuple index out of range"), AssertionError()])
def test_a_rule_that_fails_freezes_what_the_operator_touches(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(reading: Reading, call: Call) -> Result:
        raise error

    monkeypatch.setitem(registry._RULES, "relu", broken)
    topology = infer(Around(F.relu), torch.randn(8, 5))
    assert topology.unknown == {f"aten::relu ({type(error).__name__}: {error})": 1}
    assert "is used in a way that fails the rule of aten::relu" in reasons_of(topology, "first")


def test_a_rule_whose_sizes_are_wrong_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._RULES, "relu", lambda reading, call: reading.of(call.args[0])[:1])
    topology = infer(Around(F.relu), torch.randn(8, 5))
    assert "is used in a way that its rule does not cover" in reasons_of(topology, "first")


def test_all_tensors_over_the_same_memory_are_frozen() -> None:
    class Flat(nn.Module):
        """One long tensor, and two views of parts of it that do not overlap each other."""

        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Parameter(torch.randn(12))
            self.first, self.second = nn.Parameter(self.flat.data[1:4]), nn.Parameter(self.flat.data[6:9])

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.first + self.second).sum() * self.flat.sum()

    topology = infer(Flat(), torch.randn(2, 3))
    for record in topology.axes.values():
        assert "storage" in {reason.kind for reason in record.reasons}


def test_an_operator_has_one_rule() -> None:
    with pytest.raises(ValueError, match="operator 'relu' already has the rule elementwise"):
        rule("relu")(lambda reading, call: [])


# --- What operators do along an axis ---------------------------------------------------------------------------------


def taps_of(topology: Topology, name: str) -> set[str]:
    return {tap.role for tap in topology.by_name[name].taps}


class Perceiver(nn.Module):
    """Learned tokens that attention reads as keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(5, 8))
        self.query, self.key, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        keys = self.key(self.tokens).unflatten(-1, (2, 4)).transpose(0, 1).expand(x.shape[0], -1, -1, -1)
        query = self.query(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(query, keys, keys).transpose(1, 2).flatten(2))


def test_tokens_that_attention_reads_are_normalised_by_its_softmax() -> None:
    topology = infer(Perceiver(), torch.randn(2, 3, 8))
    (name,) = (record.name for record in topology.axes.values() if ("tokens", 0) in {slot[:2] for slot in record.slots})
    assert "softmax" in taps_of(topology, name)
    assert not topology.by_name[name].reasons


class Standardised(nn.Linear):
    """Weight standardisation: every weight depends on how many inputs there are."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, weight / weight.std(1, keepdim=True), self.bias)


def test_a_weight_standardised_across_an_axis_is_no_plain_sum() -> None:
    model = nn.Sequential(nn.Linear(5, 6), Standardised(6, 4), nn.ReLU(), nn.Linear(4, 2))
    topology = infer(model, torch.randn(3, 5))
    assert "reduce" in taps_of(topology, "0")
    assert "reduce" not in taps_of(topology, "1")


class HeadsInTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 12), nn.BatchNorm1d(4), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.norm(self.first(x).view(-1, 4)).view(-1, 12))


def test_batch_norm_over_a_batch_of_heads_sees_all_heads() -> None:
    """In train mode its statistics run over the heads."""
    topology = infer(HeadsInTheBatch(), torch.randn(8, 5))
    heads, channels = (record.name for record in topology.axes.values() if not record.reasons)
    assert "reduce" in taps_of(topology, heads)
    assert "reduce" not in taps_of(topology, channels)


def test_a_mask_that_code_expands_follows_the_heads() -> None:
    """A mask without parameters, expanded to the number of heads before it is added, freezes none of them."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.out = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Any:
            heads = self.value(x).unflatten(-1, (4, 2)).transpose(1, 2)
            mask = torch.arange(3.0)[None, None, :, None].expand(x.shape[0], heads.shape[1], -1, -1)
            return self.out((heads * mask).transpose(1, 2).flatten(2))

    topology = infer(Masked(), torch.randn(2, 3, 6))
    assert not topology.by_name["value:0"].reasons
    assert not topology.by_name["value:1"].reasons
