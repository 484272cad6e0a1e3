"""The frame of every page: one self-contained HTML document, its header and its tiles.

What pages show is data from others: names are escaped, and a content security policy lets nothing load from a network
and no script run but the page's own.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from html import escape

from espalier.bench import charts, gate_pictures, heat, scatter, stepper, tree_picture
from espalier.bench.page_style import LOGO, PAGE_STYLE
from espalier.bench.wording import accuracy_text, as_text

STYLE = "".join(
    [charts.STYLE, heat.STYLE, gate_pictures.STYLE, stepper.STYLE, scatter.STYLE, tree_picture.STYLE, PAGE_STYLE]
)
SCRIPT = charts.SCRIPT + stepper.SCRIPT


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page of these sections (HTML) under a title (plain text)."""
    digest = b64encode(sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)} · Espalier</title><style>{STYLE}</style></head><body><main>",
            *sections,
            f"</main><script>{SCRIPT}</script></body></html>",
        ]
    )


def header(
    what: str, title: str, ended: bool, lead: str, facts: Iterable[tuple[str, object]], notices: Iterable[str]
) -> str:
    """The head of a page: what it is, its title, whether it is finished, a sentence (HTML), facts, what is wrong."""
    badge = f'<span class="badge{"" if ended else " open"}">{"finished" if ended else "not ended"}</span>'
    shown = "".join(f"<span>{word} <b>{as_text(value)}</b></span>" for word, value in facts)
    warnings = "".join(f'<p class="warn">{escape(notice)}</p>' for notice in notices)
    return (
        f'<header><div class="brand">{LOGO}<span>Espalier {what}</span>{badge}</div><h1>{escape(title)}</h1>'
        f'<p class="lead">{lead}</p><div class="facts">{shown}</div>{warnings}</header>'
    )


def tiles(cards: Iterable[str]) -> str:
    """The results at the top."""
    return f'<section class="tiles" aria-label="Results">{"".join(cards)}</section>'


def tile(name: str, value: str, detail: str) -> str:
    """One of them (HTML)."""
    return f'<div class="card tile"><p>{name}</p><b>{value}</b><p>{detail}</p></div>'


def hero(scores: Iterable[str], note: str) -> str:
    """The largest of them: scores side by side and a sentence below."""
    return f'<div class="card tile hero"><div class="pair">{"".join(scores)}</div><p>{note}</p></div>'


def score(css: str, name: str, accuracy: object, details: Iterable[tuple[str, str]]) -> str:
    """An accuracy in large figures and what belongs to it."""
    lines = "".join(f"<p>{word} <strong>{value}</strong></p>" for word, value in details)
    return f'<div class="{css}"><p>{name}</p><b>{as_text(accuracy, accuracy_text)}</b>{lines}</div>'


__all__ = ["document", "header", "hero", "score", "tile", "tiles"]
