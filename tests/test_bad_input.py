"""What users get wrong: one error that names the thing and what to do about it, and nothing has changed."""

import copy
import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from snapshots import differences, snapshot
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from training import train

import espalier as esp
from espalier.attaching import attach
from espalier.edit.plan import Plan, Resize, grow_plan, prune_plan
from espalier.errors import (
    CaptureError,
    CheckpointError,
    EspalierError,
    MethodError,
    OptimizerError,
    PlanError,
    SurgeryError,
)
from espalier.structure import Structure


class Network(nn.Module):
    """Two convolutions, a norm and a linear layer, of widths 6, 8 and 4 on 3 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


X = torch.zeros(8, 3, 5, 5).normal_(generator=torch.Generator().manual_seed(0))


@pytest.fixture
def structure() -> Structure:
    model = Network()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    train(model, X, optimizer, 2)
    attached = attach(model, X, optimizer=optimizer)
    assert attached.axes  # tried out while the model is still in order
    return attached


@contextmanager
def expect_refusal(structure: Structure, kind: type[EspalierError], *words: str):
    """The body raises exactly this kind of error, with these words in its message, and changes nothing."""
    before = snapshot(structure.model, structure.optimizer, structure)
    sizes = {name: axis.size for name, axis in structure.axes.items()}
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind or kind is SurgeryError
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert differences(before, snapshot(structure.model, structure.optimizer, structure)) == []
    assert sizes == {name: axis.size for name, axis in structure.axes.items()}
    assert structure.history == ()


# --- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("bodi", "body"),
        ("Body", "body"),
        ("stem.weight", "stem"),
        ("nothing like it", "print(structure)"),
        ("", "print"),
    ],
)
def test_an_unknown_axis_is_named_and_another_suggested(structure, name, suggestion):
    for edit in (lambda: structure.prune(name, [0]), lambda: structure.grow(name, by=1), lambda: structure.axes[name]):
        with expect_refusal(structure, PlanError, f"no axis {name!r}", suggestion):
            edit()


@pytest.mark.parametrize("name", [None, 3, ("body",), b"body"])
def test_a_name_that_is_no_text(structure, name):
    with expect_refusal(structure, PlanError, repr(name)):
        structure.apply(Plan((Resize(name, add=1),)))


def test_a_module_without_an_axis_of_its_own(structure):
    with expect_refusal(structure, PlanError, "'norm'"):
        structure.prune("norm", [0])


def test_a_tensor_and_dimension_lead_to_an_axis_or_an_error(structure):
    assert structure.axis("norm.running_var", 0).name == "stem"
    assert structure.axis("body.weight", -4).name == "body"
    with expect_refusal(structure, PlanError, "'body.wait'"):
        structure.axis("body.wait", 0)
    with expect_refusal(structure, PlanError, "body.weight", "4 dimensions", "dim=4"):
        structure.axis("body.weight", 4)
    with expect_refusal(structure, PlanError, "dimension 2 of body.weight", "plain size"):
        structure.axis("body.weight", 2)


# --- Units -----------------------------------------------------------------------------------------------------------

BAD_UNITS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "beyond the end": ([8], ("body", "0 to 7", "8")),
    "far beyond": ([0, 10**9], ("body", "0 to 7", "1000000000")),
    "negative": ([-1], ("body", "0 to 7", "-1")),
    "twice": ([3, 1, 3], ("body", "3", "more than once")),
    "all": (range(8), ("body", "all 8 units", "keep at least one")),
    "none": ([], ("body", "nothing to do")),
    "none as a tensor": (torch.tensor([], dtype=torch.long), ("body", "nothing to do")),
    "floats": ([1.0, 2.0], ("body", "unit indices", "1.0")),
    "half a unit": ([0.5], ("body", "unit indices", "0.5")),
    "not a number": ([math.nan], ("body", "unit indices", "nan")),
    "text": (["3"], ("body", "unit indices", "'3'")),
    "one text": ("37", ("body", "unit indices", "'3'")),
    "nothing at all": ([None], ("body", "unit indices", "None")),
    "a mask of bools": ([True, False] * 4, ("body", "mask", "nonzero")),
    "a mask as a tensor": (torch.ones(8, dtype=torch.bool), ("body", "mask", "nonzero")),
    "a short mask": (torch.tensor([False, True]), ("body", "mask", "nonzero")),
    "a mask as an array": (np.zeros(8, dtype=bool), ("body", "mask", "nonzero")),
    "a tensor of floats": (torch.tensor([1.0, 2.0]), ("body", "unit indices")),
    "a tensor of two dimensions": (torch.tensor([[0, 1], [2, 3]]), ("body", "unit indices")),
    "an array of floats": (np.array([1.0]), ("body", "unit indices")),
    "one number": (3, ("body", "3", "[3]")),
    "one number as a tensor": (torch.tensor(3), ("body", "list of indices")),
}


@pytest.mark.parametrize("case", BAD_UNITS)
def test_units_that_cannot_be_removed(structure, case):
    units, words = BAD_UNITS[case]
    with expect_refusal(structure, PlanError, *words):
        structure.prune("body", units)
    with expect_refusal(structure, PlanError, *words):
        structure.prune({"stem": [0], "body": units})


def test_units_in_any_integer_type_are_fine(structure):
    for units in ((1, 2), {1, 2}, range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), iter([2, 1]), np.int32([1, 2])):
        assert structure.prune("body", units).plan.edits[0].remove == (1, 2)
        structure.undo()


@pytest.mark.parametrize("by", [0, -1, 1.0, 1.5, True, "2", math.nan, None, [1], torch.tensor(1.0)])
def test_an_amount_that_is_no_count(structure, by):
    with expect_refusal(structure, PlanError, "body"):
        structure.grow("body", by=by)
    if by is not None:
        with expect_refusal(structure, PlanError, "body"):
            structure.grow({"stem": 1, "body": by})


@pytest.mark.parametrize("add", [-1, 1.5, True, "2", None])
def test_a_plan_made_by_hand_is_checked_all_the_same(structure, add):
    with expect_refusal(structure, PlanError, "body"):
        structure.apply(Plan((Resize("stem", add=1), Resize("body", add=add))))


@pytest.mark.parametrize("remove", [(8,), (-1,), (1, 1), (0.5,), (True,), ("1",), None, tuple(range(8))])
def test_units_of_a_plan_made_by_hand_are_checked_all_the_same(structure, remove):
    with expect_refusal(structure, PlanError, "body"):
        structure.apply(Plan((Resize("stem", add=1), Resize("body", remove=remove))))


def test_calls_that_are_incomplete_or_contradictory(structure):
    with expect_refusal(structure, PlanError, "body", "units"):
        structure.prune("body")
    with expect_refusal(structure, PlanError, "body", "by"):
        structure.grow("body")
    with expect_refusal(structure, PlanError, "not both"):
        structure.prune({"body": [0]}, [0])
    with expect_refusal(structure, PlanError, "not both"):
        structure.grow({"body": 1}, by=1)
    with expect_refusal(structure, PlanError, "body", "twice"):
        structure.apply(Plan((Resize("body", add=1), Resize("body", remove=(1,)))))
    with expect_refusal(structure, PlanError, "nothing"):
        structure.apply(Plan(()))
    with expect_refusal(structure, PlanError, "nothing"):
        structure.prune({})
    with expect_refusal(structure, PlanError, "nothing"):
        structure.grow({})


def test_one_bad_edit_spoils_the_whole_plan(structure):
    with expect_refusal(structure, PlanError, "head"):
        structure.grow({"stem": 2, "body": 2, "head": 1})


def test_the_last_unit_stays(structure):
    structure.prune("body", range(1, 8))
    structure.prune("stem", range(5))
    assert not structure.axes["body"].prunable
    with pytest.raises(PlanError, match="keep at least one"):
        structure.prune("body", [0])
    assert structure.model(X).shape == (8, 4)


# --- What may not change ---------------------------------------------------------------------------------------------


def test_the_interface_stays_unless_asked_for(structure):
    with expect_refusal(structure, PlanError, "head (size 4)", "output", "interface=True"):
        structure.grow("head", by=1)
    with expect_refusal(structure, PlanError, "input", "interface=True"):
        structure.prune(structure.axis("stem.weight", 1).name, [0])
    assert structure.grow("head", by=1, interface=True).sizes == {"head": (4, 5)}


def test_limits_are_kept():
    model = Network()
    structure = attach(model, X, limits={"body": (4, 9), "stem": (None, 6)})
    with expect_refusal(structure, PlanError, "body", "3 units", "4"):
        structure.prune("body", range(5))
    with expect_refusal(structure, PlanError, "body", "10 units", "9"):
        structure.grow("body", by=2)
    with expect_refusal(structure, PlanError, "stem", "7 units", "6"):
        structure.grow("stem", by=1)
    assert not structure.axes["stem"].growable


@pytest.mark.parametrize("limits", [(0, 4), (-1, None), (5, 3), (1.5, None), ("2", None), (None, 0), (1, 2, 3), 5])
def test_limits_that_make_no_sense(limits):
    with pytest.raises(PlanError, match="body"):
        attach(Network(), X, limits={"body": limits})


def test_names_to_keep_and_limit_have_to_exist():
    with pytest.raises(PlanError, match=r"bodi.*body"):
        attach(Network(), X, keep=["bodi"])
    with pytest.raises(PlanError, match=r"bodi.*body"):
        attach(Network(), X, limits={"bodi": (1, 2)})
    with pytest.raises(PlanError, match=r"keep=\['body'\]"):
        attach(Network(), X, keep="body")


def test_kept_axes_say_so():
    structure = attach(Network(), X, keep=["body"])
    with expect_refusal(structure, PlanError, "body", "keep"):
        structure.grow("body", by=1)
    with expect_refusal(structure, PlanError, "stem", "keep"):  # the body reads it
        structure.grow("stem", by=1)


# --- Values ----------------------------------------------------------------------------------------------------------


def test_values_of_new_units_have_to_fit(structure):
    with expect_refusal(structure, PlanError, "body.weight", "(5,)", "(9, 6, 3, 3)"):
        structure.grow("body", by=1, values={"body.weight": torch.ones(5)})
    with expect_refusal(structure, PlanError, "'body.wait'"):
        structure.grow("body", by=1, values={"body.wait": torch.ones(1)})
    with expect_refusal(structure, PlanError, "body.weight", "finite"):
        structure.grow("body", by=1, values={"body.weight": torch.full((9, 6, 3, 3), math.nan)})
    with expect_refusal(structure, PlanError, "body.bias", "finite"):
        structure.grow("body", by=1, values={"body.bias": torch.tensor(math.inf)})
    with expect_refusal(structure, PlanError, "stem.weight"):
        structure.grow("body", by=1, values={"stem.weight": torch.ones(6, 3, 3, 3)})  # not touched by this plan
    with expect_refusal(structure, PlanError, "body.weight"):
        structure.grow("body", by=1, values={"body.weight": [[1.0]]})
    with expect_refusal(structure, PlanError, "body.weight", "complex"):
        structure.grow("body", by=1, values={"body.weight": torch.ones((), dtype=torch.complex64)})


def test_values_are_used_at_the_new_positions_only(structure):
    old = structure.model.body.weight.detach().clone()
    structure.grow("body", by=2, values={"body.weight": torch.full((10, 6, 3, 3), 0.25)})
    assert torch.equal(structure.model.body.weight[:8], old)
    assert bool((structure.model.body.weight[8:] == 0.25).all())


@pytest.mark.parametrize("place", ["stem.weight", "body.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_new_units_cannot_be_drawn_from_weights_that_are_not_finite(structure, place, value):
    with torch.no_grad():
        structure.model.get_parameter(place).view(-1)[3] = value
    with expect_refusal(structure, PlanError, place, "not finite"):
        structure.grow(place.removesuffix(".weight"), by=1)


def test_pruning_a_network_of_nans_goes_on_but_promises_nothing(structure):
    """It may be the way out: the unit that holds the NaN is removed."""
    with torch.no_grad():
        structure.model.body.weight[3] = math.nan
        structure.model.head.weight[:, 3] = math.nan
    assert structure.prune("body", [3]).contract == "changing"
    assert structure.model(X).isfinite().all()


# --- Models ----------------------------------------------------------------------------------------------------------


def expect_attach_refused(kind: type[EspalierError], model: Any, example: Any, *words: str, **options: Any) -> None:
    """`attach` raises this kind of error with these words, and the model is as it was."""
    before = snapshot(model) if isinstance(model, nn.Module) else {}
    with pytest.raises(kind) as caught:
        attach(model, example, **options)
    text = str(caught.value)
    for word in words:
        assert word in text, text
    if isinstance(model, nn.Module):
        assert differences(before, snapshot(model)) == []


class Failing(Network):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        self.stem(x)
        raise self.error


def test_a_forward_that_fails_says_where_and_why():
    expect_attach_refused(CaptureError, Failing(ValueError("no luck")), X, "no luck", "ValueError")
    expect_attach_refused(CaptureError, Network(), torch.zeros(8, 2, 5, 5), "stem")
    expect_attach_refused(CaptureError, Network(), torch.zeros(8, 3), "stem")
    expect_attach_refused(CaptureError, Network(), (X, X), "forward")
    expect_attach_refused(CaptureError, Network(), {"y": X}, "'y'")
    expect_attach_refused(CaptureError, Network(), None)
    expect_attach_refused(CaptureError, Network(), ())


def test_a_forward_that_is_interrupted_leaves_no_trace():
    model = Failing(KeyboardInterrupt())
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        attach(model, X)
    assert differences(before, snapshot(model)) == []


def test_a_forward_that_fails_later_is_no_harm(structure):
    """The user's forward broke after attach: the edit is refused."""
    structure.model.forward = lambda x: 1 / 0
    with expect_refusal(structure, SurgeryError, "ZeroDivisionError"):
        structure.grow("body", by=1)
    del structure.model.forward
    structure.grow("body", by=1)


@pytest.mark.parametrize("model", [None, 3, "model", Network, lambda x: x, torch.ones(3)])
def test_what_is_no_module(model):
    expect_attach_refused(PlanError, model, X, "torch.nn.Module", type(model).__name__)


def test_wrappers_are_named_with_what_is_inside():
    expect_attach_refused(
        PlanError, nn.Sequential(torch.compile(Network(), backend="eager")), X, "compiled", "in place"
    )
    expect_attach_refused(PlanError, nn.DataParallel(Network()), X, "DataParallel", ".module")


@pytest.mark.slow
def test_compiled_in_place_is_no_obstacle_or_named():
    """`model.compile()` keeps the module's type: its forward is compiled, and capture has to see the operators."""
    model = Network()
    model.compile(backend="eager")
    structure = attach(model, X)
    structure.grow("body", by=1)
    assert model.body.weight.shape[0] == 9


def test_a_distributed_wrapper_further_inside_is_named(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Network())
        expect_attach_refused(PlanError, nn.Sequential(wrapped), X, "DistributedDataParallel", "outermost")
    finally:
        torch.distributed.destroy_process_group()


def test_wrappers_further_inside_are_found_too():
    expect_attach_refused(PlanError, nn.Sequential(nn.DataParallel(Network())), X, "DataParallel")
    expect_attach_refused(PlanError, nn.Sequential(torch.compile(Network(), backend="eager")), X, "compiled")


def test_script_modules_and_shapeless_parameters():
    with pytest.warns(DeprecationWarning, match="deprecated"):
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(PlanError, match="TorchScript"):
        attach(scripted, torch.ones(8, 2))
    with pytest.raises(PlanError, match=r"0\.(weight|bias).*no shape"):
        attach(nn.Sequential(nn.LazyLinear(3)), torch.ones(8, 2))


def test_a_model_without_parameters_has_no_axes():
    structure = attach(nn.ReLU(), X)
    assert len(structure.axes) == 0
    with pytest.raises(PlanError, match="no axis 'body'"):
        structure.grow("body", by=1)
    assert "ReLU" in str(structure)


# --- Optimizers ------------------------------------------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "of another model": lambda model: SGD(Network().parameters(), lr=0.1),
    "of a copy": lambda model: SGD(copy.deepcopy(model).parameters(), lr=0.1),
    "of one tensor elsewhere": lambda model: SGD([nn.Parameter(torch.ones(3))], lr=0.1),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_an_optimizer_of_something_else(case):
    model = Network()
    expect_attach_refused(OptimizerError, model, X, "SGD", "model.parameters()", optimizer=OPTIMIZERS[case](model))


@pytest.mark.parametrize("optimizer", ["adam", torch.optim.Adam, {"lr": 0.1}, 3])
def test_what_is_no_optimizer(optimizer):
    expect_attach_refused(OptimizerError, Network(), X, type(optimizer).__name__, optimizer=optimizer)


def test_state_of_another_size_is_found_before_it_corrupts_memory(structure):
    structure.optimizer.state[structure.model.body.weight]["exp_avg"] = torch.zeros(3)
    with expect_refusal(structure, OptimizerError, "exp_avg", "body.weight", "(3,)"):
        structure.grow("body", by=1)


def test_a_model_that_changed_behind_the_back(structure):
    structure.model.body = nn.Conv2d(6, 9, 3, padding=1)
    with expect_refusal(structure, SurgeryError, "body", "attach to the model again"):
        structure.grow("stem", by=1)


def test_tensors_that_came_or_went(structure):
    structure.model.extra = nn.Parameter(torch.ones(1))
    with expect_refusal(structure, SurgeryError, "extra", "attach to the model again"):
        structure.grow("stem", by=1)
    del structure.model.extra
    structure.model.head = nn.Identity()
    with expect_refusal(structure, SurgeryError, "head", "attach to the model again"):
        structure.grow("stem", by=1)


def test_an_averaged_copy_has_to_be_a_copy():
    model = Network()
    expect_attach_refused(PlanError, model, X, "Linear", "copy of the model", follow=[nn.Linear(2, 2)])
    other = Network()
    other.body = nn.Conv2d(6, 9, 3)
    expect_attach_refused(PlanError, model, X, "body", follow=[other])


def test_undo_of_nothing(structure):
    with expect_refusal(structure, SurgeryError, "nothing to undo"):
        structure.undo()


def test_parameters_under_inference_mode_are_refused():
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    with pytest.raises(PlanError, match=r"weight was made under torch.inference_mode"):
        attach(model, torch.ones(8, 2))


# --- Plans as text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "null", "not json", '{"format": 2, "edits": [], "interface": false, "seed": 0}'),
        '{"format": 1, "edits": [{"axis": 3, "remove": [], "add": 1}], "interface": false, "seed": 0}',
        '{"format": 1, "edits": [{"axis": "body", "remove": [0.5], "add": 1}], "interface": false, "seed": 0}',
        '{"format": 1, "edits": [{"axis": "body", "remove": [true], "add": 1}], "interface": false, "seed": 0}',
        '{"format": 1, "edits": [{"axis": "body", "remove": [], "add": "1"}], "interface": false, "seed": 0}',
        '{"format": 1, "edits": [{"axis": "body"}], "interface": false, "seed": 0}',
        '{"format": 1, "edits": {"axis": "body"}, "interface": false, "seed": 0}',
        '{"format": 1, "edits": [], "interface": "yes", "seed": 0}',
    ],
)
def test_text_that_is_no_plan(text):
    with pytest.raises(PlanError, match="plan"):
        Plan.from_json(text)


def test_plans_survive_a_round_trip():
    plan = Plan((Resize("body", (1, 2), 3), Resize("stem", add=1)), interface=True, seed=4)
    assert Plan.from_json(plan.to_json()) == plan
    assert not Plan(())
    assert prune_plan({"body": [2, 1]}).edits == (Resize("body", (1, 2)),)
    assert grow_plan({"body": 2}).edits == (Resize("body", add=2),)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"structure": nn.Linear(2, 2)}, r"structure: expected what espalier\.attach returned, found a Linear"),
        ({"methods": esp.prune.Magnitude()}, r"for one write \[method\]"),
        ({"methods": [esp.prune.Magnitude]}, r"expected methods, found <function .* give what calling it returns"),
        ({"methods": ["magnitude"]}, r"found 'magnitude'; give methods such as espalier.prune.Taylor\(\)"),
        ({"loss": 3.0}, r"loss: expected a function of a model and a batch, found 3\.0"),
        ({"total_steps": 0}, "total_steps: expected a whole number of at least 1, found 0"),
    ],
)
def test_a_session_says_what_it_takes(structure: Structure, given: dict[str, Any], message: str) -> None:
    arguments = {
        "structure": structure,
        "methods": [],
        "loss": lambda model, batch: model(batch).sum(),
        "total_steps": 3,
    }
    with pytest.raises(MethodError, match=message):
        esp.Session(**{**arguments, **given})


def test_what_is_saved_is_a_structure(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected what espalier\.attach returned"):
        esp.save(nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_name_unlike_any_axis_leads_to_the_list(structure: Structure) -> None:
    with pytest.raises(PlanError, match=r"there is no axis 'xyzzy'; see print\(structure\) for all axes"):
        structure.prune("xyzzy", units=[0])
