"""The expressions of `espalier.graph.dims`, against arrays of labels that are built position by position."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from espalier.graph.dims import (
    NEW,
    Concat,
    Dim,
    Fixed,
    Leaf,
    Product,
    axes_of,
    implied,
    labels,
    show,
    size_of,
    source,
    substitute,
    without_single,
)

AXES = 4


def dims(depth: int = 3) -> st.SearchStrategy[Dim]:
    """Expressions over a few axes, which repeat."""
    leaves: st.SearchStrategy[Dim] = st.one_of(st.integers(1, 3).map(Fixed), st.integers(0, AXES - 1).map(Leaf))
    if depth == 0:
        return leaves
    parts = st.lists(dims(depth - 1), min_size=1, max_size=3).map(tuple)
    return st.one_of(leaves, parts.map(Product), parts.map(Concat))


@st.composite
def sized_dims(draw: st.DrawFn) -> tuple[Dim, dict[int, int]]:
    dim = draw(dims())
    sizes = {axis: draw(st.integers(1, 4)) for axis in range(AXES)}
    if size_of(dim, sizes) > 2000:
        dim = draw(dims(1))
    return dim, sizes


def positions(dim: Dim, sizes: dict[int, int]) -> list[tuple[object, ...]]:
    """What every position is made of, in order: the path to it, with the unit of every axis on the way."""
    match dim:
        case Fixed(size):
            return [(("fixed", index),) for index in range(size)]
        case Leaf(axis):
            return [((axis, unit),) for unit in range(sizes[axis])]
        case Concat(pieces):
            return [(number, *path) for number, piece in enumerate(pieces) for path in positions(piece, sizes)]
        case Product(factors):
            paths: list[tuple[object, ...]] = [()]
            for factor in factors:
                paths = [(*outer, *inner) for outer in paths for inner in positions(factor, sizes)]
            return paths


def units_in(path: tuple[object, ...], axis: int) -> set[int]:
    return {part[1] for part in path if isinstance(part, tuple) and part[0] == axis}


@st.composite
def changes_of(draw: st.DrawFn, sizes: dict[int, int]) -> dict[int, np.ndarray]:
    """Index maps that drop, keep, reorder and add units."""
    chosen = draw(st.sets(st.sampled_from(sorted(sizes))))
    entry = {axis: st.integers(NEW, sizes[axis] - 1) for axis in chosen}
    return {
        axis: np.array(draw(st.lists(entry[axis], min_size=1, max_size=sizes[axis] + 2)), dtype=np.int64)
        for axis in sorted(chosen)
    }


def gathered(dim: Dim, sizes: dict[int, int], changes: dict[int, np.ndarray], old: np.ndarray) -> np.ndarray:
    """`old` values along the edited `dim`, -1 where new: reshaped, concatenated and indexed piece by piece."""
    match dim:
        case Fixed():
            return old
        case Leaf(axis):
            if axis not in changes:
                return old
            return np.where(changes[axis] == NEW, NEW, old[np.maximum(changes[axis], 0)])
        case Concat(pieces):
            ends = np.cumsum([size_of(piece, sizes) for piece in pieces])
            parts = np.split(old, ends[:-1])
            return np.concatenate([gathered(p, sizes, changes, o) for p, o in zip(pieces, parts, strict=True)])
        case Product(factors):
            grid = old.reshape([size_of(factor, sizes) for factor in factors])
            for position, factor in enumerate(factors):
                chosen = gathered(factor, sizes, changes, np.arange(size_of(factor, sizes)))
                grid = np.take(grid, np.maximum(chosen, 0), axis=position)
                shape = [-1 if other == position else 1 for other in range(len(factors))]
                grid = np.where((chosen == NEW).reshape(shape), NEW, grid)
            return grid.reshape(-1)


@given(sized_dims())
def test_size_counts_positions(case: tuple[Dim, dict[int, int]]) -> None:
    dim, sizes = case
    assert size_of(dim, sizes) == len(positions(dim, sizes))


@given(sized_dims())
def test_labels_name_the_unit_of_every_position(case: tuple[Dim, dict[int, int]]) -> None:
    dim, sizes = case
    for axis in set(axes_of(dim)):
        found = labels(dim, sizes, axis)
        for path, unit in zip(positions(dim, sizes), found.tolist(), strict=True):
            units = units_in(path, axis)
            # an axis that is multiplied by itself has no single unit at a position; it may never change
            assert unit == (max(units) if units else NEW)


@given(sized_dims())
def test_labels_of_an_absent_axis(case: tuple[Dim, dict[int, int]]) -> None:
    dim, sizes = case
    absent = {**sizes, AXES: 3}
    assert (labels(dim, absent, AXES) == NEW).all()
    assert AXES not in set(axes_of(dim))


@given(st.data(), sized_dims())
def test_source_is_the_gather_of_every_axis(data: st.DataObject, case: tuple[Dim, dict[int, int]]) -> None:
    dim, sizes = case
    changes = data.draw(changes_of(sizes))
    found = source(dim, sizes, changes)
    expected = gathered(dim, sizes, changes, np.arange(size_of(dim, sizes)))
    np.testing.assert_array_equal(found, expected)
    after = {axis: len(changes[axis]) if axis in changes else size for axis, size in sizes.items()}
    assert len(found) == size_of(dim, after)


@given(sized_dims())
def test_source_without_changes_is_the_identity(case: tuple[Dim, dict[int, int]]) -> None:
    dim, sizes = case
    np.testing.assert_array_equal(source(dim, sizes, {}), np.arange(size_of(dim, sizes)))


@given(st.data(), sized_dims())
def test_removed_positions_are_those_with_the_label(data: st.DataObject, case: tuple[Dim, dict[int, int]]) -> None:
    """`labels` and `source` say the same: what an edit removes are the positions labelled with the removed units."""
    dim, sizes = case
    axis = data.draw(st.sampled_from(sorted(sizes)))
    kept = data.draw(st.sets(st.integers(0, sizes[axis] - 1), min_size=1))
    change = np.array(sorted(kept), dtype=np.int64)
    paths = positions(dim, sizes)
    expected = [index for index, path in enumerate(paths) if units_in(path, axis) <= kept]
    assert source(dim, sizes, {axis: change}).tolist() == expected
    if all(len(units_in(path, axis)) <= 1 for path in paths):
        found = labels(dim, sizes, axis)
        assert [index for index, unit in enumerate(found.tolist()) if unit == NEW or unit in kept] == expected


@given(st.data(), sized_dims())
def test_edits_compose(data: st.DataObject, case: tuple[Dim, dict[int, int]]) -> None:
    dim, sizes = case
    first = data.draw(changes_of(sizes))
    middle = {axis: len(first[axis]) if axis in first else size for axis, size in sizes.items()}
    second = data.draw(changes_of(middle))
    both: dict[int, np.ndarray] = dict(first)
    for axis, change in second.items():
        start = first.get(axis, np.arange(sizes[axis]))
        both[axis] = np.where(change == NEW, NEW, start[np.maximum(change, 0)])
    once, then = source(dim, sizes, first), source(dim, middle, second)
    np.testing.assert_array_equal(source(dim, sizes, both), np.where(then == NEW, NEW, once[np.maximum(then, 0)]))


@given(st.data(), sized_dims())
def test_substitution_keeps_sizes_and_positions(data: st.DataObject, case: tuple[Dim, dict[int, int]]) -> None:
    dim, sizes = case
    replacement = {0: Product((Leaf(AXES), Leaf(AXES + 1)))}
    sizes = {**sizes, AXES: 2, AXES + 1: 3, 0: 6}
    replaced = substitute(dim, replacement)
    assert 0 not in set(axes_of(replaced))
    assert size_of(replaced, sizes) == size_of(dim, sizes)
    kept = np.array(data.draw(st.permutations(range(3)))[:2], dtype=np.int64)
    inner = source(replacement[0], sizes, {AXES + 1: kept})
    np.testing.assert_array_equal(source(replaced, sizes, {AXES + 1: kept}), source(dim, sizes, {0: inner}))


@given(sized_dims())
def test_without_single_units_the_positions_are_the_same(case: tuple[Dim, dict[int, int]]) -> None:
    dim, sizes = case
    bare = without_single(dim, sizes)
    assert size_of(bare, sizes) == size_of(dim, sizes)
    for axis in set(axes_of(bare)):
        assert sizes[axis] > 1
        np.testing.assert_array_equal(labels(bare, sizes, axis), labels(dim, sizes, axis))
    assert without_single(bare, sizes) == bare


A, B, C, D = (Leaf(axis) for axis in range(4))
SIZES = {0: 2, 1: 3, 2: 6, 3: 2}


@pytest.mark.parametrize(
    ("pairs", "holds"),
    [
        ([(A, D)], True),
        ([(A, B)], False),
        ([(Product((A, B)), C)], True),
        ([(Product((A, B)), C), (Product((A, B)), C)], True),
        ([(Product((A, B)), C), (Product((D, B)), C)], False),
        ([(C, Product((A, B)))], False),
        ([(Product((A, B)), Product((B, A)))], False),
        ([(Concat((A, B)), Concat((D, B)))], True),
        ([(Concat((A, A)), Concat((D, D)))], True),
        ([(Concat((A, D)), Concat((D, D)))], False),
        ([(A, Fixed(2))], False),
        ([(Fixed(2), Fixed(2))], True),
    ],
)
def test_what_follows_from_what(pairs: list[tuple[Dim, Dim]], holds: bool) -> None:
    assert (implied(pairs, SIZES, SIZES) is not None) == holds


@pytest.mark.parametrize(
    ("dim", "text"),
    [
        (Fixed(3), "3"),
        (Leaf(0), "width"),
        (Leaf(7), "axis 7"),
        (Product((Leaf(1), Leaf(2))), "heads x head_dim"),
        (Concat((Leaf(0), Product((Leaf(1), Leaf(2))))), "[width | heads x head_dim]"),
    ],
)
def test_shown(dim: Dim, text: str) -> None:
    assert show(dim, {0: "width", 1: "heads", 2: "head_dim"}) == text


def test_an_example_by_hand() -> None:
    """Fused q, k and v of two heads of three: without head 0 and with a new channel in every head that is left."""
    heads, channels = Leaf(0), Leaf(1)
    qkv = Concat((Product((heads, channels)),) * 3)
    found = source(qkv, {0: 2, 1: 3}, {0: np.array([1]), 1: np.array([0, 2, NEW])})
    assert found.tolist() == [3, 5, NEW, 9, 11, NEW, 15, 17, NEW]
    assert labels(qkv, {0: 2, 1: 3}, 0).tolist() == [0, 0, 0, 1, 1, 1] * 3
