"""Masks are exact after every step, follow every edit, and come back bit by bit."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshots import differences, snapshot
from torch import Tensor, nn
from torch.optim import Optimizer
from zoo_small import ZOO

import espalier as esp
from espalier.edit.plan import Plan, Remask, Resize, mask_plan
from espalier.errors import CheckpointError, PlanError
from espalier.parts.weights.weights import choose_weights
from espalier.structure import Structure

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, 0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adam_fused": lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2),
    "rprop": lambda p: torch.optim.Rprop(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
    "muon": lambda p: torch.optim.Muon([one for one in p if one.dim() == 2]),
}
NAMES = ("0.weight", "2.weight")


def mlp(optimizer: str = "adam", follow: bool = False) -> Structure:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    copies = [copy.deepcopy(model)] if follow else []
    made = OPTIMIZERS[optimizer](list(model.parameters()))
    return esp.attach(model, torch.randn(4, 6), optimizer=made, follow=copies)


def drawn(shape: tuple[int, ...], seed: int = 0, density: float = 0.3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def some_masks(structure: Structure, seed: int = 0) -> dict[str, Tensor]:
    shapes = {name: tuple(structure.model.get_parameter(name).shape) for name in NAMES}
    return {name: drawn(shape, seed) for name, shape in shapes.items()}


def train(structure: Structure, steps: int, seed: int = 0) -> None:
    optimizer, generator = structure.optimizer, torch.Generator().manual_seed(seed)
    assert optimizer is not None
    width = structure.example.shape[1]
    for _ in range(steps):
        x, y = torch.randn(4, width, generator=generator), torch.randn(4, 3, generator=generator)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = (structure.model(x) - y).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def dead(structure: Structure, name: str) -> Tensor:
    return structure.model.get_parameter(name).detach()[~structure.masks[name]]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_thousand_steps_leave_masked_weights_and_their_momenta_at_zero(name: str) -> None:
    structure = mlp(name)
    train(structure, 2)
    masks = some_masks(structure)
    masks["2.weight"][0] = True  # every unit is read
    structure.mask(masks)
    before = {one: structure.model.get_parameter(one).detach().clone() for one in NAMES}
    train(structure, 300 if name == "lbfgs" else 1000, seed=1)
    assert structure.optimizer is not None
    for one, mask in masks.items():
        parameter = structure.model.get_parameter(one)
        assert not bool(parameter.detach()[~mask].any())
        assert bool((parameter.detach()[mask] != before[one][mask]).float().mean() > 0.9)
        state = structure.optimizer.state.get(parameter, {})
        for key in ("exp_avg", "momentum_buffer", "grad_avg", "prev", "ax"):
            if key in state:
                assert not bool(state[key][~mask].any()), key


def test_the_hook_is_there_only_while_there_are_masks() -> None:
    structure = mlp()
    train(structure, 1)
    assert structure.optimizer is not None
    hooks = structure.optimizer._optimizer_step_post_hooks
    assert len(hooks) == 0
    structure.mask(some_masks(structure))
    own = len(hooks)
    structure.unmask(*NAMES)
    assert len(hooks) == own - 1
    structure.undo()
    assert len(hooks) == own
    train(structure, 3)
    assert not bool(dead(structure, NAMES[0]).any())


def test_masks_outlive_the_structure() -> None:
    structure = mlp()
    model, optimizer, masks = structure.model, structure.optimizer, some_masks(structure)
    structure.mask(masks)
    del structure
    assert optimizer is not None
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    assert not bool(model.get_parameter(NAMES[0]).detach()[~masks[NAMES[0]]].any())


def test_contracts() -> None:
    structure = mlp()
    mask = drawn((8, 6))
    edit = structure.mask("0.weight", mask)
    assert edit.contract == "changing"
    assert edit.masks == {"0.weight": (48, int(mask.sum()))}
    assert structure.mask("0.weight", mask).contract == "exact"
    more = mask | drawn((8, 6), 1)
    x = torch.randn(3, 6)
    before = structure.model(x)
    assert structure.mask("0.weight", more).contract == "exact"  # what is live anew starts at zero
    assert torch.equal(structure.model(x), before)
    assert structure.unmask("0.weight").contract == "exact"
    assert torch.equal(structure.model(x), before)
    assert structure.masks == {}
    train(structure, 1)
    assert bool((structure.model.get_parameter("0.weight").detach()[~more] != 0).all())


def test_weights_that_live_anew_have_no_momentum_and_keep_the_size_of_steps() -> None:
    structure = mlp()
    train(structure, 3)
    mask = drawn((8, 6))
    structure.mask("0.weight", mask)
    train(structure, 3)
    assert structure.optimizer is not None
    structure.mask("0.weight", torch.ones(8, 6, dtype=torch.bool))
    state = structure.optimizer.state[structure.model.get_parameter("0.weight")]
    assert not bool(state["exp_avg"][~mask].any())
    assert bool(state["exp_avg"][mask].all())
    assert bool((state["exp_avg_sq"] > 0).all())  # of the dense gradients


def test_masking_and_undo_are_bitwise_and_copies_follow() -> None:
    structure = mlp(follow=True)
    train(structure, 3)
    follower = structure.surgery.follow[0]
    structure.mask(some_masks(structure, 3))
    train(structure, 2)
    before, other = snapshot(structure.model, structure.optimizer, structure), snapshot(follower)
    masks = structure.masks
    structure.mask(some_masks(structure, 4))
    gone = ~structure.masks["0.weight"] | ~masks["0.weight"]
    assert not bool(follower.get_parameter("0.weight").detach()[gone].any())
    structure.apply(Plan((Resize("0", (1,), 2), Resize("2", (0, 3))), masks=(Remask("2.weight"),)))
    assert set(structure.masks) == {"0.weight"}
    structure.undo()
    structure.undo()
    assert differences(before, snapshot(structure.model, structure.optimizer, structure)) == []
    assert differences(other, snapshot(follower)) == []
    assert {name: id(mask) for name, mask in structure.masks.items()} == {
        name: id(mask) for name, mask in masks.items()
    }


@pytest.mark.parametrize("seed", range(12))
def test_masks_follow_random_plans_as_a_dense_oracle_does(seed: int, tmp_path: Path) -> None:
    """A mask is to follow as weights would that are 1 where it is live; new entries are live."""
    rng, structure = random.Random(seed), mlp("adamw")
    oracle = some_masks(structure, seed)
    structure.mask(oracle)
    axes = {"0.weight": ("0", None), "2.weight": ("2", "0")}
    for turn in range(6):
        train(structure, 2, turn)
        edits = []
        for name in rng.sample(["0", "2"], rng.randint(1, 2)):
            size = structure.axes[name].size
            remove = tuple(sorted(rng.sample(range(size), rng.randint(0, size - 1))))
            edits.append(Resize(name, remove, rng.randint(0 if remove else 1, 4)))
        masks = {}
        for tensor, sides in axes.items():
            for dim, axis in enumerate(sides):
                for edit in edits:
                    if edit.axis == axis:
                        kept = [one for one in range(oracle[tensor].shape[dim]) if one not in edit.remove]
                        known = oracle[tensor].index_select(dim, torch.tensor(kept))
                        shape = [*known.shape]
                        shape[dim] = edit.add
                        oracle[tensor] = torch.cat([known, torch.ones(shape, dtype=torch.bool)], dim)
            if rng.random() < 0.4:
                masks[tensor] = oracle[tensor] = drawn(tuple(oracle[tensor].shape), 100 * seed + turn)
        plan = Plan(tuple(edits), seed=turn, masks=mask_plan(masks).masks)
        structure.apply(Plan.from_json(plan.to_json()))
        if rng.random() < 0.3:
            structure.undo()
            structure.apply(plan)
        if rng.random() < 0.4:
            esp.save(structure, tmp_path)
            weights = {name: one.clone() for name, one in structure.model.state_dict().items()}
            structure = esp.load(tmp_path, *_fresh(), optimizer=None) if turn == 5 else _loaded(tmp_path)
            assert all(torch.equal(one, weights[name]) for name, one in structure.model.state_dict().items())
        assert set(structure.masks) == set(oracle)
        for tensor, mask in oracle.items():
            assert torch.equal(structure.masks[tensor], mask)
            assert not bool(dead(structure, tensor).any())


ZOO_NETWORKS = ["resnext", "shufflenet", "mobilenet", "vit", "grouped_query", "tied_embeddings", "hf_gpt2", "densenet"]


@pytest.mark.parametrize("name", ZOO_NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_masks_follow_as_weights_do_in_any_network(name: str, seed: int) -> None:
    """The oracle: a copy whose weights are 1 where they are live and whose new weights are 1, edited densely."""
    model, example = ZOO[name]()
    dense = copy.deepcopy(model)
    structure, oracle = esp.attach(model, example), esp.attach(dense, example)
    masks = {one: drawn(tuple(model.get_parameter(one).shape), seed) for one in choose_weights(structure, None)}
    structure.mask(masks)
    with torch.no_grad():
        for one, mask in masks.items():
            dense.get_parameter(one).copy_(mask)
    rng = random.Random(seed)
    able = [axis for axis in structure.axes.values() if axis.prunable and axis.growable]
    edits = []
    for axis in rng.sample(able, min(3, len(able))):
        remove = tuple(sorted(rng.sample(range(axis.size), rng.randint(0, axis.size - 1))))
        edits.append(Resize(axis.name, remove, rng.randint(0 if remove else 1, 3)))
    plan = Plan(tuple(edits), seed=seed)
    shapes = {one: new.shape for one, new in oracle.preview(plan).tensors.items() if one in masks}
    structure.apply(plan)
    grown = {one: oracle.preview(plan).sources(one) for one in shapes}
    touched = {one for one, sources in grown.items() if any(source is not None for source in sources)}
    oracle.apply(replace(plan, values={one: torch.ones(shapes[one]) for one in touched}))
    for one in masks:
        assert torch.equal(structure.masks[one], dense.get_parameter(one).detach() != 0), one
        assert not bool(dead(structure, one).any())


def _fresh() -> tuple[nn.Module, Tensor]:
    fresh = mlp("adamw")
    return fresh.model, fresh.example


def _loaded(folder: Path) -> Structure:
    model, example = _fresh()
    return esp.load(folder, model, example, optimizer=torch.optim.AdamW(model.parameters(), 1e-2))


def test_training_goes_on_to_the_same_bits_after_load(tmp_path: Path) -> None:
    structure = mlp("adamw")
    structure.mask(some_masks(structure))
    train(structure, 3)
    structure.grow("0", 2)
    esp.save(structure, tmp_path)
    other = _loaded(tmp_path)
    for one in (structure, other):
        train(one, 5, seed=9)
    first, second = structure.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(one, second[name]) for name, one in first.items())
    assert not bool(dead(other, "2.weight").any())
    esp.save(mlp("adamw"), tmp_path)  # without masks
    assert _loaded(tmp_path).masks == {}


def test_a_damaged_mask_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = mlp("adamw")
    structure.mask(some_masks(structure))
    structure.surgery.known = structure.surgery.known.with_masks({"0.weight": torch.ones(3, dtype=torch.bool)})
    esp.save(structure, tmp_path)
    with pytest.raises(CheckpointError, match="fits no parameter"):
        _loaded(tmp_path)


def test_tied_parameters_have_one_mask() -> None:
    model, example = ZOO["tied_embeddings"]()
    structure = esp.attach(model, example)
    (alias, first), *_ = structure.topology.aliases.items()
    mask = drawn(structure.topology.shape(first))
    structure.mask(alias, mask)
    assert set(structure.masks) == {first}
    assert not bool(model.get_parameter(alias).detach()[~mask].any())
    with pytest.raises(PlanError, match="masked twice"):
        structure.mask({alias: mask, first: mask})


def test_a_memory_shared_by_two_parameters_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    structure = esp.attach(model, torch.randn(2, 4))
    with torch.no_grad():
        model[1].weight.set_(model[0].weight.detach())
    with pytest.raises(PlanError, match=r"shares its memory with 0\.weight"):
        structure.mask("1.weight", drawn((4, 4)))


def test_wrong_masks_are_refused_and_change_nothing() -> None:
    structure = mlp()
    before = snapshot(structure.model, structure.optimizer, structure)
    with pytest.raises(PlanError, match="expected a parameter"):
        structure.mask("nothing", drawn((8, 6)))
    with pytest.raises(PlanError, match=r"expected a mask of shape \(8, 6\).*found \(6, 8\)"):
        structure.mask("0.weight", drawn((6, 8)))
    with pytest.raises(PlanError, match=r"torch\.bool, True for what is live; found torch\.float32"):
        structure.mask("0.weight", torch.ones(8, 6))
    with pytest.raises(PlanError, match="no mask to take away"):
        structure.unmask("0.weight")
    with pytest.raises(PlanError, match="which weights are live"):
        structure.mask("0.weight")
    with pytest.raises(PlanError, match="not both"):
        structure.mask({}, drawn((8, 6)))
    with pytest.raises(PlanError, match=r"a mask of shape \(3, 3\) has 2 bytes, found 1"):
        Remask("0.weight", (3, 3), b"x")
    assert differences(before, snapshot(structure.model, structure.optimizer, structure)) == []


def test_plans_with_masks_are_data(tmp_path: Path) -> None:
    mask = drawn((8, 6))
    plan = Plan((Resize("2", (0,)),), masks=(Remask.of("0.weight", mask), Remask("2.weight")))
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    found = again.masks[0].mask
    assert found is not None
    assert torch.equal(found, mask)
    dead_share = 1 - float(mask.float().mean())
    assert str(plan).splitlines()[1:] == [
        f"0.weight: mask {int((~mask).sum())} of 48 weights ({dead_share:.1%})",
        "2.weight: no mask",
    ]
    with pytest.raises(PlanError, match="not a plan in JSON"):
        Plan.from_json(plan.to_json().replace('"live": "', '"live": "?'))


def test_a_plan_whose_resize_is_refused_leaves_masks_alone() -> None:
    structure = mlp()
    structure.mask(some_masks(structure))
    masks = structure.masks
    with pytest.raises(PlanError):
        structure.apply(Plan((Resize("2", (77,)),), masks=(Remask("0.weight"),)))
    assert structure.masks is masks


def test_masks_that_cannot_come_back_are_freed() -> None:
    structure = mlp()
    kept = []
    for _ in range(4):
        train(structure, 1)
        structure.mask(some_masks(structure))
        kept.append(weakref.ref(structure.masks["0.weight"]))
    gc.collect()
    assert [one() is None for one in kept] == [True, True, False, False]
    structure.undo()
    assert structure.masks["0.weight"] is kept[2]()


def test_printing_a_structure_lists_what_is_masked() -> None:
    structure = mlp()
    assert "masks hold" not in str(structure)
    structure.mask("0.weight", torch.arange(48).view(8, 6) < 12)
    *_, said, header, _, row = str(structure).splitlines()
    assert said == "masks hold 36 of 48 weights of 1 parameters at zero"
    assert header.split() == ["parameter", "weights", "live", "sparsity"]
    assert row.split() == ["0.weight", "48", "12", "75.0%"]
