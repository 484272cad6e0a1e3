"""The widely applicable Bayesian information criterion (Watanabe 2013, JMLR 14: 867-897), by sampling.

    WBIC = E[n L(w)]  over  p(w) ~ exp(-n b L(w)) phi(w),   b = 1 / log n

which is n L(w*) + lambda log n + o(log n), whatever the rank of the Fisher matrix: lambda, the real log canonical
threshold, is half the number of parameters for a regular model and less for a singular one, as networks are. Plain BIC
puts half the number of parameters in its place.

The posterior is that around the network's own weights w*: phi is a Gaussian around them, as wide, for each tensor, as
its weights are large (local learning coefficients: Lau et al. 2023, arXiv:2308.12108). Draws come from Hamiltonian
Monte Carlo (Neal 2011, MCMC using Hamiltonian dynamics), whose every trajectory trades half of the energy, so that a
chain that starts at w* is warm after a few; its masses are of the Hessian's size, and the step is set during the burn-
in, so that four of five trajectories are accepted. The energies are those of all given samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.parts.recommend.batches import samples_in
from espalier.parts.recommend.freedom import gradient_rows
from espalier.parts.recommend.planned import Planned, Tensors

_ACCEPTED = 0.8
_JITTER = 0.3
"""Part by which steps vary at random from one trajectory to the next, so that none comes back to where it began."""
LEAPS = 10
"""Steps of a trajectory, each of one pass over all samples."""
_BATCH_MEANS = 10
"""Runs of draws whose means tell the error of the mean."""


@dataclass(frozen=True)
class Sampled:
    """WBIC per sample, in the units of the loss."""

    value: float
    error: float
    """Standard error of the sampling, by batch means."""
    learning: float
    """lambda: (WBIC - n L(w*)) / log n."""
    accepted: float
    """Part of the trajectories after the burn-in."""


def wbic(
    planned: Planned, batches: Sequence[Any], parts: Sequence[Any], count: int, *,
    draws: int, burn_in: int, generator: torch.Generator,
) -> Sampled:  # fmt: skip
    """WBIC of a network whose loss is a mean negative log-likelihood per sample.

    Args:
        planned: the network.
        batches: all samples.
        parts: the same in more and smaller batches, whose gradients tell the masses.
        count: n, the number of samples that it was trained on.
        draws: after the burn-in.
        burn_in: trajectories before them.
        generator: draws momenta.

    Raises:
        MethodError: the loss is not finite, or no parameter is trained.
    """
    chain = _Chain(planned, batches, parts, count, generator)
    for number in range(burn_in):
        chain.move(adapt=1 / (1 + number) ** 0.5)
    losses, accepted = [], 0
    for _ in range(draws):
        accepted += chain.move(adapt=0.0)
        losses.append(chain.loss)
    values = torch.tensor(losses, dtype=torch.float64)
    means = torch.stack([one.mean() for one in values.tensor_split(min(_BATCH_MEANS, draws))])
    error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.inf
    mean = float(values.mean())
    learning = count * (mean - chain.start) / math.log(count)
    return Sampled(mean, error, learning, accepted / draws)


class _Chain:
    def __init__(
        self, planned: Planned, batches: Sequence[Any], parts: Sequence[Any], count: int, generator: torch.Generator
    ) -> None:
        self._planned, self._generator = planned, generator
        self._names = sorted(planned.trained)
        if not self._names:
            raise MethodError("WBIC varies the parameters that are trained, and none is: all have requires_grad=False.")
        self._batches = [(samples_in(batch), batch) for batch in batches]
        self._total = sum(size for size, _ in self._batches)
        self._heat = count / math.log(count)
        centre = {name: planned.parameters[name].clone() for name in self._names}
        whole = {name: torch.ones(one.shape, dtype=torch.bool, device=one.device) for name, one in centre.items()}
        rows = gradient_rows(planned, parts, planned.parameters, whole)
        usual = _mean_square(centre.values())
        self._centre, self._precision, self._spread = centre, {}, {}
        for name, one in centre.items():
            square = float(one.double().square().mean()) or usual
            self._precision[name] = 1 / square
            # the diagonal of the Fisher matrix: what is left of noise in it only makes proposals less apt
            information = rows[name].double().square().sum(0).view(one.shape) / max(len(parts) - 1, 1)
            self._spread[name] = (self._heat * information + 1 / square).rsqrt().to(one)
        self._step = sum(one.numel() for one in centre.values()) ** (-1 / 4)
        self._at: Tensors = centre
        self.loss, self._uphill = self._energy(centre)
        self.start = self.loss
        if not math.isfinite(self.loss):
            raise MethodError(f"WBIC needs a loss that is finite, found {self.loss} on the given batches.")

    def move(self, adapt: float) -> bool:
        """Run a trajectory and go to its end, or stay: returns which. `adapt` is how much the step follows."""
        step = self._step * (1 + _JITTER * (2 * self._uniform() - 1))
        at, loss, uphill = dict(self._at), self.loss, self._uphill
        momenta = {name: self._noise(one) / self._spread[name] for name, one in at.items()}
        before = self._potential(at, loss) + self._kinetic(momenta)
        for _ in range(LEAPS):
            momenta = {name: one - step / 2 * uphill[name] for name, one in momenta.items()}
            at = {name: one + step * self._spread[name] ** 2 * momenta[name] for name, one in at.items()}
            loss, uphill = self._energy(at)
            momenta = {name: one - step / 2 * uphill[name] for name, one in momenta.items()}
            if not math.isfinite(loss):
                break
        energy = self._potential(at, loss) + self._kinetic(momenta)
        chance = math.exp(min(before - energy, 0.0)) if math.isfinite(energy) else 0.0
        goes = self._uniform() < chance
        if goes:
            self._at, self.loss, self._uphill = at, loss, uphill
        self._step *= math.exp(adapt * (chance - _ACCEPTED))
        return goes

    def _energy(self, values: Tensors) -> tuple[float, dict[str, Tensor]]:
        """The mean loss, and the gradient of the potential."""
        loss = 0.0
        uphill = {name: self._precision[name] * (one - self._centre[name]) for name, one in values.items()}
        for size, part in self._batches:
            share = size / self._total
            value, found = self._planned.gradients(part, {**self._planned.parameters, **values}, self._names)
            loss += share * value
            for name, gradient in found.items():
                uphill[name] = uphill[name] + self._heat * share * gradient
        return loss, uphill

    def _potential(self, values: Tensors, loss: float) -> float:
        held = sum(
            self._precision[name] * float((one - self._centre[name]).double().square().sum())
            for name, one in values.items()
        )
        return self._heat * loss + held / 2

    def _kinetic(self, momenta: Tensors) -> float:
        return sum(float((self._spread[name] * one).double().square().sum()) for name, one in momenta.items()) / 2

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator, dtype=torch.float64).to(like)


def _mean_square(tensors: Any) -> float:
    found = [one.double().square().flatten() for one in tensors]
    return float(torch.cat(found).mean()) or 1.0


__all__ = ["Sampled", "wbic"]
