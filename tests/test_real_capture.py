"""Where values decide what runs or how large it is, networks are read on real values, and nothing of that remains."""

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import outputs, relative_error
from rule_cases import VALUES, Case
from snapshots import differences, snapshot
from test_rules import Function, results
from torch import Tensor, nn

import espalier
from espalier.edit.plan import Plan, Resize
from espalier.errors import CaptureError, EspalierError, PlanError
from espalier.graph.capture import capture
from espalier.graph.courses import passes
from espalier.graph.decisions import OnZeros
from espalier.graph.dims import size_of
from espalier.graph.named_tensors import tensor_table
from espalier.graph.rules import rule_for
from espalier.graph.topology import infer
from espalier.graph.values import Deciding, Following, OtherCourseError

TOLERANCE = 1e-9


# --- Networks --------------------------------------------------------------------------------------------------------


class Expert(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Mixture(nn.Module):
    """Experts as modules; those without tokens are skipped."""

    def __init__(self, width: int, inner: int, experts: int, closed: int | None = None) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Expert(width, inner + number) for number in range(experts))
        self.closed = closed

    def chosen(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(flat)
        if self.closed is not None:  # an expert that no router chooses
            scores = scores.index_fill(1, torch.tensor([self.closed]), -torch.inf)
        weights, experts = scores.softmax(-1).topk(2, dim=-1)
        return weights, experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = self.chosen(flat)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(experts == number)
            if token.numel() == 0:
                continue
            result.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return result.reshape(x.shape)


class OverHit(Mixture):
    """As Mixtral was written: a loop over the experts that are hit, indexed by numbers out of tensors."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = self.chosen(flat)
        mask = F.one_hot(experts, num_classes=len(self.experts)).permute(2, 1, 0)
        result = torch.zeros_like(flat)
        for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            place, token = torch.where(mask[hit[0]])
            inner = self.experts[hit[0]](flat[None, token].reshape(-1, x.shape[-1]))
            result.index_add_(0, token, inner * weights[token, place, None])
        return result.reshape(x.shape)


class BySplit(Mixture):
    """Tokens in order of their experts, split by counts that `tolist` gives."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = self.chosen(flat)
        order = experts.flatten().argsort()
        counts = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = (flat.repeat_interleave(2, dim=0)[order]).split(counts)
        done = [expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)]
        joined = torch.cat(done) * weights.flatten()[order, None]
        return torch.zeros_like(flat).index_add(0, order // 2, joined).reshape(x.shape)


class Routed(nn.Module):
    def __init__(self, mixture: type[Mixture], closed: int | None = None) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, 6), nn.LayerNorm(6)
        self.mixture = mixture(6, 7, 4, closed)
        self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.mixture(self.norm(x)))


class Masked(nn.Module):
    """A layer over the rows that a mask chooses; the others pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back, self.head = nn.Linear(5, 6), nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = x.mean(-1) > 0
        x = self.stem(x)
        result = x.clone()
        result[mask] = self.back(self.inner(x[mask]).relu())
        return self.head(result)


class Padded(nn.Module):
    """Tokens without padding, found by nonzero; means of each sequence by index_add."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(9, 6), nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, ids: Tensor) -> Tensor:
        row, place = (ids != 0).nonzero(as_tuple=True)
        x = self.inner(self.table(ids[row, place])).tanh()
        total = x.new_zeros(len(ids), x.shape[1]).index_add(0, row, x)
        return self.head(total / torch.bincount(row, minlength=len(ids))[:, None])


class Halting(nn.Module):
    """Repeats a block until the values say stop, and asks the values for a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.small, self.large = Expert(5, 8), nn.Linear(5, 4), nn.Linear(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + self.block(x)
            if bool(x.abs().max() > 3):
                break
        return self.head(self.small(x) if x.mean().item() < 0.3 else self.large(x))


class Standardised(nn.Module):
    """Running statistics and counters beside values that decide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.drop, self.head = (
            nn.Linear(5, 6),
            nn.BatchNorm1d(6),
            nn.Dropout(0.3),
            nn.Linear(6, 2),
        )
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        kept = x.sum(-1) > -100
        x = self.drop(self.norm(self.stem(x)))
        self.seen += 1
        self.average.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.head(x[kept])


def ids() -> Tensor:
    return torch.tensor([[3, 4, 5, 0, 0], [1, 2, 0, 0, 0], [8, 7, 6, 5, 1]])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mixture": (lambda: Routed(Mixture), lambda: torch.randn(3, 4, 5)),
    "over hit": (lambda: Routed(OverHit), lambda: torch.randn(3, 4, 5)),
    "by split": (lambda: Routed(BySplit), lambda: torch.randn(3, 4, 5)),
    "masked": (Masked, lambda: torch.randn(8, 5)),
    "padded": (Padded, ids),
    "halting": (Halting, lambda: torch.randn(4, 5)),
    "standardised": (Standardised, lambda: torch.randn(8, 5)),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    make, example = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = make().double(), example()
    return model, x.double() if x.is_floating_point() else x


def others(x: Tensor) -> list[Tensor]:
    """The example and inputs with other values, which may take other courses."""
    generator = torch.Generator().manual_seed(1)
    if not x.is_floating_point():
        return [x, x.flip(0), x.roll(1, 1)]
    return [x, *(torch.randn(x.shape, generator=generator, dtype=x.dtype) * scale for scale in (0.3, 1.0, 3.0))]


# --- What is read ----------------------------------------------------------------------------------------------------

MAY_CHANGE = {
    "mixture": {"stem", "head.0", *(f"mixture.experts.{number}.up" for number in range(4))},
    "over hit": {"stem", "head.0", *(f"mixture.experts.{number}.up" for number in range(4))},
    "by split": {"stem", "head.0", *(f"mixture.experts.{number}.up" for number in range(4))},
    "masked": {"stem", "inner"},
    "padded": {"table", "inner"},
    "halting": {"block.up", "small"},
    "standardised": {"stem"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_widths_are_axes_whatever_values_decide(name: str) -> None:
    model, x = built(name)
    with pytest.raises(CaptureError, match="do not depend on the values in tensors"):
        capture(model, x)
    structure = espalier.attach(model, x)
    assert {axis for axis, what in structure.axes.items() if what.reason is None} == MAY_CHANGE[name]
    assert dict(structure.topology.unknown) == {}
    assert "recorded on real values" in str(structure)
    assert "test_real_capture.py:" in "".join(structure.topology.notes)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_read(name: str) -> None:
    model, x = built(name)
    topology = infer(model, x)
    assert {name for one in topology.predictions for name in one.tensors} >= dict(model.named_parameters()).keys()


# --- Edits -----------------------------------------------------------------------------------------------------------


def all_outputs(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([outputs(model, one, train=False, seed=0).flatten() for one in others(x)])


@pytest.mark.parametrize("name", NETWORKS)
def test_growing_is_exact_on_every_course(name: str) -> None:
    model, x = built(name)
    structure = espalier.attach(model, x)
    expected = all_outputs(model, x)
    for axis in MAY_CHANGE[name]:
        edit = structure.grow(axis, by=3)
        assert edit.contract == "exact", edit
        assert relative_error(all_outputs(model, x), expected) < TOLERANCE, axis
    before = snapshot(model, None, structure)
    assert {axis for axis, what in structure.axes.items() if what.reason is None} == MAY_CHANGE[name]
    assert differences(before, snapshot(model, None, structure)) == []


@pytest.mark.parametrize("name", NETWORKS)
def test_zeroed_units_can_be_removed(name: str) -> None:
    model, x = built(name)
    structure = espalier.attach(model, x)
    removed = 0
    for axis in MAY_CHANGE[name]:
        units = [0, structure.axes[axis].size - 1]
        state = copy.deepcopy(model.state_dict())
        for slot in structure.axes[axis].slots:
            if slot.role == "contract":
                tensor = model.get_parameter(slot.tensor)
                with torch.no_grad():
                    tensor.index_fill_(slot.dim, torch.tensor(slot.index(units)), 0.0)
        expected = all_outputs(model, x)
        edit = structure.prune(axis, units)
        if edit.contract == "exact":
            removed += 1
            assert relative_error(all_outputs(model, x), expected) < TOLERANCE, axis
        structure.undo()
        model.load_state_dict(state)
    assert removed


@pytest.mark.parametrize("name", NETWORKS)
def test_several_axes_at_once_and_training_on(name: str) -> None:
    model, x = built(name)
    optimizer = torch.optim.AdamW(model.parameters())
    structure = espalier.attach(model, x, optimizer=optimizer)
    structure.grow(dict.fromkeys(MAY_CHANGE[name], 2))
    structure.prune({axis: [0, 2] for axis in MAY_CHANGE[name]})
    for one in others(x):
        model.train()(one).square().mean().backward()
        optimizer.step()
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def test_where_an_edit_leaves_single_units_the_courses_are_taken_again() -> None:
    model, x = built("mixture")
    structure = espalier.attach(model, x)
    structure.prune("mixture.experts.1.up", list(range(1, 8)))
    structure.prune("head.0", list(range(1, 8)))
    assert model.mixture.experts[1].up.weight.shape == (1, 6)
    assert model(x).shape == (3, 4, 3)
    structure.grow("mixture.experts.1.up", by=2)
    assert model(x).shape == (3, 4, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpoints_load_into_a_model_whose_values_take_another_course(name: str, tmp_path: Path) -> None:
    model, x = built(name)
    structure = espalier.attach(model, x)
    structure.grow(dict.fromkeys(MAY_CHANGE[name], 2))
    espalier.save(structure, tmp_path / "checkpoint")
    torch.manual_seed(7)
    fresh = NETWORKS[name][0]().double()
    espalier.load(tmp_path / "checkpoint", fresh, others(x)[-1])
    assert torch.equal(all_outputs(fresh, x), all_outputs(model, x))


# --- Courses that the example does not take ---------------------------------------------------------------------------


def test_an_expert_that_no_example_is_sent_to_is_read_by_sending_it_everything() -> None:
    torch.manual_seed(0)
    model, x = Routed(Mixture, closed=2), torch.randn(3, 4, 5)
    structure = espalier.attach(model, x)
    assert structure.axes["mixture.experts.2.up"].reason is None
    assert ("mixture.experts.2.up.weight", 1) in {(slot.tensor, slot.dim) for slot in structure.axes["stem"].slots}
    structure.grow("stem", by=2)
    assert model.mixture.experts[2].up.weight.shape == (9, 8)


class Unreachable(Mixture):
    """An expert that is asked only if an input is larger than any that is drawn."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.experts[0](x)
        if bool(x.max() > 1e6):
            y = self.experts[1](y)
        return y


def test_what_might_reach_parameters_that_no_course_reads_is_held() -> None:
    torch.manual_seed(0)
    model, x = Routed(Unreachable), torch.randn(3, 4, 5)
    axes = espalier.attach(model, x).axes
    assert {axis for axis, what in axes.items() if what.reason is None} == {"mixture.experts.0.up", "head.0"}
    assert "might reach mixture.experts.1.up in mixture" in axes["stem"].reason


def test_unread_parameters_hold_nothing_else_where_no_values_decide() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    model[0].register_parameter("spare", nn.Parameter(torch.zeros(6)))
    assert espalier.attach(model, torch.randn(2, 5)).axes["0"].reason is None


# --- Nothing remains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_left_changed(name: str) -> None:
    model, x = built(name)
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before, given = snapshot(model, None), x.clone()
    versions = [tensor._version for tensor in (*model.parameters(), *model.buffers(), x)]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    structure = espalier.attach(model, x)
    structure.check(Plan((Resize(next(iter(MAY_CHANGE[name])), add=1),)))
    assert differences(before, snapshot(model, None)) == []
    assert versions == [tensor._version for tensor in (*model.parameters(), *model.buffers(), x)]
    assert torch.equal(x, given)
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert [module.training for module in model.modules()] == [n % 2 == 0 for n, _ in enumerate(model.modules())]


def test_what_is_written_through_a_view_is_a_copy() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 3))
            self.plain = torch.zeros(3)

        def forward(self, x: Tensor) -> Tensor:
            self.weight.t()[0].mul_(5.0)
            self.plain.add_(1.0)
            x.add_(1.0)
            assert self.weight[0, 0].item() == 5.0
            assert self.weight[0, 1].item() == 1.0
            assert self.plain.sum().item() == 3.0
            assert bool((x == 1.0).all())
            return x @ self.weight + self.plain

    model, x = Writes(), torch.zeros(2, 4)
    trace, *_ = passes(model, x, tensor_table(model), {}).traces
    assert trace.decisions
    assert model.weight.eq(1).all()
    assert model.weight._version == x._version == 0
    assert not model.plain.any()
    assert not x.any()


# --- Decisions -------------------------------------------------------------------------------------------------------


def test_numbers_that_follow_from_sizes_are_computed_anew() -> None:
    """Else a scale would be held at the old size, and the edit called exact."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return self.head(x * torch.ones_like(x[0]).sum().item())

    model, x = Scaled(), torch.randn(4, 5)
    structure = espalier.attach(model, x)
    assert structure.topology.predictions[0].decisions == ()
    shapes = {"inner.weight": (8, 5), "inner.bias": (8,), "head.weight": (2, 8)}
    trace = capture(model, x, shapes=shapes, evaluator=Following([]))
    assert [call.args[1] for call in trace.calls if call.name == "aten::mul"] == [8.0]
    assert structure.grow("inner", by=2).contract == "changing"


def test_a_stale_number_for_a_size_is_refused() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 3
            self.qkv, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.heads + int(x.sum().item() > 1e6)
            return self.head(self.qkv(x).view(len(x), heads, -1).softmax(1).flatten(1))

    model, x = Views(), torch.randn(4, 5)
    structure = espalier.attach(model, x)
    structure.grow("qkv:1", by=1)
    with torch.no_grad():
        assert model(x).shape == (4, 2)
    edit = structure.grow("qkv:0", by=1)
    assert model.heads == 4
    assert [str(change) for change in edit.attributes if change.path == ("heads",)] == ["model.heads: 3 -> 4"]


def test_another_course_after_an_edit_is_refused() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            if x.shape[1] > 6 and bool(x.sum() > 0):
                x = x.roll(1, 1)
            return self.head(x[x.sum(1) > -1e6])

    model, x = Branches(), torch.randn(4, 5)
    structure = espalier.attach(model, x)
    with pytest.raises(PlanError, match=r"inner .* cannot change: .*test_real_capture\.py:.* expected aten::"):
        structure.grow("inner", by=1)
    assert model.inner.weight.shape == (6, 5)


def test_decisions_are_taken_again_in_their_places_only() -> None:
    model, x = built("masked")
    table = tensor_table(model)
    deciding = Deciding()
    trace = capture(model, x, table=table, evaluator=deciding)
    again = capture(model, x, table=table, evaluator=Following(deciding.decisions))
    assert [call.op for call in again.calls] == [call.op for call in trace.calls]
    assert again.shapes == trace.shapes
    assert trace.shapes[trace.calls[-1].args[1].index][0] > 0
    with pytest.raises(CaptureError) as problem:
        capture(model, x, table=table, evaluator=Following(deciding.decisions[1:]))
    assert isinstance(problem.value.__cause__, OtherCourseError)


# --- Operators without a rule for fake tensors -----------------------------------------------------------------------


class Grouped(nn.Module):
    """Experts in one tensor; the operator's rule for fake tensors wants another type than its kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 8)), nn.Parameter(torch.randn(4, 8, 16))
        self.gate, self.head = nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.gate(x).softmax(-1).max(-1)
        experts, order = experts.sort()
        ends = torch.histc(experts.float(), bins=4, min=0, max=3).cumsum(0, dtype=torch.int32)
        inner = F.grouped_mm(x[order], self.up.transpose(-2, -1), offs=ends).relu()
        out = F.grouped_mm(inner, self.down.transpose(-2, -1), offs=ends) * weights[order, None]
        return self.head(torch.zeros_like(out).index_copy(0, order, out))


def test_an_operator_whose_rule_for_fake_tensors_is_wrong_is_run_on_zeros() -> None:
    torch.manual_seed(0)
    model, x = Grouped(), torch.randn(12, 8)
    structure = espalier.attach(model, x)
    decisions = structure.topology.predictions[0].decisions
    assert [type(one.outcome) for one in decisions] == [OnZeros, OnZeros]
    assert any("no rule for fake tensors" in note for note in structure.topology.notes)
    axis = structure.axis("up", 1)
    assert axis.reason is None
    assert axis.size == 4  # blocks of four, since the kernel reads rows of 16 bytes
    expected = model(x)
    edit = structure.grow(axis.name, by=1)
    assert edit.contract == "exact"
    assert model.up.shape == (4, 20, 8)
    assert model.down.shape == (4, 8, 20)
    assert relative_error(model(x), expected) < 1e-5
    assert "offsets" in structure.axis("up", 0).reason


@pytest.mark.parametrize("one", VALUES.values(), ids=VALUES)
def test_rules_of_operators_that_values_steer(one: Case) -> None:
    model = Function(one.function, one.tensors())
    topology = infer(model, ())
    (prediction,) = topology.predictions
    assert all(rule_for(call) is not None for call in prediction.calls)
    assert dict(topology.unknown) == {}
    assert [tuple(size_of(dim, topology.sizes) for dim in prediction.dims[index]) for index in prediction.outputs] == [
        tuple(result.shape) for result in results(one.function, one.tensors())
    ]


@pytest.fixture
def detection_operators() -> Iterator[None]:
    """Those of torchvision, by simple kernels of the same signature where the package is not at hand."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )
    library.impl("nms", lambda dets, scores, threshold: (scores > threshold).nonzero().flatten(), "CPU")
    library.impl("roi_align", lambda x, rois, *_: x[rois[:, 0].long(), :, :2, :2].clone(), "CPU")
    torch.library.register_fake(
        "torchvision::roi_align",
        lambda x, rois, scale, height, width, ratio, aligned: x.new_empty(len(rois), x.shape[1], height, width),
        lib=library,
    )
    yield
    library._destroy()


@pytest.mark.parametrize("threshold", [-100.0, 100.0], ids=["boxes", "no boxes"])
def test_boxes_of_a_detector(detection_operators: None, threshold: float) -> None:
    class Detects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.scores, self.boxes = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 1, 1), nn.Conv2d(6, 4, 1)
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            scores, boxes = self.scores(x).flatten(), self.boxes(x).permute(0, 2, 3, 1).reshape(-1, 4)
            kept = torch.ops.torchvision.nms(boxes, scores, threshold)
            rois = torch.cat([torch.zeros(len(kept), 1), boxes[kept]], dim=1)
            return self.head(torch.ops.torchvision.roi_align(x, rois, 1.0, 2, 2, -1, False))

    torch.manual_seed(0)
    model, x = Detects(), torch.randn(1, 3, 6, 6)
    structure = espalier.attach(model, x)
    assert {axis for axis, what in structure.axes.items() if what.reason is None} == {"body", "head.1"}
    assert dict(structure.topology.unknown) == {}
    assert structure.axis("boxes.weight", 0).reason is not None
    expected = model(x)
    assert (len(expected) > 2) == (threshold < 1)
    for axis in ("body", "head.1"):
        assert structure.grow(axis, by=2).contract == "exact"
    assert relative_error(model(x), expected) < 1e-5


# --- Failures --------------------------------------------------------------------------------------------------------


class Leaves(nn.Module):
    """Code that no recording sees into."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(x.detach().numpy()) * 2.0)


def failing(function: Callable[[Tensor], Any]) -> nn.Module:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return function(x)

    return nn.Sequential(nn.Linear(5, 6), Fails(), nn.Linear(6, 2))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (failing(lambda x: x[x > 1e6].max() * x), r"failed in 1, in eval mode on real values: .*max\(\)"),
        (failing(lambda x: x[:, (x.sum(0) > -1e9).nonzero().flatten() + 100]), "failed in 1, in eval mode .*out of"),
        (nn.Sequential(nn.Linear(5, 6), Leaves(), nn.Linear(6, 2)), "failed in 1, in eval mode"),
    ],
)
def test_failures_name_the_module_and_the_cause(model: nn.Module, text: str) -> None:
    with pytest.raises(CaptureError, match=text):
        espalier.attach(model, torch.randn(4, 5))


def test_values_on_the_meta_device_cannot_decide() -> None:
    model = Masked().to("meta")
    with pytest.raises(CaptureError, match="do not depend on the values in tensors"):
        espalier.attach(model, torch.randn(8, 5, device="meta"))


class Detector(nn.Module):
    """Boxes above a threshold in eval mode; in train mode it asks for targets."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.boxes = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1), nn.Conv2d(6, 4, 1)

    def forward(self, images: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        if self.training and targets is None:
            raise ValueError("targets should not be none when in training mode")
        features = self.body(torch.stack(images)).relu()
        scores, boxes = self.head(features).flatten(2), self.boxes(features).flatten(2)
        found = []
        for score, box in zip(scores, boxes, strict=True):
            kept = torch.where(score.amax(0) > 0)[0]
            found.append({"scores": score[:, kept], "boxes": box[:, kept].t()})
        return found


def test_a_detector_is_read_in_eval_mode() -> None:
    torch.manual_seed(0)
    model, images = Detector().train(), [torch.randn(3, 9, 9), torch.randn(3, 9, 9)]
    structure = espalier.attach(model, (images,))
    assert {axis for axis, what in structure.axes.items() if what.reason is None} == {"body"}
    assert any("only the eval-mode pass is known" in note and "targets" in note for note in structure.topology.notes)
    before = [one["boxes"] for one in model.eval()(images)]
    assert structure.grow("body", by=2).contract == "exact"
    for old, new in zip(before, model(images), strict=True):
        assert relative_error(new["boxes"], old) < 1e-5
    structure.prune("body", [0, 1])
    assert model.body.weight.shape == (6, 3, 3, 3)


def test_a_failure_in_train_mode_is_one_where_no_values_decide() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("targets")
            return x

    with pytest.raises(EspalierError, match="in train mode on fake tensors: ValueError: targets"):
        espalier.attach(nn.Sequential(nn.Linear(5, 6), Asks()), torch.randn(4, 5))
