"""What is kept beside a network: when each unit came, and what methods remember of their units between steps."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from loops import loss_of, start
from zoo_small import ZOO

import espalier as esp
from espalier.edit.births import followed, from_json, to_json
from espalier.errors import CheckpointError
from espalier.graph.dims import IntArray
from espalier.method import Method
from espalier.parts.names import Names, carried
from espalier.parts.score import Context


class Marks:
    """One number for every unit: how many steps it has seen."""

    def __init__(self) -> None:
        self.marks: dict[str, list[int]] = {}

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        for axis, origins in units.items():
            old = self.marks.get(axis, [0] * (int(origins.max()) + 1))
            self.marks[axis] = [0 if one < 0 else old[one] for one in origins]

    def rename(self, names: Names, /) -> None:
        self.marks = carried(self.marks, names.axes)

    def after_step(self, context: Context, /) -> None:
        assert context.memory is self
        assert context.total_steps == 40
        for axis in context.axes:
            size = context.structure.axes[axis].size
            self.marks[axis] = [one + 1 for one in self.marks.get(axis, [0] * size)]

    def state(self) -> dict[str, Any]:
        return {axis: list(one) for axis, one in self.marks.items()}

    def restore(self, state: Mapping[str, Any], /) -> None:
        self.marks = {axis: [int(one) for one in marks] for axis, marks in state.items()}


def remembering() -> list[Method]:
    return [
        replace(esp.grow.Random(amount=0.2, every=esp.steps(6), start=esp.steps(3), until=0.8), memory=Marks),
        replace(esp.prune.Random(amount=0.2, every=esp.steps(4), start=esp.steps(5), until=0.8), memory=Marks),
    ]


# --- Births ----------------------------------------------------------------------------------------------------------


def test_births_follow_every_edit_and_its_undoing() -> None:
    model, example = ZOO["mlp"]()
    structure = esp.attach(model, example)
    assert structure.births["0"].tolist() == [0] * 12
    structure.step = 7
    edit = structure.grow("0", by=3)
    assert edit.units == {"0": (*range(12), -1, -1, -1)}
    first = structure.births["0"].tolist()
    assert first == [0] * 12 + [7] * 3
    structure.step = 9
    structure.prune({"0": [0, 13], "2": [1]})
    assert structure.births["0"].tolist() == [0] * 11 + [7] * 2
    structure.grow({"0": 1, "2": 2})
    assert structure.births["0"].tolist() == [0] * 11 + [7] * 2 + [9]
    assert structure.births["2"].tolist() == [0] * 8 + [9] * 2
    structure.undo()
    structure.undo()
    assert structure.births["0"].tolist() == first
    assert structure.births["2"].tolist() == [0] * 9


def test_a_copy_of_a_unit_is_new() -> None:
    births = {"a": np.array([0, 4, 6]), "b": np.array([1])}
    after = followed(births, {"a": np.array([0, 2, 2, 0, -1])}, now=8)
    assert after["a"].tolist() == [0, 6, 8, 8, 8]
    assert after["b"].tolist() == [1]


def test_births_are_read_as_they_were_written() -> None:
    births = {"a": np.array([0, 0, 3, 3, 7]), "b": np.array([0, 0])}
    data = json.loads(json.dumps(to_json(births)))
    assert data == {"a": [[0, 2], [3, 2], [7, 1]]}
    read = from_json(data, {"a": 5, "b": 2})
    assert {axis: one.tolist() for axis, one in read.items()} == {"a": [0, 0, 3, 3, 7], "b": [0, 0]}
    with pytest.raises(CheckpointError, match="births of a: expected 4 units, found 5"):
        from_json(data, {"a": 4, "b": 2})


# --- Memories --------------------------------------------------------------------------------------------------------


def test_memories_follow_their_own_and_others_edits() -> None:
    run = start("mlp", remembering(), total_steps=40).train(40)
    assert len(run.session.events) > 6
    for one in run.session.state_dict()["methods"]:
        for axis, marks in one["memory"].items():
            births = run.structure.births[axis].tolist()
            assert marks == [40 - birth for birth in births]
            assert len(set(births)) > 1


def test_what_is_undone_is_undone_in_memories() -> None:
    run = start("mlp", remembering(), total_steps=40).train(2)
    before = run.session.state_dict()["methods"]
    run.structure.prune("0", [3, 4])
    run.structure.grow("2", by=2)
    between = run.session.state_dict()["methods"]
    assert len(between[0]["memory"]["0"]) == 10
    assert between[0]["memory"]["2"][-2:] == [0, 0]
    run.structure.undo()
    run.structure.undo()
    assert run.session.state_dict()["methods"] == before


def test_a_memory_goes_on_where_it_was_saved() -> None:
    half = start("mlp", remembering(), total_steps=40).train(2)
    state = json.loads(json.dumps(half.session.state_dict()))
    through = half.train(20)
    rest = start("mlp", remembering(), total_steps=40).train(2)
    rest.session = esp.Session(rest.structure, remembering(), loss=loss_of, total_steps=40)
    rest.session.load_state_dict(state)
    rest.train(20)
    assert json.dumps(rest.session.state_dict()["methods"]) == json.dumps(through.session.state_dict()["methods"])
    state["methods"][0]["memory"] = {"0": ["no number"]}
    with pytest.raises(CheckpointError, match="no state of a session: ValueError"):
        start("mlp", remembering(), total_steps=40).session.load_state_dict(state)
