"""Parts of methods of layers by themselves: scores against direct computation, orders, turns, candidates, selection."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from blocks import BLOCKS, Blocks
from loops import loss_of
from torch import Tensor, nn
from zoo_small import BasicBlock

import espalier as esp
from espalier.edit.depth_edits import Insert
from espalier.edit.recipes.redrawn import Redrawn
from espalier.errors import MethodError
from espalier.method import Method
from espalier.parts.clock import Metric
from espalier.parts.depth.cost import layer_sizes, layers_cost
from espalier.parts.depth.norms import NormScales, RemovableNormed
from espalier.parts.depth.order import InOrder
from espalier.parts.depth.places import Copies, NewLayers, Removable, StageEnds
from espalier.parts.depth.scores import GateTaylor, Influence
from espalier.parts.depth.select import Rank
from espalier.parts.depth.trial import gains
from espalier.parts.depth.turns import InTurn
from espalier.parts.goal import Cap, Goal, Scores
from espalier.parts.score import Context
from espalier.structure import Structure
from espalier.train.settings import build


def asked(structure: Structure, places: object, batch: tuple[Tensor, ...], budget: int = 10**9) -> tuple[Context, Goal]:
    """What a method of layers would be asked."""
    catalogue = places(structure, None)  # type: ignore[operator]
    direction = "prune" if isinstance(places, (Removable, RemovableNormed)) else "grow"
    sizes = layer_sizes(direction, catalogue)
    cost = layers_cost(direction, esp.Units(1), structure.topology, catalogue)
    ones, zeros = dict.fromkeys(sizes, 1), dict.fromkeys(sizes, 0)
    goal = Goal(
        direction, sizes, zeros, ones, dict.fromkeys(sizes, 1.0), Cap(cost, budget),
        layers=catalogue.candidates, spare=catalogue.spare,
    )  # fmt: skip
    loss = partial(loss_of, structure.model)
    return Context(structure, tuple(sizes), 0, 0, 0.0, 7, loss, batch, (batch,)), goal


def blocks() -> tuple[Blocks, tuple[Tensor, ...], Structure]:
    torch.manual_seed(4)
    model = Blocks()
    with torch.no_grad():
        for layer, size in zip(model.layers, (0.1, 2.0, 0.5), strict=True):
            layer.down.weight.mul_(size)
    batch = (torch.randn(32, 6),)
    return model, batch, esp.attach(model, batch)


# --- Scores ----------------------------------------------------------------------------------------------------------


def test_block_influence_is_one_minus_the_cosine() -> None:
    model, batch, structure = blocks()
    context, goal = asked(structure, Removable(), batch)
    found = Influence()(context, goal).values
    x = model.stem(batch[0]).detach()
    for number, layer in enumerate(model.layers):
        y = layer(x).detach()
        direct = (1 - torch.cosine_similarity(x, y, dim=-1)).mean()
        assert float(found[f"layers.{number}"]) == pytest.approx(float(direct), rel=1e-4)
        x = y
    assert min(found, key=lambda name: float(found[name])) == "layers.0"


def test_the_features_of_images_are_channels() -> None:
    torch.manual_seed(4)
    model, example = BLOCKS["resnet"].make()
    structure = esp.attach(model, example)
    context, goal = asked(structure, Removable(), example)
    found = Influence()(context, goal).values
    ends: dict[str, tuple[Tensor, Tensor]] = {}
    hook = model.get_submodule("layers.0.1").register_forward_hook(
        lambda module, args, result: ends.update(one=(args[0].detach().clone(), result.detach().clone()))
    )
    model.eval()
    model(*example)
    hook.remove()
    direct = (1 - torch.cosine_similarity(*ends["one"], dim=1)).mean()
    assert float(found["layers.0.1"]) == pytest.approx(float(direct), rel=1e-4)


def test_the_gate_is_the_derivative_of_the_loss() -> None:
    model, batch, structure = blocks()
    context, goal = asked(structure, Removable(), batch)
    found = GateTaylor()(context, goal).values
    model.double()
    batch = tuple(one.double() for one in batch)

    def loss(number: int, gate: float) -> float:
        x = model.stem(batch[0])
        for at, layer in enumerate(model.layers):
            y = layer(x)
            x = x + gate * (y - x) if at == number else y
        y = model.head(x)
        return (y - torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype)).square().mean().item()

    for number in range(3):
        slope = (loss(number, 1 + 1e-5) - loss(number, 1 - 1e-5)) / 2e-5
        assert float(found[f"layers.{number}"]) == pytest.approx(abs(slope), rel=1e-3)


def test_influence_does_not_judge_branches() -> None:
    torch.manual_seed(4)
    model, example = BLOCKS["vit"].make()
    structure = esp.attach(model, example)
    context, _ = asked(structure, Removable(), example)
    catalogue = Removable()(structure, ["blocks.*.mlp"])
    assert set(catalogue.candidates) == {f"blocks.{number}.mlp" for number in range(3)}
    sizes = dict.fromkeys(catalogue.candidates, 1)
    cost = layers_cost("prune", esp.Units(1), structure.topology, catalogue)
    layers, spare = catalogue.candidates, catalogue.spare
    goal = Goal("prune", sizes, sizes, sizes, {}, Cap(cost, 1), layers=layers, spare=spare)
    with pytest.raises(MethodError, match="branch"):
        Influence()(context, goal)
    assert set(GateTaylor()(context, goal).values) == set(sizes)


def test_new_layers_are_asked_all_at_once_as_one_by_one() -> None:
    """What begins as nothing does not see the others, so that one pass answers for all."""
    _model, batch, structure = blocks()
    context, goal = asked(structure, NewLayers("residual"), batch)
    together = gains(context, goal.layers)
    assert len(together) == 3
    for name, one in goal.layers.items():
        assert gains(context, {name: one})[name] == pytest.approx(together[name], rel=1e-4)
        assert together[name] > 0


# --- Orders, turns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "first"), [("spread", [3, 1, 5]), ("middle", [3, 4, 2]), ("last", [7, 6, 5])])
def test_orders(order: str, first: list[int]) -> None:
    torch.manual_seed(0)
    model = Blocks(depth=8)
    batch = (torch.randn(4, 6),)
    context, goal = asked(esp.attach(model, batch), Copies(), batch)
    values = InOrder(order)(context, goal).values  # type: ignore[arg-type]
    ranked = sorted(values, key=lambda name: -float(values[name]))
    assert [int(name.split(".")[1].split(" ")[0]) for name in ranked[:3]] == first


def test_a_stage_stops_once_growing_it_does_not_help() -> None:
    metrics = [Metric(1, 0.5, "max"), Metric(2, 0.6, "max"), Metric(3, 0.6, "max"), Metric(4, 0.7, "max")]
    turns = InTurn(0.01)
    assert turns.stopped([(1, "a")], metrics[:1], 1) == frozenset()  # nothing is known yet
    assert turns.stopped([(1, "a")], metrics, 2) == frozenset()
    assert turns.stopped([(1, "a"), (2, "b")], metrics, 3) == {"b"}
    assert turns.stopped([(1, "a"), (2, "b"), (3, "a")], metrics, 4) == {"b"}
    worse = [Metric(one.epoch, one.value, "min") for one in metrics]
    assert turns.stopped([(1, "a"), (2, "b")], worse, 3) == {"a", "b"}
    silent = [Metric(one.epoch, None, "max") for one in metrics]
    assert turns.stopped([(1, "a"), (2, "b")], silent, 3) == frozenset()


class Stages(nn.Module):
    """One block in each of three stages, all but the first at a boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.stages = nn.ModuleList(nn.Sequential(BasicBlock(*pair, stride=stride)) for *pair, stride in
                                    ((4, 4, 1), (4, 6, 2), (6, 8, 2)))  # fmt: skip
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))


def stages() -> tuple[esp.Session, Iterator[None]]:
    torch.manual_seed(1)
    model, batch = Stages(), (torch.randn(8, 3, 8, 8),)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    structure = esp.attach(model, batch, optimizer=optimizer)
    method = esp.grow.AutoGrow(every=esp.epochs(1), start=0.0, until=1.0)
    session = esp.Session(structure, [method], loss=loss_of, total_steps=40)

    def steps() -> Iterator[None]:
        while True:
            for _ in range(2):
                loss = session.loss(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                session.step()
            yield

    return session, steps()


def test_autogrow_takes_stages_in_turn_and_drops_those_that_do_not_pay() -> None:
    session, training = stages()
    for metric in (0.1, 0.3, 0.3, 0.5, 0.7, 0.7, 0.7, 0.7, 0.7):
        next(training)
        session.epoch_end(metric)
    grown = [event.layers[0].split(" after ")[1] for event in session.events]
    # stages.1 does not pay (0.3 before and after), nor do at last stages.2 and stages.0 (0.7); then nothing grows
    assert grown == ["stages.0.0", "stages.1.0", "stages.2.0", "stages.0.1", "stages.2.1", "stages.0.2"]
    kinds = [type(one).__name__ for one in session.model.get_submodule("stages.0")]
    assert kinds == ["BasicBlock"] * (1 + sum(one.startswith("stages.0") for one in grown))


def test_a_stage_that_cannot_be_repeated_gets_a_residual_layer() -> None:
    structure = stages()[0].structure
    found = StageEnds()(structure, None)
    assert found.stages == {"stages.0": 1, "stages.1": 1, "stages.2": 1}
    kinds = [edit.layer.kind for one in found.candidates.values() for edit in one.edits if isinstance(edit, Insert)]
    assert kinds == ["redrawn", "residual", "residual"]


# --- Candidates and selection ----------------------------------------------------------------------------------------


def test_a_stage_keeps_its_last_block() -> None:
    torch.manual_seed(0)
    model, example = BLOCKS["resnet"].make()
    structure = esp.attach(model, example)
    context, goal = asked(structure, Removable(kept=1), example, budget=0)
    values = Scores({name: torch.tensor([float(at)]) for at, name in enumerate(goal.layers)})
    # layers.1.0, at the boundary, is the one that stays of the second stage
    assert Rank()(values, goal) == {"layers.0.0": (0,), "layers.1.1": (0,)}
    _, goal = asked(structure, Removable(kept=2), example, budget=0)
    assert Rank()(values, goal) == {}
    never = Scores({name: torch.tensor([math.inf]) for name in goal.layers})
    _, goal = asked(structure, Removable(kept=0), example, budget=0)
    assert Rank()(never, goal) == {}
    assert context.axes == ("layers.0.0", "layers.0.1", "layers.1.1")


def test_what_comes_fits_and_what_is_worth_nothing_stays_away() -> None:
    _model, batch, structure = blocks()
    _, goal = asked(structure, Copies(), batch, budget=4)
    names = list(goal.layers)
    values = Scores(dict(zip(names, torch.tensor([[1.0], [3.0], [-math.inf]]), strict=True)))
    assert Rank()(values, goal) == {names[1]: (0,)}
    _, goal = asked(structure, Copies(), batch, budget=9)
    assert Rank()(values, goal) == {names[0]: (0,), names[1]: (0,)}
    assert Rank(at_most=1)(values, goal) == {names[1]: (0,)}


def test_nothing_of_a_redrawn_copy_is_the_source_but_its_shapes() -> None:
    model, _batch, structure = blocks()
    structure.insert_layer(Redrawn("layers.1", seed=3), after="layers.1")
    assert isinstance(model.layers, nn.ModuleList)
    old, new = model.layers[1], model.layers[2]
    assert new.up.weight.shape == old.up.weight.shape
    assert not torch.equal(new.up.weight, old.up.weight)
    assert float(new.up.weight.detach().abs().max()) <= 1 / math.sqrt(8)  # as torch initialises it
    again = Redrawn("layers.1", seed=3).build(dict(model.named_modules()).__getitem__, "layers.1")
    assert torch.equal(again.up.weight, new.up.weight)


def test_names_that_are_no_layers_are_refused() -> None:
    model, batch, structure = blocks()
    structure = esp.attach(model, batch, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(MethodError, match=r"no layer that may change fits 'layer\.\*'"):
        esp.Session(structure, [esp.prune.ShortGPT(axes=["layer.*"])], loss=loss_of, total_steps=3)
    with pytest.raises(MethodError, match="allows a cost of"):
        esp.Session(structure, [esp.prune.ShortGPT(budget=esp.Parameters(10))], loss=loss_of, total_steps=3)


# --- Settings --------------------------------------------------------------------------------------------------------


def test_settings_know_methods_of_layers() -> None:
    def names(found: list[Method]) -> list[str]:
        return [one.name for one in found]

    assert names(build("constant", "copy-blocks", "shortgpt", total_steps=100)) == ["copy-blocks", "shortgpt"]
    assert names(build("growing", "net2deeper", "magnitude", total_steps=100)) == ["net2deeper", "magnitude"]
    assert names(build("shrinking", None, "layers-random", total_steps=100)) == ["layers-random"]
    with pytest.raises(MethodError, match="layers have no scope"):
        build("shrinking", None, "shortgpt", total_steps=100, scope="global")
    with pytest.raises(MethodError, match="names of axes mean axes"):
        build("growing", "net2deeper", "magnitude", total_steps=100, axes=["layers.*"])


def test_budgets_of_one_level_bind_the_other() -> None:
    """Once a pruning of widths has met its budget of parameters for good, growing layers keeps within it."""
    model, batch, _ = blocks()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    structure = esp.attach(model, batch, optimizer=optimizer)
    methods = [
        esp.prune.Random(budget=esp.Parameters(0.8, of="initial"), every=esp.steps(2), start=0.0, until=esp.steps(2)),
        esp.grow.CopyBlocks(per_event=1, every=esp.steps(2), start=esp.steps(3), until=1.0),
    ]
    session = esp.Session(structure, methods, loss=loss_of, total_steps=12)
    limit = 0.8 * structure.cost().parameters
    for _ in range(12):
        loss = session.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step()
    assert {event.action for event in session.events} <= {"prune", "grow"}
    assert structure.cost().parameters <= limit


# --- Scales of norms -------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """Two blocks without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def test_layers_are_worth_the_scales_of_the_norms_that_end_them() -> None:
    torch.manual_seed(0)
    model, example = BLOCKS["resnet"].make()
    with torch.no_grad():
        for number, module in enumerate(one for one in model.modules() if isinstance(one, nn.BatchNorm2d)):
            module.weight.copy_(torch.randn_like(module.weight) * (1 + number))
    structure = esp.attach(model, example)
    context, goal = asked(structure, RemovableNormed(), example)
    found = NormScales()(context, goal).values
    assert found.keys() == goal.layers.keys() != set()
    for name in goal.layers:
        *_, last = (one for one in model.get_submodule(name).modules() if isinstance(one, nn.BatchNorm2d))
        assert float(found[name]) == pytest.approx(float(last.weight.detach().abs().mean()))


def test_all_norms_count_where_none_of_them_comes_last() -> None:
    model, batch, structure = blocks()
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            layer.norm.weight.copy_(torch.linspace(-1, 3, 8) * (3 - number))
    context, goal = asked(structure, RemovableNormed(), batch)
    found = NormScales()(context, goal).values
    assert [float(one) for one in found.values()] == pytest.approx(
        [float(layer.norm.weight.detach().abs().mean()) for layer in model.layers]
    )
    method = esp.prune.LayerScales(budget=esp.Units(2))
    (edit,) = method.propose(context, asked(structure, RemovableNormed(), batch, budget=2)[1]).depth
    assert str(edit).startswith("remove layers.2")


def test_where_there_is_no_norm_there_is_a_clear_refusal() -> None:
    model, batch = Bare(), (torch.randn(3, 4),)
    structure = esp.attach(model, batch, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(MethodError, match=r"layers\.0, layers\.1 have no norm with a scale"):
        esp.Session(structure, [esp.prune.LayerScales()], loss=loss_of, total_steps=3)
    context, goal = asked(structure, Removable(), batch)
    with pytest.raises(MethodError, match=r"layers\.0 has no norm with a scale"):
        NormScales()(context, goal)


def test_blocks_without_a_norm_stay_beside_others_and_are_refused_by_name() -> None:
    torch.manual_seed(0)
    model, batch = Blocks(), (torch.randn(8, 6),)
    model.layers[1].norm = nn.LayerNorm(8, elementwise_affine=False)
    structure = esp.attach(model, batch, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    assert set(RemovableNormed()(structure, None).candidates) == {"layers.0", "layers.2"}
    with pytest.raises(MethodError, match=r"layers\.1 has no norm with a scale"):
        esp.Session(structure, [esp.prune.LayerScales(axes=["layers.*"])], loss=loss_of, total_steps=3)
