"""torch.compile and DistributedDataParallel together: around the wrapper it works, inside of it it is refused."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import espalier as esp
from espalier.errors import ParallelError

X = torch.zeros(2, 8)


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.compiler.reset()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_a_compiled_wrapper_trains_on_after_an_edit() -> None:
    wrapper = DistributedDataParallel(network())
    runs = torch.compile(wrapper, backend="eager")
    structure = esp.attach(runs, X, optimizer=torch.optim.SGD(wrapper.parameters(), 0.1))
    assert structure.model is wrapper.module
    assert structure.runs is runs
    x = torch.randn(4, 8)
    runs(x).sum().backward()
    structure.grow("0", by=4)
    wrapper.zero_grad()
    found = runs(x)
    torch.testing.assert_close(found, wrapper.module(x))
    found.square().sum().backward()
    (expected,) = torch.autograd.grad(wrapper.module(x).square().sum(), [wrapper.module[2].weight])
    assert expected.shape == (4, 20)
    torch.testing.assert_close(wrapper.module[2].weight.grad, expected)


def test_a_compiled_network_inside_of_a_wrapper_is_refused_with_the_other_way() -> None:
    wrapper = DistributedDataParallel(torch.compile(network(), backend="eager"))
    with pytest.raises(ParallelError, match=r"torch\.compile\(DistributedDataParallel\(model\)\)"):
        esp.attach(wrapper, X)
