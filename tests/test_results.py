"""Results that are remembered are those that fake tensors give."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from espalier.graph import results
from espalier.graph.capture import capture
from espalier.graph.fakes import Fakes
from espalier.graph.trace import Trace


class Everything(nn.Module):
    """Operators of every kind: plain ones, views, in place, several results, numbers of two types."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("count", torch.ones(4, dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.norm(self.conv(x)).relu_()
        flat = x.view(len(x), -1)
        left, right = x.split(4, dim=1)
        whole, _ = torch.max(torch.cat([right, left.transpose(2, 3)], dim=1), dim=1)
        turned = whole.clone()
        turned.unsqueeze_(1)
        kept, _ = torch.ops.aten.native_dropout(flat, 0.5, False)
        places = [one.untyped_storage()._cdata for one in (x, flat, left, kept)]
        shared = (places[0] == places[1] == places[2], places[0] == places[3])
        return turned, self.count + 1, self.count + 1.0, F.pad(flat, (1, 2)), flat.new_full((1,), float(shared[0]))


def recorded(trace: Trace) -> tuple[object, ...]:
    return trace.calls, trace.shapes, trace.strides, trace.dtypes, trace.outputs


def test_a_capture_on_remembered_results_is_that_without_any() -> None:
    model, x = Everything().eval(), torch.randn(2, 3, 8, 8)
    results._remembered.clear()
    fresh = capture(model, x)
    known = len(results._remembered)
    again = capture(model, x)
    assert recorded(fresh) == recorded(again)
    assert known > 5
    assert len(results._remembered) == known, "the second capture found everything"


def test_views_share_memory_and_results_do_not() -> None:
    found: list[tuple[bool, ...]] = []

    class Looking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made = x * 2
            view, other = made.view(-1), made.relu()
            place = made.untyped_storage()._cdata
            found.append((view.untyped_storage()._cdata == place, other.untyped_storage()._cdata == place))
            return view + other.view(-1)

    for _ in range(2):
        capture(Looking(), torch.randn(4, 5))
    assert found == [(True, False), (True, False)]


def test_whole_numbers_and_others_are_told_apart() -> None:
    class Added(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x + 1, x + 1.0, x + True

    for _ in range(2):
        trace = capture(Added(), torch.ones(3, dtype=torch.int64))
        assert [trace.dtypes[ref.index] for ref in trace.outputs.values()] == [torch.int64, torch.float32, torch.int64]


def test_the_default_type_counts() -> None:
    class Made(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum() + torch.ones(3)

    types = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            trace = capture(Made(), torch.ones(3, dtype=torch.int64))
        finally:
            torch.set_default_dtype(torch.float32)
        types.append(trace.dtypes[next(iter(trace.outputs.values())).index])
    assert types == [torch.float32, torch.float64]


def test_a_fake_tensor_has_the_state_of_one_that_is_made_in_full() -> None:
    fakes = Fakes()
    for device in (torch.device("cpu"), torch.device("cuda:0")):
        first, second = (fakes.over(torch.empty(2, 3, device="meta"), device) for _ in range(2))
        full = FakeTensor(fakes.mode, torch.empty(2, 3, device="meta"), device)
        for one in (first, second):
            assert one.device == full.device
            assert vars(one) == vars(full)
            assert torch._C._dispatch_key_set(one) == torch._C._dispatch_key_set(full)
