"""What `shrink` returns: the network, what became of the target, and every round on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import nn

from espalier.oneshot.rounds import Round, shown
from espalier.table import text_table

Outcome = Literal[
    "reached", "already met", "uncertain", "accuracy missed", "target missed", "out of reach", "interrupted"
]


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A network made smaller. `print` it for a summary.

    The outcomes:

    - ``reached``: target and floor hold, by measurement,
    - ``already met``: the network as it was given met the target; `model` is a copy of it,
    - ``uncertain``: the floor holds and the median meets the target, but times vary so much that the interval holds
      larger ones too,
    - ``accuracy missed``: the last network is below the floor; `model` is the smallest one that is not,
    - ``target missed``: the last network holds the floor, but it was found to need more than the target after training,
    - ``out of reach``: the smallest network that limits and frozen axes allow needs more; nothing was trained for that,
    - ``interrupted``: one of the user's functions failed; this is in the error's `reached`.
    """

    model: nn.Module = field(repr=False)
    """The smallest network that holds the floor; a plain module in which nothing of Espalier is left."""
    outcome: Outcome
    why: str
    """The outcome in a sentence, with its numbers."""
    rounds: tuple[Round, ...]
    floor: float
    """The worst score that was allowed."""
    chosen: int
    """Number of the round that `model` is from."""
    last: nn.Module = field(repr=False)
    """The last network, whatever its score; `model` itself where that is the last one."""
    target: str = ""
    limit: float = 0.0
    """What the network was to cost at most, in what the target counts."""
    unit: str = ""
    round_to: int = 1
    notes: tuple[str, ...] = ()
    """What could not be done on the way."""
    scale: float = 1.0
    """Factor with which costs are shown, as milliseconds for seconds."""
    spent: float | None = None
    """With `max_training`: what everything took, in samples trained on with the network as it was given."""

    @property
    def reached(self) -> bool:
        """Whether target and floor hold."""
        return self.outcome in ("reached", "already met")

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page; returns its path."""
        from espalier.oneshot.page import Page  # draws with what the reports of runs are made of

        drawn = Page(
            target=self.target,
            outcome=self.outcome,
            reached=self.reached,
            why=self.why,
            notes=self.notes,
            unit=self.unit,
            scale=self.scale,
            limit=self.limit,
            floor=self.floor,
            chosen=self.chosen,
            rounds=self.rounds,
        )
        written = Path(path)
        written.write_text(drawn.html(), encoding="utf-8")
        return written

    def __str__(self) -> str:
        rows = [
            [
                "*" if one.number == self.chosen else "",
                "as given" if one.number == 0 else str(one.number),
                shown(one.cost, self.scale),
                f"{one.score:.4g}",
                f"{one.parameters:,}",
                f"{one.flops:,}",
            ]
            for one in self.rounds
        ]
        table = "\n".join(text_table(["", "round", self.unit, "score", "parameters", "FLOPs"], rows, right=(4, 5)))
        notes = "".join(f"\n- {one}" for one in self.notes)
        took = "" if self.spent is None else f"\n\nThis took as much as training on {self.spent:,.0f} samples at first."
        return f"{self.outcome}: {self.why}\n\n{table}{took}{notes}"


__all__ = ["Outcome", "Shrunk"]
