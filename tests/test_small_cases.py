"""Every small case: what may change, what is refused and why, and that what is said to be exact is.

The oracle is independent of the topology's own reasoning: units whose readers are set to zero are removed, and the
outputs of the smaller network are compared with those of the larger one, in double precision, in train and eval mode.
"""

import warnings
from dataclasses import dataclass

import pytest
import torch
from oracles import disturb, outputs, relative_error
from small_case import SmallCase
from small_cases import CASES
from torch import Tensor, nn

from espalier.attaching import attach
from espalier.axis import Axis
from espalier.graph.named_tensors import tensor_table
from espalier.graph.topology import INTERFACE, Slot
from espalier.record import Edit
from espalier.structure import Structure

EXACT = 1e-9
BY = 2


@dataclass
class Settled:
    """A case with its structure, and what the network was before any edit."""

    case: SmallCase
    model: nn.Module
    example: tuple[Tensor, ...]
    structure: Structure
    state: dict[str, Tensor]

    def restore(self) -> None:
        self.structure.undo()
        self.model.load_state_dict(self.state)

    def tensors(self) -> dict[str, Tensor]:
        return dict(tensor_table(self.model).tensors)

    def outputs(self) -> list[Tensor]:
        return [outputs(self.model, self.example, train, 0) for train in (True, False)]

    def error(self, before: list[Tensor]) -> float:
        return max(relative_error(after, old) for after, old in zip(self.outputs(), before, strict=True))

    def axes(self) -> list[Axis]:
        return [self.structure.axes[name] for name in sorted(self.case.free)]


@pytest.fixture(scope="module", params=CASES)
def settled(request: pytest.FixtureRequest) -> Settled:
    case = CASES[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old weight_norm is still in use
        model = case.model()
    example = case.example()
    disturb(model, example, seed=0)
    structure = attach(model, example)
    return Settled(case, model, example, structure, {key: one.clone() for key, one in model.state_dict().items()})


def test_what_may_change_and_what_not(settled: Settled) -> None:
    axes, topology = settled.structure.axes, settled.structure.topology
    assert {axis.name for axis in axes.values() if axis.prunable and axis.growable} == settled.case.free
    kinds = {
        record.name: {reason.kind for reason in record.reasons} - INTERFACE
        for record in topology.axes.values()
        if topology.sizes[record.number] > 1 or record.name in settled.case.refused
    }
    assert {name for name, found in kinds.items() if found} == set(settled.case.refused)
    for name, kind in settled.case.refused.items():
        assert kind in kinds[name]
    for record in topology.axes.values():
        for reason in record.reasons:
            assert reason.kind in INTERFACE | {"unread"} or ".py:" in reason.text or "in the code" in reason.text


def test_growth_is_exact_where_the_contract_says_so(settled: Settled) -> None:
    before = settled.outputs()
    changing = set()
    for axis in settled.axes():
        edit = settled.structure.grow(axis.name, by=BY)
        assert settled.structure.axes[axis.name].size == axis.size + BY
        if edit.contract == "exact":
            assert settled.error(before) <= EXACT, (axis.name, edit.why)
            check_training(settled, axis, grown=True)
        else:
            changing.add(axis.name)
            check_training(settled, axis, grown=False)
        settled.restore()
    assert changing <= settled.case.changing


@pytest.mark.parametrize("roles", [("contract",), None], ids=["readers", "everything"])
def test_silent_units_go_without_a_trace(settled: Settled, roles: tuple[str, ...] | None) -> None:
    uncertain = set()
    for axis in settled.axes():
        silence(settled, axis, roles)
        before = settled.outputs()
        if not all(bool(one.isfinite().all()) for one in before):
            settled.model.load_state_dict(settled.state)
            continue  # a weight that is divided by its own length, which is zero now
        edit = settled.structure.prune(axis.name, [1])
        if edit.contract == "exact":
            assert settled.error(before) <= EXACT, (axis.name, edit.why)
        else:
            uncertain.add(axis.name)
        check_training(settled, axis, grown=False)
        settled.restore()
    assert uncertain <= settled.case.uncertain


def test_a_unit_that_contributes_never_goes_as_if_it_did_not(settled: Settled) -> None:
    before = settled.outputs()
    for axis in settled.axes():
        edit: Edit = settled.structure.prune(axis.name, [0])
        assert edit.contract != "exact" or settled.error(before) <= EXACT, (axis.name, edit.why)
        settled.restore()


def test_a_unit_that_one_reader_still_reads_does_not_go_as_if_it_contributed_nothing(settled: Settled) -> None:
    for axis in settled.axes():
        readers = [slot for slot in axis.slots if slot.role == "contract"]
        for kept in readers if len(readers) > 1 else ():
            silence(settled, axis, ("contract",), kept)
            before = settled.outputs()
            edit = settled.structure.prune(axis.name, [1])
            assert edit.contract != "exact" or settled.error(before) <= EXACT, (axis.name, kept.tensor, edit.why)
            settled.restore()


def test_parameters_stay_what_they_are(settled: Settled) -> None:
    """The same objects, tied as before, with gradients or without."""

    def identities() -> dict[str, tuple[int, bool]]:
        found = settled.model.named_parameters(remove_duplicate=False)
        return {name: (id(one), one.requires_grad) for name, one in found}

    before = identities()
    for axis in settled.axes():
        settled.structure.grow(axis.name, by=1)
        assert identities() == before
        settled.restore()
    assert identities() == before


def silence(settled: Settled, axis: Axis, roles: tuple[str, ...] | None, kept: Slot | None = None) -> None:
    """Set to zero what reads unit 1 of an axis, or every entry of it; all but in the place that is kept."""
    tensors = settled.tensors()
    with torch.no_grad():
        for slot in axis.slots:
            if slot != kept and (roles is None or slot.role in roles) and tensors[slot.tensor].is_floating_point():
                tensors[slot.tensor].index_fill_(slot.dim, torch.tensor(slot.index([1])), 0.0)


def check_training(settled: Settled, axis: Axis, grown: bool) -> None:
    """A backward pass runs, gradients have the shapes of their parameters, and new units can learn."""
    parameters = [one for one in settled.model.parameters() if one.requires_grad]
    if not parameters:
        return
    settled.model.train()
    result = settled.model(*settled.example)
    torch.manual_seed(0)
    (result * torch.randn_like(result)).sum().backward()
    settled.model.eval()
    for one in parameters:
        assert one.grad is None or one.grad.shape == one.shape
    assert any(one.grad is not None and bool(one.grad.any()) for one in parameters)
    if grown and axis.name not in settled.case.still:
        tensors = settled.tensors()
        new = list(range(axis.size, axis.size + BY))
        gradients = [
            tensors[slot.tensor].grad.index_select(slot.dim, torch.tensor(slot.index(new))).abs().max()
            for slot in settled.structure.axes[axis.name].slots
            if tensors[slot.tensor].requires_grad and tensors[slot.tensor].grad is not None
        ]
        assert not gradients or max(gradients) > 0, axis.name
    settled.model.zero_grad()
