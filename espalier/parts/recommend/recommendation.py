"""What is recommended, as data: evidence in words and numbers, a plan, and what the plan is predicted to change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, overload

from espalier.edit.plan import Plan
from espalier.table import text_table

Kind = Literal["dead", "duplicates", "redundant", "grow", "remove", "insert", "factorise", "fold"]
KINDS: frozenset[Kind] = frozenset(get_args(Kind))
ROUNDING = 1e-5
"""Part of the loss below which a change of it is rounding."""

_UNTRAINED = 0.01
"""Part of the loss by which a step of the network's own weights lowers it that is said."""
_SHOWN = 12
"""Of what was not looked at, so many are printed."""


@dataclass(frozen=True)
class Evidence:
    """One thing that was measured."""

    measure: str
    value: float
    words: str
    """What was found, as part of a sentence."""
    null: float | None = None
    """What permuted data give; None where nothing is permuted."""
    p: float | None = None
    """How probable a value as extreme is of permuted data."""

    def as_json(self) -> dict[str, Any]:
        """As data."""
        return {"measure": self.measure, "value": self.value, "null": self.null, "p": self.p, "words": self.words}


@dataclass(frozen=True)
class Recommendation:
    """An edit, why it is recommended, and what it is predicted to change. It is carried out by
    ``structure.apply(recommendation.plan)`` as long as the network is as it was."""

    kind: Kind
    site: str
    """The axis or the module."""
    what: str
    """What is done, in words."""
    plan: Plan
    evidence: tuple[Evidence, ...]
    loss: float
    """Predicted change of the mean loss of a sample as soon as the plan is applied: measured on samples that it was not
    made from."""
    error: float
    """Its standard error over parts of these samples."""
    parameters: int
    flops: int
    """Change of the numbers of parameters, and of FLOPs of the example inputs."""
    freedom: float
    """Change of the effective degrees of freedom; not a number where the criterion does not ask for it."""
    criterion: float
    """Change of the criterion per sample; lower is better."""
    contract: str
    """``exact``, ``bounded`` or ``changing``: what surgery promises for the plan."""
    is_free: bool
    """Whether it saves parameters, costs no FLOPs, and changes the loss by no more than rounding."""

    @property
    def reason(self) -> str:
        """All evidence in one sentence."""
        return "; ".join(one.words for one in self.evidence)

    def __str__(self) -> str:
        return f"{self.what} ({self.site}): loss {self.loss:+.4g}, {self.parameters:+,} parameters; {self.reason}"

    def as_json(self) -> dict[str, Any]:
        """As data; the tensors of the plan are left out (`Plan.save` writes them)."""
        return {
            "kind": self.kind,
            "site": self.site,
            "what": self.what,
            "reason": self.reason,
            "evidence": [one.as_json() for one in self.evidence],
            "loss": self.loss,
            "error": self.error,
            "parameters": self.parameters,
            "flops": self.flops,
            "freedom": self.freedom if self.freedom == self.freedom else None,
            "criterion": self.criterion,
            "contract": self.contract,
            "free": self.is_free,
            "plan": json.loads(self.plan.to_json()),
        }


@dataclass(frozen=True)
class Recommendations(Sequence[Recommendation]):
    """Recommendations, the best first: those that cost nothing by what they save, then the others by the criterion."""

    ranked: tuple[Recommendation, ...]
    others: tuple[Recommendation, ...]
    """Plans that were tried and are not recommended, the best first."""
    criterion: str
    loss: float
    """The mean loss of the network as it is."""
    own_step: float
    """What one best step of the weights that there are changes the loss by, on the samples that judge; 0 if it does not
    fall. New layers, and units that only their own gradient speaks for, have to do better."""
    samples: int
    """What the criterion takes for the number of samples."""
    level: float
    """Of each test against permuted data: the part of places with nothing to find that are taken for some."""
    measured: Mapping[str, tuple[Evidence, ...]] = field(repr=False)
    """Axis, or ``layer`` and the path of a module -> all that was measured there, recommended or not."""
    refused: Mapping[str, str] = field(repr=False)
    """Likewise -> why nothing is recommended there, or not something."""

    @overload
    def __getitem__(self, index: int) -> Recommendation: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Recommendation, ...]: ...
    def __getitem__(self, index: int | slice) -> Recommendation | tuple[Recommendation, ...]:
        return self.ranked[index]

    def __len__(self) -> int:
        return len(self.ranked)

    def __iter__(self) -> Iterator[Recommendation]:
        return iter(self.ranked)

    def table(self, most: int | None = None) -> str:
        """The ranked table with a reason under it for every row.

        Args:
            most: rows at most; None for all.
        """
        shown = self.ranked[:most]
        lines = [f"loss {self.loss:.4g}; by {self.criterion}, {self.samples:,} samples; lower is better", ""]
        if self.own_step < -_UNTRAINED * abs(self.loss):
            lines += [
                f"not trained to the end: one step of the weights there are changes it by {self.own_step:+.3g}",
                "",
            ]
        if not shown:
            lines.append(f"nothing is recommended; {len(self.others)} plans were tried.")
        else:
            lines += text_table(
                ("", "what", "where", "loss", "", "parameters", "FLOPs", "criterion", "contract"),
                [_row(number, one) for number, one in enumerate(shown, 1)],
                right=(0, 3, 4, 5, 6, 7),
            )
            lines += ["", *(f"{number}. {one.reason}" for number, one in enumerate(shown, 1))]
            if len(shown) < len(self.ranked):
                lines.append(f"and {len(self.ranked) - len(shown)} more.")
        if self.refused:
            lines += ["", "not looked at, or not wholly:"]
            lines += [f"    {site}: {why}" for site, why in list(self.refused.items())[:_SHOWN]]
            if len(self.refused) > _SHOWN:
                lines.append(f"    and {len(self.refused) - _SHOWN} more")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def as_json(self) -> dict[str, Any]:
        """As data."""
        return {
            "criterion": self.criterion,
            "loss": self.loss,
            "own_step": self.own_step,
            "samples": self.samples,
            "level": self.level,
            "recommendations": [one.as_json() for one in self.ranked],
            "others": [one.as_json() for one in self.others],
            "measured": {site: [one.as_json() for one in found] for site, found in self.measured.items()},
            "refused": dict(self.refused),
        }


def _row(number: int, one: Recommendation) -> tuple[str, ...]:
    criterion = "free" if one.is_free else f"{one.criterion:+.4f}"
    loss, error = f"{one.loss:+.4f}", f"± {one.error:.4f}"
    return (
        str(number), one.what, one.site, loss, error, f"{one.parameters:+,}", f"{one.flops:+,}", criterion, one.contract
    )  # fmt: skip


__all__ = ["KINDS", "ROUNDING", "Evidence", "Kind", "Recommendation", "Recommendations"]
