"""What edits were predicted to do, and what they did, in the report of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from statistics import median

from espalier.bench.charts import whole
from espalier.bench.records import as_number
from espalier.bench.report_tables import numbers, table
from espalier.bench.scatter import Spot, keys, near, scatter
from espalier.bench.search_records import Branch, SearchRun
from espalier.bench.tree_picture import gain_text
from espalier.bench.wording import MISSING, section

_FEWEST_RANKED = 4


def predictions(search: SearchRun) -> str:
    """Each edit that came with a prediction, as a point; and kinds of edits, as a table."""
    known = [
        (branch, branch.predicted, gain)
        for branch in search.branches
        if branch.predicted is not None and (gain := as_number(branch.judged.get("gain"))) is not None
    ]
    if not known:
        return section("Predicted and happened", "The proposals of this search predicted nothing.", "")
    predicted, happened = [one[1] for one in known], [one[2] for one in known]
    spots = [
        Spot(
            x, y, "accepted" if branch.judged.get("accepted") is True else "refused",
            f"{branch.what}\npredicted {x:+.4f}\nhappened {gain_text(branch.judged)}",
            as_number(branch.judged.get("error")), hollow=branch.judged.get("accepted") is not True,
        )
        for branch, x, y in known
    ]  # fmt: skip
    ranges = near(predicted, 0.0), near(happened, 0.0)
    chart = scatter(
        "Predicted and happened fall of the loss", spots, "predicted fall of the loss", _short, _short,
        diagonal=True, x_range=ranges[0], y_range=ranges[1],
    )  # fmt: skip
    outside = sum(not ranges[1][0] <= one <= ranges[1][1] for one in happened)
    note = f'<p class="note">{outside} of them lie outside and are drawn at the border.</p>' if outside else ""
    about = (
        "By how much the held-out loss was predicted to fall, and by how much it fell against the control in the last "
        "rung of the branch; whiskers are standard errors, the dashed line is where both are the same."
    )
    if len(known) >= _FEWEST_RANKED:
        about += f" Rank correlation of {len(known)} edits: {rank_correlation(predicted, happened):+.2f}."
    entries = [("accepted", "accepted", False), ("not accepted", "refused", True)]
    figure = f'<figure class="card"><figcaption>Fall of the loss</figcaption>{keys(entries)}{chart}{note}</figure>'
    return section("Predicted and happened", about, f'<div class="plots">{figure}{_kinds(search)}</div>')


def _kinds(search: SearchRun) -> str:
    """What each kind of edit promised and gave."""
    kinds: dict[str, list[Branch]] = {}
    for branch in search.branches:
        if branch.judged:
            kinds.setdefault(str(branch.judged.get("edit")), []).append(branch)
    rows = []
    for kind, its in sorted(kinds.items(), key=lambda item: -len(item[1])):
        predicted = [one.predicted for one in its if one.predicted is not None]
        gains = [gain for one in its if (gain := as_number(one.judged.get("gain"))) is not None]
        won = sum(one.judged.get("accepted") is True for one in its)
        cells = [whole(len(its)), whole(won), _middle(predicted), _middle(gains)]
        rows.append(f"<tr><td>{escape(kind)}</td>{numbers(cells)}</tr>")
    head = (
        '<tr><th>Kind</th><th class="n">Tried</th><th class="n">Accepted</th><th class="n">Predicted, median</th>'
        '<th class="n">Happened, median</th></tr>'
    )
    return table(head, rows)


def _middle(values: Sequence[float]) -> str:
    return f"{median(values):+.4f}" if values else MISSING


def _short(value: float) -> str:
    return f"{value:.3g}"


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, equal values sharing theirs; 0 where one of them is constant."""
    ranks = []
    for values in (a, b):
        places = sorted(values)
        ranks.append([places.index(one) + (places.count(one) - 1) / 2 for one in values])
    middle = (len(a) - 1) / 2
    spread = [math.fsum((one - middle) ** 2 for one in its) for its in ranks]
    if not all(spread):
        return 0.0
    together = math.fsum((x - middle) * (y - middle) for x, y in zip(*ranks, strict=True))
    return together / math.sqrt(spread[0] * spread[1])


__all__ = ["predictions", "rank_correlation"]
