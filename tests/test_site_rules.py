"""What may be done to layers and cells, rule by rule: reasons, branches, runs, cells, copies, forms, costs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from grammar_modules import ByWeight, Gate, Gated, Halves, InPlace, Keeping, Kept, Taking, Twice, Unheard, WithExtras
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_small import ZOO

from espalier.errors import PlanError
from espalier.graph.cells import cells
from espalier.graph.regions import Refusal, Region, region_of
from espalier.graph.sites import Site, site_table, sites
from espalier.graph.topology import infer
from espalier.measure.cost import cost_of

TOKENS = torch.randn(2, 3, 4)


def site_of(model: nn.Module, path: str, x: object = TOKENS, named: tuple[str, ...] = ()) -> Site:
    found = sites(infer(model, x), dict(model.named_modules()), named)
    return next(site for site in found if site.modules == (path,))


class Function(nn.Module):
    """Code of the test, with its modules."""

    def __init__(self, code: Callable[..., object], **modules: nn.Module) -> None:
        super().__init__()
        self.code = code
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> object:
        return self.code(self, x)


class Table(nn.Module):
    """Gives what no input has a part in."""

    def forward(self) -> Tensor:
        return torch.ones(4) * 2.0


class Scaled(nn.Module):
    """Reads an attribute of its child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = square()
        self.inner.factor = 2.0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.inner(x))

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.inner.factor


class Moded(Function):
    """Code that asks for the mode."""


def square() -> nn.Linear:
    return nn.Linear(4, 4)


REASONS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "size": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), "0", "turns 3 x 4 into 3 x 6"),
    "type": (lambda: Function(lambda m, x: m.a(x).float(), a=Function(lambda m, x: x.half())), "a",
             "turns 3 x 4 into another type of number"),
    "twice": (lambda: Twice(square(), nn.ReLU()), "inner", "runs 2 times in a forward"),
    "never": (lambda: Function(lambda m, x: m.a(x), a=square(), b=square()), "b", "is never run by itself"),
    "inputs": (lambda: Gated(Gate(square()), square(), narrow=False), "gate",
               "has several inputs of the size of its result (input 0, by)"),
    "escaping": (lambda: Kept(Keeping(square())), "keeping",
                 "computes something that is used elsewhere, other than its result (in keeping ("),
    "several": (lambda: Taking(WithExtras(square(), "used")), "inner", "gives back 2 tensors that are used"),
    "dictionary": (lambda: Taking(WithExtras(square(), "dict")), "inner",
                   "gives back something else than a tensor or a tuple or list of tensors"),
    "weight": (lambda: ByWeight(4, runs=True), "layer", "has its tensor layer.weight read by others"),
    "attribute": (lambda: Scaled(), "inner", "has its attribute factor read by the code of the model"),
    "unused": (lambda: Unheard(square(), square()), "unheard", "computes nothing that is used"),
    "two names": (lambda: Unheard(square(), square()), "layer", "is known as again too"),
    "memory": (lambda: InPlace(nn.ReLU(inplace=True), half=True), "act",
               "writes into memory that is used elsewhere (in act ("),
    "no input": (lambda: Function(lambda m, x: x + m.a(), a=Table()), "a", "has no input"),
    "form": (lambda: Moded(lambda m, x: m.a(x)[0] if m.training else m.a(x), a=Moded(
        lambda m, x: (x * 2.0, None) if m.training else x * 2.0)), "a", "does not give back the same in every pass"),
    "place": (lambda: Moded(lambda m, x: m.a(x)[m.training], a=Moded(lambda m, x: (x * 2.0, x * 3.0))), "a",
              "has another result used in another pass"),
    "fused": (lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), "linear1", "turns 3 x 4 into 3 x 6"),
    "fused norm": (lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), "norm1",
                   "has its attribute weight read by the code of the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_why_a_module_may_not_go(name):
    make, path, reason = REASONS[name]
    site = site_of(make(), path)
    assert site.removal is None
    assert site.why_not["removal"].startswith(reason), site.why_not["removal"]
    assert "remove" not in site.may


def test_the_model_itself_is_no_region():
    assert region_of(infer(square(), TOKENS), "") == Refusal("is the model itself")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = square(), square(), square(), square()

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))


class Block(nn.Module):
    """A block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(4), nn.RMSNorm(4), Attention()
        self.up, self.act, self.down, self.drop = nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.down(self.act(self.up(self.norm2(x))))


REMOVALS = {
    "block": "entry",
    "block.attention": "zero",
    "block.norm1": "entry",
    "block.norm2": "entry",
    "block.drop": "entry",
    "block.attention.out": "entry",
    "block.up to block.down": "zero",
}
"""What is left of each: a branch that does nothing of its own is nothing; what is left of others is their input."""


def test_what_is_neutral_for_a_branch_and_what_for_its_parts():
    model = nn.ModuleDict({"block": Block()})
    whole = Function(lambda m, x: m.block(x), **model)
    found = {site.name: site.removal for site in sites(infer(whole, TOKENS), dict(whole.named_modules()))}
    assert {name: found[name] for name in REMOVALS} == REMOVALS


BESIDE: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "residual": (lambda m, x: x + m.a(x), True),
    "added in place": (lambda m, x: m.a(x).add_(x), True),
    "scaled and dropped": (lambda m, x: x + F.dropout(0.5 * m.a(x), 0.2, m.training), True),
    "taken from": (lambda m, x: x - m.a(x), True),
    "from which is taken": (lambda m, x: m.a(x) - x, False),
    "parallel": (lambda m, x: m.a(x) + m.b(x), True),
    "behind another layer": (lambda m, x: x + m.a(m.b(x)), False),
    "normalised": (lambda m, x: x + m.a(F.layer_norm(x, (4,)).relu()), True),
    "a constant": (lambda m, x: m.a(x) + torch.ones(4), False),
    "a weight": (lambda m, x: m.a(x) + m.b.weight[:3], False),
    "smaller": (lambda m, x: m.a(x) + x.mean(1, keepdim=True), False),
    "used again": (lambda m, x: x + m.a(x) + m.b(m.a.kept.pop()), False),
    "shifted before": (lambda m, x: x + (m.a(x) + 1.0), False),
    "a sum by itself": (lambda m, x: (lambda y: y + y)(m.a(x)), False),
}


class Remembering(nn.Linear):
    """Keeps its result for others."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.kept = [y]
        return y


@pytest.mark.parametrize("name", BESIDE)
def test_zero_is_neutral_for_what_is_only_added_to_its_origin(name):
    code, beside = BESIDE[name]
    model = Function(code, a=Remembering(4, 4), b=square())
    region = region_of(infer(model, TOKENS), "a")
    assert isinstance(region, Region)
    assert region.beside == beside


def chain(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


@pytest.mark.parametrize(
    ("widths", "runs"),
    [
        ((4, 6, 4), []),  # the whole of its parent
        ((4, 6, 8, 6, 5), [("1", "2")]),
        ((4, 6, 4, 6, 4), [("0", "1"), ("1", "2"), ("2", "3")]),
        ((4, 6, 6, 4, 5), [("0", "1", "2")]),
        ((4, 4, 4, 5), []),
        ((4, 6, 8, 4, 8, 5), [("0", "1", "2"), ("2", "3")]),
    ],
)
def test_the_shortest_runs_that_keep_a_size(widths, runs):
    model = Function(lambda m, x: m.body(x), body=chain(*widths))
    found = sites(infer(model, TOKENS), dict(model.named_modules()))
    expected = [tuple(f"body.{key}" for key in run) for run in runs]
    assert [site.modules for site in found if len(site.modules) > 1] == expected
    for site in found:
        if len(site.modules) > 1:
            assert site.may == ("remove",)
            assert site.parameters == sum(
                p.numel() for path in site.modules for p in model.get_submodule(path).parameters()
            )


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: m.b(m.a(x).relu()),  # code between them
        lambda m, x: (lambda y: m.b(y) + y.mean())(m.a(x)),  # another reader
        lambda m, x: m.b(m.a(x)) if m.training else m.a(x) @ m.b.weight.t(),  # not in every pass
    ],
)
def test_modules_that_do_not_hand_on_to_each_other_alone_are_no_run(code):
    class Moded(nn.Dropout):
        """Asks for its mode, so that both are looked at."""

    model = Function(code, a=nn.Linear(4, 6), b=nn.Linear(6, 4), mode=Moded())
    assert all(len(site.modules) == 1 for site in sites(infer(model, TOKENS), dict(model.named_modules())))


def test_cells_are_blocks_of_one_class_and_say_which_are_alike():
    model, x = ZOO["resnet"]()
    found = {one.container: one for one in cells(infer(model, x), dict(model.named_modules()))}
    assert found["layers.0"].members == ("layers.0.0", "layers.0.1")
    assert found["layers.0"].alike == (("layers.0.0", "layers.0.1"),)
    assert found["layers.1"].alike == (("layers.1.0",), ("layers.1.1",))
    boundary = site_of(model, "layers.1.0", x)
    assert (boundary.kind, boundary.removal, boundary.insert_after) == ("cell", None, True)
    assert boundary.why_not["removal"].endswith(": a boundary between stages")
    inner = site_of(model, "layers.0.1", x)
    assert (inner.kind, inner.removal, inner.alike) == ("cell", "entry", ("layers.0.0",))
    assert inner.silence == ("layers.0.1.bn2.bias", "layers.0.1.bn2.weight")


def test_users_name_cells_by_patterns():
    model = Function(lambda m, x: m.body(x), body=nn.Sequential(Block(), nn.ReLU()))
    assert site_of(model, "body.0").kind == "layer"
    assert site_of(model, "body.0", named=("body.?",)).kind == "cell"
    assert site_of(model, "body.0", named=("*.0",)).kind == "cell"
    with pytest.raises(PlanError, match=r"no module of the model is named 'layers\.\*'"):
        site_of(model, "body.0", named=("layers.*",))


COPIES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "one tensor": (lambda: nn.Sequential(Block(), square()), "0", ""),
    "keyword": (lambda: Function(lambda m, x: m.a(x=x), a=Function(lambda m, x: x * 2.0)), "a",
                "gets more than its first tensor"),
    "in a list": (lambda: Function(lambda m, x: m.a[0](x=x), a=nn.ModuleList([Function(lambda m, x: x * 2.0)])),
                  "a.0", ""),
    "tuple": (lambda: Taking(WithExtras(square(), "tuple")), "inner", "gives back a tuple"),
    "half": (lambda: Halves(nn.Linear(2, 2)), "inner", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_after_a_module_gets_its_result_alone(name):
    make, path, reason = COPIES[name]
    site = site_of(make(), path)
    assert site.copyable == (not reason)
    assert site.why_not.get("copyable", "").startswith(reason)


FOLDS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)), "1"),
    "last": (lambda: nn.Sequential(nn.Linear(4, 6)), None),
    "through an activation": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)), None),
    "pointwise first": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 3, padding=1)), "1"),
    "bias before padding": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3, padding=1)), None),
    "pointwise second": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)), "1"),
    "wide": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)), None),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(3, 2, 1)), None),
}


@pytest.mark.parametrize("name", FOLDS)
def test_layers_that_can_be_one(name):
    make, other = FOLDS[name]
    x = torch.randn(2, 3, 6, 6) if isinstance(make()[0], nn.Conv2d) else TOKENS
    site = site_of(make(), "0", x)
    assert site.folds_into == other
    assert ("folds_into" in site.why_not) == (other is None)


@pytest.mark.parametrize(
    ("norm", "other"), [(nn.BatchNorm2d(4), "0"), (nn.BatchNorm2d(4, track_running_stats=False), None)]
)
def test_batch_norms_fold_into_the_layer_before_them(norm, other):
    site = site_of(nn.Sequential(nn.Conv2d(3, 4, 3), norm), "1", torch.randn(2, 3, 6, 6))
    assert site.folds_into == other


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(3, 4, 3), None),
        (nn.Conv2d(3, 3, 3, groups=3), "is a convolution of 3 groups, which is not one matrix"),
        (nn.Conv2d(3, 1, 3), "has rank 1 already"),
        (nn.BatchNorm2d(3), "is no linear layer and no convolution"),
    ],
)
def test_layers_that_can_be_two(layer, reason):
    site = site_of(nn.Sequential(layer, nn.ReLU()), "0", torch.randn(2, 3, 6, 6))
    assert site.factorisable == (reason is None)
    assert site.why_not.get("factorisable") == reason


def test_the_last_of_two_layers_folds_into_the_first():
    assert site_of(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)), "1").folds_into == "0"


def test_tied_layers_keep_their_form():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for path, other in (("0", "1"), ("1", "0")):
        site = site_of(model, path)
        assert (site.factorisable, site.folds_into, site.removal) == (False, None, "entry")
        assert site.why_not["factorisable"] == f"shares {path}.weight with {other}"


def test_what_goes_with_a_module_is_what_only_it_has():
    model = Function(lambda m, x: m.b(m.a(x)), a=nn.Linear(4, 6), b=nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)))
    topology = infer(model, TOKENS)
    found = {site.name: site for site in sites(topology, dict(model.named_modules()))}
    whole = cost_of(topology)
    assert found["a"].parameters + found["b"].parameters == whole.parameters
    assert found["a"].flops + found["b"].flops == whole.flops
    assert found["b.0"].flops == 2 * 2 * 3 * 6 * 6
    model.b[1].weight = nn.Parameter(torch.randn(5, 6))
    model.b[0].bias = model.a.bias  # tied: it stays
    assert site_of(model, "b").parameters == found["b"].parameters - 6
    assert site_of(model, "a").parameters == found["a"].parameters - 6


def test_sites_come_in_the_order_in_which_they_run():
    model, x = ZOO["llama_by_hand"]()
    found = sites(infer(model, x), dict(model.named_modules()))
    assert [site.position for site in found] == sorted(site.position for site in found)
    assert {path for site in found for path in site.modules} == {path for path, _ in model.named_modules() if path}
    assert all(site.may or site.why_not for site in found)


def test_the_table_shows_cells_first_and_counts_the_rest():
    model, x = ZOO["resnet"]()
    found = sites(infer(model, x), dict(model.named_modules()))
    lines = site_table(found, most=5)
    assert len(lines) == 2 + 5 + 1
    assert lines[2].split()[:2] == ["layers.0.0", "cell"]
    assert "where a layer may be inserted" in lines[-1]
    assert "more of these" in lines[-1]
