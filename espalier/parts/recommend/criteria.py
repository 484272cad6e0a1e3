"""By what recommendations are ranked: what a plan changes, per sample, in the units of the loss. Lower is better.

    Loss           dL
    AIC            dL + dk / n                 (Akaike 1974; over 2n)
    BIC            dL + dk log n / (2 n)       (Schwarz 1978; over 2n)
    WBIC           d E[L(w)] over the tempered posterior (Watanabe 2013; over n)

L is a mean negative log-likelihood per sample, n the number of samples that the network was trained on, and k either
the number of parameters or its effective number (`espalier.parts.recommend.freedom`). With the number of parameters,
BIC says *smaller* to nearly every deep network, whose parameters are more than its samples: one unit of an MLP of
64-64-64-10 has 129 of them, which by 1,437 samples is 0.33 nats, a seventh of all that there is to know about ten
classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from espalier.errors import MethodError
from espalier.parts.checks import check_count

Penalty = Literal["none", "aic", "bic"]
Counted = Literal["parameters", "effective"]


@dataclass(frozen=True)
class Criterion:
    """The change of the loss, and a penalty for parameters."""

    penalty: Penalty = "aic"
    counted: Counted = "effective"
    """What k is; without a penalty it does not matter."""

    def __post_init__(self) -> None:
        if self.penalty not in get_args(Penalty) or self.counted not in get_args(Counted):
            raise MethodError(
                f"expected a penalty of {', '.join(get_args(Penalty))} and counted= one of "
                f"{', '.join(get_args(Counted))}, found {self.penalty!r} and {self.counted!r}."
            )

    @property
    def needs_freedom(self) -> bool:
        """Whether k is the effective number."""
        return self.penalty != "none" and self.counted == "effective"

    def change(self, loss: float, parameters: int, freedom: float, samples: int) -> float:
        """What a plan changes the criterion by, per sample."""
        if self.penalty == "none":
            return loss
        count = freedom if self.counted == "effective" else parameters
        return loss + self.price(samples) * count

    def price(self, samples: int) -> float:
        """Of one degree of freedom, where there is a penalty."""
        return 1 / samples if self.penalty == "aic" else math.log(samples) / (2 * samples)

    def __str__(self) -> str:
        if self.penalty == "none":
            return "the loss alone"
        counted = "all parameters" if self.counted == "parameters" else "effective degrees of freedom"
        return f"{self.penalty.upper()} with {counted}"


@dataclass(frozen=True)
class WBIC:
    """The widely applicable BIC, sampled for every plan: hundreds of passes over all samples each."""

    draws: int = 40
    burn_in: int = 20
    """Trajectories of the sampler, ten passes each (`espalier.parts.recommend.wbic`)."""
    most: int = 12
    """Plans that are judged: the best ones by BIC with effective degrees of freedom; the others are left out."""

    def __post_init__(self) -> None:
        for name in ("draws", "burn_in", "most"):
            check_count(name, getattr(self, name))

    def __str__(self) -> str:
        return f"WBIC ({self.draws} draws after {self.burn_in})"


CRITERIA: Mapping[str, Criterion | WBIC] = MappingProxyType(
    {
        "loss": Criterion("none"),
        "aic": Criterion("aic", "parameters"),
        "bic": Criterion("bic", "parameters"),
        "aic-effective": Criterion("aic", "effective"),
        "bic-effective": Criterion("bic", "effective"),
        "wbic": WBIC(),
    }
)
"""By name."""


def criterion_named(given: str | Criterion | WBIC) -> Criterion | WBIC:
    """The criterion of that name, or the one that is given. Raises MethodError for anything else."""
    if isinstance(given, (Criterion, WBIC)):
        return given
    if given not in CRITERIA:
        raise MethodError(f"criterion: expected one of {', '.join(CRITERIA)}, found {given!r}.")
    return CRITERIA[given]


__all__ = ["CRITERIA", "WBIC", "Counted", "Criterion", "Penalty", "criterion_named"]
