"""A sparse copy computes the same, has only what was measured to be faster, and says why the rest is dense."""

from __future__ import annotations

import pytest
import torch
from snapshots import differences, snapshot
from torch import Tensor, nn

import espalier as esp
from espalier.edit.plan import mask_plan
from espalier.errors import EspalierError
from espalier.measure import sparse, sparse_forms
from espalier.measure.sparse import sparse_copy
from espalier.measure.sparse_forms import CompressedRows, SemiStructured, problem, two_of_four
from espalier.structure import Structure


def masked(sparsity: float, width: int = 64) -> Structure:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width, bias=False), nn.Dropout())
    structure = esp.attach(model, torch.randn(3, 5, width))
    shape = (width, width)
    structure.apply(mask_plan({name: torch.rand(shape) > sparsity for name in ("0.weight", "2.weight")}))
    return structure


def halved(width: int = 64) -> Structure:
    """Two of every four weights are live."""
    structure = masked(0.0, width)
    live = torch.tensor([True, False, False, True]).repeat(width, width // 4)
    structure.apply(mask_plan({"0.weight": live, "2.weight": live}))
    return structure


def test_a_sparse_copy_computes_the_same_and_leaves_the_model_alone() -> None:
    structure = masked(0.8)
    before = snapshot(structure.model)
    found = structure.sparse_copy(least=0.0, repeats=1)
    assert differences(before, snapshot(structure.model)) == []
    assert set(found.faster) == {"0.weight", "2.weight"}
    assert isinstance(found.model.get_submodule("0"), CompressedRows)
    assert "the whole network:" in str(found)
    x = torch.randn(2, 7, 64)
    structure.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), structure.model(x))


def test_only_what_is_faster_is_replaced() -> None:
    structure = masked(0.5)
    found = structure.sparse_copy(least=1e9)
    assert found.faster == {}
    assert found.seconds == found.dense_seconds
    assert not any(isinstance(module, CompressedRows) for module in found.model.modules())
    assert [one.why_dense for one in found.weights] == ["has to be 1e+09 times as fast"] * 2
    assert all(one.times is not None for one in found.weights)
    assert str(found).endswith("masks save no time here: no layer is faster in a sparse form")
    structure = masked(0.995, width=1024)
    faster = structure.sparse_copy(torch.randn(128, 1024))
    assert set(faster.faster) == {"0.weight", "2.weight"}  # 13 to 20 times in measurements
    assert faster.seconds < faster.dense_seconds


class Mixture(nn.Module):
    """A convolution, a layer by keyword, one with a hook, and one that does not run in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv1d(4, 4, 1), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.register_forward_hook(lambda module, args, result: None)
        self.extra = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(input=self.conv(x)))
        return self.extra(x) if self.training else x


def test_every_masked_weight_has_a_form_or_a_reason() -> None:
    torch.manual_seed(0)
    model = Mixture()
    structure = esp.attach(model, torch.randn(2, 4, 4))
    names = ("conv.weight", "first.weight", "first.bias", "second.weight", "extra.weight")
    masks = {name: torch.rand(model.get_parameter(name).shape) > 0.6 for name in names}
    structure.apply(mask_plan(masks))
    found = {one.name: one for one in structure.sparse_copy(least=0.0, repeats=1).weights}
    assert set(found) == set(names)
    assert found["conv.weight"].why_dense == "belongs to a Conv1d; sparse kernels are for plain linear layers"
    assert found["first.weight"].form == "compressed rows"
    for name in ("first.bias", "second.weight"):
        assert found[name].why_dense == "is not the weight of its layer, or its layer has hooks"
    assert found["extra.weight"].why_dense == "is not read for these inputs"
    assert found["first.weight"].sparsity == pytest.approx(1 - float(masks["first.weight"].float().mean()))
    with pytest.raises(EspalierError, match=r"compressed rows: conv\.weight belongs to a Conv1d"):
        structure.sparse_copy(form="compressed rows")


def test_where_there_is_nothing_to_gain_it_is_said() -> None:
    structure = esp.attach(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    with pytest.raises(EspalierError, match="nothing is masked"):
        structure.sparse_copy()
    structure = masked(0.5)
    with pytest.raises(EspalierError, match=r"0\.weight: expected a weight on a CPU or a GPU, found meta"):
        sparse_copy(structure.model.to("meta"), structure.masks, structure.example)


def test_two_of_four_is_refused_on_a_cpu() -> None:
    with pytest.raises(
        EspalierError, match=r"semi-structured: 0\.weight is on cpu; kernels .* are those of NVIDIA GPUs"
    ):
        halved().sparse_copy(form="semi-structured")


def test_the_pattern_is_known_by_the_zeros_along_rows() -> None:
    live = torch.tensor([[1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0]])
    assert two_of_four(live)
    assert not two_of_four(torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    assert not two_of_four(torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])[:, 1:5])
    assert not two_of_four(live[:, :6])
    structure = masked(0.0)
    run = esp.Session(
        esp.attach(structure.model, structure.example, optimizer=torch.optim.SGD(structure.model.parameters(), 0.1)),
        [esp.prune.WeightsMagnitude(pattern=esp.NM(2, 4), budget=esp.Sparsity(0.5), every=esp.steps(1), start=0.0,
                                    until=esp.steps(1))],
        loss=lambda model, batch: model(batch).square().mean(),
        total_steps=2,
    )  # fmt: skip
    run.loss(structure.example).backward()
    run.step()
    assert run.structure.masks
    assert all(two_of_four(run.structure.model.get_parameter(name)) for name in run.structure.masks)


class OnGPU(Tensor):
    """A tensor on the CPU that says that it is on a GPU: the rules look at nothing else of it."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("dtype", "capability", "pattern", "reason"),
    [
        (torch.float16, (8, 0), True, ""),
        (torch.bfloat16, (9, 0), True, ""),
        (torch.float16, (7, 5), True, r"compute capability 7\.5; .* need 8\.0"),
        (torch.float32, (9, 0), True, "is of type float32; .* take float16 and bfloat16"),
        (
            torch.float16,
            (9, 0),
            False,
            r"more than two numbers in some four of a row; prune with the pattern NM\(2, 4\)",
        ),
    ],
)
def test_what_a_gpu_has_to_be_for_two_of_four(
    dtype: torch.dtype, capability: tuple[int, int], pattern: bool, reason: str
) -> None:
    live = torch.tensor([1.0, 0.0, 0.0 if pattern else 1.0, 1.0]).repeat(16, 4).to(dtype)
    found = problem("semi-structured", live.as_subclass(OnGPU), capability)
    assert (found == "") == (reason == "")
    if reason:
        with pytest.raises(EspalierError, match=reason):
            raise EspalierError(found)


def test_the_semi_structured_form_is_chosen_only_if_it_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the device and for torch's conversion, since there is no such GPU where tests run."""
    structure = halved()
    monkeypatch.setattr(sparse, "DEVICES", {"cpu": "semi-structured"})
    monkeypatch.setattr(sparse, "problem", lambda form, weight, capability: "")
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight.clone())
    found = structure.sparse_copy(least=0.0, repeats=1)
    assert {one.form for one in found.weights} == {"semi-structured"}
    assert isinstance(found.model.get_submodule("2"), SemiStructured)
    x = torch.randn(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), structure.model.eval()(x))

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight * 1.01)
    found = structure.sparse_copy(least=0.0, repeats=1)
    assert {one.why_dense for one in found.weights} == {"would make something else in a sparse form"}

    def refused(weight: Tensor) -> Tensor:
        raise RuntimeError("shapes are multiples of 16\nmore")

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", refused)
    found = structure.sparse_copy()
    assert {one.why_dense for one in found.weights} == {"is refused by torch: shapes are multiples of 16"}
    assert not any(isinstance(module, SemiStructured) for module in found.model.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_of_four_on_a_gpu() -> None:
    structure = halved(1024)
    model = structure.model.to("cuda", torch.float16)
    x = torch.randn(512, 1024, device="cuda", dtype=torch.float16)
    found = sparse_copy(model, structure.masks, x, form="semi-structured", least=0.0)
    assert {one.form for one in found.weights} == {"semi-structured"}
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), model.eval()(x), rtol=2e-2, atol=2e-2)


def test_forms_are_those_of_the_devices() -> None:
    assert dict(sparse_forms.DEVICES) == {"cpu": "compressed rows", "cuda": "semi-structured"}
    assert problem("compressed rows", torch.zeros(2, 2), None) == ""
    assert "compressed rows are for the CPU" in problem("compressed rows", torch.zeros(2, 2, device="meta"), None)
