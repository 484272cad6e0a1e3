"""How a report writes values: numbers, costs, durations and changes as escaped text."""

from __future__ import annotations

import re
from html import escape

from espalier.bench.charts import Formatter, si, whole
from espalier.bench.records import as_number, as_pair

MISSING = "—"
_SEED = re.compile(r",? ?\bseed=\d+")


def as_text(value: object, form: Formatter = whole) -> str:
    """Escaped text for the page: formatted where it is a number, a dash where it is missing."""
    number = as_number(value)
    if number is not None:
        return escape(form(number))
    return MISSING if value is None else escape(str(value))


def change(before: object, after: object, form: Formatter = whole) -> str:
    """`before → after`, or one value where both are the same."""
    old, new = as_text(before, form), as_text(after, form)
    return new if old == new else f"{old} → {new}"


def loss_text(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def accuracy_text(value: float) -> str:
    """A fraction as a percentage with two decimals."""
    return f"{100 * value:.2f}%"


def flops_text(value: float) -> str:
    """Floating-point operations with a unit prefix: 1.2 GFLOPs."""
    number = si(value)
    return f"{number[:-1]} {number[-1]}FLOPs" if number[-1].isalpha() else f"{number} FLOPs"


def duration_text(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def times_text(count: int) -> str:
    """How often: once, twice, 3 times."""
    return {1: "once", 2: "twice"}.get(count, f"{whole(count)} times")


def relative_text(before: object, after: object) -> str:
    """How many fewer or more, in words that a noun can follow; empty where it cannot be said."""
    old, new = as_number(before), as_number(after)
    if old is None or new is None or old <= 0:
        return ""
    if new == old:
        return "just as many"
    if new >= 2 * old:
        return f"{new / old:.1f} times as many"
    return f"{abs(new / old - 1):.0%} {'fewer' if new < old else 'more'}"


def plain_change(pair: object, form: Formatter) -> str:
    """`before → after` as plain text, for where a chart escapes it."""
    values = [(as_number(value), value) for value in as_pair(pair)]
    return " → ".join(MISSING if raw is None else str(raw) if value is None else form(value) for value, raw in values)


def layer_text(edit: object) -> str:
    """What came or went, without the seed that its weights were drawn by."""
    return _SEED.sub("", str(edit))


def section(title: str, about: str, body: str) -> str:
    """One section of the page under its heading."""
    return f'<section><h2>{title}</h2><p class="about">{about}</p>{body}</section>'
