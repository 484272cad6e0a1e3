"""A failure at any stage of an edit leaves model, optimizer, topology, history and attributes as they were, bit by bit.

Failures are put in everywhere: at every call of a function of the package during an edit, at every tensor, state and
attribute that is replaced, before and after each; ordinary errors, and Ctrl-C, which no `except Exception` catches.
"""

import contextlib
import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from effort import NIGHTLY
from snapshots import Snapshot, differences, snapshot
from torch import Tensor, nn
from torch.optim import AdamW
from training import loss_of, train

from espalier.attaching import attach
from espalier.edit import apply, journal, new_tensors
from espalier.edit.journal import Journal
from espalier.edit.plan import Plan, Resize
from espalier.errors import SurgeryError
from espalier.structure import Structure


class Net(nn.Module):
    """Of everything a little: convolution in channels-last, batch norm, attention by an attribute, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.qkv = nn.Linear(6, 3 * 2 * 3)
        self.mix = nn.Linear(2 * 3, 6)
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.mix(((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))
        x = x + self.two(torch.tanh(self.one(x)))
        return self.out(x.mean(1))


X = torch.zeros(4, 2, 3, 3).normal_(generator=torch.Generator().manual_seed(0))


def trained() -> Structure:
    """With gradients, state, one average of the model that follows, and an earlier edit in the history."""
    torch.manual_seed(0)
    model = Net().to(memory_format=torch.channels_last)
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    train(model, X, optimizer, 2)
    structure = attach(model, X, optimizer=optimizer, follow=[average])
    structure.grow("one", by=1)
    loss_of(model, X).backward()
    return structure


def plan_for(structure: Structure) -> Plan:
    """Of everything: units go and come on one axis, a head comes, units go."""
    heads = next(name for name, axis in structure.axes.items() if name.startswith("qkv") and axis.size == 2)
    return Plan((Resize("conv", remove=(1,), add=2), Resize(heads, add=1), Resize("one", remove=(0, 3))))


def everything(structure: Structure) -> Snapshot:
    """Model, optimizer, structure, and the copy that follows."""
    found = snapshot(structure.model, structure.optimizer, structure)
    copies = {
        f"copy {place}": value for module in structure.surgery.follow for place, value in snapshot(module).items()
    }
    return {**found, **copies}


def assert_nothing_happened(structure: Structure, before: Snapshot) -> None:
    """Bitwise as before; and the next edits work as if nothing had been tried."""
    assert differences(before, everything(structure)) == []
    structure.apply(plan_for(structure))
    structure.undo()
    assert differences(before, everything(structure)) == []


class Injected(Exception):
    pass


# --- At every call of the package ------------------------------------------------------------------------------------


@contextmanager
def profile(hook: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    """Call `hook` at every call and return of a Python function."""
    sys.setprofile(hook)
    try:
        yield
    finally:
        sys.setprofile(None)


def is_ours(frame: FrameType) -> bool:
    """A function of the package; no generator, since closing one that is left over swallows errors."""
    return "/espalier/" in frame.f_code.co_filename and not frame.f_code.co_flags & inspect.CO_GENERATOR


def outside_capture(frame: FrameType) -> bool:
    """Not while an operator is being recorded, which happens thousands of times alike."""
    at: FrameType | None = frame
    while at is not None:
        if at.f_code.co_name in ("entered", "left", "__torch_dispatch__"):
            return False
        at = at.f_back
    return True


Site = tuple[str, int, str]


def call_sites(action: Callable[[], object]) -> dict[Site, list[int]]:
    """Where `action` calls functions of the package: (file, line, function called) -> the numbers of these calls."""
    sites: dict[Site, list[int]] = {}
    count = 0

    def hook(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        if event == "call" and is_ours(frame) and outside_capture(frame):
            count += 1
            caller = frame.f_back
            site = (caller.f_code.co_filename, caller.f_lineno, frame.f_code.co_qualname)
            sites.setdefault(site, []).append(count)

    with profile(hook):
        action()
    return sites


def interrupt() -> None:
    """Ctrl-C, as the system sends it."""
    signal.raise_signal(signal.SIGINT)


def fail() -> None:
    raise Injected("here")


def fail_at(number: int, failure: Callable[[], None]) -> Callable[[FrameType, str, Any], None]:
    """A hook that fails at the call of that number."""
    count = 0

    def hook(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        if event == "call" and is_ours(frame) and outside_capture(frame):
            count += 1
            if count == number:
                failure()

    return hook


CLEANING_UP = frozenset({"Attributes.restore"})
"""These cannot fail by themselves; but Ctrl-C can arrive there."""


@pytest.mark.parametrize("failure", [fail, interrupt])
def test_a_failure_at_every_call_of_an_edit(failure):
    """From checking the plan to writing the history: every place that calls something (nightly; else every tenth).

    Afterwards nothing has changed; or, where the failure did not matter to it, the edit is whole and can be undone.
    """
    structure = trained()
    plan = plan_for(structure)
    sites = call_sites(lambda: structure.apply(plan))
    structure.undo()
    before, history = everything(structure), structure.history
    assert len(sites) > 150
    broken = []
    chosen = slice(None) if NIGHTLY else slice(int(failure is fail), None, 10)
    for site, numbers in list(sites.items())[chosen]:
        if failure is fail and site[2] in CLEANING_UP:
            continue
        for number in numbers if NIGHTLY else numbers[:1] if failure is interrupt else numbers[-1:]:
            with contextlib.suppress(Injected, SurgeryError, KeyboardInterrupt), profile(fail_at(number, failure)):
                structure.apply(plan)
            if len(structure.history) > len(history):
                structure.undo()
            found = differences(before, everything(structure))
            if found or structure.history != history:
                broken.append(f"{Path(site[0]).name}:{site[1]} calling {site[2]}: {', '.join(found[:3])}")
                structure = trained()
                before, history = everything(structure), structure.history
    assert not broken, "\n".join(broken)
    assert_nothing_happened(structure, before)


# --- At every stage by name ------------------------------------------------------------------------------------------

STAGES = (
    *("espalier.surgery.tensor_table", "espalier.surgery.stage", "espalier.surgery.check_values"),
    *("espalier.surgery.contract_of", "espalier.surgery.compensating_attributes"),
    *("espalier.surgery.resized_example", "espalier.edit.store.Here.commit", "espalier.surgery.cost_of"),
    *("espalier.edit.stage.changes_of", "espalier.edit.stage.repaired", "espalier.edit.refresh.verify"),
    *("espalier.edit.repair.known_changes", "espalier.edit.verify.capture", "espalier.edit.new_tensors.fill"),
    *("espalier.edit.new_tensors.gather", "espalier.edit.apply.gather"),
    *("espalier.edit.apply.plan_state", "espalier.edit.apply.changed_attribute"),
    *("espalier.edit.apply.check_shapes", "espalier.edit.journal.replace"),
)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_a_failure_of_every_stage(monkeypatch, stage, error):
    structure = trained()
    before = everything(structure)

    def fails(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(stage, fails)
        with pytest.raises((SurgeryError, type(error))):
            structure.apply(plan_for(structure))
    assert_nothing_happened(structure, before)


# --- At every replacement --------------------------------------------------------------------------------------------


def replacements(structure: Structure, method: str) -> int:
    """How often an edit calls this method of its journal."""
    calls = 0
    right = getattr(Journal, method)

    def counted(self: Journal, *args: Any) -> None:
        nonlocal calls
        calls += 1
        right(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, method, counted)
        structure.apply(plan_for(structure))
    structure.undo()
    return calls


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("method", ["replace_tensor", "replace_state", "set_attribute"])
def test_a_failure_at_every_replacement(monkeypatch, method, after):
    structure = trained()
    total = replacements(structure, method)
    assert total >= 5
    before = everything(structure)
    right = getattr(Journal, method)
    for number in range(1, total + 1):
        calls = 0

        def fails(self: Journal, *args: Any) -> None:
            nonlocal calls
            calls += 1
            if after:
                right(self, *args)
            if calls == number:  # noqa: B023 - it is called within this turn only
                raise Injected("here")
            if not after:
                right(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Journal, method, fails)
            with pytest.raises(SurgeryError, match=r"rolled back; nothing was changed: Injected: here"):
                structure.apply(plan_for(structure))
        assert differences(before, everything(structure)) == [], number
    assert_nothing_happened(structure, before)


def test_memory_that_runs_out_at_every_tensor(monkeypatch):
    """The new tensors cannot be allocated: what was replaced before comes back."""
    structure = trained()
    plan, right, calls, limit = plan_for(structure), apply.gather, 0, 10**9

    def fails(*args: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise RuntimeError("[enforce fail] not enough memory: you tried to allocate 800000000000 bytes")
        return right(*args, **options)

    for module in (new_tensors, apply):  # values, and gradients
        monkeypatch.setattr(module, "gather", fails)
    structure.apply(plan)
    structure.undo()
    before, total = everything(structure), calls
    assert total > 30
    for limit in range(1, total + 1, 1 if NIGHTLY else 4):
        calls = 0
        with pytest.raises(SurgeryError, match="not enough memory"):
            structure.apply(plan)
        assert differences(before, everything(structure)) == [], limit
    monkeypatch.undo()
    assert_nothing_happened(structure, before)


def test_a_graph_from_before_a_failed_edit_still_runs_backward(monkeypatch):
    structure = trained()
    model = structure.model
    model.zero_grad()
    loss = loss_of(model, X)
    with monkeypatch.context() as patch:
        patch.setattr(apply, "check_shapes", lambda *_: 1 / 0)
        with pytest.raises(SurgeryError):
            structure.apply(plan_for(structure))
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()  # in train mode the statistics do not matter for the gradient
    loss_of(model, X).backward()
    for old, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(old, parameter.grad)


def test_a_failed_edit_leaves_the_earlier_one_undoable(monkeypatch):
    structure = trained()
    size = structure.axes["one"].size
    with monkeypatch.context() as patch:
        patch.setattr(journal, "replace", lambda *_: 1 / 0)
        with pytest.raises(SurgeryError):
            structure.apply(plan_for(structure))
    structure.undo()
    assert structure.axes["one"].size == size - 1
    assert structure.model.one.weight.shape[0] == size - 1
    assert structure.history == ()


def test_a_failed_undo_is_reported_and_restores_what_it_can(monkeypatch):
    """The one case that cannot be made whole: the message says so."""
    structure = trained()
    structure.apply(plan_for(structure))
    right = journal.replace

    def fails(tensor: Tensor, new: Tensor, grad: Tensor | None = None, name: str = "a tensor") -> Any:
        if name == "conv.bias":
            raise RuntimeError("gone")
        return right(tensor, new, grad, name)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "replace", fails)
        with pytest.raises(SurgeryError, match=r"could not be taken back.*gone.*load a checkpoint"):
            structure.undo()
    assert structure.model.conv.weight.shape[0] == 6
