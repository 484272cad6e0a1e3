"""Networks are handed on to where Espalier is not installed, and compute the same there."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import exported_models
import pytest
import torch
from exported_models import Mixed, build
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import espalier as esp
from espalier.edit.residual import Residual
from espalier.errors import CheckpointError, ExportError
from espalier.export import tree
from espalier.layers import CopyOf, ResidualLayer
from espalier.structure import Structure

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def shuffled(model: nn.Module) -> None:
    """Give all tensors values that no initialisation gives."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.3)


def resized(structure: Structure) -> None:
    structure.prune({"features.0": [1, 4], "blocks.1.up": [0, 2, 15]})
    structure.grow({"features.0": 3, "blocks.0.up": 2})


def with_layers(structure: Structure) -> None:
    structure.grow("blocks.0.up", by=2)
    structure.add_cell("blocks", of="blocks.0", position=1)
    structure.remove_layer("blocks.3")
    structure.insert_layer(ResidualLayer(8, 5, norm="layer"), after="second")
    structure.insert_layer(ResidualLayer(6, 3, kernel=(3, 3)), after="features.0")
    structure.add_skip("blocks.0")
    structure.prune("blocks.1.up", [0, 1, 2])


def with_less(structure: Structure) -> None:
    structure.factorise("blocks.0.up", 3)
    structure.fold("features.1")
    structure.remove_layer("blocks.1.norm")
    structure.insert_layer(CopyOf("blocks.0", zero=("down.weight", "down.bias")), after="blocks.1")


EDITS = [resized, with_layers, pytest.param(with_less, marks=pytest.mark.slow), lambda structure: None]


def exported(edit: Callable[[Structure], None], folder: Path) -> Structure:
    torch.manual_seed(0)
    model = build()
    shuffled(model)
    structure = esp.attach(model, X, optimizer=torch.optim.AdamW(model.parameters()))
    edit(structure)
    shuffled(model)
    assert esp.export_code(structure, folder, build) == folder / "network.py"
    return structure


@pytest.mark.parametrize("edit", EDITS)
def test_exported_code_is_the_network(edit: Callable[[Structure], None], tmp_path: Path) -> None:
    structure = exported(edit, tmp_path)
    namespace = {"__file__": str(tmp_path / "network.py"), "__name__": "network"}
    text = (tmp_path / "network.py").read_text()
    exec(compile(text, "network.py", "exec"), namespace)
    torch.manual_seed(5)
    found = namespace["restore"](build())  # type: ignore[operator]
    assert torch.equal(found.eval()(X), structure.model.eval()(X))
    assert all(one.data_ptr() % 64 == 0 for one in found.parameters()), "kernels round by where tensors begin"
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in structure.model.named_parameters()]
    assert "import espalier" not in text
    assert "from espalier" not in text


def test_exported_code_runs_where_espalier_cannot_be_imported(tmp_path: Path) -> None:
    structure = exported(with_layers, tmp_path)
    (tmp_path / "exported_models.py").write_text(Path(exported_models.__file__).read_text())
    save_file({"x": X}, tmp_path / "x.safetensors")
    script = (
        "import sys; sys.modules['espalier'] = None\n"
        "from safetensors.torch import load_file, save_file\n"
        "import torch, network\n"
        "torch.set_num_threads(1)\n"
        "with torch.no_grad():\n"
        "    save_file({'y': network.load().eval()(load_file('x.safetensors')['x'])}, 'y.safetensors')\n"
        "assert not any(name.startswith('espalier.') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
    assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], structure.model.eval()(X).detach())


def test_the_file_says_what_changed(tmp_path: Path) -> None:
    structure = exported(resized, tmp_path)
    text = (tmp_path / "network.py").read_text()
    assert "Mixed, pruned and grown" in text
    assert "features.0: 6 -> 7" in text
    assert "blocks.1.up: 16 -> 13" in text
    assert "('features.0', ('out_channels',), 7)" in text
    assert structure.axes["features.0"].size == 7
    assert "blocks.2.up" not in text


def test_a_layer_that_plain_code_cannot_build_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "_OWN", {kind: used for kind, used in tree._OWN.items() if kind is not Residual})
    with pytest.raises(ExportError, match=r"features\.1 \(Residual\) came by an edit"):
        exported(
            lambda structure: structure.insert_layer(ResidualLayer(6, 3, kernel=(3, 3)), after="features.0"), tmp_path
        )
    assert not (tmp_path / "network.py").exists()


def test_channels_last_stays(tmp_path: Path) -> None:
    model = build().to(memory_format=torch.channels_last)
    structure = esp.attach(model, X)
    structure.grow("features.0", by=2)
    esp.export_code(structure, tmp_path, build)
    namespace = {"__file__": str(tmp_path / "network.py"), "__name__": "network"}
    exec((tmp_path / "network.py").read_text(), namespace)
    found = namespace["restore"](build())  # type: ignore[operator]
    assert found.features[3].weight.stride() == model.features[3].weight.stride()
    assert found.second.weight is found.first.weight


class Shifted(Mixed):
    """Reads a number that is set after it is built."""

    shift = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


def test_what_differs_otherwise_is_found(tmp_path: Path) -> None:
    model = Shifted()
    model.shift = 1.0
    structure = esp.attach(model, X)
    with pytest.raises(ExportError, match="does not give the outputs"):
        esp.export_code(structure, tmp_path, Shifted)
    with pytest.raises(ExportError, match="expected a Shifted, found a Mixed"):
        esp.export_code(structure, tmp_path, Mixed)
    with pytest.raises(ExportError, match="expected a function that gives a Shifted"):
        esp.export_code(structure, tmp_path, lambda: 3)  # type: ignore[arg-type, return-value]


def test_a_model_of_other_sizes_is_refused(tmp_path: Path) -> None:
    def sized(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

    structure = esp.attach(sized(6), torch.zeros(2, 4))
    structure.prune("0", [1])
    with pytest.raises(CheckpointError, match=r"expected the original shape \(6, 4\), found \(8, 4\)"):
        esp.export_code(structure, tmp_path, lambda: sized(8))
    esp.export_code(structure, tmp_path, lambda: sized(6))
    namespace = {"__file__": str(tmp_path / "network.py"), "__name__": "network"}
    exec((tmp_path / "network.py").read_text(), namespace)
    assert "load" not in namespace
    with pytest.raises(RuntimeError, match=r"0.weight: expected shape \(6, 4\) as it is built, found \(8, 4\)"):
        namespace["restore"](sized(8))  # type: ignore[operator]


def test_torch_export_of_an_edited_network_round_trips(tmp_path: Path) -> None:
    structure = esp.attach(build(), X)
    resized(structure)
    structure.insert_layer(ResidualLayer(8, 5), after="second")
    model = structure.model.eval()
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "network.pt2")
    found = torch.export.load(tmp_path / "network.pt2").module()
    three = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(found(three), model(three))


def test_a_plain_state_loads_into_a_model_of_the_same_sizes(tmp_path: Path) -> None:
    first, second = (nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Linear(size, 2)) for size in (6, 9))
    structure = esp.attach(first, torch.zeros(1, 4))
    structure.grow("0", by=3)
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(first(X[0, :, 0, :4]), second(X[0, :, 0, :4]))


def test_quantised_after_pruning() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(64, 32)
    structure = esp.attach(model, x)
    structure.apply(esp.scaled_plan(structure, esp.Parameters(0.5, of="initial"), round_to=8))
    quantised = pytest.importorskip("torchao.quantization")
    expected = model(x)
    quantised.quantize_(model, quantised.Int8WeightOnlyConfig())
    found = model(x)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.02
    assert model[0].weight.dtype == torch.float32
    assert "Int8" in type(model[0].weight).__name__ or "Affine" in type(model[0].weight).__name__


def test_onnx_runtime_gives_the_same(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    structure = esp.attach(build(), X)
    resized(structure)
    shuffled(structure.model)
    assert esp.export_onnx(structure, tmp_path / "network.onnx") < 1e-5
    assert structure.model.training
    with pytest.raises(ExportError, match="ONNX Runtime differs"):
        esp.export_onnx(structure, tmp_path / "network.onnx", tolerance=0.0)


def test_onnx_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r"onnx is missing: pip install 'espalier\[export\]'"):
        esp.export_onnx(build(), tmp_path / "network.onnx", X)
