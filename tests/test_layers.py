"""Imports point one way: a module may import only from layers above its own."""

import ast
from functools import cache
from pathlib import Path

import espalier

ROOT = Path(espalier.__file__).parent

# From top to bottom, as in docs/design.md. Within a layer of several names, modules must not import each other in a
# cycle; between layers they may only look up.
LAYERS = [
    "errors",
    "version",
    "table",
    "graph",
    "edit",
    "compiled",
    "measure",
    "layers",
    "axis",
    "record",
    "peers",
    "surgery",
    "structure",
    "parallel",
    "attaching",
    "parts",
    "method",
    "methods",
    "grow",
    "prune",
    "train",
    "adapters",
    "export",
    "evolve",
    "bench",
    "oneshot",
    "suite",
    "cli",
    "__main__",
]

# Likewise within espalier.parts, whose own modules stand above its folders.
PARTS = ["timing", "units", "weights", "ghosts", "depth", "gates", "recommend"]


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


@cache
def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("espalier"):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "espalier" else []
            found.update(names or [node.module])
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("espalier."))
    return found


@cache
def modules() -> dict[str, Path]:
    result = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(("espalier", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        result[name] = path
    return result


def test_every_module_has_a_layer() -> None:
    known = {layer_of(name) for name in modules() if name != "espalier"}
    assert known <= set(LAYERS), f"put these into LAYERS and docs/design.md: {sorted(known - set(LAYERS))}"


def test_imports_look_up_only() -> None:
    wrong = []
    for name, path in modules().items():
        if name == "espalier":
            continue
        for other in imports_of(path):
            if LAYERS.index(layer_of(other)) > LAYERS.index(layer_of(name)):
                wrong.append(f"{name} imports {other}")
    assert not wrong, wrong


def test_folders_of_parts_look_up_only() -> None:
    def place(module: str) -> int | None:
        top, _, rest = module.removeprefix("espalier.").partition(".")
        folder = rest.partition(".")[0]
        if top != "parts":
            return None
        return PARTS.index(folder) if (ROOT / "parts" / folder).is_dir() and folder else -1

    wrong = []
    for name, path in modules().items():
        own = place(name)
        for other in imports_of(path) if own is not None else ():
            if (theirs := place(other)) is not None and theirs > own:
                wrong.append(f"{name} imports {other}")
    assert not wrong, wrong


def test_no_cycles() -> None:
    paths = modules()
    graph = {name: imports_of(path) & paths.keys() for name, path in paths.items()}
    graph.pop("espalier")
    done: set[str] = set()
    while graph.keys() - done:
        ready = [name for name in graph.keys() - done if graph[name] - {name} <= done]
        assert ready, f"a cycle of imports among {sorted(graph.keys() - done)}"
        done.update(ready)


def test_the_algebra_knows_nothing_of_torch() -> None:
    for name in ("dims", "solver"):
        source = (ROOT / "graph" / f"{name}.py").read_text()
        assert "import torch" not in source
        assert "from torch" not in source
