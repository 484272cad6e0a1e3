"""Streams that norms read: what grows, or goes, without a trace, and what the contract has to call changing.

The oracle is the outputs in float64, in eval and in train mode, dropout masks held.
"""

import pytest
import torch
from oracles import FixedDropout, HeldMasks, disturb, outputs, relative_error
from torch import Tensor, nn

from espalier.attaching import attach
from espalier.edit import neutral

BOUND = 1e-9


class DropPath(nn.Module):
    """Drops a branch for whole samples; the choice depends on the sample alone, so that it can be held."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.ones(x.shape[0], 1, 1, dtype=x.dtype)
        kept[::3] = 0.0
        return x * kept / 0.7


class Scale(nn.Module):
    """A scale per unit: even (as at its start) or not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class OffsetRMSNorm(nn.Module):
    """The scale is one plus a weight, as in Gemma."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)


class PreNorm(nn.Module):
    """x + branch(norm(x)), twice, with what may sit on the branch and on the stream."""

    def __init__(self, norm: type[nn.Module], branch: nn.Module | None = None, stream: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.stream = stream or nn.Identity()
        self.norms = nn.ModuleList(norm(6) for _ in range(3))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(2))
        self.branch = branch or nn.Identity()
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stream(self.stem(x))
        for norm, mlp in zip(self.norms[:2], self.mlps, strict=True):
            x = x + self.branch(mlp(norm(x)))
        return self.head(self.norms[2](x))


class PostNorm(nn.Module):
    """norm(x + f(x)): the stream is what a norm gives."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.first, self.second = norm(6), norm(6)
        self.mlp = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        return self.head(self.second(x + self.mlp(x)))


class Groups(nn.Module):
    """Group norm between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.norm = nn.GroupNorm(3, 6)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.instance(self.second(self.norm(self.first(x)).relu()))
        return self.head(x.relu().mean((2, 3)))


TOKENS, IMAGES, VECTORS = (7, 4, 5), (6, 3, 5, 5), (9, 5)


def shape_for(model: nn.Module) -> tuple[int, ...]:
    return IMAGES if isinstance(model, Groups) else VECTORS if isinstance(model, nn.Sequential) else TOKENS


class Comparison:
    def __init__(self, model: nn.Module, even: tuple[str, ...] = (), silent: tuple[int, ...] = ()) -> None:
        torch.manual_seed(0)
        self.model, self.x = model.double(), torch.randn(shape_for(model), dtype=torch.float64)
        disturb(model, self.x, 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(even):
                    parameter.fill_(0.7)
                if name.startswith(("stem", "mlps.0.2", "mlps.1.2")):
                    parameter[list(silent)] = 0.0
        self.masks = {train: HeldMasks() for train in (False, True)}
        self.before = self.present()

    def present(self) -> dict[bool, Tensor]:
        return {train: outputs(self.model, self.x, train, 5, held) for train, held in self.masks.items()}

    def error(self) -> float:
        return max(relative_error(found, self.before[train]) for train, found in self.present().items())


EXACT = {
    "layer norm": (lambda: PreNorm(nn.LayerNorm), "stem", ()),
    "layer norm, drop path": (lambda: PreNorm(nn.LayerNorm, DropPath()), "stem", ()),
    "layer norm, even scale": (lambda: PreNorm(nn.LayerNorm, nn.LayerNorm(6)), "stem", ("branch.",)),
    "RMS norm": (lambda: PreNorm(nn.RMSNorm), "stem", ()),
    "RMS norm, scale": (lambda: PreNorm(nn.RMSNorm, Scale(6)), "stem", ()),
    "RMS norm, drop path": (lambda: PreNorm(nn.RMSNorm, DropPath()), "stem", ()),
    "RMS norm, dropout": (lambda: PreNorm(nn.RMSNorm, FixedDropout(0.3), FixedDropout(0.2)), "stem", ()),
    "RMS norm behind batch norm": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.RMSNorm(6), nn.Linear(6, 2)),
        "0",
        (),
    ),
    "RMS norm, one plus weight": (lambda: PreNorm(OffsetRMSNorm), "stem", ()),
    "post-norm, RMS": (lambda: PostNorm(nn.RMSNorm), "stem", ()),
    "post-norm, even scale": (lambda: PostNorm(nn.LayerNorm), "stem", ("first.",)),
    "groups of a group norm": (Groups, "first:groups", ()),
    "instance norm": (Groups, "second", ()),
}
CHANGING = {
    "layer norm, dropout": (lambda: PreNorm(nn.LayerNorm, FixedDropout(0.3)), "stem", "do not stay at the mean"),
    "layer norm, uneven scale": (lambda: PreNorm(nn.LayerNorm, Scale(6)), "stem", "a scale of its own"),
    "post-norm, uneven scale": (lambda: PostNorm(nn.LayerNorm), "stem", "not even"),
    "channels of a group": (Groups, "first:1", "normalised within groups"),
}


@pytest.mark.parametrize("case", EXACT)
def test_streams_grow_exactly(case):
    make, name, even = EXACT[case]
    model = make()
    compared = Comparison(model, even)
    structure = attach(model, compared.x)
    edit = structure.grow(name, by=3, seed=2)
    assert edit.contract == "exact", edit.why
    assert compared.error() <= BOUND
    edit = structure.grow(name, by=2, seed=3)
    assert edit.contract == "exact", edit.why
    assert compared.error() <= BOUND


@pytest.mark.parametrize("case", CHANGING)
def test_what_has_no_compensation_says_why(case):
    make, name, words = CHANGING[case]
    model = make()
    compared = Comparison(model)
    structure = attach(model, compared.x)
    edit = structure.grow(name, by=3)
    assert edit.contract == "changing"
    assert words in edit.why
    assert compared.error() > 1e-6


@pytest.mark.parametrize("norm", [nn.RMSNorm, OffsetRMSNorm])
def test_units_at_zero_leave_a_stream_that_an_rms_norm_reads(norm):
    model = PreNorm(norm, FixedDropout(0.2))
    compared = Comparison(model, silent=(1, 4))
    edit = attach(model, compared.x).prune("stem", [1, 4])
    assert edit.contract == "exact", edit.why
    assert compared.error() <= BOUND


def test_units_that_a_layer_norm_reads_do_not_leave_exactly():
    model = PreNorm(nn.LayerNorm)
    compared = Comparison(model, silent=(1,))
    edit = attach(model, compared.x).prune("stem", [1])
    assert edit.contract == "changing"
    assert compared.error() > 1e-6


def test_without_the_neutral_start_the_outputs_differ(monkeypatch):
    """New units at random values, where the mean of the others, or zero, is right."""
    monkeypatch.setattr(neutral.Chosen, "starts", lambda self: {})
    for case, (make, name, even) in EXACT.items():
        model = make()
        if isinstance(model, Groups):
            continue
        compared = Comparison(model, even)
        edit = attach(model, compared.x).grow(name, by=3)
        assert edit.contract == "exact"
        assert compared.error() > 1e-6, case
