"""What plans are predicted to change: the network is run as each would make it, on samples that none was made from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from espalier.edit.plan import Plan
from espalier.errors import EspalierError, MethodError
from espalier.parts.line_search import best_amplitude
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
    stepped: bool = False
    """Whether the loss is that after one best step of the new parameters, which change nothing at first."""


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
            asked = isinstance(criterion, WBIC) or criterion.needs_freedom
            rows = samples.cut(rows_for(sum(planned.parameters[name].numel() for name in planned.trained)))
            freedoms = Freedoms(planned, rows, count, structure.masks) if asked else None
            sampled = _wbic(planned, samples, count, criterion, seed) if isinstance(criterion, WBIC) else None
        return cls(structure, loss, samples, count, criterion, seed, before, freedoms, sampled)

    @property
    def loss(self) -> float:
        """The mean loss of the network as it is."""
        return float(self.before @ self.samples.weights)

    def judged(self, proposal: Proposal) -> Recommendation:
        """What is predicted of a plan; by WBIC later (`by_wbic`).

        Raises:
            PlanError, SurgeryError: the plan cannot be carried out.
        """
        with as_planned(self.structure, proposal.plan, self.given) as planned:
            after = planned.losses(self.samples.judged)
            at_once = float((after - self.before) @ self.samples.weights)
            values = None
            if proposal.stepped:
                values = stepped(planned, self.samples.found)
                after = planned.losses(self.samples.judged, values)
            freedom = math.nan if self.freedoms is None else self.freedoms.change(planned, values)
            cost, contract = planned.cost, planned.contract
        now, weights = self.structure.cost(), self.samples.weights
        differences = after - self.before
        loss = float(differences @ weights)
        spread = ((differences - loss).square() * weights).sum().sqrt()
        parameters, flops = cost.parameters - now.parameters, cost.flops - now.flops
        by = FIRST if isinstance(self.criterion, WBIC) else self.criterion
        free = parameters < 0 and flops <= 0 and abs(loss) <= ROUNDING * abs(self.loss)
        evidence = proposal.evidence
        if proposal.kind in ("grow", "insert"):
            evidence = (*evidence, self._fall(differences, proposal))
        return Recommendation(
            kind=proposal.kind,
            site=proposal.site,
            what=proposal.what,
            plan=proposal.plan,
            evidence=evidence,
            loss=loss,
            error=float(spread) / math.sqrt(max(len(differences) - 1, 1)),
            at_once=at_once,
            parameters=parameters,
            flops=flops,
            freedom=freedom,
            criterion=by.change(loss, parameters, freedom, self.count),
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

    def _fall(self, differences: Tensor, proposal: Proposal) -> Evidence:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, proposal.site, "falls"))
        p = falls(differences, self.samples.weights, generator)
        loss = float(differences @ self.samples.weights)
        words = f"on other samples the loss changes by {loss:+.3g} (p = {p:.2g})"
        return Evidence("held-out loss", loss, words, 0.0, p)


def stepped(planned: Planned, batches: tuple[object, ...]) -> Tensors:
    """The new parameters after one step down their gradient, as far as the loss of some batches falls.

    Steps are powers of two times that at which a loss that fell on as it begins would be zero: L / |g|^2.
    """
    names = sorted(planned.fresh.keys() & planned.trained)
    sizes = [samples_in(batch) for batch in batches]
    gradient: dict[str, Tensor] = {}
    loss = 0.0
    for batch, size in zip(batches, sizes, strict=True):
        value, found = planned.gradients(batch, planned.parameters, names)
        loss += value * size / sum(sizes)
        for name, one in found.items():
            gradient[name] = gradient.get(name, torch.zeros_like(one)) + one * planned.fresh[name] * size / sum(sizes)
    square = sum(float(one.double().square().sum()) for one in gradient.values())
    if not square > 0:
        return planned.parameters

    def values(amplitude: float) -> dict[str, Tensor]:
        length = amplitude * abs(loss) / square
        return {**planned.parameters, **{name: planned.parameters[name] - length * gradient[name] for name in names}}

    def then(amplitude: float) -> float:
        found = float(planned.losses(batches, values(amplitude)) @ torch.tensor(sizes, dtype=torch.float64))
        return found if math.isfinite(found) else math.inf

    return values(best_amplitude(then))


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


__all__ = ["Judge", "Proposal", "attempted", "best", "stepped"]
