"""Hooks of the documentation site: the README as its first page, a reference page for every module, links to code.

Pages link to files of the repository (`../espalier/parts/score.py`), so that they work where the repository is read.
In the site these links lead to the reference page of the module, those to examples and to the change log to pages with
their text. Formulas become MathML when the site is built, so that pages need no script and load nothing.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages that are made."""
    made = {"index.md": (ROOT / "README.md").read_text(), "changelog.md": (ROOT / "CHANGELOG.md").read_text()}
    for path in sorted((ROOT / "examples").glob("*.py")):
        made[f"examples/{path.stem}.md"] = f"# {path.name}\n\n```python\n{path.read_text()}```\n"
    for module in modules():
        made[reference(module)] = f"# {module}\n\n::: {module}\n"
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Lead links to files of the repository to the pages that show them, relative to the page they are on."""
    up = "../" * page.file.src_uri.count("/")

    def led(match: re.Match[str]) -> str:
        path = re.sub(r"^(\.\./)+", "", match[1])
        if path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif path == "CHANGELOG.md":
            path = "changelog.md"
        elif path.startswith("examples/") and path.endswith(".py"):
            path = path.removesuffix(".py") + ".md"
        elif path.startswith("espalier/") and path.endswith(".py"):
            path = reference(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        else:
            return match[0]
        return f"]({up}{path}{match[2] or ''})"

    return re.sub(r"\]\(((?:\.\./)*[\w./-]+)(#[\w-]+)?\)", led, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Write formulas as MathML."""

    def written(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return str(convert(html.unescape(match[2]), display=display))

    return re.sub(
        r'<(span|div) class="arithmatex">\s*(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])\s*</\1>', written, content, flags=re.DOTALL
    )


def modules() -> list[str]:
    """All modules that have names of their own, from top to bottom."""
    found = []
    for path in sorted((ROOT / "espalier").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if not any(part.startswith("_") for part in name.split(".")):
            found.append(name)
    return found


def reference(module: str) -> str:
    """The page of a module."""
    return "reference/" + module.replace(".", "/") + ".md"


__all__ = ["on_files", "on_page_content", "on_page_markdown"]
