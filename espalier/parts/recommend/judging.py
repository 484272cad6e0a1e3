"""What plans are predicted to change: the network is run as each would make it, on samples that none was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from espalier.edit.plan import Plan
from espalier.errors import EspalierError, MethodError
from espalier.parts.recommend.batches import Samples, samples_in
from espalier.parts.recommend.criteria import WBIC, Criterion
from espalier.parts.recommend.freedom import Freedoms, rows_for
from espalier.parts.recommend.nulls import falls
from espalier.parts.recommend.planned import Loss, Planned, Tensors, as_planned
from espalier.parts.recommend.recommendation import ROUNDING, Evidence, Kind, Recommendation
from espalier.parts.recommend.wbic import Sampled, wbic
from espalier.parts.score import derived_seed
from espalier.structure import Structure

PARTS = 16
"""Into how many parts the samples are cut on which plans are judged, about."""
_HALVINGS = 16
"""Of a step down a gradient."""
FIRST = Criterion("bic", "effective")
"""By what plans are chosen that WBIC then judges."""


@dataclass(frozen=True)
class Proposal:
    """A plan, and why it is proposed."""

    kind: Kind
    site: str
    what: str
    plan: Plan
    evidence: tuple[Evidence, ...]
    trained: bool = False
    """Whether a step of new parameters is all that lowers the loss, so that one of those there are might do as much."""


@dataclass(frozen=True)
class Judge:
    """Judges proposals against the network as it is."""

    structure: Structure
    given: Loss
    samples: Samples
    count: int
    """n: samples that the network was trained on."""
    criterion: Criterion | WBIC
    seed: int
    before: Tensor
    """Mean losses of the parts of the judged samples, as the network is: (parts,)."""
    own: Tensor
    """Likewise after one best step of the parameters that there are; of a network trained to the end no lower."""
    freedoms: Freedoms | None
    """Of the network as it is; None where no criterion asks for it."""
    sampled: Sampled | None
    """WBIC of the network as it is, where it is the criterion."""

    @classmethod
    def of(
        cls, structure: Structure, loss: Loss, samples: Samples, count: int, criterion: Criterion | WBIC, seed: int
    ) -> Judge:
        """Measure the network as it is. Raises MethodError for WBIC of a network with masks."""
        if isinstance(criterion, WBIC) and structure.masks:
            raise MethodError("WBIC varies all weights, and masks hold some at zero; choose another criterion.")
        with as_planned(structure, Plan(()), loss) as planned:
            before = planned.losses(samples.judged)
            whole = {name: torch.ones_like(planned.parameters[name], dtype=torch.bool) for name in planned.trained}
            own = planned.losses(samples.judged, stepped(planned, samples.found, whole))
            if not float((own - before) @ samples.weights) < 0:
                own = before
            asked = isinstance(criterion, WBIC) or criterion.needs_freedom
            rows = samples.cut(rows_for(sum(planned.parameters[name].numel() for name in planned.trained)))
            freedoms = Freedoms(planned, rows, count, structure.masks) if asked else None
            sampled = _wbic(planned, samples, count, criterion, seed) if isinstance(criterion, WBIC) else None
        return cls(structure, loss, samples, count, criterion, seed, before, own, freedoms, sampled)

    @property
    def loss(self) -> float:
        """The mean loss of the network as it is."""
        return float(self.before @ self.samples.weights)

    @property
    def own_step(self) -> float:
        """What the loss changes by after one best step of the parameters that there are; 0 if it does not fall."""
        return float((self.own - self.before) @ self.samples.weights)

    def judged(self, proposal: Proposal) -> Recommendation:
        """What is predicted of a plan; by WBIC later (`by_wbic`).

        Raises:
            PlanError, SurgeryError: the plan cannot be carried out.
        """
        with as_planned(self.structure, proposal.plan, self.given) as planned:
            after = planned.losses(self.samples.judged)
            freedom = math.nan if self.freedoms is None else self.freedoms.change(planned)
            cost, contract = planned.cost, planned.contract
        now, weights = self.structure.cost(), self.samples.weights
        differences = after - self.before
        loss = float(differences @ weights)
        spread = ((differences - loss).square() * weights).sum().sqrt()
        parameters, flops = cost.parameters - now.parameters, cost.flops - now.flops
        by = FIRST if isinstance(self.criterion, WBIC) else self.criterion
        free = parameters < 0 and flops <= 0 and abs(loss) <= ROUNDING * abs(self.loss)
        evidence = proposal.evidence
        beyond = after - (self.own if proposal.trained else self.before)
        if proposal.kind in ("grow", "insert"):
            evidence = (*evidence, self._fall(loss, beyond, proposal))
        return Recommendation(
            kind=proposal.kind,
            site=proposal.site,
            what=proposal.what,
            plan=proposal.plan,
            evidence=evidence,
            loss=loss,
            error=float(spread) / math.sqrt(max(len(differences) - 1, 1)),
            parameters=parameters,
            flops=flops,
            freedom=freedom,
            criterion=by.change(float(beyond @ weights), parameters, freedom, self.count),
            contract=contract,
            is_free=free,
        )

    def by_wbic(self, one: Recommendation, criterion: WBIC) -> Recommendation:
        """The same with the change of WBIC for its criterion."""
        assert self.sampled is not None
        with as_planned(self.structure, one.plan, self.given) as planned:
            found = _wbic(planned, self.samples, self.count, criterion, self.seed)
        change, error = found.value - self.sampled.value, math.hypot(found.error, self.sampled.error)
        words = (
            f"WBIC {change:+.4g} ± {error:.2g} per sample, learning coefficient {self.sampled.learning:.3g} -> "
            f"{found.learning:.3g}"
        )
        evidence = (*one.evidence, Evidence("wbic", change, words))
        return replace(one, criterion=change, evidence=evidence)

    def _fall(self, loss: float, beyond: Tensor, proposal: Proposal) -> Evidence:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, proposal.site, "falls"))
        p = falls(beyond, self.samples.weights, generator)
        null = self.own_step if proposal.trained else 0.0
        than = f", by {null:+.3g} with a step of the weights that there are" if proposal.trained else ""
        words = f"on other samples the loss changes by {loss:+.3g}{than} (p = {p:.2g})"
        return Evidence("held-out loss", loss, words, null, p)


def slopes(planned: Planned, batches: Sequence[Any], masks: Tensors) -> tuple[float, dict[str, Tensor]]:
    """The mean loss of some batches, and its gradient by those entries of parameters that masks show, zero elsewhere.

    `masks`: parameter -> entries, of booleans; those that are not trained have no gradient.
    """
    names = sorted(masks.keys() & planned.trained)
    sizes = [samples_in(batch) for batch in batches]
    gradient = {name: torch.zeros_like(planned.parameters[name]) for name in names}
    loss = 0.0
    for batch, size in zip(batches, sizes, strict=True):
        share = size / sum(sizes)
        value, found = planned.gradients(batch, planned.parameters, names)
        loss += share * value
        for name, one in found.items():
            gradient[name] += share * one * masks[name]
    return loss, gradient


def stepped(planned: Planned, batches: Sequence[Any], masks: Tensors) -> Tensors:
    """Parameters after one step down the gradient by some of their entries, as far as the loss falls.

    The gradient is that of every second batch, and the loss that of the others, so that no step goes further than holds
    for other samples as well. Steps are halves, quarters and so on of that at which a loss that fell on as it begins
    would be zero: L / |g|^2.
    """
    others = batches[1::2] or batches
    loss, gradient = slopes(planned, batches[::2], masks)
    square = squared(gradient)
    if not (square > 0 and math.isfinite(square)):
        return planned.parameters
    sizes = torch.tensor([samples_in(batch) for batch in others], dtype=torch.float64)

    def values(amplitude: float) -> dict[str, Tensor]:
        length = amplitude * abs(loss) / square
        return {**planned.parameters, **{name: planned.parameters[name] - length * one
                                         for name, one in gradient.items()}}  # fmt: skip

    def then(amplitude: float) -> float:
        found = float(planned.losses(others, values(amplitude)) @ sizes)
        return found if math.isfinite(found) else math.inf

    return values(_descent(then))


def _descent(loss: Callable[[float], float]) -> float:
    """The amplitude of the lowest loss on the way down from 1 by halves, past those that raise it; 0 if all do."""
    lowest, best = loss(0.0), 0.0
    for halvings in range(_HALVINGS):
        now = loss(0.5**halvings)
        if now < lowest:
            lowest, best = now, 0.5**halvings
        elif best:
            break
    return best


def squared(gradient: Tensors) -> float:
    """The squared norm of a gradient."""
    return sum(float(one.double().square().sum()) for one in gradient.values())


def attempted(
    judge: Judge, proposals: list[Callable[[], Proposal]], site: str, refused: dict[str, str]
) -> list[Recommendation]:
    """Judge proposals for one site; why one of them cannot be carried out goes to `refused`, by its name there."""
    found = []
    for make in proposals:
        try:
            one = judge.judged(make())
        except EspalierError as error:
            refused[site] = " ".join(str(error).split())
            continue
        if not math.isfinite(one.loss):
            refused[site] = f"{one.what}: the loss is then not finite"
            continue
        found.append(one)
    return found


def best(found: list[Recommendation]) -> list[Recommendation]:
    """The best of several plans for one site, as a list of one, or of none."""
    return sorted(found, key=lambda one: (one.criterion, one.parameters))[:1]


def _wbic(planned: Planned, samples: Samples, count: int, criterion: WBIC, seed: int) -> Sampled:
    generator = torch.Generator().manual_seed(derived_seed(seed, "wbic"))
    return wbic(
        planned, samples.whole, samples.cut(PARTS), count,
        draws=criterion.draws, burn_in=criterion.burn_in, generator=generator,
    )  # fmt: skip


__all__ = ["PARTS", "Judge", "Proposal", "attempted", "best", "slopes", "squared", "stepped"]
