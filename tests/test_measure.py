"""Costs against torch's own counter, and costs of a unit against growing one."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo_small import ZOO

import espalier as esp
from espalier.graph.trees import call_arguments
from espalier.measure import cost_of, latency

NETWORKS = sorted(ZOO)


def counted(model: nn.Module, example: Any) -> int:
    args, kwargs = call_arguments(example)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NETWORKS)
def test_flops_are_those_of_torchs_counter(name: str) -> None:
    model, example = ZOO[name]()
    structure = esp.attach(model, example)
    ours, theirs = structure.cost().flops, counted(model, example)
    # torch's counter does not know the attention kernel of the CPU; it is the only operator counted here alone.
    known = sum(
        factor * _volume(structure, dims)
        for call, factor, dims in structure.topology.predictions[0].costs
        if "flash_attention_for_cpu" not in structure.topology.predictions[0].calls[call].name
    )
    assert theirs in (ours, known)
    assert ours >= known > 0


def _volume(structure: Any, dims: Any) -> int:
    from espalier.graph.dims import size_of

    total = 1
    for dim in dims:
        total *= size_of(dim, structure.topology.sizes)
    return total


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_counted_once(name: str) -> None:
    model, example = ZOO[name]()
    assert esp.attach(model, example).cost().parameters == sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("name", ["mlp_batch_norm", "resnext", "densenet", "grouped_query", "hf_llama"])
def test_the_cost_of_a_unit_is_what_growing_by_one_adds(name: str) -> None:
    model, example = ZOO[name]()
    structure = esp.attach(model, example)
    grown = 0
    for key in structure.axes:
        axis = structure.axes[key]
        if not axis.growable:
            continue
        number = structure.topology.by_name[key].number
        before = structure.cost()
        predicted = cost_of(structure.topology, {number: axis.size + 1})
        structure.grow(key, by=1)
        after = structure.cost()
        assert after == predicted
        assert after - before == axis.unit_cost
        assert after.parameters == sum(one.numel() for one in model.parameters())
        assert after.flops == esp.attach(model, example).cost().flops
        grown += 1
    assert grown


def test_latency_is_positive_and_restores_modes() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
    model[1].eval()
    seconds = latency(model, torch.zeros(2, 4), repeats=3, warmup=1)
    assert seconds > 0
    assert [module.training for module in model] == [True, False, True]
    with pytest.raises(ValueError, match="at least 1 repeat"):
        latency(model, torch.zeros(2, 4), repeats=0)
