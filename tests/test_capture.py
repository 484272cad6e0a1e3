"""Captures see what a model does, whatever Python it is written in, and leave no trace of it."""

import random
import time
import warnings
from collections import deque, namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from resnet import ResNet50
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from zoo_small import ZOO

import espalier
from espalier.bench.models import build
from espalier.errors import CaptureError
from espalier.graph.capture import capture
from espalier.graph.named_tensors import tensor_table
from espalier.graph.recorder import Divergence
from espalier.graph.topology import infer
from espalier.graph.trace import Call, Ref, Trace
from espalier.graph.trees import map_tensors

X = torch.randn(4, 6)
capture(nn.ReLU(), X)  # torch imports some modules late, and these add a filter for warnings


def names(trace: Trace) -> list[str]:
    return [call.name.removeprefix("aten::") for call in trace.calls]


# --- Nothing remains -------------------------------------------------------------------------------------------------


def contents(value: Any, depth: int = 3) -> Any:
    """What a value holds, down to the identity of what has no parts, and every byte of tensors."""
    if isinstance(value, Tensor):
        return (
            id(value),
            tuple(value.shape),
            value.dtype,
            value.device,
            bytes_of(value),
            id(value.grad if value.is_leaf else None),
        )
    if depth and isinstance(value, Mapping):
        return type(value), [(key, contents(item, depth - 1)) for key, item in value.items()]
    if depth and isinstance(value, (list, tuple, deque)):
        return type(value), [contents(item, depth - 1) for item in value]
    if isinstance(value, set):
        return frozenset(map(id, value))
    return id(value)


def bytes_of(tensor: Tensor) -> bytes:
    if tensor.device.type == "meta":
        return b""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a capture might disturb."""
    return {
        "modules": [(id(module), contents(module.__dict__)) for module in model.modules()],
        "versions": [tensor._version for tensor in (*model.parameters(), *model.buffers())],
        "training": [module.training for module in model.modules()],
        "torch": torch.random.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": [np.asarray(part).tolist() for part in np.random.get_state()],
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "modes": len(_get_current_dispatch_mode_stack()),
        "hooks": [len(hooks) for hooks in GLOBAL_HOOKS],
        "class": dict(vars(nn.Module)),
        "warnings": list(warnings.filters),
        "default type": torch.get_default_dtype(),
    }


GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_forward_hooks_always_called,
)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    before = state_of(model)
    yield
    after = state_of(model)
    for part, was in before.items():
        assert after[part] == was, part


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_no_network_of_the_zoo_is_disturbed(name: str, training: bool) -> None:
    model, example = ZOO[name]()
    for number, module in enumerate(model.modules()):
        module.training = number % 3 > 0
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    with undisturbed(model):
        assert capture(model, example, training=training).calls


class State:
    """Some object that a module keeps."""

    def __init__(self) -> None:
        self.last: Any = None
        self.all: list[Any] = []


class Messy(nn.Module):
    """A forward that leaves things behind everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("nothing", None)
        self.register_parameter("no_bias", None)
        self.cache: Any = None
        self.history: list[Any] = [1]
        self.table: dict[str, Any] = {"kept": [torch.zeros(1)]}
        self.seen: set[Any] = {"a"}
        self.recent: deque[Any] = deque([1, 2], maxlen=2)
        self.state = State()
        self.constant = torch.arange(6.0)
        self.counter = torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layer(x)) + self.constant
        self.cache = x
        self.count += 1
        self.average.mul_(0.9).add_(x.mean(0))
        self.counter += x.sum(0)
        self.history.append(x)
        self.table["new"] = x
        self.table["kept"].append(x)
        self.seen.add(x)
        self.recent.append(x)
        self.state.last = x
        self.state.all.append(x)
        self.later = nn.Linear(6, 2)
        self.layer.weight.requires_grad_(False)
        self.eval()
        random.random()
        np.random.rand()
        torch.manual_seed(1)
        torch.rand(3)
        warnings.warn("noise", stacklevel=1)
        return self.later(F.dropout(x, 0.5, True))


@pytest.mark.parametrize("training", [False, True])
def test_what_a_forward_leaves_behind_is_put_back(training: bool) -> None:
    model = Messy()
    with undisturbed(model):
        trace = capture(model, X, training=training)
    assert trace.tensors.keys() >= {"layer.weight", "average", "count"}


class Failing(Messy):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        with torch.enable_grad():
            self.norm(x[:, :5])
        return x


def test_a_forward_that_fails_leaves_nothing_either() -> None:
    model = Failing()
    with (
        undisturbed(model),
        pytest.raises(CaptureError, match=r"failed in norm, in eval mode .*last operator that worked"),
    ):
        capture(model, X)


def test_a_capture_that_is_stopped_leaves_nothing_either() -> None:
    model = Messy()

    def stop(trace: Trace, call: Call) -> None:
        if call.name == "aten::sum":
            raise Divergence("enough")

    with undisturbed(model), pytest.raises(Divergence, match="enough"):
        capture(model, X, observer=stop)


def test_an_interrupt_leaves_nothing_either() -> None:
    model = Messy()

    def interrupt(trace: Trace, call: Call) -> None:
        raise KeyboardInterrupt

    with undisturbed(model), pytest.raises(KeyboardInterrupt):
        capture(model, X, observer=interrupt)


def test_reading_of_constants_does_not_change_them() -> None:
    model = Messy()
    before = model.counter.clone(), model.constant.clone()
    capture(model, X)
    assert torch.equal(model.counter, before[0])
    assert torch.equal(model.constant, before[1])
    assert not isinstance(model.counter, FakeTensor)


# --- Whatever Python it is written in --------------------------------------------------------------------------------


class DropsLayers(nn.Module):
    """Stochastic depth by Python's and NumPy's generators."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if random.random() < 0.5 or np.random.rand() < 0.2:
                x = layer(x)
        return x


def test_code_that_draws_numbers_does_the_same_in_every_capture() -> None:
    model = DropsLayers()
    with undisturbed(model):
        assert names(capture(model, X)) == names(capture(model, X))


def test_printing_works(capsys: pytest.CaptureFixture[str]) -> None:
    class Prints(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            print("input", x.shape, x.mean())
            return super().forward(x)

    assert names(capture(Prints(6, 2), X)) == ["mean", "t", "addmm"]
    assert "FakeTensor" in capsys.readouterr().out


def test_hooks_can_be_removed_after_a_capture() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    for _ in range(3):
        model.register_forward_hook(lambda *_: None).remove()  # what comes next lies further back in memory
    hooks = [model.register_forward_hook(lambda *_: None) for _ in range(2)]
    espalier.attach(model, torch.zeros(2, 4))
    for hook in hooks:
        hook.remove()
    assert list(model._forward_hooks.items()) == []


def test_hooks_run_since_they_can_be_part_of_the_computation() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    seen: list[Any] = []
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[1].register_forward_hook(lambda module, args, result: result + 1)
    handle = model.register_forward_hook(lambda module, args, result: seen.append(result))
    with undisturbed(model):
        trace = capture(model, X)
    assert names(trace) == ["mul", "t", "addmm", "relu", "add"]
    assert [call.modules[-1] for call in trace.calls] == ["0", "0", "0", "1", "1"]
    assert len(seen) == 1
    handle.remove()


def test_modules_called_twice_are_two_calls_of_one_parameter() -> None:
    model, example = ZOO["shared_module"]()
    trace = capture(model, example)
    weight = trace.tensors["block.0.weight"]
    transposed = [call.outputs[0] for call in trace.calls if weight in call.args]
    used = [call for call in trace.calls if set(call.args) & set(transposed)]
    assert len(used) == 2
    assert {call.modules for call in used} == {("", "block", "block.0")}


def test_a_module_under_two_names_has_the_first() -> None:
    layer = nn.Linear(6, 6)
    trace = capture(nn.ModuleDict({"a": nn.Sequential(layer, layer)})["a"], X)
    assert {call.modules[-1] for call in trace.calls} == {"0"}
    table = tensor_table(nn.Sequential(layer, layer))
    assert set(table.tensors) == {"0.weight", "0.bias"}


def test_tied_parameters_are_one() -> None:
    model, example = ZOO["tied_embeddings"]()
    table = tensor_table(model)
    assert table.aliases == {"head.weight": "embedding.weight"}
    assert [key for _, key, _ in table.places["embedding.weight"]] == ["weight", "weight"]
    trace = capture(model, example)
    uses = [call.name for call in trace.calls if trace.tensors["embedding.weight"] in call.args]
    assert uses == ["aten::embedding", "aten::t"]


PARAMETRIZED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
    "spectral_norm": lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)),
    "spectral_norm_by_hook": lambda: torch.nn.utils.spectral_norm(nn.Linear(6, 5)),
    "pruned": lambda: torch.nn.utils.prune.random_unstructured(nn.Linear(6, 5), "weight", 0.5),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrized_layers(name: str, training: bool) -> None:
    model = nn.Sequential(PARAMETRIZED[name](), nn.Linear(5, 2))
    with undisturbed(model):
        trace = capture(model, X, training=training)
    read = {key for key in trace.tensors if key.startswith("0.") and "bias" not in key}
    assert read
    assert read == {key for key in tensor_table(model).tensors if key.startswith("0.") and "bias" not in key}
    topology = infer(model, X)
    assert topology.unknown == {}
    (record,) = (record for record in topology.axes.values() if ("1.weight", 1) in {slot[:2] for slot in record.slots})
    assert not record.reasons


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weight_norm_by_hook_keeps_its_weight() -> None:
    layer, x = torch.nn.utils.weight_norm(nn.Conv1d(6, 5, 3)), torch.randn(2, 6, 8)
    weight = layer.weight
    with undisturbed(layer):
        trace = capture(layer, x)
    assert layer.weight is weight
    assert set(trace.tensors) == {"weight_g", "weight_v", "bias"}


def test_lstm_reads_all_its_weights() -> None:
    model, x = nn.LSTM(6, 5, num_layers=2, batch_first=True), torch.randn(2, 3, 6)
    flat = list(model._flat_weights)
    with undisturbed(model):
        trace = capture(model, x)
    assert set(trace.tensors) == set(dict(model.named_parameters()))
    assert all(a is b for a, b in zip(flat, model._flat_weights, strict=True))


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        example = torch.empty(4, 6)
    with undisturbed(model):
        topology = infer(model, example)
    assert [record.name for record in topology.axes.values() if not record.reasons] == ["0"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    model, example = ZOO["vit"]()
    model, example = model.to(dtype), map_tensors(example, lambda x: x.to(dtype))
    trace = capture(model, example)
    assert {trace.dtypes[ref.index] for ref in trace.outputs.values()} == {dtype}


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "nothing": nullcontext,
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", AROUND)
def test_what_is_around_or_inside_changes_no_axis(name: str, inside: bool) -> None:
    """The caller's or the forward's own grad mode, inference mode or autocast."""

    class Inside(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any) -> Any:
            with AROUND[name]():
                return self.model(*args)

    model, example = ZOO["vit"]()
    expected = infer(Inside(model) if inside else model, example)
    wrapped = Inside(model)
    with undisturbed(model):
        if inside:
            found = infer(wrapped, example)
        else:
            with AROUND[name]():
                found = infer(model, example)
    assert found.unknown == {}

    def summary(topology: Any) -> list[Any]:
        return [
            (record.name, sorted({reason.kind for reason in record.reasons}), record.slots)
            for record in topology.axes.values()
        ]

    assert summary(found) == summary(expected)


def test_inference_mode_records_the_same_operators() -> None:
    model, example = ZOO["llama_by_hand"]()
    expected = names(capture(model, example))
    with torch.inference_mode():
        assert names(capture(model, example)) == expected


# --- Inputs and outputs ----------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Batch:
    left: Tensor
    right: Tensor
    label: str = "some"


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, left: Any, right: Any = None) -> Any:
        if isinstance(left, (Pair, Batch)):
            assert type(left) in (Pair, Batch)
            left, right = left.left, left.right
        elif isinstance(left, dict):
            left, right = left["left"], left["right"]
        return self.layer(left + right)


@pytest.mark.parametrize(
    ("example", "paths"),
    [
        ((X, X + 1), ["input 0", "input 1"]),
        ([X, X + 1], ["input 0", "input 1"]),
        ({"left": X, "right": X + 1}, ["input 'left'", "input 'right'"]),
        (({"left": X, "right": X + 1},), ["the input.left", "the input.right"]),
        ((Pair(X, X + 1),), ["the input[0]", "the input[1]"]),
        ((Batch(X, X + 1),), ["the input.left", "the input.right"]),
        ({"left": Batch(X, X + 1)}, ["input 'left'.left", "input 'left'.right"]),
    ],
)
def test_inputs_of_every_form(example: Any, paths: list[str]) -> None:
    trace = capture(Adds(), example)
    assert list(trace.inputs) == paths
    assert names(trace) == ["add", "t", "addmm"]
    assert trace.calls[0].args == tuple(trace.inputs.values())


def test_one_tensor_given_twice_is_one_value() -> None:
    trace = capture(Adds(), (X, X))
    assert trace.inputs["input 0"] == trace.inputs["input 1"]


@dataclass
class Result:
    logits: Tensor
    extra: Any = None


class Plain:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.number = 3


@pytest.mark.parametrize(
    ("form", "paths"),
    [
        (lambda y: y, ["output"]),
        (lambda y: (y, [y + 1]), ["output[0]", "output[1][0]"]),
        (lambda y: {"logits": y, "other": None}, ["output.logits"]),
        (lambda y: Pair(y, None), ["output[0]"]),
        (lambda y: Result(y, {"more": y * 2}), ["output.logits", "output.extra.more"]),
        (lambda y: Plain(y), ["output.logits"]),
    ],
)
def test_outputs_of_every_form_are_frozen(form: Callable[[Tensor], Any], paths: list[str]) -> None:
    class Returns(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return form(super().forward(x))

    model = Returns(6, 3)
    assert list(capture(model, X).outputs) == paths
    (record,) = (
        record for record in infer(model, X).axes.values() if ("weight", 0) in {slot[:2] for slot in record.slots}
    )
    assert {reason.kind for reason in record.reasons} == {"output"}


def test_outputs_of_hugging_face_models() -> None:
    model, example = ZOO["hf_bert"]()
    assert list(capture(model, example).outputs) == ["output.logits"]


@pytest.mark.parametrize("result", [None, 3.0, "text", []])
def test_a_model_that_returns_no_tensor_is_refused(result: Any) -> None:
    class Returns(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            super().forward(x)
            return result

    with pytest.raises(CaptureError, match=f"returned no tensor in eval mode, but {type(result).__name__}"):
        capture(Returns(6, 3), X)


# --- Values ----------------------------------------------------------------------------------------------------------


def test_numbers_in_parameters_buffers_and_constants_can_be_read() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.register_buffer("steps", torch.tensor(3))
            self.other = torch.tensor([4.0])

        def forward(self, x: Tensor) -> Tensor:
            if self.scale > 1 and bool(self.other > 1):
                raise AssertionError
            return x * self.scale.item() * int(self.steps) * self.other.item()

    with pytest.raises(CaptureError, match="do not depend on the values in tensors"):
        capture(Reads(), X)

    class ReadsOnly(Reads):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.item() * int(self.steps) * self.other.item()

    trace = capture(ReadsOnly(), X)
    assert [call.args[1] for call in trace.calls] == [2.0, 3, 4.0]


@pytest.mark.parametrize(
    "decide",
    [
        lambda x: x if x.mean() > 0 else -x,
        lambda x: x * x.max().item(),
        lambda x: x[x > 0],
        lambda x: x[x.argmax().tolist() :],
        lambda x: x.nonzero(),
    ],
)
def test_a_forward_that_depends_on_values_is_refused_with_the_reason(decide: Callable[[Tensor], Tensor]) -> None:
    class Decides(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return decide(super().forward(x))

    with pytest.raises(CaptureError, match=r"Keep \.item\(\), bool\(tensor\), nonzero\(\) and x\[mask\] out of"):
        capture(Decides(6, 6), X)


def test_shapes_that_are_not_there_yet() -> None:
    """A planned edit is tried out by other shapes for some tensors."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with undisturbed(model):
        trace = capture(model, X, shapes={"0.weight": (9, 6), "0.bias": (9,), "2.weight": (2, 9)})
    assert trace.shapes[trace.tensors["0.weight"].index] == (9, 6)
    assert (4, 9) in trace.shapes
    with pytest.raises(CaptureError, match="failed in 2"):
        capture(model, X, shapes={"0.weight": (9, 6), "0.bias": (9,)})


def test_parameters_stay_parameters_for_the_code() -> None:
    class Asks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.weight, nn.Parameter)
            assert not isinstance(x, nn.Parameter)
            assert dict(self.named_parameters()).keys() == {"weight", "bias"}
            return super().forward(x)

    assert capture(Asks(6, 2), X).calls


def test_a_tensor_turned_in_place_is_another_value() -> None:
    class Turns(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x.unsqueeze_(1).transpose_(0, 2).squeeze_(1)

    trace = capture(Turns(6, 4), X)
    (result,) = trace.outputs.values()
    assert [trace.shapes[call.outputs[0].index] for call in trace.calls if call.outputs[0]] == [
        (6, 4), (4, 4), (4, 1, 4), (4, 1, 4), (4, 4)
    ]  # fmt: skip
    assert trace.calls[-1].outputs[0] == result
    assert len({call.outputs[0] for call in trace.calls}) == len(trace.calls)


def test_an_operator_in_place_keeps_its_value() -> None:
    trace = capture(nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True)), X)
    assert names(trace) == ["t", "addmm", "relu_"]
    assert trace.calls[1].outputs == trace.calls[2].outputs


# --- What a call knows -----------------------------------------------------------------------------------------------


def test_calls_know_where_they_ran() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).sin()

    trace = capture(nn.Sequential(Block(), nn.ReLU()), X)
    t, addmm, sin, relu = trace.calls
    assert addmm.modules == ("", "0", "0.inner")
    assert sin.modules == ("", "0")
    assert addmm.frame[0] == sin.frame[0] == __file__
    assert sin.where == f"in 0 (test_capture.py:{sin.frame[1]}, sin)"
    assert relu.where.startswith("in 1 (")
    assert "capture.py" not in relu.where
    assert t.arguments() == {"self": trace.tensors["0.inner.weight"]}
    assert addmm.arguments()["beta"] == addmm.arguments()["alpha"] == 1
    assert isinstance(addmm.arguments()["mat1"], Ref)


def test_code_without_modules_is_in_the_model_itself() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cos()

    (call,) = capture(Bare(), X).calls
    assert call.where == f"in the model itself (test_capture.py:{call.frame[1]}, cos)"


def test_networks_of_this_package_are_named_by_their_own_lines() -> None:
    trace = capture(build("resnet20", (3, 32, 32), 10), torch.randn(2, 3, 32, 32))
    assert {Path(call.frame[0]).name for call in trace.calls} == {"models.py"}


def test_whether_the_mode_matters() -> None:
    assert not capture(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()), X).mode_matters
    assert capture(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), X).mode_matters


def test_auxiliary_heads_of_train_mode_are_seen() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.aux = nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Any:
            x = self.body(x)
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    model = Auxiliary()
    assert "aux.weight" not in capture(model, X).tensors
    assert "aux.weight" in capture(model, X, training=True).tensors
    topology = infer(model, X)
    assert ("aux.weight", 1) in {slot[:2] for slot in topology.by_name["body"].slots}


# --- Time ------------------------------------------------------------------------------------------------------------


def test_attach_takes_at_most_four_plain_forwards_on_fake_tensors() -> None:
    """On ResNet-50 at 224 x 224; processor time, the smallest of some runs."""
    model, image = ResNet50().eval(), torch.randn(1, 3, 224, 224)
    mode = FakeTensorMode()
    fake = ResNet50().eval()
    with mode:
        for module in fake.modules():
            for store in (module._parameters, module._buffers):
                for key, one in store.items():
                    store[key] = None if one is None else torch.empty(one.shape, dtype=one.dtype)
        fake_image = torch.empty(1, 3, 224, 224)

    def forward() -> None:
        with mode, torch.no_grad():
            fake(fake_image)

    def seconds(function: Callable[[], Any]) -> float:
        start = time.process_time()
        function()
        return time.process_time() - start

    plain, attach = (
        min(seconds(function) for _ in range(5)) for function in (forward, lambda: espalier.attach(model, image))
    )
    assert attach <= 4 * plain
