"""Kinds of gates: how they are drawn from their logits, what they are when the network is judged, and how logits learn.

A kind is a frozen value without state. Its `loss` evaluates the training loss at gates that it draws, as often as it
needs, and says what the gradient by the logits is. All kinds share k (`espalier.parts.gates.stages`), penalties on the
probability that a gate is open (`espalier.parts.gates.expected`), sleep, waking and everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.parts.gates.estimators import DisARM, Estimator, antithetic, sampled
from espalier.parts.gates.functions import GateFunction, Sigmoid
from espalier.parts.gates.gating import mean_of
from espalier.parts.gates.rows import joined, parted

Rows = Mapping[str, Tensor]
"""Key of gates -> one number for each of them, or for each of them in every sample: shape (samples, gates)."""
Judged = Literal["hard", "mean"]


class Evaluation(Protocol):
    """The training loss as a function of gates."""

    @property
    def samples(self) -> int | None:
        """How many samples have gates of their own, and a loss; None where a batch shares one set of gates."""

    def __call__(self, gates: Rows, /) -> Tensor:
        """With gradients, by weights and by gates that ask for them."""

    def aside(self, gates: Rows, /) -> Tensor:
        """Without a graph, with the same random numbers, and without a trace."""


@dataclass(frozen=True)
class Drawn:
    """The loss at gates that were drawn, and what their logits learn from it."""

    loss: Tensor
    slopes: Rows = field(default_factory=dict)
    """Key -> gradient of the expected loss by the logits."""
    leaves: Rows = field(default_factory=dict)
    """Key -> logits that take their gradient when the loss is differentiated."""


class GateKind(Protocol):
    """How gates are drawn and trained."""

    @property
    def lasting(self) -> bool:
        """Whether gates that differ from each other may be left between 0 and 1 when all are decided."""

    def probability(self, logits: Tensor, k: float, /) -> Tensor:
        """Of a gate that is not zero; of the shape of the logits, differentiable by them where it is not flat.

        Each depends on its own logit only: rows of several keys may come as one.
        """

    def judged(self, logits: Tensor, k: float, /) -> Tensor:
        """What is multiplied when the network is judged; of the shape of the logits. What is 0 is out."""

    def logit(self, probability: float, k: float, /) -> float:
        """The logit at which a gate has that probability. Raises MethodError where there is none."""

    def loss(self, logits: Rows, k: float, evaluation: Evaluation, generator: torch.Generator, /) -> Drawn:
        """The loss of a training step."""


@dataclass(frozen=True)
class Bernoulli:
    """Gates of 0 or 1, whose logits learn by an estimator from the losses at two antithetic samples.

    The weights are trained at the gates z. The twin z' is evaluated before, aside; where it equals z it is not
    evaluated at all.
    """

    function: GateFunction = field(default_factory=Sigmoid)
    estimator: Estimator = field(default_factory=DisARM)
    shown: Judged = "hard"
    """A gate of at least 1/2 is judged as 1 (``hard``) or as its probability (``mean``, as in the paper)."""

    def __post_init__(self) -> None:
        if self.shown not in get_args(Judged):
            raise MethodError(f"judged: expected 'hard' or 'mean', found {self.shown!r}.")

    @property
    def lasting(self) -> bool:
        return False

    def probability(self, logits: Tensor, k: float, /) -> Tensor:
        return self.function.probability(logits, k)

    def judged(self, logits: Tensor, k: float, /) -> Tensor:
        p = self.probability(logits, k)
        return torch.where(p >= 0.5, p, 0.0) if self.shown == "mean" else (p >= 0.5).to(p)

    def logit(self, probability: float, k: float, /) -> float:
        return self.function.logit(probability, k)

    def loss(self, logits: Rows, k: float, evaluation: Evaluation, generator: torch.Generator, /) -> Drawn:
        flat = joined(logits)
        p = self.probability(flat, k)
        samples = evaluation.samples
        u = torch.rand(p.shape if samples is None else (samples, *p.shape), dtype=p.dtype, generator=generator)
        z, other = sampled(u, p), antithetic(u, p)
        apart = self.estimator.twice and not torch.equal(z, other)
        twin = evaluation.aside(parted(other.float(), logits)) if apart else None
        loss = evaluation(parted(z.float(), logits))
        if not apart and (self.estimator.twice or not bool(((p > 0) & (p < 1)).any())):
            return Drawn(mean_of(loss))
        here = loss.detach()
        losses = (here.double().cpu(), (here if twin is None else twin).double().cpu())
        slopes = self.estimator(losses, u, p, self.function.chain(flat, k))
        return Drawn(mean_of(loss), parted(slopes, logits))


__all__ = ["Bernoulli", "Drawn", "Evaluation", "GateKind", "Judged", "Rows"]
