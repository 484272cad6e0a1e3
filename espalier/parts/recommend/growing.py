"""What new units of an axis would be worth: what the loss asks of the weights there and they cannot give.

The units are those of TINY (`espalier.parts.ghosts.bottleneck`), one axis at a time:

    N = E[x v'],  v = g - dW* h,  R^-1 N = U s V'

As many are proposed as there are singular values s above the largest ones that are found in the same way after the
gradients g of samples were exchanged. If these say nothing of the inputs, which is the null hypothesis, the largest s
is above a part 1 - level of the permuted ones in no more than `level` of all cases, whatever the scale of anything.

Axes that TINY cannot look at begin by the directions of steepest descent (`espalier.parts.ghosts.steepest`), take one
best step, and have only the test on other samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.edit.plan import Plan, Resize
from espalier.errors import MethodError
from espalier.parts.budget import Polynomial
from espalier.parts.ghosts.bottleneck import Wanted, largest, new_units, singular_values, triangle
from espalier.parts.ghosts.ghosts import Ghosts
from espalier.parts.ghosts.products import Product
from espalier.parts.ghosts.reach import Between, between, crossed, looked_at, tried
from espalier.parts.ghosts.steepest import AsFound, Steepest
from espalier.parts.ghosts.tiny import TinyInit, taken_apart, with_units
from espalier.parts.goal import Cap, Goal, Scores
from espalier.parts.init import Beginning
from espalier.parts.recommend.batches import samples_in
from espalier.parts.recommend.judging import Judge, Proposal, attempted, slopes, squared, stepped
from espalier.parts.recommend.nulls import p_high, shuffled, until_settled
from espalier.parts.recommend.planned import as_planned
from espalier.parts.recommend.recommendation import Evidence, Recommendation
from espalier.parts.score import Context

_RIDGE = 1.0
_FLOOR = 1e-3
"""As `espalier.parts.ghosts.tiny` has them by default."""
_FEW = 8
_PART = 8
"""Where nothing tells how many units to add: one in so many."""


@dataclass(frozen=True)
class Gain:
    """What new units of one axis could give, against permuted gradients."""

    wanted: Wanted
    updates: Mapping[str, Tensor]
    values: Tensor
    """Singular values, the largest first."""
    null: tuple[float, ...]
    """The largest one of each permutation, as many as are needed to know that `p` is above the level if it is; empty
    where samples could not be told apart."""
    level: float

    @property
    def p(self) -> float | None:
        """How probable a largest value like this is if gradients say nothing of the inputs; None if not known."""
        return p_high(float(self.values[0]), self.null) if self.null else None

    @property
    def units(self) -> int:
        """Values above the permuted ones."""
        if not self.null:
            return len(self.values)
        ordered = sorted(self.null, reverse=True)
        # p <= level for all values above this one
        threshold = ordered[max(math.floor(self.level * (1 + len(ordered))) - 1, 0)]
        return int((self.values > threshold).sum())


def gain(context: Context, axis: str, around: Between, permutations: int, level: float) -> Gain:
    """Look at what new units of one axis could give.

    Raises:
        MethodError: the weights around it are not used as they have to be.
    """
    batches = context.probe
    looked = [looked_at(context, {axis: around}, batch) for batch in batches]
    samples = [samples_in(batch) for batch in batches]
    statistics = _Statistics(around, looked)
    found, updates = statistics.crossed(None)
    root = statistics.roots[around.maker]
    observed = found.to(root)
    values = singular_values(root, observed.T)
    told = all(product.samples == count for (products, _), count in zip(looked, samples, strict=True)
               for product in products.values())  # fmt: skip
    generator = context.generator(f"{axis}, gradients permuted")

    def permuted() -> float:
        cross, _ = statistics.crossed([shuffled(count, generator) for count in samples])
        return largest(root.to(cross), cross.T)

    null = until_settled(float(values[0]), permuted, permutations if told else 0, level)
    return Gain(Wanted(root, observed, statistics.mean), updates, values, null, level)


class _Statistics:
    """What one axis shows on some batches. All tell dW* as well as what is left: what that has of chance, permuted
    gradients have too."""

    def __init__(self, around: Between, looked: Sequence[tuple[dict[str, Product], dict[str, Tensor]]]) -> None:
        self._around, self._looked = around, looked
        self._rows = [{name: _precise(product.rows()) for name, product in products.items()} for products, _ in looked]
        self._gradients = [{name: _precise(one) for name, one in found.items()} for _, found in looked]
        grams: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for (products, _), rows in zip(looked, self._rows, strict=True):
            for name, one in rows.items():
                gram = (one.T @ one).double() / (products[name].samples * len(looked))
                grams[name] = grams[name] + gram if name in grams else gram
                counts[name] = counts.get(name, 0) + len(one)
        self.roots = {name: triangle(gram, _RIDGE / counts[name]) for name, gram in grams.items()}
        self.mean = torch.stack([rows[around.maker].double().mean(0) for rows in self._rows]).mean(0)

    def crossed(self, orders: Sequence[Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """N', and dW*, with the samples of the gradients in other orders: one for every batch; None as they are."""
        gradients = [
            {name: one if orders is None else one[orders[number].to(one.device)] for name, one in found.items()}
            for number, found in enumerate(self._gradients)
        ]  # fmt: skip
        updates = {name: self._update(name, gradients) for name in self._around.readers}
        total: Tensor | None = None
        for (products, _), rows, found in zip(self._looked, self._rows, gradients, strict=True):
            maker = products[self._around.maker]
            parts = [
                crossed(maker, products[name], places, rows[self._around.maker],
                        self._left(products[name], rows[name], found[name], updates[name]))
                for name, places in zip(self._around.readers, self._around.places, strict=True)
            ]  # fmt: skip
            of_batch = torch.cat(parts) if len(parts) > 1 else parts[0]
            total = of_batch if total is None else total.add_(of_batch)  # in place: these are the largest tensors here
        assert total is not None
        return total.div_(len(self._looked)), updates

    def _update(self, name: str, gradients: Sequence[Mapping[str, Tensor]]) -> Tensor:
        slope: Tensor | float = 0.0
        for (products, _), rows, found in zip(self._looked, self._rows, gradients, strict=True):
            slope = slope + products[name].units_last(found[name]).T @ rows[name] / len(self._looked)
        assert isinstance(slope, Tensor)
        return -torch.cholesky_solve(slope.T.to(self.roots[name]), self.roots[name]).T

    def _left(self, reader: Product, rows: Tensor, gradient: Tensor, update: Tensor) -> Tensor:
        left = -reader.units_last(gradient) - rows @ update.T.to(rows) / reader.samples
        if not reader.is_convolution:
            return left.reshape(reader.output.shape)
        return left.reshape(reader.samples, *reader.positions, -1).movedim(-1, 1)


def _precise(one: Tensor) -> Tensor:
    return one.to(torch.promote_types(one.dtype, torch.float32))


def larger(
    context: Context, judge: Judge, axis: str, permutations: int, level: float, refused: dict[str, str]
) -> tuple[list[Recommendation], tuple[Evidence, ...]]:
    """Plans by which one axis grows, judged, and what was measured."""
    around = between(context.structure.topology, axis)
    if isinstance(around, Between):
        problems, biases = tried(context, {axis: around}, context.probe[0])
        if axis not in problems:
            found = gain(context, axis, around, permutations, level)
            return _by_gain(context, judge, axis, around, biases, found, refused)
    count = _count(context, axis, max(1, context.structure.axes[axis].size // _PART))
    if not count:
        return [], ()
    return attempted(judge, [lambda: _steepest(context, judge, axis, count)], axis, refused), ()


def _by_gain(
    context: Context,
    judge: Judge,
    axis: str,
    around: Between,
    biases: Mapping[str, str],
    found: Gain,
    refused: dict[str, str],
) -> tuple[list[Recommendation], tuple[Evidence, ...]]:
    largest = float(found.values[0])
    null = sorted(found.null)[len(found.null) // 2] if found.null else None
    seen = "" if null is None else f", permuted {null:.3g} (p = {found.p:.2g})"
    words = f"what the loss asks for and its readers cannot give: singular value {largest:.3g}{seen}"
    evidence = Evidence("gain of growing", largest, words, null, found.p)
    size = context.structure.axes[axis].size
    count = _count(context, axis, min(found.units, max(_FEW, size // 2)))
    if not count or not largest > 0:
        return [], (evidence,)

    def make() -> Proposal:
        incoming, outgoing, values = new_units(found.wanted, count, _FLOOR)
        able = _count(context, axis, len(values))
        if not able:
            raise MethodError("no size that its limits allow is that much larger.")
        parts = taken_apart(context, around, incoming, outgoing, found.updates, biases)
        chosen = {axis: tuple(range(able))}
        scores = Scores({axis: values}, {axis: parts})
        start = TinyInit(batches=len(context.probe))(context, chosen, scores)
        ghosts = Ghosts(context, {axis: able})
        fall = slope(context, ghosts, with_units(ghosts, chosen, scores.found, 0.0),
                     with_units(ghosts, chosen, scores.found, 1.0))  # fmt: skip
        steep = Evidence("slope", -fall, f"the loss begins to fall by {-fall:.3g} per unit of their amplitude")
        return Proposal("grow", axis, _what(able, size), _plan(context, axis, able, start), (evidence, steep))

    return attempted(judge, [make], axis, refused), (evidence,)


def slope(context: Context, ghosts: Ghosts, at: Mapping[str, Tensor], towards: Mapping[str, Tensor]) -> float:
    """The derivative of the loss, from one choice of the tensors of new units towards another one."""
    names = [name for name, one in at.items() if not torch.equal(one, towards[name])]
    sizes = [samples_in(batch) for batch in context.probe]
    total = 0.0
    for batch, size in zip(context.probe, sizes, strict=True):
        found = ghosts.gradients(at, batch, names)
        total += size / sum(sizes) * sum(float((found[name] * (towards[name] - at[name])).sum()) for name in names)
    return total


def _steepest(context: Context, judge: Judge, axis: str, count: int) -> Proposal:
    """New units in the directions of steepest descent, after one best step of their own weights."""
    size = context.structure.axes[axis].size
    goal = Goal(
        "grow", {axis: size}, {axis: size}, {axis: size + count}, {axis: float(size)},
        Cap(Polynomial({(axis,): 1}), size + count),
    )  # fmt: skip
    scores = Steepest()(context, goal)
    begun = AsFound()(context, {axis: tuple(range(count))}, scores)
    plan = _plan(context, axis, count, begun)
    with as_planned(context.structure, plan, judge.given) as planned:
        square = squared(slopes(planned, judge.samples.found, planned.fresh)[1])
        values = stepped(planned, judge.samples.found, planned.fresh)
    words = f"the squared gradient of new units' weights is {square:.3g}, and is followed by one step"
    evidence = Evidence("gain of growing", square, words)
    fresh = {name: one for name, one in values.items() if name in planned.fresh}
    start = Beginning({**begun.values, **fresh}, begun.deltas)
    plan = _plan(context, axis, count, start)
    return Proposal("grow", axis, _what(count, size), plan, (evidence,), trained=True)


def _plan(context: Context, axis: str, count: int, start: Beginning) -> Plan:
    return Plan((Resize(axis, add=count),), seed=context.seed, values=start.values, deltas=start.deltas)


def _what(count: int, size: int) -> str:
    return f"add {count} unit{'s' if count > 1 else ''} to {size}"


def _count(context: Context, axis: str, most: int) -> int:
    """About as many new units as that, such that the size is one that the axis may have; 0 if there is none."""
    one = context.structure.axes[axis]
    if most < 1:
        return 0
    size = one.limits.below(one.size + most + 1)
    return 0 if size is None or size <= one.size else size - one.size


__all__ = ["Gain", "gain", "larger", "slope"]
