"""The journal gives back every byte, and undo is refused where it would lose something."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from espalier.edit.journal import Journal, UndoStack
from espalier.edit.optimizer import plan_state
from espalier.edit.tensors import gather
from espalier.errors import SurgeryError


def network() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    step(model, optimizer)
    return model, optimizer


def loss_of(model: nn.Module) -> torch.Tensor:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return model(images.contiguous(memory_format=torch.channels_last)).pow(2).mean()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def edit(model: nn.Sequential, optimizer: torch.optim.Optimizer, source: list[int], journal: Journal) -> None:
    """Gives the hidden axis other units: parameters, gradients, buffers, state and attributes."""
    units = np.array(source, dtype=np.int64)
    norm = model[1]
    tensors = [
        (model[0].weight, (units, None, None, None)),
        (model[0].bias, (units,)),
        (norm.weight, (units,)),
        (norm.bias, (units,)),
        (norm.running_mean, (units,)),
        (norm.running_var, (units,)),
        (model[3].weight, (None, units, None, None)),
    ]
    for tensor, sources in tensors:
        new = gather(tensor, sources, 0.5)
        grad = None if tensor.grad is None else gather(tensor.grad, sources, 0.0, like=tensor)
        state = plan_state(optimizer, tensor, sources, new)
        journal.replace_tensor(tensor, new, grad, "hidden")
        journal.replace_state(optimizer, tensor, state, "hidden")
    for owner, name in ((model[0], "out_channels"), (norm, "num_features"), (model[3], "in_channels")):
        journal.set_attribute(owner, name, len(units))


def everything(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Every byte, object and layout that an edit could change."""
    found: dict[str, object] = {}

    def note(name: str, tensor: torch.Tensor) -> None:
        found[name] = (tensor.data_ptr(), tensor.untyped_storage().nbytes(), tensor.shape, tensor.stride())
        found[name + " bytes"] = tensor.detach().clone().contiguous().numpy().tobytes()

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        note(name, tensor)
        found[name + " itself"] = (id(tensor), tensor.requires_grad)
        if tensor.grad is not None:
            note(name + " grad", tensor.grad)
            found[name + " grad itself"] = id(tensor.grad)
        if tensor in optimizer.state:
            for key, value in optimizer.state[tensor].items():
                note(f"{name} {key}", value)
                found[f"{name} {key} itself"] = id(value)
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (int, float, tuple, str))}
        found[name + " attributes"] = list(plain.items())
    found["groups"] = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    return found


EDITS = ([0, 2, 5], [0, 1, 2, 3, 4, 5, -1, -1], [5, -1, 1])


@pytest.mark.parametrize("source", EDITS)
@pytest.mark.parametrize("take_back", [Journal.rollback, Journal.undo])
def test_everything_comes_back(source, take_back):
    model, optimizer = network()
    before = everything(model, optimizer)
    journal = Journal()
    edit(model, optimizer, source, journal)
    assert model[0].weight.shape[0] == len(source)
    assert everything(model, optimizer) != before
    loss_of(model.eval())  # it runs, and running statistics stay
    take_back(journal)
    model.train()
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("failing", range(17))
def test_a_failure_half_way_is_rolled_back(failing, monkeypatch):
    model, optimizer = network()
    before, versions = everything(model, optimizer), [parameter._version for parameter in model.parameters()]
    expected = torch.autograd.grad(loss_of(model.eval()), list(model.parameters()))
    loss = loss_of(model)
    journal, calls = Journal(), iter(range(100))

    def failing_after(method):
        def call(*arguments):
            method(*arguments)
            if next(calls) == failing:
                raise MemoryError

        return call

    for name in ("replace_tensor", "replace_state", "set_attribute"):
        monkeypatch.setattr(journal, name, failing_after(getattr(journal, name)))
    with pytest.raises(MemoryError):
        edit(model, optimizer, EDITS[1], journal)
    journal.rollback()
    model.train()
    assert everything(model, optimizer) == before
    assert [parameter._version for parameter in model.parameters()] == versions
    optimizer.zero_grad()
    loss.backward()  # the graph of before the edit is still good
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_a_change_that_fails_itself_is_rolled_back():
    model, optimizer = network()
    before, journal = everything(model, optimizer), Journal()
    with pytest.raises(SurgeryError, match="Cannot replace the bias"):
        journal.replace_tensor(model[0].bias, torch.zeros(3), torch.zeros(4), "the bias")
    product = model[0].bias * 2
    with pytest.raises(SurgeryError, match="not a leaf"):
        journal.replace_tensor(product, torch.zeros(3))
    with pytest.raises(AttributeError):
        journal.set_attribute(Reluctant(), "frozen", 5)
    journal.rollback()
    assert everything(model, optimizer) == before


class Config:
    """Redirects one attribute to another, as configurations of Hugging Face do."""

    class_size = 4

    def __init__(self) -> None:
        self.n_embd = 4

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @hidden_size.setter
    def hidden_size(self, value: int) -> None:
        self.n_embd = value


class Reluctant:
    """Attributes that cannot be set, or not set back."""

    _growing = 4

    @property
    def frozen(self) -> int:
        return 4

    @property
    def growing(self) -> int:
        return self._growing

    @growing.setter
    def growing(self, value: int) -> None:
        if value < self._growing:
            raise ValueError("it only grows")
        self._growing = value


def test_attributes_of_every_kind_come_back():
    config, module, journal = Config(), nn.Linear(2, 3), Journal()
    weight = module.weight
    for owner, name, value in [
        (config, "hidden_size", 8),
        (config, "class_size", 4),
        (config, "made_up", 8),
        (module, "out_features", 8),
        (module, "weight", nn.Parameter(torch.zeros(8, 2))),
        (module, "child", nn.Linear(1, 1)),
    ]:
        journal.set_attribute(owner, name, value)
        assert getattr(owner, name) is value
    assert config.n_embd == 8
    journal.rollback()
    assert vars(config) == {"n_embd": 4}
    assert (config.class_size, module.out_features) == (4, 3)
    assert module.weight is weight
    assert list(module.children()) == []


def test_state_that_did_not_exist_is_removed():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], momentum=0.9)
    journal = Journal()
    journal.replace_state(optimizer, parameter, {"momentum_buffer": torch.ones(2)})
    journal.rollback()
    assert parameter not in optimizer.state
    optimizer.state[parameter]["other"] = 1
    journal.replace_state(optimizer, parameter, {"momentum_buffer": torch.ones(2)})
    journal.rollback()
    assert optimizer.state[parameter] == {"other": 1}


def test_what_resists_does_not_stop_the_rest():
    layer, journal = nn.Linear(2, 3), Journal()
    journal.set_attribute(layer, "out_features", 5)
    journal.set_attribute(Reluctant(), "growing", 5)
    with pytest.raises(SurgeryError, match=r"1 of the changes .* first because of: it only grows"):
        journal.rollback()
    assert layer.out_features == 3


def pushed(stack: UndoStack, model: nn.Sequential, optimizer: torch.optim.Optimizer, source: list[int]) -> None:
    journal = Journal()
    edit(model, optimizer, source, journal)
    stack.push(journal)


def test_as_many_undos_as_edits_give_back_every_byte():
    model, optimizer = network()
    stack, seen = UndoStack([optimizer], limit=100), []
    generator = np.random.default_rng(0)
    for _ in range(100):
        seen.append(everything(model, optimizer))
        size = model[0].out_channels
        kept = list(generator.permutation(size)[: generator.integers(1, size + 1)])
        pushed(stack, model, optimizer, kept + [-1] * int(generator.integers(0, 4)))
    while seen:
        stack.undo()
        assert everything(model, optimizer) == seen.pop()
    with pytest.raises(SurgeryError, match="nothing to undo"):
        stack.undo()


def test_the_limit_bounds_the_stack():
    model, optimizer = network()
    stack = UndoStack([optimizer], limit=2)
    for _ in range(3):
        pushed(stack, model, optimizer, [0, 1, -1])
    assert len(stack) == 2


@pytest.mark.parametrize("variant", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_a_step_ends_undo_and_frees_what_it_kept(variant):
    model, _ = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **variant)
    step(model, optimizer)
    stack = UndoStack([optimizer], limit=10)
    old_state = weakref.ref(optimizer.state[model[0].weight]["momentum_buffer"])
    pushed(stack, model, optimizer, EDITS[0])
    assert old_state() is not None
    step(model, optimizer)
    gc.collect()
    assert old_state() is None
    before = everything(model, optimizer)
    with pytest.raises(SurgeryError, match="no edit was made since the last optimizer step"):
        stack.undo()
    assert everything(model, optimizer) == before
    pushed(stack, model, optimizer, [0, 1])  # and a new edit can be undone again
    stack.undo()
    assert everything(model, optimizer) == before


def test_undo_refuses_to_lose_changes_made_by_hand():
    model, optimizer = network()
    stack = UndoStack([], limit=10)
    pushed(stack, model, optimizer, EDITS[0])
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    with pytest.raises(SurgeryError, match="parameter hidden was changed since then"):
        stack.undo()
    assert model[0].out_channels == 3


def test_undo_refuses_to_lose_a_change_between_two_edits():
    model, optimizer = network()
    stack = UndoStack([], limit=10)
    pushed(stack, model, optimizer, EDITS[1])
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    changed = everything(model, optimizer)
    pushed(stack, model, optimizer, EDITS[0])
    stack.undo()
    assert everything(model, optimizer) == changed
    with pytest.raises(SurgeryError, match="nothing to undo"):
        stack.undo()


def test_undo_refuses_to_lose_a_loaded_state():
    model, optimizer = network()
    stack = UndoStack([optimizer], limit=10)
    pushed(stack, model, optimizer, EDITS[0])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(SurgeryError, match="optimizer state 'exp_avg' of hidden was changed"):
        stack.undo()


def test_a_failed_edit_leaves_older_ones_undoable():
    model, optimizer = network()
    before, stack = everything(model, optimizer), UndoStack([optimizer], limit=10)
    pushed(stack, model, optimizer, EDITS[1])
    failed = Journal()
    edit(model, optimizer, EDITS[2], failed)
    failed.rollback()
    stack.undo()
    assert everything(model, optimizer) == before
