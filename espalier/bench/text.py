"""Text as a data set: sequences of characters, and at every place the character that comes next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from espalier.bench.fetch import Source, fetch

LENGTH = 64
"""Characters in a sequence."""
_TESTED = 0.1
"""The last part of a text, which tests."""
_SHAKESPEARE = Source(
    "tinyshakespeare.txt",
    "6fb458f1232090904fb40fe944165e91",
    ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
)


@dataclass(frozen=True)
class Text:
    """A text that was published in one piece."""

    characters: str

    def sequences(self, seed: int, validation: float) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        """Sequences to train, to validate and to test, each (N, LENGTH + 1) int64, the last character being the first
        of the sequence after it; and how many different characters there are. The fraction `validation` of what does
        not test is chosen by `seed`."""
        known = {one: number for number, one in enumerate(sorted(set(self.characters)))}
        codes = torch.tensor([known[one] for one in self.characters])
        count = (len(codes) - 1) // LENGTH
        cut = codes.unfold(0, LENGTH + 1, LENGTH)[:count]
        tested = round(_TESTED * count)
        rest = cut[: count - tested]
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
        held_out = max(1, round(validation * len(rest)))
        chosen = torch.zeros(len(rest), dtype=torch.bool)
        chosen[order[:held_out]] = True
        return (rest[~chosen], rest[chosen], cut[count - tested :]), len(known)


def tinyshakespeare(folder: Path) -> Text:
    """1.1 million characters of Shakespeare (Karpathy 2015), in the folder above."""
    return Text(fetch(_SHAKESPEARE, folder.parent).read_text(encoding="utf-8"))


__all__ = ["LENGTH", "Text", "tinyshakespeare"]
