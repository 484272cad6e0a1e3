"""Sessions in which layers come and go: by the user's own edits, under methods that change widths."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import BLOCKS
from effort import in_turn
from loops import loss_of
from test_memory import Marks
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

import espalier as esp
from espalier.errors import EspalierError
from espalier.method import Method
from espalier.parts.units.where import choose_axes
from espalier.structure import Structure

pytestmark = pytest.mark.filterwarnings("ignore::espalier.errors.EspalierWarning")
TOTAL = 40
Edits = dict[int, list[Callable[[Structure], object]]]


def methods() -> list[Method]:
    """A grower and a pruner of widths, both with much to remember."""
    grower = esp.grow.Random(
        width=1.5, every=esp.steps(5), start=esp.steps(2), until=0.9, scope="global",
        when=(esp.Plateau("loss", patience=1) | esp.EffectiveRank(0.5)).held(1),
        recovery=esp.Recovery(warm=esp.steps(3), rates="norm"),
    )  # fmt: skip
    pruner = esp.prune.Slimming(
        budget=esp.Parameters(0.7, of="initial"), every=esp.steps(4), start=esp.steps(4), until=0.9
    )
    return [replace(grower, memory=Marks), pruner]


class Training:
    """A network of blocks in training, on other batches at every step."""

    def __init__(self, name: str, given: list[Method], *, kept: Path | None = None, seed: int = 0) -> None:
        torch.manual_seed(3)
        block = BLOCKS[name]
        model, example = block.make()
        self.containers = block.containers
        generator = torch.Generator().manual_seed(7)
        self.batches = [
            tuple(torch.randn(16, *one.shape[1:], generator=generator) for one in example) for _ in range(TOTAL)
        ]
        optimizer: Optimizer = AdamW(model.parameters(), 1e-2) if seed % 2 else SGD(model.parameters(), 0.01, 0.9)
        if kept is None:
            self.structure = esp.attach(model, example, optimizer=optimizer)
        else:
            self.structure = esp.load(kept, model, example, optimizer=optimizer)
        self.optimizer = optimizer
        self.session = esp.Session(
            self.structure, given, loss=loss_of, probe=self.batches[:2], total_steps=TOTAL, seed=seed
        )
        torch.manual_seed(0)

    def train(self, until: int, edits: Edits) -> Training:
        while self.session.steps_done < until:
            for edit in edits.get(self.session.steps_done, ()):
                edit(self.structure)
            loss = self.session.loss(self.batches[self.session.steps_done])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.session.step()
            if self.session.steps_done % 5 == 0:
                self.session.epoch_end(0.0)
        return self

    def events(self) -> list[dict[str, Any]]:
        return [{**event.to_json(), "seconds": 0.0} for event in self.session.events]

    def all_weights(self) -> dict[str, Tensor]:
        return {name: one.clone() for name, one in self.structure.model.state_dict().items()}


def drawn_edits(name: str, seed: int) -> Edits:
    """Cells added and removed at random steps, between two steps of training."""
    generator = random.Random(f"{name} {seed}")
    containers = BLOCKS[name].containers

    def edit(structure: Structure, choice: int, where: float, container: str) -> None:
        count = len(list(structure.model.get_submodule(container).children()))
        try:
            if choice and count < 5:
                structure.add_cell(container, int(where * (count + 1)), init="zero" if choice == 1 else "copy")
            elif count > 1:
                structure.remove_layer(f"{container}.{int(where * count)}")
            else:
                structure.add_cell(container)
        except EspalierError:  # the first cell of a stage is none that could go
            structure.add_cell(container)

    found: Edits = {}
    for step in generator.sample(range(1, TOTAL - 1), 5):
        fixed = generator.randrange(3), generator.random(), generator.choice(containers)
        found.setdefault(step, []).append(lambda structure, fixed=fixed: edit(structure, *fixed))
    return found


def state_of(run: Training) -> dict[str, Any]:
    return {**run.session.state_dict(), "events": run.events()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", BLOCKS)
def test_methods_of_widths_follow_layers_that_come_and_go(name: str, seed: int) -> None:
    run, edits = Training(name, methods(), seed=seed), drawn_edits(name, seed)
    for step in range(1, TOTAL + 1):
        run.train(step, edits)
        present = set(run.structure.axes)
        for one in run.session._controller.running:
            named = {*one.axes, *one.reference, *one.left_out}
            assert named <= present
            if one.memory is not None and isinstance(one.memory, Marks):
                sizes = {axis: len(marks) for axis, marks in one.memory.marks.items()}
                assert set(one.axes) <= sizes.keys() <= present
                assert all(run.structure.axes[axis].size == size for axis, size in sizes.items())
    depths = [edit.plan.depth for edit in run.structure.history]
    assert sum(map(bool, depths)) == 5
    for one in run.session._controller.running:
        able = {axis for axis, why in choose_axes(run.structure, one.method.direction, None).items() if why is None}
        assert set(one.axes) == able
    actions = {event.action for event in run.session.events}
    assert {"grow", "prune"} <= actions <= {"grow", "prune", "rejected"}


@pytest.mark.parametrize(
    ("name", "seed"),
    [pytest.param(name, seed, marks=in_turn(row, seed)) for row, name in enumerate(BLOCKS) for seed in range(2)],
)
def test_a_run_goes_on_to_the_same_bits_across_edits_of_layers(name: str, seed: int, tmp_path: Path) -> None:
    edits = drawn_edits(name, seed)
    at = sorted(edits)[2] + 1
    through = Training(name, methods(), seed=seed).train(at, edits)
    esp.save(through.structure, tmp_path)
    state, noise = json.dumps(through.session.state_dict()), torch.get_rng_state()
    through.train(TOTAL, edits)
    rest = Training(name, methods(), seed=seed, kept=tmp_path)
    rest.session.load_state_dict(json.loads(state))
    torch.set_rng_state(noise)
    assert json.dumps(rest.session.state_dict()) == state
    rest.train(TOTAL, edits)
    assert rest.events() == through.events()
    assert same(rest.all_weights(), through.all_weights())
    assert state_of(rest) == state_of(through)


@pytest.mark.parametrize("name", BLOCKS)
def test_edits_of_layers_that_are_undone_leave_no_trace(name: str) -> None:
    edits = drawn_edits(name, 0)

    def undone(structure: Structure) -> None:
        structure.add_cell(BLOCKS[name].containers[0], 0 if name == "blocks" else 1)
        assert session.state_dict()["sizes"].keys() == structure.axes.keys()  # the session took notice
        structure.undo()

    plain = Training(name, methods()).train(TOTAL, edits)
    run = Training(name, methods())
    session = run.session
    often: Edits = {step: [undone, *edits.get(step, ())] for step in range(3, TOTAL, 4)}
    run.train(TOTAL, {**edits, **often})
    assert run.events() == plain.events()
    assert same(run.all_weights(), plain.all_weights())


def test_names_mean_what_they_meant() -> None:
    """A method that was given one axis by its name keeps to it; one that was given a pattern takes in what is new."""
    named = esp.prune.Random(axes=["layers.1.up"], amount=0.1, every=esp.steps(100))
    pattern = esp.prune.Random(axes=["layers.*.up"], amount=0.1, every=esp.steps(100))
    run = Training("blocks", [named, pattern])
    one, other = run.session._controller.running
    assert (one.axes, len(other.axes)) == (("layers.1.up",), 3)
    run.structure.add_cell("layers", 0)
    run.train(1, {})
    assert one.axes == ("layers.2.up",)
    assert other.axes == tuple(f"layers.{number}.up" for number in range(4))
    run.structure.remove_layer("layers.2")
    run.train(2, {})
    assert one.axes == ()
    assert other.axes == tuple(f"layers.{number}.up" for number in range(3))


def test_a_session_goes_on_although_what_it_was_given_by_name_is_gone(tmp_path: Path) -> None:
    def given() -> list[Method]:
        return [
            esp.prune.Random(axes=["layers.1.up", "layers.2.up"], amount=0.1, every=esp.steps(3)),
            esp.prune.ShortGPT(axes=["layers.0", "layers.1"], per_event=1, every=esp.steps(2), start=0.0, until=1.0),
        ]

    run = Training("blocks", given())
    run.structure.remove_layer("layers.2")
    run.train(3, {})
    assert [len(event.layers) for event in run.session.events if event.layers] == [1]
    esp.save(run.structure, tmp_path)
    state, noise = json.dumps(run.session.state_dict()), torch.get_rng_state()
    rest = Training("blocks", given(), kept=tmp_path)
    rest.session.load_state_dict(json.loads(state))
    torch.set_rng_state(noise)
    run.train(9, {})
    rest.train(9, {})
    assert run.events() == rest.events()
    assert same(run.all_weights(), rest.all_weights())
