"""The registered methods as text."""

from __future__ import annotations

from espalier.method import methods


def methods_text() -> str:
    """One paragraph for every method: name, direction, what it does, paper, arguments of its own with defaults."""
    paragraphs = []
    for entry in methods():
        method = entry.method
        lines = [f"{method.direction} {method.name} ({method.level}): {method.description}", f"    {method.paper}"]
        if entry.defaults:
            lines.append(f"    {', '.join(f'{name}={value!r}' for name, value in entry.defaults.items())}")
        lines.append(f"    when: {method.schedule}")
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)
