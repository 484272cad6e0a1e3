"""Layers and cells come and go in the networks of the zoo: what is promised holds, and nothing is lost."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from effort import in_turn
from oracles import call, outputs, relative_error
from snapshots import differences, snapshot
from torch import Tensor, nn
from torch.optim import Optimizer
from zoo_small import ZOO

import espalier as esp
from espalier.edit.depth_edits import Insert, Remove
from espalier.edit.plan import Plan, grow_plan, mask_plan
from espalier.errors import EspalierError, PlanError, SurgeryError
from espalier.graph.sites import Site
from espalier.layers import CopyOf, Identity, ResidualLayer
from espalier.structure import Structure

EXACT = 1e-10
PER_KIND = 3
"""Sites of each kind that are tried in one network."""


def ready(name: str) -> tuple[Structure, Optimizer, Any]:
    """A network of the zoo in double precision, with an optimizer that has state."""
    model, example = ZOO[name]()
    model = model.double()
    example = _double(example)
    _without_dropout(model)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    step(model, optimizer, example)
    return esp.attach(model, example, optimizer=optimizer), optimizer, example


def _without_dropout(model: nn.Module) -> None:
    """A new layer draws, and all masks after it would be others."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0


def _double(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: _double(one) for key, one in tree.items()}
    return tuple(_double(one) for one in tree) if isinstance(tree, (tuple, list)) else tree


def step(model: nn.Module, optimizer: Optimizer, example: Any) -> None:
    optimizer.zero_grad()
    sum(one.square().mean() for one in _tensors(call(model, example))).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor) and tree.is_floating_point():
        yield tree
    elif isinstance(tree, dict):
        for one in tree.values():
            yield from _tensors(one)
    elif isinstance(tree, (tuple, list)):
        for one in tree:
            yield from _tensors(one)


def both(model: nn.Module, example: Any) -> list[Tensor]:
    """The outputs in eval and in train mode; the model stays as it is."""
    model = copy.deepcopy(model)
    return [outputs(model, example, train, seed=0) for train in (False, True)]


def chosen(found: list[Site], seed: str) -> list[Site]:
    return found if len(found) <= PER_KIND else random.Random(seed).sample(found, PER_KIND)


def edits(structure: Structure, name: str) -> Iterator[tuple[Site, Plan]]:
    """Plans for some of the sites of a network, of every kind."""
    sites = structure.sites()
    for site in chosen([one for one in sites if one.removal is not None], name):
        yield site, Plan((), depth=tuple(
            Remove(path, "entry" if path != site.modules[-1] else site.removal or "entry") for path in site.modules
        ))  # fmt: skip
    for site in chosen([one for one in sites if one.silence is not None], name):
        zero = tuple(one.removeprefix(f"{site.name}.") for one in site.silence or ())
        yield site, Plan((), depth=(Insert(site.name, CopyOf(site.name, zero)),))
    for site in chosen([one for one in sites if one.copyable], name):
        yield site, Plan((), depth=(Insert(site.name, CopyOf(site.name)),))
    for side in (False, True):
        for site in chosen([one for one in sites if (one.insert_before if side else one.insert_after)], name):
            try:
                layer = esp.layers.default_layer(structure.topology, site.name, before=side)
            except PlanError:
                continue  # no dimension there is known to be features
            yield site, Plan((), depth=(Insert(site.name, layer, before=side),))


@pytest.mark.parametrize("name", [pytest.param(name, marks=in_turn(row)) for row, name in enumerate(ZOO)])
def test_what_sites_list_can_be_done_and_undone(name: str) -> None:
    structure, optimizer, example = ready(name)
    model = structure.model
    before_outputs, kept = both(model, example), set(map(id, model.parameters()))
    for site, plan in edits(structure, name):
        before = snapshot(model, optimizer, structure)
        contract, _ = structure.check(plan)
        assert not differences(before, snapshot(model, optimizer, structure)), f"check changed something: {plan}"
        parameters = sum(one.numel() for one in model.parameters())
        edit = structure.apply(plan)
        assert edit.contract == contract.kind
        after_outputs = both(model, example)
        if edit.contract == "exact":
            for one, other in zip(before_outputs, after_outputs, strict=True):
                assert relative_error(one, other) < EXACT, f"{edit} is not exact"
        if isinstance(plan.depth[0], Remove):
            assert parameters - sum(one.numel() for one in model.parameters()) == site.parameters, str(plan)
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        fresh = {id(one) for one in model.parameters() if one.requires_grad and id(one) not in kept}
        assert fresh <= held, f"parameters that no optimizer trains: {plan}"
        assert held <= set(map(id, model.parameters())), f"parameters of a layer that is gone: {plan}"
        structure.undo()
        assert not differences(before, snapshot(model, optimizer, structure)), f"not undone: {plan}"


SAVED = (
    "mlp_batch_norm", "resnet", "mobilenet", "inception", "densenet", "unet", "vit", "hf_bert", "hf_gpt2", "hf_llama",
    "llama_by_hand", "encoder_norm_first",
)  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_a_network_of_other_layers_is_saved_and_trains_on(name: str, tmp_path: Path) -> None:
    structure, optimizer, example = ready(name)
    model = structure.model
    done = 0
    for number, (_, plan) in enumerate(edits(structure, name)):
        if number % 3:
            continue
        try:
            structure.apply(plan)
        except EspalierError:
            continue  # an earlier edit of this test took what this one is about
        step(model, optimizer, example)
        done += 1
    assert done
    axis = next((one for one in structure.axes.values() if one.growable), None)
    if axis is not None:
        structure.grow(axis.name, by=2)
        step(model, optimizer, example)
    esp.save(structure, tmp_path)
    other, optimizer_of_other = fresh_of(name)
    loaded = esp.load(tmp_path, other, example, optimizer=optimizer_of_other)
    assert [*other.state_dict()] == [*model.state_dict()]
    assert {one: axis.size for one, axis in loaded.axes.items()} == {
        one: axis.size for one, axis in structure.axes.items()
    }
    for _ in range(2):
        for one, two in zip(both(model, example), both(other, example), strict=True):
            assert torch.equal(one, two)
        step(model, optimizer, example)
        step(other, optimizer_of_other, example)


def fresh_of(name: str) -> tuple[nn.Module, Optimizer]:
    model = ZOO[name]()[0].double()
    _without_dropout(model)
    return model, torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, None]:
        return x + self.outer(torch.relu(self.inner(self.norm(x)))), None


class Stack(nn.Module):
    """Blocks in a list, which know their positions, and a number that counts them."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.num_layers = count
        self.stem = nn.Linear(5, 8)
        self.blocks = nn.ModuleList([Block(8) for _ in range(count)])
        for position, block in enumerate(self.blocks):
            block.layer_idx = position
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for position in range(self.num_layers):
            x, _ = self.blocks[position](x, scale=None)
        out: Tensor = self.head(x)
        return out


def stacked(**options: Any) -> Structure:
    torch.manual_seed(0)
    model = Stack().double()
    return esp.attach(model, torch.randn(4, 5, dtype=torch.float64), **options)


def test_numbers_that_count_layers_follow() -> None:
    structure = stacked()
    model = structure.model
    assert isinstance(model, Stack)
    structure.add_cell("blocks", position=1)
    assert (len(model.blocks), model.num_layers) == (4, 4)
    assert [block.layer_idx for block in model.blocks] == [0, 1, 2, 3]
    structure.remove_layer("blocks.0")
    assert (len(model.blocks), model.num_layers) == (3, 3)
    assert [block.layer_idx for block in model.blocks] == [0, 1, 2]


def test_names_move_along() -> None:
    structure = stacked(limits={"blocks.2.inner": (4, 20)}, keep=["blocks.1"])
    structure.prune("blocks.2.inner", units=[0, 5])
    births = structure.births["blocks.2.inner"]
    edit = structure.remove_layer("blocks.0")
    assert edit.renamed == {
        "blocks.0.inner": None,
        "blocks.1.inner": "blocks.0.inner",
        "blocks.2.inner": "blocks.1.inner",
    }
    assert structure.axes["blocks.1.inner"].size == 10
    assert structure.limits["blocks.1.inner"].at_least == 4
    assert structure.births["blocks.1.inner"] is births
    assert structure.axes["blocks.0.inner"].reason is not None
    structure.step = 7
    structure.add_cell("blocks", of="blocks.1")
    assert structure.births["blocks.2.inner"].tolist() == [7] * 10
    assert structure.axes["blocks.2.inner"].reason is None


def test_masks_move_along_and_are_copied() -> None:
    structure = stacked(optimizer=None)
    live = torch.rand(12, 8) > 0.5
    structure.mask("blocks.1.inner.weight", live)
    structure.add_cell("blocks", position=1, of="blocks.1", init="copy")
    assert {*structure.masks} == {"blocks.1.inner.weight", "blocks.2.inner.weight"}
    assert all(torch.equal(mask, live) for mask in structure.masks.values())


def test_copies_of_the_model_share_the_edits() -> None:
    torch.manual_seed(0)
    model = Stack().double()
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    x = torch.randn(4, 5, dtype=torch.float64)
    structure = esp.attach(model, x, follow=[averaged])
    structure.insert_layer(after="stem")
    structure.add_cell("blocks")
    structure.factorise("head", 2)
    structure.remove_layer("blocks.0")
    structure.add_skip("blocks.1.norm")
    assert torch.equal(model(x), averaged.module(x))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in averaged.module.named_parameters()]
    while structure.undoable:
        structure.undo()
    assert torch.equal(model(x), averaged.module(x))


def test_a_new_connection_goes_past_a_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double(),
        torch.randn(5, 4).double(),
    )
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, x)
    structure = esp.attach(model, x, optimizer=optimizer)
    before, weight, state = model(x), model[1].weight, optimizer.state[model[1].weight]["exp_avg"]
    edit = structure.add_skip("1")
    assert edit.contract == "exact"
    assert torch.equal(model(x), before)
    inner = model[1].inner
    assert inner.weight is weight
    assert optimizer.state[inner.weight]["exp_avg"] is state
    assert structure.axes["0"].size == 6
    step(model, optimizer, x)
    assert model[1].gate.item() != 0
    structure.grow("0", by=2)
    esp.save(structure, tmp_path)
    other = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    esp.load(tmp_path, other, x)
    assert torch.equal(other(x), model(x))
    with pytest.raises(PlanError, match=r"turns 8 into 2|turns 6 into 2"):
        structure.add_skip("3")


def test_a_plan_of_all_levels_is_atomic() -> None:
    structure = stacked()
    model, x = structure.model, structure.example
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    structure = esp.attach(model, x, optimizer=optimizer)
    plan = Plan(
        (*grow_plan({"blocks.0.inner": 4}).edits,),
        masks=mask_plan({"head.weight": torch.rand(3, 8) > 0.3}).masks,
        depth=(Remove("blocks.1"), Insert("blocks.2", CopyOf("blocks.0"))),
    )
    assert Plan.from_json(plan.to_json()) == plan
    before = snapshot(model, optimizer, structure)
    structure.apply(plan)
    assert structure.axes["blocks.0.inner"].size == 16
    assert structure.axes["blocks.2.inner"].size == 16
    assert [*structure.masks] == ["head.weight"]
    structure.undo()
    assert not differences(before, snapshot(model, optimizer, structure))
    bad = Plan(plan.edits, masks=plan.masks, depth=(Remove("blocks.1"), Insert("stem", CopyOf("head"))))
    with pytest.raises(EspalierError):
        structure.apply(bad)
    assert not differences(before, snapshot(model, optimizer, structure))


def test_json_that_is_no_plan_of_layers_is_refused() -> None:
    text = Plan((), depth=(Insert("stem", ResidualLayer(8, 8)),)).to_json()
    for damage in (
        {"edit": "explode"},
        {"layer": {"kind": "nothing"}},
        {"at": 3},
        {"layer": {"kind": "copy", "of": 1}},
    ):
        data = json.loads(text)
        data["depth"][0] |= damage
        with pytest.raises(PlanError):
            Plan.from_json(json.dumps(data))


def test_what_cannot_be_done_is_refused_with_the_reason() -> None:
    structure, layer = stacked(), nn.Linear(8, 8)
    before = snapshot(structure.model, None, structure)
    with pytest.raises(PlanError, match=r"stem cannot be removed: it turns 5 into 8"):
        structure.remove_layer("stem")
    with pytest.raises(PlanError, match=r"no module 'block.1' in the model. Did you mean 'blocks.1'"):
        structure.remove_layer("block.1")
    with pytest.raises(PlanError, match=r"expected the path of a module, such as 'features.4', found 3"):
        structure.remove_layer(3)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"beside stem: expected a recipe of a layer, .* found a Linear"):
        structure.insert_layer(layer, after="stem")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"an Insert, a Remove or a Replace"):
        Plan((), depth=("blocks.1",))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"stem cannot be copied: it turns 5 into 8"):
        structure.add_cell("blocks", of="stem")
    with pytest.raises(PlanError, match="which layer"):
        structure.remove_layer()
    with pytest.raises(PlanError, match=r"nn.ModuleList of cells, found a Linear of 0 modules"):
        structure.add_cell("head")
    with pytest.raises(PlanError, match=r"position is from 0 to 3, found 5"):
        structure.add_cell("blocks", position=5)
    with pytest.raises(PlanError, match=r"init: expected 'zero'"):
        structure.add_cell("blocks", init="one")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"either after=\.\.\. or before=\.\.\."):
        structure.insert_layer(Identity(8))
    with pytest.raises(PlanError, match=r"removed or replaced twice"):
        structure.apply(Plan((), depth=(Remove("blocks.0"), Remove("blocks.0.norm"))))
    with pytest.raises(PlanError, match=r"blocks.0 goes in the same plan"):
        structure.apply(Plan((), depth=(Remove("blocks.0"), Insert("blocks.0", CopyOf("blocks.1")))))
    with pytest.raises(PlanError, match=r"cannot be previewed"):
        structure.preview(Plan((), depth=(Remove("blocks.0"),)))
    assert not differences(before, snapshot(structure.model, None, structure))


class Peeking(nn.Module):
    """Its code looks into a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x)) * self.first.weight.mean()
        return out


class Numbered(nn.Module):
    """Its code treats one entry of a list in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x) if number == 2 else torch.relu(layer(x))
        return x


def test_code_that_would_run_otherwise_is_noticed() -> None:
    structure = esp.attach(Peeking(), torch.randn(2, 4))
    before = snapshot(structure.model, None, structure)
    with pytest.raises(PlanError, match=r"its tensor first\.weight read by others"):
        structure.remove_layer("first")
    assert not differences(before, snapshot(structure.model, None, structure))
    structure = esp.attach(Numbered(), torch.randn(2, 4))
    structure.remove_layer("layers.0")
    kinds = [type(one).__name__ for one in structure.model.layers]  # type: ignore[union-attr, arg-type]
    assert kinds == ["Bypass", "Linear", "Linear"], "deleting it would give the last layer another activation"


def test_a_redrawn_copy_of_a_masked_layer_is_zero_where_its_original_is() -> None:
    structure = stacked()
    live = torch.rand(12, 8) > 0.5
    structure.mask("blocks.1.inner.weight", live)
    structure.insert_layer(esp.layers.Redrawn("blocks.1"), after="blocks.1")
    new = structure.model.get_parameter("blocks.2.inner.weight")
    assert not new[~live].any()
    assert new[live].all()


STAGES = (
    *("espalier.surgery.promise_of", "espalier.surgery.regrow", "espalier.surgery.regrown", "espalier.edit.depth.make"),
    *("espalier.edit.depth.infer", "espalier.edit.depth.difference", "espalier.edit.depth.repeats"),
    *("espalier.edit.depth.follow", "espalier.edit.depth.following", "espalier.edit.depth.backward_problem"),
    *("espalier.edit.steps.insert", "espalier.edit.steps.remove_entry", "espalier.edit.known.same_axes"),
)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_a_failure_of_every_stage_leaves_everything(
    monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Stack(), nn.ReLU(inplace=True)).double(), torch.randn(4, 5, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, x)
    averaged = copy.deepcopy(model)
    structure = esp.attach(model, x, optimizer=optimizer, follow=[averaged])
    before, of_copy = snapshot(model, optimizer, structure), snapshot(averaged)
    plan = Plan(
        grow_plan({"0.blocks.0.inner": 2}).edits,
        depth=(Remove("0.blocks.1"), Insert("0.blocks.2", CopyOf("0.blocks.0"))),
    )

    def fails(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(stage, fails)
        with pytest.raises((EspalierError, type(error))):
            structure.apply(plan)
    assert not differences(before, snapshot(model, optimizer, structure))
    assert not differences(of_copy, snapshot(averaged))
    structure.apply(plan)
    assert torch.equal(model(x), averaged(x))


def test_an_optimizer_that_was_made_with_names_has_those_of_now() -> None:
    torch.manual_seed(0)
    model = Stack().double()
    x = torch.randn(4, 5, dtype=torch.float64)
    optimizer = torch.optim.AdamW([*model.named_parameters()])
    step(model, optimizer, x)
    structure = esp.attach(model, x, optimizer=optimizer)
    before = snapshot(model, optimizer, structure)
    structure.remove_layer("blocks.0")
    structure.add_cell("blocks")
    group = optimizer.param_groups[0]
    assert len(group["param_names"]) == len(group["params"])
    named = dict(model.named_parameters())
    assert {*group["param_names"]} == {*named}
    assert all(named[name] is one for name, one in zip(group["param_names"], group["params"], strict=True))
    torch.optim.AdamW([*model.named_parameters()]).load_state_dict(optimizer.state_dict())
    structure.undo()
    structure.undo()
    assert not differences(before, snapshot(model, optimizer, structure))
    structure.remove_layer("blocks.0")
    optimizer.load_state_dict(optimizer.state_dict())  # makes new groups
    with pytest.raises(SurgeryError, match="a parameter group of the optimizer was changed since then"):
        structure.undo()


def test_groups_of_their_own_rates_stay_and_new_parameters_join_those_of_their_kind() -> None:
    torch.manual_seed(0)
    model = Stack().double()
    x = torch.randn(4, 5, dtype=torch.float64)
    matrices = [one for one in model.parameters() if one.dim() > 1]
    vectors = [one for one in model.parameters() if one.dim() < 2]
    optimizer = torch.optim.SGD([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 0.5}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.5], total_steps=20)
    structure = esp.attach(model, x, optimizer=optimizer)
    structure.insert_layer(after="stem")
    structure.add_cell("blocks", init="copy")
    structure.factorise("head", 2)
    assert all(one.dim() > 1 for one in optimizer.param_groups[0]["params"])
    assert all(one.dim() < 2 for one in optimizer.param_groups[1]["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len([*model.parameters()])
    step(model, optimizer, x)
    scheduler.step()
