"""Every small network as users write them: attach, print, each axis alone pruned and grown, undone, trained on."""

import math

import pytest
import torch
from effort import NIGHTLY, in_turn
from snapshots import differences, snapshot
from torch.optim import AdamW
from training import assert_state_fits, finite, train
from zoo_small import ZOO

from espalier.attaching import attach
from espalier.errors import EspalierError
from espalier.graph.topology import INTERFACE
from espalier.structure import Structure

HELD_BY_CODE = {
    "hard_coded_view": {"fc1:0", "fc1:1", "mix"},
    "roll_channels": {"conv1:1"},
}
"""Axes that code holds fixed by literal sizes."""

SHARES = {
    "hard_coded_view": 0.0,
    # its residual stream is its input and output: the feed-forward layers are all that may change
    **dict.fromkeys((name for name in ZOO if name.startswith("encoder_")), 0.35),
    "one_unit": 0.8,
}
"""Least share of parameters on at least one prunable axis, where it is less than nearly all."""


def attached(name: str) -> tuple[Structure, object]:
    model, x = ZOO[name]()
    optimizer = AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3, fused=True)
    train(model, x, optimizer, 1)
    return attach(model, x, optimizer=optimizer), x


def edit_once(structure: Structure, axis: str, grow: bool, train_on: bool) -> str | None:
    """One edit of one axis, undone; then again, for a training step to follow. Returns the refusal, if it is one."""
    model, optimizer = structure.model, structure.optimizer
    before = snapshot(model, optimizer, structure)
    try:
        edit = structure.grow(axis, by=2) if grow else structure.prune(axis, [0])
    except EspalierError as refusal:
        assert differences(before, snapshot(model, optimizer, structure)) == []
        return str(refusal)
    assert edit.contract in ("exact", "bounded", "changing")
    assert edit.why
    structure.undo()
    assert differences(before, snapshot(model, optimizer, structure)) == []
    if train_on:
        structure.apply(edit.plan)
        train(model, structure.example, optimizer, 1)
        assert finite(model)
        assert_state_fits(optimizer)
    return None


def edit_all(structure: Structure, train_on: bool, both: bool = True) -> dict[str, str]:
    """Every axis that says that it may change, alone, grown and pruned (not `both`: one or the other, in turn).

    Returns those that were refused, and why.
    """
    refused = {}
    for number, axis in enumerate(list(structure.axes)):
        for grow in (True, False):
            may = structure.axes[axis].growable if grow else structure.axes[axis].prunable
            if may and (both or grow == (number % 2 == 0)):
                text = edit_once(structure, axis, grow, train_on)
                if text is not None:
                    refused[axis] = text
    return refused


@pytest.mark.parametrize("name", HELD_BY_CODE)
def test_sizes_that_code_holds_are_found_and_explained(name):
    structure, _ = attached(name)
    for axis in HELD_BY_CODE[name]:
        assert not structure.axes[axis].prunable
        assert not structure.axes[axis].growable
        assert "zoo_small.py:" in structure.axes[axis].reason


def share_of_parameters(structure: Structure) -> float:
    """On at least one prunable axis."""
    reached = {slot.tensor for axis in structure.axes.values() if axis.prunable for slot in axis.slots}
    sizes = {key: value.numel() for key, value in structure.model.named_parameters()}
    return sum(size for key, size in sizes.items() if key in reached) / sum(sizes.values())


def assert_explained(structure: Structure) -> None:
    """Every frozen axis says why, and where in the user's code."""
    for record in structure.topology.axes.values():
        for reason in record.reasons:
            assert len(reason.text) > 15
            assert reason.text.count("(") == reason.text.count(")"), reason
            assert reason.kind in INTERFACE or ".py:" in reason.text, reason
    assert dict(structure.topology.unknown) == {}


@pytest.mark.parametrize("name", [pytest.param(name, marks=in_turn(row)) for row, name in enumerate(ZOO)])
def test_every_axis_that_says_that_it_may_change_can(name):
    structure, _ = attached(name)
    before = snapshot(structure.model, structure.optimizer)
    table, axes = str(structure), list(structure.axes)
    assert differences(before, snapshot(structure.model, structure.optimizer)) == []
    assert all(axis in table for axis in axes)
    assert_explained(structure)
    share = share_of_parameters(structure)
    print(f"\n{name}: {share:.1%} of the parameters are on a prunable axis")
    assert share >= SHARES.get(name, 0.95)
    assert edit_all(structure, train_on=True, both=NIGHTLY or not name.startswith("hf_")) == {}
    assert list(structure.axes) == axes


def test_as_many_channels_as_are_rolled_around_are_frozen_and_the_others_not():
    structure, _ = attached("roll_channels")
    assert structure.axes["conv1:0"].size == 6
    assert structure.axes["conv1:0"].prunable
    assert "expected shifts=" in structure.axes["conv1:1"].reason
    assert structure.axis("conv2.weight", 0).prunable


def test_half_of_every_axis_at_once():
    """One plan for the whole network, and the network at half its width trains."""
    for name in ("vgg_batch_norm", "resnet", "mobilenet", "densenet", "vit", "tied_embeddings", "hf_bert"):
        structure, _ = attached(name)
        cost = structure.cost()
        units = {axis.name: range(axis.size // 2) for axis in structure.axes.values() if axis.prunable}
        structure.prune(units)
        assert structure.cost().parameters < 0.7 * cost.parameters
        assert structure.cost().parameters == sum(one.numel() for one in structure.model.parameters())
        train(structure.model, structure.example, structure.optimizer, 2)
        assert finite(structure.model)


@pytest.mark.parametrize("name", ["mlp", "lenet", "hf_gpt2", "encoder_norm_first", "tied_embeddings"])
def test_the_interface_changes_when_asked_for(name):
    structure, x = attached(name)
    outputs = [axis.name for axis in structure.axes.values() if axis.reason is not None]
    changed = 0
    for axis in outputs:
        if (
            structure.topology.by_name[axis].reasons
            and {reason.kind for reason in structure.topology.by_name[axis].reasons} <= INTERFACE
        ):
            size = structure.axes[axis].size
            structure.grow(axis, by=1, interface=True)
            assert structure.axes[axis].size == size + 1
            changed += 1
    assert changed > 0
    train(structure.model, structure.example, structure.optimizer, 1)
    assert finite(structure.model)
    assert math.isfinite(sum(float(one.detach().sum()) for one in structure.model.parameters()))
    assert isinstance(x, (tuple, dict, torch.Tensor))
