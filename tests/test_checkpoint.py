"""`esp.save` and `esp.load`: bitwise round trips, damaged and foreign checkpoints, interrupted saves."""

import contextlib
import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshots import differences, snapshot
from torch import Tensor, nn
from torch.optim import Optimizer
from zoo_small import ZOO

import espalier as esp
from espalier.errors import CheckpointError, EspalierError, PlanError, SurgeryError
from espalier.structure import Structure
from espalier.train import checkpoint_files, checkpoint_loading

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, amsgrad=True, foreach=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "adam of a tensor rate": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(1e-3)),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2, initial_accumulator_value=0.1),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-3),
}
FILES = ("manifest.json", "network.json", "network.safetensors", "optimizer.json", "optimizer.safetensors")


def outputs(model: nn.Module, example: Any) -> Tensor:
    found = model(**example) if isinstance(example, dict) else model(*example)
    return found if isinstance(found, Tensor) else found[0]


def step(model: nn.Module, example: Any, optimizer: Optimizer, seed: int) -> Tensor:
    torch.manual_seed(seed)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = outputs(model, example).float().square().mean()
        loss.backward()
        return loss

    return torch.as_tensor(optimizer.step(closure))


def edit(structure: Structure, seed: int, count: int) -> None:
    """Apply random edits."""
    rng = random.Random(seed)
    applied = 0
    while applied < count:
        axis = rng.choice([one for one in structure.axes.values() if one.prunable or one.growable])
        with contextlib.suppress(PlanError, SurgeryError):
            if axis.prunable and rng.random() < 0.5:
                structure.prune(axis.name, rng.sample(range(axis.size), max(1, axis.size // 4)))
            else:
                structure.grow(axis.name, rng.randint(1, 3), seed=rng.randint(0, 99))
            applied += 1


def fresh(name: str, kind: str) -> tuple[nn.Module, Any, Optimizer]:
    model, example = ZOO[name]()
    return model, example, OPTIMIZERS[kind]([one for one in model.parameters() if one.requires_grad])


def assert_same_run(model: nn.Module, optimizer: Optimizer, other: nn.Module, its: Optimizer, example: Any) -> None:
    """Outputs in both modes, two further steps, and everything after them are bitwise the same."""
    for training in (False, True):
        results = []
        for one in (model, other):
            torch.manual_seed(0)
            with torch.no_grad():
                results.append(outputs(one.train(training), example))
        assert torch.equal(*results)
    for seed in (5, 6):
        assert torch.equal(step(model, example, optimizer, seed), step(other, example, its, seed))
    assert_equal_tensors(dict(model.named_parameters()), dict(other.named_parameters()))
    assert_equal_tensors(dict(model.named_buffers()), dict(other.named_buffers()))
    ours = {name: optimizer.state[one] for name, one in model.named_parameters() if one in optimizer.state}
    theirs = {name: its.state[one] for name, one in other.named_parameters() if one in its.state}
    assert ours.keys() == theirs.keys()
    for name, entries in ours.items():
        assert_equal_tensors(entries, theirs[name])


def assert_equal_tensors(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, theirs[name]), name
            assert value.stride() == theirs[name].stride(), name
            assert value.dtype == theirs[name].dtype, name
        else:
            assert value == theirs[name], name


# --- Round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "edits"),
    [
        *(("mlp_batch_norm", kind, 5) for kind in OPTIMIZERS),
        ("vit", "adamw", 6),
        ("resnext", "sgd", 6),
        ("densenet", "rmsprop", 6),
        ("group_norm_resnet", "adafactor", 6),
        ("grouped_query", "adam", 5),
        ("llama_by_hand", "adagrad", 4),
        ("tied_embeddings", "adafactor", 5),
        ("frozen_parameters", "adam", 3),
    ],
)
def test_loaded_network_goes_on_as_the_saved_one(tmp_path: Path, name: str, kind: str, edits: int) -> None:
    model, example, optimizer = fresh(name, kind)
    structure = esp.attach(model, example, optimizer=optimizer)
    step(model, example, optimizer, 1)
    edit(structure, 1, edits)
    step(model, example, optimizer, 2)
    esp.save(structure, tmp_path)

    other, _, its = fresh(name, kind)
    objects = [*map(id, other.parameters()), *map(id, its.param_groups)]
    loaded = esp.load(tmp_path, other, example, optimizer=its)

    assert loaded.optimizer is its
    assert loaded.model is other
    assert [*map(id, other.parameters()), *map(id, its.param_groups)] == objects
    assert loaded.initial_sizes == structure.initial_sizes
    assert {one: loaded.axes[one].size for one in structure.axes} == {
        one.name: one.size for one in structure.axes.values()
    }
    assert loaded.cost() == structure.cost()
    assert_same_run(model, optimizer, other, its, example)
    edit(loaded, 2, 2)
    loaded.undo()
    step(other, example, its, 7)
    esp.save(loaded, tmp_path)
    third, _, last = fresh(name, kind)
    esp.load(tmp_path, third, example, optimizer=last)
    assert_same_run(other, its, third, last, example)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("hf_gpt2", [("h.0.mlp.c_fc.bias", 0), ("h.1.attn.c_proj.weight", 0), ("wpe.weight", 1)]),
        ("hf_llama", [("layers.0.mlp.up_proj.weight", 0), ("layers.1.self_attn.k_proj.weight", 0), ("norm.weight", 0)]),
    ],
)
def test_hugging_face_models(tmp_path: Path, name: str, places: list[tuple[str, int]]) -> None:
    """Hidden units, heads (their number is an attribute or an entry of the config) and the residual stream."""
    model, example, optimizer = fresh(name, "adamw")
    structure = esp.attach(model, example, optimizer=optimizer)
    step(model, example, optimizer, 1)
    for tensor, dim in places:
        found = [
            axis
            for axis in structure.axes.values()
            if any(slot.tensor.endswith(tensor) and slot.dim == dim for slot in axis.slots)
        ]
        structure.grow(min(found, key=lambda axis: len(axis.slots)).name, 2)
    esp.save(structure, tmp_path)
    other, _, its = fresh(name, "adamw")
    loaded = esp.load(tmp_path, other, example, optimizer=its)
    assert loaded.cost() == structure.cost()
    assert len(loaded.history[0].sizes) == 3
    assert_same_run(model, optimizer, other, its, example)


def test_random_edits_of_several_seeds(tmp_path: Path) -> None:
    for seed in range(8):
        model, example, optimizer = fresh("mlp", "adamw")
        structure = esp.attach(model, example, optimizer=optimizer)
        step(model, example, optimizer, seed)
        edit(structure, seed, 10)
        esp.save(structure, tmp_path)
        other, _, its = fresh("mlp", "adamw")
        esp.load(tmp_path, other, example, optimizer=its)
        assert_same_run(model, optimizer, other, its, example)


def test_many_edits_are_one_after_loading(tmp_path: Path) -> None:
    def built() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))

    model, other, example = built(), built(), torch.randn(8, 4)
    structure = esp.attach(model, example)
    structure.grow("0", 2)
    structure.prune("0", [0, 1])  # the size is as before; what these contributed is gone, and the eps is not restored
    for _ in range(3):
        structure.grow("2", 2)
        structure.prune("2", [0])
    esp.save(structure, tmp_path)
    loaded = esp.load(tmp_path, other, example)
    assert other[1].eps == model[1].eps != nn.LayerNorm(6).eps
    (only,) = loaded.history
    assert only.sizes == {"2": (5, 8)}
    assert [str(change) for change in only.attributes if change.path == ("out_features",)] == ["2.out_features: 5 -> 8"]
    assert torch.equal(model(example), other(example))
    with pytest.raises(SurgeryError, match="nothing to undo"):
        loaded.undo()


def test_undone_edits_leave_no_trace(tmp_path: Path) -> None:
    model, example, optimizer = fresh("vit", "sgd")
    structure = esp.attach(model, example, optimizer=optimizer)
    structure.grow("patch_embed", 4)
    structure.undo()
    esp.save(structure, tmp_path)
    saved = json.loads((tmp_path / "network.json").read_text())
    assert saved["attributes"] == []
    assert esp.load(tmp_path, ZOO["vit"]()[0], example).history == ()


def test_channels_last_with_a_fused_optimizer(tmp_path: Path) -> None:
    def built() -> tuple[nn.Module, Any, Optimizer]:
        model, example = ZOO["vgg_batch_norm"]()
        model = model.to(memory_format=torch.channels_last)
        return model, example, OPTIMIZERS["adamw"](model.parameters())

    model, example, optimizer = built()
    structure = esp.attach(model, example, optimizer=optimizer)
    step(model, example, optimizer, 1)
    edit(structure, 3, 4)
    esp.save(structure, tmp_path)
    assert model.features[4].weight.is_contiguous(memory_format=torch.channels_last)
    for fits in (True, False):
        other, _ = ZOO["vgg_batch_norm"]()
        other = other.to(memory_format=torch.channels_last) if fits else other
        its = OPTIMIZERS["adamw"](other.parameters())
        esp.load(tmp_path, other, example, optimizer=its)
        assert other.features[4].weight.stride() == model.features[4].weight.stride()
        if fits:
            assert_same_run(model, optimizer, other, its, example)


def test_schedulers_rate_and_group_options_come_back(tmp_path: Path) -> None:
    def built() -> tuple[nn.Module, Any, Optimizer]:
        model, example = ZOO["mlp"]()
        groups = [{"params": model[0].parameters()}, {"params": model[2:].parameters(), "lr": 0.3, "weight_decay": 0.1}]
        return model, example, torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    model, example, optimizer = built()
    structure = esp.attach(model, example, optimizer=optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    structure.grow("0", 3)
    step(model, example, optimizer, 1)
    scheduler.step()
    esp.save(structure, tmp_path)
    other, _, its = built()
    its.param_groups[1]["weight_decay"] = 0.7
    esp.load(tmp_path, other, example, optimizer=its)
    assert [group["lr"] for group in its.param_groups] == [0.05, 0.15]
    assert [group["initial_lr"] for group in its.param_groups] == [0.1, 0.3]
    assert its.param_groups[1]["weight_decay"] == 0.1
    assert_same_run(model, optimizer, other, its, example)


def test_how_to_compute_stays_the_choice_of_the_user(tmp_path: Path) -> None:
    model, example, optimizer = fresh("mlp", "adamw")
    step(model, example, optimizer, 1)
    esp.save(esp.attach(model, example, optimizer=optimizer), tmp_path)
    other, _ = ZOO["mlp"]()
    its = torch.optim.AdamW(other.parameters(), lr=5.0, foreach=False)
    esp.load(tmp_path, other, example, optimizer=its)
    assert its.param_groups[0]["lr"] == 1e-3
    assert (its.param_groups[0]["fused"], its.param_groups[0]["foreach"]) == (None, False)
    step(other, example, its, 2)


def test_state_of_nested_lists(tmp_path: Path) -> None:
    def built() -> tuple[nn.Module, Any, Optimizer]:
        model, example = ZOO["mlp"]()
        return model, example, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=4)

    model, example, optimizer = built()
    structure = esp.attach(model, example, optimizer=optimizer)
    structure.grow("0", 3)
    step(model, example, optimizer, 1)
    esp.save(structure, tmp_path)
    other, _, its = built()
    esp.load(tmp_path, other, example, optimizer=its)
    for seed in (2, 3):
        assert torch.equal(step(model, example, optimizer, seed), step(other, example, its, seed))
    assert_equal_tensors(dict(model.named_parameters()), dict(other.named_parameters()))


class OddTensors(nn.Module):
    """Buffers as people register them: views, shared storage, not persistent, of many types."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        table = torch.randn(2, 5)
        self.register_buffer("row", table[0])
        self.register_buffer("other_row", table[1], persistent=False)
        self.register_buffer("same", self.row)
        self.register_buffer("ids", torch.arange(3).expand(2, 3))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("waves", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("short", torch.randn(3, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_every_buffer_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, example = OddTensors(), torch.randn(8, 4)
    structure = esp.attach(model, example)
    structure.grow("first", 2)
    esp.save(structure, tmp_path)
    torch.manual_seed(2)
    other = OddTensors()
    esp.load(tmp_path, other, example)
    assert other.same is other.row
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name
    assert torch.equal(model(example), other(example))


def test_grown_interface(tmp_path: Path) -> None:
    model, example, optimizer = fresh("mlp", "sgd")
    structure = esp.attach(model, example, optimizer=optimizer)
    structure.grow("0:inputs", 2, interface=True)
    structure.grow("4", 1, interface=True)
    esp.save(structure, tmp_path)
    other, _, its = fresh("mlp", "sgd")
    loaded = esp.load(tmp_path, other, example, optimizer=its)
    assert loaded.example[0].shape == (8, 12)
    assert outputs(other, loaded.example).shape == (8, 4)
    assert_same_run(model, optimizer, other, its, loaded.example)


def test_what_was_kept_stays_kept(tmp_path: Path) -> None:
    model, example = ZOO["mlp"]()
    structure = esp.attach(model, example, keep=["4"], limits={"0": (4, 20)})
    structure.prune("0", [0])
    esp.save(structure, tmp_path)
    loaded = esp.load(tmp_path, ZOO["mlp"]()[0], example)
    assert not loaded.axes["2"].growable
    assert loaded.axes["2"].reason == structure.axes["2"].reason == "is kept as asked for by keep='4'"
    assert (loaded.axes["0"].limits.at_least, loaded.axes["0"].limits.at_most) == (4, 20)
    other = esp.load(tmp_path, ZOO["mlp"]()[0], example, keep=["0"], limits={"0": (None, 13)})
    assert not other.axes["0"].growable
    assert (other.axes["0"].limits.at_least, other.axes["0"].limits.at_most) == (None, 13)


def test_what_was_learnt_of_the_code_is_not_forgotten(tmp_path: Path) -> None:
    """Axes that code holds fixed: methods that choose axes go on with the same choice."""
    for name in ("hard_coded_view",):
        model, example = ZOO[name]()
        structure = esp.attach(model, example)
        if name != "hard_coded_view":
            edit(structure, 1, 2)
        esp.save(structure, tmp_path)
        loaded = esp.load(tmp_path, ZOO[name]()[0], example)
        ours, theirs = structure.topology, loaded.topology
        assert (ours.sizes, ours.tensors) == (theirs.sizes, theirs.tensors)
        assert [(one.name, one.slots, one.reasons) for one in ours.axes.values()] == [
            (one.name, one.slots, one.reasons) for one in theirs.axes.values()
        ]
        assert any("cannot change" in str(axis.reason) for axis in structure.axes.values())


def test_networks_without_optimizer(tmp_path: Path) -> None:
    model, example = ZOO["mlp"]()
    with_optimizer = OPTIMIZERS["sgd"](model.parameters())
    step(model, example, with_optimizer, 1)
    structure = esp.attach(model, example, optimizer=with_optimizer)
    structure.grow("0", 3)
    esp.save(structure, tmp_path)
    other, _ = ZOO["mlp"]()
    alone = esp.load(tmp_path, other, example)
    assert alone.optimizer is None
    assert torch.equal(outputs(model, example), outputs(other, example))

    esp.save(alone, tmp_path)
    assert not (tmp_path / "optimizer.safetensors").exists()
    third, _, its = fresh("mlp", "adagrad")  # which has state before its first step
    esp.load(tmp_path, third, example, optimizer=its)
    assert its.state[third[0].weight]["sum"].shape == (15, 10)
    torch.testing.assert_close(its.state[third[0].weight]["sum"], torch.full((15, 10), 0.1))
    step(third, example, its, 1)


def test_averaged_models_follow(tmp_path: Path) -> None:
    def built() -> tuple[nn.Module, Any, nn.Module]:
        model, example = ZOO["vgg_batch_norm"]()
        return model, example, torch.optim.swa_utils.AveragedModel(model, use_buffers=True)

    model, example, average = built()
    structure = esp.attach(model, example, follow=[average])
    average.update_parameters(model)
    structure.prune("features.0", [1, 2])
    with torch.no_grad():
        model.features[0].weight.mul_(1.5)
    average.update_parameters(model)
    esp.save(structure, tmp_path)

    other, _, its = built()
    loaded = esp.load(tmp_path, other, example, follow=[its])
    assert int(its.n_averaged) == 2
    assert its.module.features[0].out_channels == 6
    assert torch.equal(outputs(average.eval(), example), outputs(its.eval(), example))
    assert torch.equal(outputs(model.eval(), example), outputs(other.eval(), example))
    loaded.prune("features.0", [0])
    assert its.module.features[0].weight.shape == (5, 3, 3, 3)
    with pytest.raises(CheckpointError, match="1 copies were saved, found 2"):
        esp.load(tmp_path, (third := built())[0], example, follow=[third[2], built()[2]])

    esp.save(esp.load(tmp_path, built()[0], example), tmp_path)  # without the copy
    fourth, _, late = built()
    esp.load(tmp_path, fourth, example, follow=[late])
    assert torch.equal(outputs(fourth.eval(), example), outputs(late.eval(), example))


# --- Damaged and foreign checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the `mlp` with AdamW."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, example, optimizer = fresh("mlp", "adamw")
    structure = esp.attach(model, example, optimizer=optimizer)
    step(model, example, optimizer, 1)
    structure.prune("0", [0, 5])
    structure.grow("2", 3)
    esp.save(structure, folder)
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    """A copy of it to be spoilt."""
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def assert_refused(
    folder: Path, match: str, model: nn.Module | None = None, optimizer: Optimizer | None = None
) -> None:
    """Loading raises CheckpointError, and no byte of model and optimizer changes."""
    standard, example, its = fresh("mlp", "adamw")
    if model is None:
        model, optimizer = standard, its
        step(model, example, its, 3)  # state and gradients that must survive
    before = snapshot(model, optimizer)
    with pytest.raises(CheckpointError, match=match):
        esp.load(folder, model, example, optimizer=optimizer)
    assert differences(before, snapshot(model, optimizer)) == []


def forge(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change a JSON file and the manifest with it, as somebody who means harm would."""
    data = json.loads((folder / name).read_text())
    change(data)
    content = json.dumps(data).encode()
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut short", "empty", "flipped", "longer"])
def test_damaged_files_are_refused(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    content = path.read_bytes()
    middle = len(content) // 2
    spoilt = {
        "cut short": content[:middle],
        "empty": b"",
        "flipped": content[:middle] + bytes([content[middle] ^ 0x20]) + content[middle + 1 :],
        "longer": content + b"}",
    }
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(spoilt[damage])
    assert_refused(saved, "manifest.json" if name == "manifest.json" else name)


def test_any_flipped_bit_of_the_manifest_is_harmless_or_refused(saved: Path) -> None:
    content = (saved / "manifest.json").read_bytes()
    whole = snapshot_of_loaded(saved)
    refused = 0
    for position in range(0, len(content), 7):
        changed = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        (saved / "manifest.json").write_bytes(changed)
        try:
            checkpoint_files.read(saved)
        except CheckpointError:
            refused += 1
        else:
            assert snapshot_of_loaded(saved) == whole
    assert refused > 70


def snapshot_of_loaded(folder: Path) -> dict[str, list[float]]:
    model, example, optimizer = fresh("mlp", "adamw")
    esp.load(folder, model, example, optimizer=optimizer)
    return {name: one.flatten().tolist() for name, one in model.named_parameters()}


def test_another_format_version(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    assert_refused(saved, r"format 2; this version of Espalier reads format 1")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "[" * 100_000,
        '{"format": 1}',
        '{"format": 1, "files": {"../secret": {}}}',
        '{"format": 1, "files": 3}',
    ],
)
def test_a_manifest_that_is_none(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_text(text)
    assert_refused(saved, "manifest.json")


def test_a_manifest_that_names_other_files(saved: Path) -> None:
    secret = saved.parent / "secret"
    secret.write_bytes(b"x")
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(saved, "lists the files")


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert_refused(tmp_path, "no checkpoint in .* it has no manifest.json")
    assert_refused(tmp_path / "nowhere", "there is no such folder")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data["axes"].pop("2"), "has an axis 2 that the checkpoint does not know"),
        (lambda data: data["axes"].update(other={"original": 3, "size": 3}), "no such axis"),
        (lambda data: data["axes"]["0"].update(original=13), "0 of 13 units originally, this model has 12"),
        (lambda data: data["axes"]["0"].update(size=11), r"0.weight: expected shape \(11, 10\)"),
        (lambda data: data["axes"]["0"].update(size=10**12), "0.weight: expected shape"),
        (lambda data: data["axes"]["0"].update(size=0), "damaged: ValueError: 0 is no number"),
        (lambda data: data["axes"]["0"].update(size="10"), "damaged: TypeError"),
        (lambda data: data.pop("tensors"), "damaged: KeyError"),
        (lambda data: data["tensors"]["0.weight"].update(order=[0, 0]), "no order of 2 dimensions"),
        (lambda data: data["tensors"]["0.weight"].update(shape=[10]), "0.weight: the checkpoint lists float32"),
        (lambda data: data["tensors"].update(more=data["tensors"]["0.bias"]), "it has more, this model has not"),
        (lambda data: data["attributes"][0].update(module="9"), "sets 9.out_features, which is no number"),
        (lambda data: data["attributes"][0].update(path=["forward"]), "sets 0.forward, which is no number"),
        (lambda data: data["attributes"][0].update(path=["training"]), "sets 0.training, which is no number"),
        (lambda data: data["attributes"][0].update(original=99), "0.out_features: expected the original value 99"),
        (lambda data: data["attributes"][0].update(path=["a", "b", "c"]), "damaged: ValueError"),
        (lambda data: data["attributes"][0].update(value={"x": 1}), "damaged: TypeError"),
        (lambda data: data.update(limits={"0": [1, 2]}), "damaged: TypeError"),
        (lambda data: data.update(frozen={"9": []}), "damaged: KeyError: '9'"),
        (lambda data: data.update(frozen={"0": [{"kind": "output", "text": "x"}]}), "damaged: ValueError"),
    ],
)
def test_forged_networks_are_refused(saved: Path, change: Callable[[Any], None], match: str) -> None:
    forge(saved, "network.json", change)
    assert_refused(saved, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data.update({"class": "Adam"}), "saved with the optimizer torch.optim.adamw.Adam, found"),
        (lambda data: data["groups"].append(data["groups"][0]), "has 2 parameter groups, this one has 1"),
        (lambda data: data["groups"][0]["params"].pop(), "only this optimizer has '4.bias'"),
        (lambda data: data["groups"][0].pop("options"), "damaged: KeyError"),
        (lambda data: data["state"]["0.weight"]["step"].update(tensor="nothing"), "damaged: KeyError"),
        (lambda data: data["state"]["0.weight"]["step"].update(order=[3]), "damaged: ValueError"),
        (
            lambda data: data["state"]["0.weight"].update(exp_avg=data["state"]["0.bias"]["exp_avg"]),
            r"'exp_avg' of 0.weight should have shape \(10, 10\)",
        ),
        (lambda data: data["state"].update({"0.weight": {"exp_avg": [1]}}), "damaged: TypeError"),
    ],
)
def test_forged_optimizers_are_refused(saved: Path, change: Callable[[Any], None], match: str) -> None:
    forge(saved, "optimizer.json", change)
    assert_refused(saved, match)


def test_other_models_are_refused(saved: Path) -> None:
    def layers(*sizes: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(one, two) for one, two in itertools.pairwise(sizes)))

    standard = ZOO["mlp"]()[0]
    assert_refused(saved, r"it has 2.weight, this model has not", nn.Sequential(nn.Linear(10, 12)))
    assert_refused(saved, r"0.weight: expected the original shape \(12, 10\), found \(10, 10\)", layers(10, 10, 3))
    assert_refused(saved, "this one also has 5.weight", nn.Sequential(*standard, nn.Linear(3, 3)))
    assert_refused(saved, "expected dtype torch.float32, found torch.float64", ZOO["mlp"]()[0].double())
    tied = ZOO["mlp"]()[0]
    tied[4].register_parameter("again", tied[0].weight)
    assert_refused(saved, "4.again: expected no tie, found otherwise", tied)


def test_code_that_no_longer_fits_is_refused(tmp_path: Path) -> None:
    class Reshaping(nn.Module):
        def __init__(self, hard_coded: bool) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
            self.hard_coded = hard_coded

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.second(hidden.reshape(8, 6) if self.hard_coded else hidden)

    example = torch.randn(8, 4)
    structure = esp.attach(Reshaping(False), example)
    structure.grow("first", 2)
    esp.save(structure, tmp_path)
    model = Reshaping(True)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="Build the model with the code that it was saved with"):
        esp.load(tmp_path, model, example)
    assert differences(before, snapshot(model)) == []


def test_other_optimizers_are_refused(saved: Path) -> None:
    model, _ = ZOO["mlp"]()
    assert_refused(saved, r"AdamW, found torch.optim.sgd.SGD; build one", model, torch.optim.SGD(model.parameters()))
    groups = [{"params": model[0].parameters()}, {"params": model[2:].parameters()}]
    assert_refused(saved, "has 1 parameter groups, this one has 2", model, torch.optim.AdamW(groups))
    partly = torch.optim.AdamW(model[0].parameters())
    assert_refused(saved, "only the saved optimizer has '2.bias'", model, partly)


def test_a_failure_during_the_commit_is_rolled_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("out of memory"), KeyboardInterrupt()):

        def failing(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(checkpoint_loading, "check_shapes", failing)
        model, example, optimizer = fresh("mlp", "adamw")
        step(model, example, optimizer, 3)
        before = snapshot(model, optimizer)
        with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
            esp.load(saved, model, example, optimizer=optimizer)
        assert isinstance(caught.value, KeyboardInterrupt) or "nothing was changed: out of memory" in str(caught.value)
        assert differences(before, snapshot(model, optimizer)) == []


# --- Saves that fail -------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here: nothing after it runs."""


@contextlib.contextmanager
def killed_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """End the process at the given call that reaches the disk; later ones do nothing but end it again."""
    count = [0]

    def ends(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] > call:
                raise Killed
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "write_text"), (Path, "unlink")):
            patch.setattr(owner, name, ends(getattr(owner, name)))
        patch.setattr(checkpoint_files, "save_file", ends(checkpoint_files.save_file))
        yield count


def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example, optimizer = fresh("mlp", "adamw")
    structure = esp.attach(model, example, optimizer=optimizer)
    found: list[bool] = []
    for call in range(100):
        folder = tmp_path / str(call)
        esp.save(structure, folder)
        old = outputs(model, example)
        step(model, example, optimizer, call)
        edit(structure, call, 1)
        new = outputs(model, example)
        finished = True
        with killed_at(call, monkeypatch):
            try:
                esp.save(structure, folder)
            except Killed:
                finished = False
        other, _, its = fresh("mlp", "adamw")
        loaded = esp.load(folder, other, example, optimizer=its)
        is_new = torch.equal(outputs(other, example), new)
        assert is_new or torch.equal(outputs(other, example), old)
        assert is_new or not finished
        found.append(is_new)
        step(other, example, its, call)  # the optimizer's state is that of the same moment
        esp.save(loaded, folder)
        third, _, last = fresh("mlp", "adamw")
        esp.load(folder, third, example, optimizer=last)
        assert torch.equal(outputs(third, example), outputs(other, example))
        assert not list(folder.glob("*.new"))
        if finished:
            break
    assert finished
    assert found == sorted(found)  # up to some call the earlier one holds, from then on the new one
    assert found.count(False) >= 8
    assert found.count(True) >= 6


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = ZOO["mlp"]()
    structure = esp.attach(model, example)
    esp.save(structure, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    structure.grow("0", 2)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"could not be written to .*No space left"):
            esp.save(structure, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(CheckpointError, match="could not be written"):
        esp.save(structure, tmp_path / "network.json")


def test_other_files_of_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("hello")
    model, example = ZOO["mlp"]()
    structure = esp.attach(model, example)
    for _ in range(2):
        esp.save(structure, str(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"report.html", "manifest.json", "network.json", "network.safetensors"}
    assert (tmp_path / "report.html").read_text() == "hello"


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    class WithExtra(nn.Linear):
        def get_extra_state(self) -> int:
            return 3

    example = torch.randn(8, 4)
    with pytest.raises(CheckpointError, match=r"0 \(WithExtra\) keeps extra state"):
        esp.save(esp.attach(nn.Sequential(WithExtra(4, 6), nn.Linear(6, 2)), example), tmp_path / "extra")

    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight]["helper"] = object()
    with pytest.raises(CheckpointError, match=r"SGD state of 0.weight cannot be saved: 0.weight:helper is a object"):
        esp.save(esp.attach(model, example, optimizer=optimizer), tmp_path / "state")

    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model.register_buffer("wide", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(CheckpointError, match="safetensors cannot hold these tensors"):
        esp.save(esp.attach(model, example), tmp_path / "type")

    model[0].register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(CheckpointError, match=r"0.sparse is a Tensor of layout torch.sparse_coo"):
        esp.save(esp.attach(model, example), tmp_path / "layout")

    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    structure = esp.attach(model, example)
    model[0].weight = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(EspalierError, match="attach to the model again"):
        esp.save(structure, tmp_path / "resized")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
