"""Edits need no second copy of the network: memory holds one tensor twice at most; failures are put back even so."""

import gc
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from effort import NIGHTLY
from hypothesis import given
from snapshots import differences, snapshot
from test_rollback import Net, X, plan_for
from torch import Tensor, nn
from torch.optim import Adafactor, AdamW
from training import loss_of, train

from espalier.attaching import attach
from espalier.edit import apply
from espalier.edit.journal import Journal
from espalier.edit.tensors import gather, left_out
from espalier.errors import PlanError, SurgeryError
from espalier.structure import Structure


def frugal(make: Callable[..., torch.optim.Optimizer] = AdamW, **options: Any) -> Structure:
    """A trained network with gradients and state, and a copy that follows; nothing can be undone."""
    torch.manual_seed(0)
    model = Net().to(memory_format=torch.channels_last)
    optimizer = make(model.parameters(), lr=1e-3, **options)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    train(model, X, optimizer, 2)
    structure = attach(model, X, optimizer=optimizer, follow=[average], undo_limit=0)
    loss_of(model, X).backward()
    return structure


def everything(structure: Structure) -> dict[str, Any]:
    found = snapshot(structure.model, structure.optimizer, structure)
    copies = {
        f"copy {place}": value for module in structure.surgery.follow for place, value in snapshot(module).items()
    }
    return {**found, **copies}


# --- What an edit leaves out -----------------------------------------------------------------------------------------


@st.composite
def edits(draw: st.DrawFn) -> tuple[Tensor, list[np.ndarray | None]]:
    """A tensor in some memory layout, and for every dimension which old positions the new ones are, if it changes."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    count = int(np.prod(shape))
    plain = torch.arange(1, count + 1).to(dtype).reshape([shape[dim] for dim in order])
    tensor = plain.permute([order.index(dim) for dim in range(len(shape))])
    sources: list[np.ndarray | None] = []
    for size in shape:
        kept = draw(st.lists(st.integers(0, size - 1), unique=True))
        new = draw(st.integers(0, 2))
        source = draw(st.permutations([*kept, *[-1] * new]))
        sources.append(draw(st.sampled_from([None, np.array(source, dtype=np.int64)])))
    return tensor, sources


@given(edits())
def test_what_is_kept_and_what_is_left_out_are_the_whole_tensor(edit):
    tensor, sources = edit
    before = tensor.clone()
    new = gather(tensor, sources, 77)
    rest = left_out(tensor, new, sources)
    assert rest is not None
    kept = sum(1 for value in new.flatten().tolist() if value != 77 and value in before.flatten().tolist())
    assert sum(piece.numel() for piece in rest.pieces if piece is not None) <= max(0, before.numel() - kept + 1)
    again = rest.rejoined(new)
    assert torch.equal(again, before)
    assert again.stride() == tensor.stride()
    assert again.dtype == tensor.dtype


def test_a_tensor_that_is_part_of_a_larger_one_is_not_taken_apart():
    base, half = torch.randn(8, 4), np.array([0, 1], dtype=np.int64)
    part = base[:4]
    assert left_out(part, gather(part, [half, None], 0.0), [half, None]) is None
    strided = torch.randn(4, 8)[:, ::2]
    assert left_out(strided, gather(strided, [half, None], 0.0), [half, None]) is None
    assert left_out(base, torch.zeros(5, 4), [half, None]) is None


# --- Memory ----------------------------------------------------------------------------------------------------------


def bytes_alive() -> int:
    """Of all tensors that Python knows, each memory once."""
    found = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter) and one.device.type == "cpu"]
    storages = [one.untyped_storage() for one in found if one.layout is torch.strided]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def peak_of(structure: Structure, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """The most that is alive beyond what was before, looked at after every replacement."""
    right, most = Journal.replace_tensor, 0
    before = bytes_alive()

    def noted(self: Journal, *args: Any) -> None:
        nonlocal most
        right(self, *args)
        most = max(most, bytes_alive() - before)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "replace_tensor", noted)
        action()
    return most


@pytest.mark.parametrize("undo_limit", [0, 1])
def test_memory_holds_one_tensor_twice_and_no_more(undo_limit, monkeypatch):
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))])
    model = nn.Sequential(nn.Linear(4, 64), model, nn.Linear(64, 2))
    structure = attach(model, torch.zeros(2, 4), undo_limit=undo_limit)
    units = {name: range(0, 256, 4) for name, axis in structure.axes.items() if axis.size == 256}
    assert len(units) == 6
    largest = max(one.numel() * one.element_size() for one in model.parameters())
    gc.collect()
    gc.disable()  # what only the collector would free, at some time, counts as held
    try:
        before = bytes_alive()
        most = peak_of(structure, lambda: structure.prune(units), monkeypatch)
        assert most < 1.3 * largest
        removed = sum(one.numel() * one.element_size() for one in model.parameters()) // 3
        assert bytes_alive() < before + (0.1 * largest if undo_limit else -0.9 * removed)
    finally:
        gc.enable()


def test_the_measure_of_memory_can_fail(monkeypatch):
    monkeypatch.setattr(Journal, "forget", lambda *_: None)
    with pytest.raises(AssertionError):
        test_memory_holds_one_tensor_twice_and_no_more(1, monkeypatch)


# --- Failures --------------------------------------------------------------------------------------------------------

OPTIMIZERS = [(AdamW, {"fused": True}), (AdamW, {"amsgrad": True}), (Adafactor, {})]


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS)
@pytest.mark.parametrize("method", ["replace_tensor", "replace_state", "set_attribute", "forget"])
def test_a_failure_at_every_change_puts_everything_back(make, options, method, monkeypatch):
    structure = frugal(make, **options)
    before, right = everything(structure), getattr(Journal, method)
    plan, number = plan_for(structure), -2
    while True:
        number, calls = number + (1 if NIGHTLY else 3), 0

        def fails(self: Journal, *args: Any) -> None:
            nonlocal calls
            right(self, *args)
            calls += 1
            if calls == number:  # noqa: B023 - it is called within this turn only
                raise MemoryError("no room")

        monkeypatch.setattr(Journal, method, fails)
        try:
            structure.apply(plan)
        except SurgeryError as error:
            assert "rolled back" in str(error)  # noqa: PT017 - the last turn does not raise
        else:
            break
        assert differences(before, everything(structure)) == [], number
    assert number > 8
    assert structure.history[-1].plan == plan
    train(structure.model, X, structure.optimizer, 2)


def test_a_graph_from_before_a_failed_edit_still_runs_backward(monkeypatch):
    structure = frugal()
    model = structure.model.eval()
    model.zero_grad()
    loss = loss_of(model, X)
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    with monkeypatch.context() as patch:
        patch.setattr(apply, "check_shapes", lambda *_: 1 / 0)
        with pytest.raises(SurgeryError):
            structure.apply(plan_for(structure))
    loss.backward()
    for old, parameter in zip(expected, model.parameters(), strict=True):
        assert torch.equal(old, parameter.grad)


def test_the_edit_itself_is_the_same():
    results = []
    for undo_limit in (0, 3):
        structure = frugal()
        again = attach(structure.model, X, optimizer=structure.optimizer, undo_limit=undo_limit)
        again.apply(plan_for(again))
        results.append(snapshot(again.model, again.optimizer))
    values = [{place: value[2:] for place, value in one.items() if place.endswith("weight")} for one in results]
    assert len(values[0]) == 7
    assert values[0] == values[1]


def test_there_is_nothing_to_undo():
    structure = frugal()
    structure.apply(plan_for(structure))
    with pytest.raises(SurgeryError, match=r"nothing to undo.*undo_limit above 0"):
        structure.undo()


@pytest.mark.parametrize("undo_limit", [-1, 1.5, True, None])
def test_limits_that_make_no_sense(undo_limit):
    with pytest.raises(PlanError, match="undo_limit: expected a number of edits of at least 0, found"):
        attach(Net(), X, undo_limit=undo_limit)


# --- Undo ------------------------------------------------------------------------------------------------------------


def undoable() -> Structure:
    structure = frugal()
    return attach(structure.model, X, optimizer=structure.optimizer)


def test_undo_gives_back_gradients_and_statistics_that_passes_changed_since():
    structure = undoable()
    before = snapshot(structure.model, structure.optimizer)
    structure.apply(plan_for(structure))
    loss_of(structure.model, X).backward()
    structure.model.one.weight.grad = None
    structure.undo()
    places = differences(before, snapshot(structure.model, structure.optimizer))
    # what the edit did not touch is not its own to give back
    untouched = {"bn.num_batches_tracked", "out.weight gradient", "out.bias gradient", "two.bias gradient"}
    assert set(places) <= untouched | {"mix.bias gradient"}, places


def test_undo_notices_what_goes_past_autograd():
    structure = undoable()
    structure.apply(plan_for(structure))
    weight = structure.model.one.weight
    old = weight.data[0, 0].clone()
    weight.data[0, 0] += 1
    with pytest.raises(SurgeryError, match=r"cannot be undone: parameter one\.weight was changed since then"):
        structure.undo()
    weight.data[0, 0] = old
    structure.undo()
