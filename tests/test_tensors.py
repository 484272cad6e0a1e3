"""Index maps against NumPy, memory layouts, and the traps of changing a parameter in place."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from espalier.edit.tensors import gather, memory_order, neighbours_mean, new_shape, replace
from espalier.errors import SurgeryError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


def positions(*entries: int) -> np.ndarray:
    return np.array(entries, dtype=np.int64)


@st.composite
def edits(draw, dtypes=DTYPES):
    """A tensor in some memory layout, and sources for it: kept, range, chosen, repeated and new positions."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    dtype = draw(st.sampled_from(dtypes))
    order = draw(st.permutations(range(len(shape))))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 10
    tensor = torch.empty_permuted(shape, order, dtype=dtype)
    tensor.copy_(values)
    sources = [
        draw(
            st.none()
            | st.builds(lambda a, b: np.arange(min(a, b), max(a, b)), st.integers(0, size), st.integers(0, size))
            | st.lists(st.integers(-1, size - 1), max_size=7).map(lambda entries: positions(*entries))
        )
        for size in shape
    ]
    return tensor, sources


def oracle(tensor: torch.Tensor, sources, fill) -> np.ndarray:
    """NumPy: fancy indexing, then the fill wherever any dimension is new."""
    array = tensor.to(torch.float64).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    full = [np.arange(size) if source is None else source for size, source in zip(array.shape, sources, strict=True)]
    result = array[np.ix_(*[np.maximum(source, 0) for source in full])].copy()
    new = np.zeros(result.shape, dtype=bool)
    for dim, source in enumerate(full):
        new |= (source < 0).reshape([-1 if other == dim else 1 for other in range(len(full))])
    result[new] = np.broadcast_to(fill, result.shape)[new]
    return result


def assert_same(result: torch.Tensor, expected: np.ndarray) -> None:
    found = result.to(torch.float64).numpy() if result.dtype == torch.bfloat16 else result.numpy()
    np.testing.assert_array_equal(found, expected)


@given(edits())
@settings(deadline=None)
def test_gather_equals_numpy(edit):
    tensor, sources = edit
    before = tensor.clone()
    result = gather(tensor, sources, 1.0)
    assert_same(result, oracle(tensor, sources, 1.0))
    assert (result.dtype, tuple(result.shape)) == (tensor.dtype, new_shape(tensor.shape, sources))
    assert torch.equal(tensor, before)
    assert not result._is_view()
    assert result.numel() == 0 or result.data_ptr() != tensor.data_ptr()


@given(edits(), st.booleans())
@settings(deadline=None)
def test_gather_takes_a_tensor_at_new_positions_only(edit, broadcast):
    tensor, sources = edit
    shape = list(new_shape(tensor.shape, sources))
    if broadcast:
        shape[0] = 1
    fill = (torch.arange(float(np.prod(shape))).reshape(shape) % 7).to(tensor.dtype)
    numpy_fill = fill.to(torch.float64).numpy() if fill.dtype == torch.bfloat16 else fill.numpy()
    assert_same(gather(tensor, sources, fill), oracle(tensor, sources, numpy_fill))


@given(edits(dtypes=[torch.float64]))
@settings(deadline=None)
def test_neighbours_mean_equals_its_definition(edit):
    tensor, sources = edit
    array = tensor.numpy()
    full = [np.arange(size) if source is None else source for size, source in zip(array.shape, sources, strict=True)]
    result = neighbours_mean(tensor, sources)
    expected = np.empty(result.shape)
    for place in itertools.product(*[range(len(source)) for source in full]):
        chosen = []
        for size, source, index in zip(array.shape, full, place, strict=True):
            kept = np.unique(source[source >= 0])
            new = kept if len(kept) else np.arange(size)
            chosen.append(np.array([source[index]]) if source[index] >= 0 else new)
        expected[place] = array[np.ix_(*chosen)].mean()
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12)


def test_an_empty_dimension_grows_from_the_fill():
    empty = torch.empty(0, 3)
    assert torch.equal(gather(empty, (positions(-1, -1), None), 2.0), torch.full((2, 3), 2.0))
    assert torch.equal(neighbours_mean(empty, (positions(-1, -1), None)), torch.zeros(2, 3))


@pytest.mark.parametrize("size", [(6, 4, 3, 3), (6, 1, 3, 3), (6, 4, 1, 1), (1, 4, 3, 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_image_layouts_survive_growing_and_pruning(size, memory_format):
    tensor = torch.zeros_like(torch.randn(size), memory_format=memory_format)
    grown = (np.r_[np.arange(size[0]), -1], np.r_[np.arange(size[1]), -1, -1], None, None)
    pruned = (np.arange(size[0])[::2].copy(), np.arange(size[1])[::2].copy(), None, None)
    for sources in (grown, pruned):
        for result in (gather(tensor, sources, 0.0), neighbours_mean(tensor, sources)):
            assert result.is_contiguous(memory_format=memory_format)


def test_volume_layout_and_any_other_order_survive():
    volume = torch.randn(4, 3, 2, 2, 2).contiguous(memory_format=torch.channels_last_3d)
    sources = (positions(0, 2, -1), positions(2, 0, -1, -1), None, None, None)
    assert gather(volume, sources, 0.0).is_contiguous(memory_format=torch.channels_last_3d)
    transposed = torch.randn(5, 4).t()
    assert gather(transposed, (positions(0, 3, -1), None), 0.0).stride() == (1, 3)


def test_what_is_not_dense_becomes_row_major():
    expanded = torch.arange(3.0).expand(2, 3)
    assert memory_order(expanded) == (0, 1)
    assert gather(expanded, (None, positions(2, 0)), 0.0).is_contiguous()
    assert gather(torch.randn(4, 8)[:, ::2], (positions(1, 3), None), 0.0).is_contiguous()


def test_like_gives_the_layout():
    parameter = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    state = torch.randn(4, 3, 2, 2)
    sources = (positions(0, 1, 2, 3, -1), None, None, None)
    result = gather(state, sources, 0.0, like=parameter)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result[:4], state)


def test_meta_and_fake_tensors_are_gathered_without_data():
    sources = (positions(0, 2, -1), positions(1))
    meta = gather(torch.empty(3, 4, device="meta"), sources, 0.0)
    assert (meta.device.type, tuple(meta.shape)) == ("meta", (3, 1))
    with FakeTensorMode():
        assert tuple(gather(torch.empty(3, 4), sources, 0.0).shape) == (3, 1)
        assert tuple(neighbours_mean(torch.empty(3, 4), sources).shape) == (3, 1)


@pytest.mark.parametrize(
    ("sources", "match"),
    [
        ((None,), r"shape \(3, 4\) needs 2 sources.*got 1"),
        ((positions(0, 3), None), r"dimension 0 .* from -1 to 2, got .*\[0 3\]"),
        ((None, positions(-2)), r"dimension 1 .* from -1 to 3"),
        ((None, np.array([0.0])), "1-d int64 array.*float64"),
    ],
)
def test_sources_that_do_not_fit_are_refused(sources, match):
    with pytest.raises(SurgeryError, match=match):
        gather(torch.zeros(3, 4), sources, 0.0)


def test_values_and_means_that_do_not_fit_are_refused():
    with pytest.raises(SurgeryError, match=r"shape \(2, 2\), which does not broadcast to the new shape \(4,\)"):
        gather(torch.zeros(3), (positions(0, 1, 2, -1),), torch.zeros(2, 2))
    with pytest.raises(SurgeryError, match=r"floating-point entries, but .* torch\.int64"):
        neighbours_mean(torch.arange(3), (positions(0, -1),))


def shrink(layer: nn.Linear, kept: int) -> None:
    replace(layer.weight, layer.weight.detach()[:kept].clone(), name="layer.weight")
    replace(layer.bias, layer.bias.detach()[:kept].clone(), name="layer.bias")


def test_replace_keeps_identity_hooks_and_requires_grad():
    layer = nn.Linear(4, 6)
    seen = []
    layer.weight.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    layer.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    layer.bias.requires_grad_(False)
    weight, bias = layer.weight, layer.bias
    layer(torch.randn(2, 4)).sum().backward()
    new, grad = torch.randn(3, 4), torch.randn(3, 4)
    replace(weight, new, grad)
    assert layer.weight is weight
    assert weight.data_ptr() == new.data_ptr()
    assert weight.grad is grad
    replace(bias, torch.zeros(3))
    assert (weight.requires_grad, bias.requires_grad) == (True, False)
    assert weight.is_leaf
    seen.clear()
    layer(torch.randn(2, 4)).sum().backward()
    assert seen == [(3, 4), "accumulated"]


def test_replace_drops_a_gradient_of_the_old_shape():
    layer = nn.Linear(4, 6)
    layer(torch.randn(2, 4)).sum().backward()
    shrink(layer, 3)
    assert layer.weight.grad is None


def test_parameters_that_share_their_storage_stay_tied():
    first = nn.Parameter(torch.randn(4))
    second = nn.Parameter(first.detach())
    new = torch.randn(3)
    replace(first, new)
    replace(second, new)
    with torch.no_grad():
        first[0] = 7.0
    assert second[0] == 7.0


def test_a_new_backward_works_while_an_old_graph_is_alive():
    layer = nn.Linear(4, 6)
    old_loss = layer(torch.randn(2, 4)).sum()
    shrink(layer, 3)
    loss = layer(torch.randn(2, 4)).sum()
    loss.backward()
    assert tuple(layer.weight.grad.shape) == (3, 4)
    assert old_loss.grad_fn is not None


@pytest.mark.parametrize("backward_between", [False, True])
def test_an_old_graph_cannot_write_a_gradient_of_the_old_shape(backward_between):
    layer = nn.Linear(4, 6)
    old_loss = layer(torch.randn(2, 4)).sum()
    shrink(layer, 3)
    if backward_between:
        layer(torch.randn(2, 4)).sum().backward()
    before = layer.weight.grad
    with pytest.raises(SurgeryError, match=r"graph recorded before layer.\w+ was changed from \(6.*\) to \(3.*\)"):
        old_loss.backward()
    assert layer.weight.grad is before
    layer.zero_grad()
    layer(torch.randn(2, 4)).sum().backward()  # the guard is on the old graph, not on the parameter
    assert tuple(layer.weight.grad.shape) == (3, 4)


def test_an_old_graph_that_saved_the_tensor_fails():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    old_loss = model(torch.randn(2, 4)).sum()
    replace(model[1].weight, model[1].weight.detach()[:, :3].clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old_loss.backward()


def refusals():
    parameter = nn.Parameter(torch.randn(4))
    with torch.inference_mode():
        inference = torch.zeros(2)
    yield "not a leaf", parameter * 2, torch.zeros(2), None
    yield r"float32 on cpu, but its replacement is torch.float64", parameter, torch.zeros(2, dtype=torch.float64), None
    yield "replacement is torch.float32 on meta", parameter, torch.zeros(2, device="meta"), None
    yield "inference_mode", parameter, inference, None
    yield r"shape \(2,\) on cpu, but its gradient is of shape \(4,\)", parameter, torch.zeros(2), torch.zeros(4)
    yield "only plain dense tensors", torch.eye(3).to_sparse(), torch.zeros(2), None


@pytest.mark.parametrize(("match", "tensor", "new", "grad"), list(refusals()))
def test_replace_refuses_and_changes_nothing(match, tensor, new, grad):
    shape, version = tensor.shape, tensor._version
    if tensor.requires_grad and tensor.is_leaf:
        tensor.grad = torch.ones_like(tensor)
    with pytest.raises(SurgeryError, match="Cannot replace the thing: .*" + match):
        replace(tensor, new, grad, name="the thing")
    assert (tensor.shape, tensor._version) == (shape, version)
    assert not tensor.is_leaf or not tensor.requires_grad or tensor.grad is not None
