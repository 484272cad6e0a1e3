"""`import espalier` imports nothing of the package and nothing optional; names come on first use, in any order."""

from __future__ import annotations

import ast
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import espalier

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OPTIONAL = {
    "accelerate", "lightning", "mlflow", "modelopt", "onnx", "onnxruntime", "onnxscript", "pebble", "peft", "ray",
    "rich", "scipy", "sklearn", "submitit", "tensorboard", "timm", "torch_pruning", "torchao", "torchvision",
    "transformers", "wandb",
}  # fmt: skip
ROOT = Path(espalier.__file__).parent
NAMES = espalier.__all__
TOP = sorted(found.name for found in pkgutil.iter_modules([str(ROOT)]))

# Every case is a new process as far as Espalier is concerned; torch is imported once for all of them.
FORKED = """
import os, sys, traceback
import torch, safetensors.torch

for case in sys.stdin.read().split(chr(0)):
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        try:
            exec(case, {"__name__": "case"})
            sys.stdout.flush()
        except BaseException:
            print("This failed:", case, traceback.format_exc(), sep="\\n", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(1)
"""
HOMES = f"""
import pickle, sys
from importlib import import_module
import espalier

def check(name):
    found = getattr(espalier, name)
    home = espalier._HOMES[name]
    expected = import_module(f"espalier.{{name}}") if home == "espalier" else vars(sys.modules[home])[name]
    assert found is expected, (name, found)
    return found

NAMES = {NAMES!r}
TOP = {TOP!r}
"""
MODULES_FIRST = """
for module in TOP:
    if module not in ("__main__", "cli"):
        import_module(f"espalier.{module}")
for name in NAMES:
    check(name)
"""
NAMES_FIRST = """
found = {name: check(name) for name in NAMES}
for module in TOP:
    if module not in ("__main__", "cli"):
        assert getattr(espalier, module) is import_module(f"espalier.{module}"), module
for name, value in found.items():
    assert check(name) is value
    if isinstance(value, type(sys)):
        continue
    assert pickle.loads(pickle.dumps(value)) is value
everything = {}
exec("from espalier import *", everything)
assert all(everything[name] is value for name, value in found.items())
"""
METHODS = """
from espalier.method import find, methods, register
from espalier.errors import MethodError
from espalier.methods.common import pruning
from espalier.parts.score import Chance

def own():
    return pruning("own", Chance(), paper="", description="")

def taken():
    return pruning("taylor", Chance(), paper="", description="")

register(own)
try:
    register(taken)
except MethodError as error:
    assert "there is a prune method 'taylor' already, from espalier.methods.taylor" in str(error), error
else:
    raise AssertionError("a name that is taken was accepted")
import espalier
assert find("prune", "taylor").make is espalier.prune.Taylor
both = espalier.grow, espalier.prune
assert {one.make for one in methods()} == {own, *(vars(one)[name] for one in both for name in one.__all__)}
"""
RECIPES = """
from espalier.edit.recipes.base import recipe_of
assert recipe_of({"kind": "identity", "features": 3}).features == 3
"""
RULES = """
import sys
before = set(sys.modules)
from espalier.graph.rules.registry import known_operators
operators = set(known_operators())
assert len(operators) > 200
import espalier
for name in espalier.__all__:
    getattr(espalier, name)
assert operators == set(known_operators())
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def in_new_processes(cases: Iterable[str]) -> str:
    """What the cases print; AssertionError with the traceback if one fails."""
    paths = os.pathsep.join([str(ROOT.parent), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED], input=chr(0).join(cases), text=True,
        capture_output=True, check=False, timeout=600, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_import_imports_nothing() -> None:
    """Not even torch, nor anything of the package beside its top."""
    script = "import sys; before = set(sys.modules); import espalier; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    modules = set(found.stdout.split())
    assert {name for name in modules if name.startswith("espalier")} == {"espalier"}
    assert not {name.partition(".")[0] for name in modules} & {"torch", "numpy", "safetensors", *OPTIONAL}


def test_the_version_needs_no_torch() -> None:
    script = """if True:
        import sys
        from espalier.__main__ import main
        sys.argv[1:] = ["--version"]
        assert main() == 0
        assert "torch" not in sys.modules
    """
    printed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    assert printed.stdout == f"espalier {espalier.__version__}\n"


def test_names_come_on_first_use_in_any_order_and_import_nothing_optional() -> None:
    cases = [HOMES + MODULES_FIRST, HOMES + NAMES_FIRST, METHODS, RECIPES, RULES]
    modules = set(in_new_processes(cases).split())
    assert "espalier" in modules
    assert not modules & OPTIONAL


@pytest.mark.slow
def test_every_name_alone_and_after_every_module_alone() -> None:
    alone = [HOMES + f"check({name!r})" for name in NAMES]
    after = [
        HOMES + f"import espalier.{module}\nfor name in NAMES: check(name)" for module in TOP if module != "__main__"
    ]
    in_new_processes([*alone, *after])


def imported() -> Iterator[tuple[str, str]]:
    """Names and modules as type checkers see them."""
    for node in ast.walk(ast.parse((ROOT / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("espalier"):
            for alias in node.names:
                assert alias.asname == alias.name
                yield alias.name, node.module


def test_what_type_checkers_see_is_what_is_found() -> None:
    assert dict(imported()) == espalier._HOMES
    assert dir(espalier) == sorted(espalier._HOMES)
    assert set(dir(espalier)) - set(NAMES) == {"__version__"}


def test_no_package_has_a_name_that_is_a_module_of_it_too() -> None:
    """Whichever was imported last would be found under that name."""
    wrong = []
    for path in sorted(ROOT.rglob("__init__.py")):
        modules = {found.name for found in pkgutil.iter_modules([str(path.parent)])}
        package = ".".join(("espalier", *path.parent.relative_to(ROOT).parts))
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module != package:
                names = [alias.asname or alias.name for alias in node.names]
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names = [node.id]
            wrong += [f"{package}.{name}" for name in names if name in modules]
    assert not wrong


def test_modules_are_found_and_what_is_misspelt_is_not() -> None:
    assert espalier.suite is sys.modules["espalier.suite"]
    with pytest.raises(AttributeError, match="module 'espalier' has no attribute 'atach'") as caught:
        espalier.atach  # noqa: B018
    assert (caught.value.name, caught.value.obj) == ("atach", espalier)
    with pytest.raises(ImportError, match="cannot import name 'atach' from 'espalier'"):
        from espalier import atach  # noqa: F401
    assert not hasattr(espalier, "__main__")


def test_every_extra_has_a_smallest_use() -> None:
    """It is run by `make each-extra`, alone on top of the core."""
    root = ROOT.parent
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    uses = {path.stem.removeprefix("use_") for path in (root / "tools" / "extras").glob("use_*.py")}
    assert uses == set(declared)
