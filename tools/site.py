"""Hooks of the documentation site: the README as its first page, notebooks, a reference of every module, links.

Pages link to files of the repository (`../espalier/parts/score.py`), so that they work where the repository is read.
In the site these links lead to the reference page of the module, those to examples and to the change log to pages with
their text. Formulas become MathML when the site is built, so that pages need no script and load nothing.
"""

from __future__ import annotations

import ast
import html
import json
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
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        made[f"notebooks/{path.stem}.md"] = notebook(json.loads(path.read_text()))
    for module in modules():
        made[reference(module)] = f"---\ntitle: {module}\n---\n\n::: {module}\n    options: {{heading_level: 1}}\n"
    made["reference/index.md"] = contents()
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
        elif path.startswith("notebooks/") and path.endswith(".ipynb"):
            path = path.removesuffix(".ipynb") + ".md"
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
        formula = re.sub(r"\\tag\{(\d+)\}", r"\\qquad (\1)", html.unescape(match[2]))
        return str(convert(formula, display=display))

    return re.sub(
        r'<(span|div) class="arithmatex">\s*(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])\s*</\1>', written, content, flags=re.DOTALL
    )


def notebook(book: dict[str, Any]) -> str:
    """A notebook as a page: its text, its code and what that printed."""
    parts = []
    for cell in book["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            parts.append(f"```text\n{''.join(output['text'])}```")
    return "\n\n".join(parts) + "\n"


def contents() -> str:
    """The page that the reference begins with: what `import espalier as esp` gives, then every module."""
    names = []
    for node in ast.walk(ast.parse((ROOT / "espalier/__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("espalier."):
            names += [(alias.name, f"{node.module}") for alias in node.names if not alias.name.startswith("_")]
    lines = ["# Reference", "", "Every page is made from the docstrings of a module; its source can be unfolded.", ""]
    lines += ["## `import espalier as esp`", "", "| name | module |", "| --- | --- |"]
    linked = "| [`esp.{}`]({}#{}.{}) | `{}` |"
    for name, module in sorted(names, key=lambda one: one[0].lower()):
        lines.append(linked.format(name, reference(module).removeprefix("reference/"), module, name, module))
    lines += ["", "`esp.grow`, `esp.prune`, `esp.layers` and `esp.measure` are modules.", "", "## Modules", ""]
    for module in modules():
        path = ROOT / (module.replace(".", "/") + ".py")
        path = path if path.exists() else path.with_suffix("") / "__init__.py"
        about = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        lines.append(f"- [`{module}`]({reference(module).removeprefix('reference/')}): {about}")
    return "\n".join(lines) + "\n"


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


__all__ = ["contents", "modules", "notebook", "on_files", "on_page_content", "on_page_markdown", "reference"]
