"""Expected costs of networks with gates, against enumeration and autograd; the stages of k."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from zoo_small import ZOO

import espalier as esp
from espalier.errors import MethodError
from espalier.measure.cost import cost_of
from espalier.parts.budget import Polynomial
from espalier.parts.gates.expected import Expected, ExpectedCost, PerUnit, moment
from espalier.parts.gates.functions import HardSigmoid, Sigmoid
from espalier.parts.gates.stages import DECIDED, Stages


def drawn(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def enumerated(p: Tensor, value) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for one in itertools.product((0.0, 1.0), repeat=len(p)):
        z = torch.tensor(one, dtype=torch.float64)
        total = total + value(z) * torch.where(z > 0, p, 1 - p).prod()
    return total


@pytest.mark.parametrize("power", range(5))
def test_moments_are_those_of_enumeration(power):
    p = drawn(6).requires_grad_()
    found, exact = moment(p, power), enumerated(p, lambda z: z.sum() ** power)
    torch.testing.assert_close(found, exact)
    if power:
        for one, other in zip(torch.autograd.grad(found, p), torch.autograd.grad(exact, p), strict=True):
            torch.testing.assert_close(one, other)


def test_products_of_distinct_axes_are_the_polynomial_at_expected_sizes():
    cost = Polynomial({("a", "b"): 3, ("a",): 2, (): 5})
    p = {"a": drawn(3, 1), "b": drawn(4, 2)}
    a, b = (float(one.sum()) for one in p.values())
    assert float(Expected(cost)(p)) == pytest.approx(3 * a * b + 2 * a + 5)
    leaves = {axis: one.clone().requires_grad_() for axis, one in p.items()}
    grads = torch.autograd.grad(Expected(cost)(leaves), list(leaves.values()))
    assert [one.tolist() for one in grads] == [pytest.approx([3 * b + 2] * 3), pytest.approx([3 * a] * 4)]
    squared = Polynomial({("a", "a"): 1})
    assert float(Expected(squared)(p)) == pytest.approx(a * a + float((p["a"] * (1 - p["a"])).sum()))


@pytest.mark.parametrize("of", ["parameters", "flops"])
def test_the_expected_cost_of_a_coupled_network_is_that_of_enumeration(of):
    model, example = ZOO["resnet"]()
    structure = esp.attach(model, example)
    topology, axes = structure.topology, ["conv1", "layers.0.0.conv1"]  # a stream, which is squared, and a block
    penalty = ExpectedCost(2.0, of)
    reference = penalty.reference(topology)
    assert reference == getattr(structure.cost(), of)
    sizes = [structure.axes[axis].size for axis in axes]
    tables = []
    for axis, size in zip(axes, sizes, strict=True):
        p, table = drawn(size, size + len(tables)), [1.0]
        for one in p.tolist():  # of how many are open
            table = [x * (1 - one) + y * one for x, y in zip([*table, 0.0], [0.0, *table], strict=True)]
        tables.append((axis, p, table))
    total = 0.0
    for counts in itertools.product(*(range(size + 1) for size in sizes)):
        at = {topology.by_name[axis].number: count for axis, count in zip(axes, counts, strict=True)}
        chance = math.prod(table[count] for (_, _, table), count in zip(tables, counts, strict=True))
        total += chance * getattr(cost_of(topology, at), of)
    priced = penalty.priced(topology, [axis for axis, _, _ in tables], reference)
    found = priced({axis: p for axis, p, _ in tables})
    assert float(found) == pytest.approx(2 * total / reference, rel=1e-12)
    whole = {axis: torch.ones(size) for axis, size in zip(axes, sizes, strict=True)}
    assert float(priced(whole)) == pytest.approx(2.0)


@pytest.mark.parametrize("function", [Sigmoid(), HardSigmoid()], ids=repr)
def test_the_gradient_by_logits_is_the_papers(function):
    phi = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    p = function.probability(phi, 2.0)
    structure = esp.attach(*ZOO["mlp"]())
    value = PerUnit({"0": 0.3, "*": 9.0}).priced(structure.topology, ["0"], 1.0)({"0": p})
    (found,) = torch.autograd.grad(value, phi)
    p, c = p.detach(), function.chain(phi.detach(), 2.0)
    torch.testing.assert_close(found, 0.3 * c * p * (1 - p))


def test_stages():
    stages = Stages(k=7.0, start=0.25, until=0.5)
    assert [stages.at(one) for one in (0.0, 0.25, 0.4, 0.5, 1.0)] == [DECIDED, 7.0, 7.0, DECIDED, DECIDED]
    annealed = Stages(k=1.0, start=0.2, until=0.6, rise=100.0)
    assert annealed.at(0.4) == pytest.approx(10.0)
    assert [annealed.stage(one) for one in (0.1, 0.2, 0.6)] == [0, 1, 2]
    with pytest.raises(MethodError, match="start < until"):
        Stages(start=0.5, until=0.5)
    with pytest.raises(MethodError, match="rise"):
        Stages(rise=0.5)
    with pytest.raises(MethodError, match="of: expected"):
        ExpectedCost(1.0, "latency")
