"""Numbers that code reads from attributes and shapes, followed to the operators that get them."""

import copy
import functools
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from espalier.attaching import attach
from espalier.graph.capture import capture
from espalier.graph.origins import Attribute, Derived, SizeOf, Tracked, origin_of

X = torch.randn(2, 5, 6)


class Coded(nn.Module):
    """Two projections of a sequence around code given as a function of the module and its input."""

    def __init__(self, code, **attributes) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 12), nn.Linear(6, 12)
        self.out = nn.Linear(12, 3)
        self.code = code
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.code(self, self.q(x), self.k(x)))


def scores(m: Coded, q: Tensor, k: Tensor, heads: int, each: int) -> Tensor:
    """Each projection seen by heads and turned around within them: nothing but the numbers ties the two."""
    return q.view(2, 5, heads, each).sin().flatten(2) + 0 * k.view(2, 5, heads, each).cos().flatten(2).sum(-1, True)


def test_one_attribute_that_sets_two_sizes_makes_them_one_axis():
    tied = Coded(lambda m, q, k: scores(m, q, k, m.heads, m.each), heads=3, each=4)
    structure = attach(tied, X)
    assert structure.topology.tensors["q.weight"][0] == structure.topology.tensors["k.weight"][0]
    edit = structure.prune(next(name for name, axis in structure.axes.items() if axis.size == 3), [0])
    assert (tied.heads, tied.each) == (2, 4)
    assert {str(change) for change in edit.attributes} >= {"model.heads: 3 -> 2"}
    structure.undo()
    assert (tied.heads, tied.each) == (3, 4)


def test_sizes_that_nothing_ties_stay_apart():
    free = Coded(lambda m, q, k: q.sin() + 0 * k.cos().sum(-1, True))
    structure = attach(free, X)
    assert structure.topology.tensors["q.weight"][0] != structure.topology.tensors["k.weight"][0]


@pytest.mark.parametrize(
    "attributes",
    [
        {"sizes": (3, 4)},
        {"sizes": [3, 4]},
        {"config": SimpleNamespace(heads=3, each=4)},
    ],
    ids=["tuple", "list", "settings"],
)
def test_numbers_in_tuples_lists_and_settings_follow(attributes):
    def code(m: Coded, q: Tensor, k: Tensor) -> Tensor:
        heads, each = m.sizes if "sizes" in attributes else (m.config.heads, m.config.each)
        return scores(m, q, k, heads, each)

    model = Coded(code, **copy.deepcopy(attributes))
    structure = attach(model, X)
    structure.grow(next(name for name, axis in structure.axes.items() if axis.size == 4), by=2)
    model(X)
    found = model.sizes if "sizes" in attributes else (model.config.heads, model.config.each)
    assert tuple(found) == (3, 6)
    assert type(found) is type(attributes.get("sizes", ()))


def test_a_size_read_from_one_tensor_and_handed_to_another_ties_them():
    model = Coded(lambda m, q, k: q.sin() + 0 * k.reshape(2, -1, q.shape[-1]).cos().sum(-1, True))
    structure = attach(model, X)
    assert structure.topology.tensors["q.weight"][0] == structure.topology.tensors["k.weight"][0]


def test_arithmetic_is_followed():
    model = Coded(lambda m, q, k: q.view(2, 5, m.heads, q.shape[-1] // m.heads).sin().flatten(2) + 0 * k.sum(-1, True),
                  heads=3)  # fmt: skip
    structure = attach(model, X)
    assert {axis.size for axis in structure.axes.values() if axis.growable} >= {3, 4}
    structure.grow({name: 1 for name, axis in structure.axes.items() if axis.size in (3, 4) and axis.growable})
    assert model.heads == 4
    assert model.q.out_features == 20
    model(X)


def test_what_a_cache_hands_on_from_another_layer_says_nothing():
    @functools.lru_cache
    def halves(width: int) -> tuple[int, int]:
        return width // 2, width - width // 2

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            both = self.up(x)
            a, b = both.split(halves(both.shape[-1]), -1)
            return self.down(a * b.sigmoid())

    structure = attach(nn.Sequential(Halved(), Halved()), X)
    assert structure.topology.tensors["0.up.weight"][0] != structure.topology.tensors["1.up.weight"][0]


def test_a_capture_leaves_plain_numbers_behind():
    model = Coded(lambda m, q, k: scores(m, q, k, m.heads, m.each), heads=3, each=4, sizes=[3, 4],
                  config=SimpleNamespace(heads=3))  # fmt: skip
    config = model.config
    attach(model, X).axes.keys()
    assert all(type(one) is int for one in (model.heads, model.each, *model.sizes, model.config.heads))
    assert model.config is config


def test_only_a_tracked_capture_has_links():
    model = Coded(lambda m, q, k: scores(m, q, k, m.heads, m.each), heads=3, each=4)
    assert capture(model, X).links == {}
    links = capture(model, X, tracked=True).links
    assert "the model.heads" in {str(one.origin) for found in links.values() for one in found}


def test_a_tracked_number_is_an_int():
    heads = Tracked(3, Attribute("m", ("heads",), 3, 0))
    assert heads == 3
    assert hash(heads) == hash(3)
    assert {3: "x"}[heads] == "x"
    assert list(range(heads)) == [0, 1, 2]
    assert heads / 2 == 1.5
    assert heads * 0.5 == 1.5
    assert heads**2 == 9
    assert heads % 2 == 1
    assert type(pickle.loads(pickle.dumps(heads))) is int
    assert copy.deepcopy(heads) is heads
    assert torch.zeros(heads, 2).shape == (3, 2)


def test_origins_of_arithmetic():
    width = Tracked(12, SizeOf(7, 1, 0))
    assert origin_of(width // 3) == Derived("//", SizeOf(7, 1, 0), 3)
    assert origin_of(2 * width) == Derived("*", 2, SizeOf(7, 1, 0))
    assert origin_of(20 - width) == Derived("-", 20, SizeOf(7, 1, 0))
    assert origin_of(sum([width, width])) == Derived("+", Derived("+", 0, SizeOf(7, 1, 0)), SizeOf(7, 1, 0))
    assert type(width * True) is int
    assert origin_of("12") is None
