"""Compiled networks before and after edits: they compute what eager mode does, are compiled anew, and never go back to
eager mode in silence."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espalier as esp
from espalier.errors import EspalierWarning, PlanError
from espalier.layers import ResidualLayer
from espalier.structure import Structure

# torch's own, about inputs of code that is compiled in parts
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

X = torch.linspace(-1, 1, 40).view(5, 8)


class Network(nn.Module):
    """A norm between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.norm(self.first(x))))))


class Counting:
    """A backend that compiles nothing, and counts what it is given."""

    def __init__(self) -> None:
        self.compiled = self.ran = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        self.compiled += 1

        def run(*inputs: Tensor) -> Any:
            self.ran += 1
            return graph.forward(*inputs)

        return run


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def wrapped(backend: Counting) -> tuple[nn.Module, nn.Module]:
    model = Network()
    return model, torch.compile(model, backend=backend)


def in_place(backend: Counting) -> tuple[nn.Module, nn.Module]:
    model = Network()
    model.compile(backend=backend)
    return model, model


class Part(nn.Module):
    """One of several parts that are compiled each by itself."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.layer = nn.Linear(before, after)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


def by_parts(backend: Counting) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential()
    model.second = Part(8, 6)
    model.head = Part(6, 3)
    for module in model:
        module.compile(backend=backend)
    return model, model


def a_list(backend: Counting) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential()
    model.second = nn.Linear(8, 6)
    model.act = nn.ReLU()
    model.head = nn.Linear(6, 3)
    return model, torch.compile(model, backend=backend)


def train(runs: nn.Module, structure: Structure) -> Tensor:
    assert structure.optimizer is not None
    structure.optimizer.zero_grad()
    loss = runs(X).square().mean()
    loss.backward()
    structure.optimizer.step()
    return loss.detach()


def eager(model: nn.Module) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        return model(X)


@pytest.fixture
def three_versions() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=3):
        yield


@pytest.mark.usefixtures("three_versions")
@pytest.mark.parametrize(
    ("way", "given"),
    [
        (wrapped, "the wrapper"),
        pytest.param(in_place, "the model", marks=pytest.mark.slow),
        pytest.param(wrapped, "the model", marks=pytest.mark.slow),
        pytest.param(by_parts, "the model", marks=pytest.mark.slow),
        pytest.param(a_list, "the wrapper", marks=pytest.mark.slow),
    ],
)
def test_edits_beyond_the_limit_stay_compiled(
    way: Callable[[Counting], tuple[nn.Module, nn.Module]], given: str
) -> None:
    backend = Counting()
    model, runs = way(backend)
    runs(X)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = backend.compiled
    structure = esp.attach(runs if given == "the wrapper" else model, X, optimizer=optimizer)
    axis = next(name for name in structure.axes if name.startswith("second"))
    assert structure.axes[axis].growable
    assert structure.model is model
    assert structure.runs is (runs if given == "the wrapper" else model)
    assert backend.compiled == before, "reading a network compiles nothing"
    for number in range(4):
        compiled = backend.compiled
        if number % 3 == 2:
            structure.prune(axis, [0, 3, 4])
        else:
            structure.grow(axis, by=2)
        assert backend.compiled == compiled
        train(runs, structure)
        ran = backend.ran
        torch.testing.assert_close(runs(X), eager(model))
        assert backend.ran > ran, "it went back to eager mode"
    assert structure.axes[axis].size == 6 + 3 * 2 - 3


def test_undo_finds_compiled_code_again() -> None:
    backend = Counting()
    _model, runs = wrapped(backend)
    structure = esp.attach(runs, X)
    expected, compiled = runs(X), backend.compiled
    structure.grow("second", by=3)
    runs(X)
    structure.undo()
    assert torch.equal(runs(X), expected)
    assert backend.compiled == compiled + 1, "guards find the code of the earlier size"


@pytest.mark.parametrize("way", [in_place, pytest.param(wrapped, marks=pytest.mark.slow)])
def test_layers_that_come_and_go_are_seen_by_compiled_code(
    way: Callable[[Counting], tuple[nn.Module, nn.Module]],
) -> None:
    backend = Counting()
    model, runs = way(backend)
    structure = esp.attach(model, X)
    expected = runs(X)
    structure.insert_layer(ResidualLayer(6, 6), after="second")
    torch.testing.assert_close(runs(X), expected)
    with torch.no_grad():
        for parameter in model.second.parameters():
            parameter.add_(0.5)  # those of the new layer too, which is a child of this one
    found = runs(X)
    torch.testing.assert_close(found, eager(model))
    structure.remove_layer("norm")
    torch.testing.assert_close(runs(X), eager(model))
    assert not torch.allclose(runs(X), found)
    assert backend.ran == 5


@pytest.mark.usefixtures("three_versions")
def test_a_compiled_function_around_the_model_follows() -> None:
    backend = Counting()
    model = Network()

    @torch.compile(backend=backend)
    def loss(x: Tensor) -> Tensor:
        return model(x).square().mean()

    structure = esp.attach(model, X)
    for _ in range(4):
        structure.grow("second", by=1)
        ran = backend.ran
        torch.testing.assert_close(loss(X), eager(model).square().mean())
        assert backend.ran > ran


@pytest.mark.usefixtures("three_versions")
def test_other_compiled_networks_are_left_alone() -> None:
    backend, others = Counting(), Counting()
    _model, runs = wrapped(backend)
    teacher = nn.Sequential(nn.Linear(8, 3))
    teacher_runs = torch.compile(teacher, backend=others)
    structure = esp.attach(runs, X)
    for _ in range(4):
        structure.grow("second", by=1)
        runs(X), teacher_runs(X)
    assert others.compiled == 1


@pytest.mark.usefixtures("three_versions")
def test_giving_up_is_said_and_the_next_edit_compiles_again() -> None:
    backend = Counting()
    _model, runs = wrapped(backend)
    structure = esp.attach(runs, X)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True):
        for samples in range(2, 6):
            runs(torch.ones(samples, 8))
    ran = backend.ran
    runs(torch.ones(30, 8))
    assert backend.ran == ran, "PyTorch gave up"
    with pytest.warns(EspalierWarning, match="gave up on a function after 3 versions"):
        structure.grow("second", by=1)
    runs(X)
    assert backend.ran == ran + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        structure.grow("second", by=1)


def test_a_session_trains_the_compiled_network_and_looks_at_it_in_eager_mode() -> None:
    backend = Counting()
    model, runs = wrapped(backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    structure = esp.attach(runs, X, optimizer=optimizer)
    session = esp.Session(
        structure,
        [
            esp.grow.Random(width=2.0, every=esp.steps(2), until=0.5),
            esp.prune.L1(budget=esp.Parameters(1.0, of="initial"), every=esp.steps(2), start=0.6),
        ],
        loss=lambda model, x: model(x).square().mean(),
        total_steps=10,
    )
    for _ in range(10):
        ran = backend.ran
        loss = session.loss(X)
        assert backend.ran == ran + 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        compiled, ran = backend.compiled, backend.ran
        session.step()
        assert (backend.compiled, backend.ran) == (compiled, ran), "an event needs no compiled code"
    assert len([one for one in session.events if one.sizes]) > 3


def test_gates_are_evaluated_in_eager_mode_and_this_is_said() -> None:
    backend = Counting()
    model, runs = wrapped(backend)
    structure = esp.attach(runs, X, optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.warns(EspalierWarning, match="session.loss runs in eager mode"):
        session = esp.Session(
            structure, [esp.prune.L0()], loss=lambda model, x: model(x).square().mean(), total_steps=20
        )
    session.loss(X).backward()
    with session.decided():
        runs(X)
    assert backend.compiled == 0
    runs(X)
    assert backend.compiled == 1


def test_a_checkpoint_loads_into_a_compiled_model(tmp_path: Any) -> None:
    structure = esp.attach(Network(), X)
    structure.grow("second", by=2)
    structure.insert_layer(ResidualLayer(8, 4), after="second")
    esp.save(structure, tmp_path)
    backend = Counting()
    _model, runs = wrapped(backend)
    runs(X)
    loaded = esp.load(tmp_path, runs, X)
    assert loaded.runs is runs
    torch.testing.assert_close(runs(X), structure.model(X))
    assert backend.ran == 2


def test_a_wrapper_inside_of_a_model_is_refused_with_the_other_way() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(8, 6), backend="eager"), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(PlanError, match=r"module\.compile\(\)"):
        esp.attach(model, X)


@pytest.mark.slow
@pytest.mark.usefixtures("three_versions")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of modules that Inductor imports
def test_inductor_compiles_after_every_edit() -> None:
    model = Network()
    runs = torch.compile(model)
    structure = esp.attach(runs, X, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True))
    compiled = torch._dynamo.utils.counters["stats"]
    for _ in range(4):
        structure.grow("second", by=1)
        before = compiled["unique_graphs"]
        train(runs, structure)
        assert compiled["unique_graphs"] == before + 1
        torch.testing.assert_close(runs(X), eager(model))
