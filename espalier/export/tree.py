"""How the modules of a network differ from those that the user's code builds, as lines of plain Python.

A fresh model is built and the layers of the network are brought to it, as when a checkpoint is loaded; before that,
every module of it is marked with its path, and copies keep the mark. What has no mark is new: a module of torch, which
its `repr` builds, or one of the few that surgery makes itself, whose classes are written into the file.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import dedent, indent

from torch import nn

from espalier.edit.depth import replay
from espalier.edit.journal import Journal
from espalier.edit.layers import AFTER, BEFORE, Bypass, Inserted, at, laid_out, put, run_after, run_before
from espalier.edit.recipes.skip import Skipped
from espalier.edit.residual import Residual
from espalier.edit.steps import Step
from espalier.errors import ExportError

_MARK = "_exported_from"
_OWN: Mapping[type[nn.Module], Sequence[Callable[..., object]]] = {
    Inserted: (at, put, run_after, run_before),
    Bypass: (at, laid_out),
    Skipped: (at,),
    Residual: (),
}
"""Modules that surgery makes, and the functions that they use."""


@dataclass
class Tree:
    """What has to be done to the modules of a freshly built model."""

    copies: list[str] = field(default_factory=list)
    """Statements, in which `old` is the modules as they were built, by path. These come first, since they copy modules
    as they are before anything has changed."""
    lines: list[str] = field(default_factory=list)
    """Those that follow."""
    classes: dict[type[nn.Module], None] = field(default_factory=dict)
    """Those of surgery's own modules that they use."""
    _names: dict[int, str] = field(default_factory=dict)
    _built: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    _originals: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, fresh: nn.Module, plans: Sequence[Sequence[Step]]) -> Tree:
        """From a freshly built model, which is changed, and the plans in which layers came or went.

        Raises ExportError for a layer that plain code cannot build.
        """
        tree = cls()
        for path, module in fresh.named_modules():
            vars(module)[_MARK] = path
            tree._originals[id(module)] = path
            tree._built[path] = [
                (key, vars(child).get(_MARK, f"{path}.{key}" if path else key))
                for key, child in module._modules.items()
                if child is not None
            ]
        kept = list(fresh.modules())  # so that no new module gets the id of one that went
        replay(Journal(), fresh, plans, [], [])
        tree._change("", fresh, "model")
        for module in {*kept, *fresh.modules()}:
            vars(module).pop(_MARK, None)
        return tree

    def _change(self, path: str, module: nn.Module, name: str) -> None:
        """Write what makes the modules under one, which is there under a name, what they are."""
        children = {key: child for key, child in module._modules.items() if child is not None}
        mark = self._mark(module)
        built = self._built[mark] if mark is not None else []
        found = [(key, self._mark(child)) for key, child in children.items()]
        own = id(module) in self._originals
        same = found == built and (not own or all(id(child) in self._originals for child in children.values()))
        if same:
            for key, child in children.items():
                self._change(_join(path, key), child, f'{name}.get_submodule("{key}")' if not own else self._old(child))
            return
        made = {key: self._name(_join(path, key), child) for key, child in children.items()}
        entries = [f'"{key}": {one}' for key, one in made.items()]
        self.lines += [f"children({name}, {{", *(f"    {entry}," for entry in entries), "})"]
        for hooked, line in (
            (AFTER, f"{name}.register_forward_hook(run_after)"),
            (BEFORE, f"{name}.register_forward_pre_hook(run_before, with_kwargs=True)"),
        ):
            if isinstance(children.get(hooked), Inserted):
                self.lines.append(line)
        for key, child in children.items():
            self._change(_join(path, key), child, made[key])

    def _mark(self, module: nn.Module) -> str | None:
        return None if type(module) in _OWN else vars(module).get(_MARK)

    def _old(self, module: nn.Module) -> str:
        return f'old["{self._originals[id(module)]}"]' if self._originals[id(module)] else "model"

    def _name(self, path: str, module: nn.Module) -> str:
        """An expression for a module that a container gets."""
        if id(module) in self._originals:
            return self._old(module)
        if id(module) not in self._names:
            name = self._names[id(module)] = f"new{len(self._names)}"
            lines = self.lines if self._mark(module) is None else self.copies
            lines.append(f"{name} = {self._expression(path, module)}")
        return self._names[id(module)]

    def _expression(self, path: str, module: nn.Module) -> str:
        mark = self._mark(module)
        if mark is not None:
            return f'copy.deepcopy(old["{mark}"])'
        kind = type(module)
        if kind in _OWN:
            self.classes[kind] = None
            tensors = list(module._parameters)
            plain = {key: value for key, value in vars(module).items() if key[0] != "_" and key != "training"}
            return f"blank({kind.__name__}, {tensors!r}, {plain!r})"
        if kind is nn.Sequential:
            return "nn.Sequential()"
        expression = f"nn.{module!r}"
        if kind.__module__.startswith("torch.nn.") and not module._modules and _builds(expression, module):
            return expression
        raise ExportError(
            f"{path} ({kind.__name__}) came by an edit, and plain code cannot build it: expected a module of torch.nn, "
            "a copy of one that the model has, or a layer of espalier.layers. Save it with espalier.save instead."
        )


def _builds(expression: str, module: nn.Module) -> bool:
    try:
        found = eval(expression, {"nn": nn})
    except (SyntaxError, NameError, TypeError, ValueError, AttributeError):
        return False
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    return (
        type(found) is type(module)
        and repr(found) == repr(module)
        and own == {name: tensor.shape for name, tensor in found.state_dict().items()}
    )


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def sources(classes: Mapping[type[nn.Module], None]) -> Iterator[str]:
    """The code of surgery's own modules and of what they use, without constructors."""
    functions = dict.fromkeys(one for kind in classes for one in _OWN[kind])
    for function in functions:
        yield dedent(inspect.getsource(function))
    for kind in classes:
        yield _without_constructor(kind)


def _without_constructor(kind: type[nn.Module]) -> str:
    text = dedent(inspect.getsource(kind))
    definition = ast.parse(text).body[0]
    assert isinstance(definition, ast.ClassDef)
    methods = [one for one in definition.body if isinstance(one, ast.FunctionDef)]
    kept = [one for one in methods if one.name not in ("__init__", "remember")]
    bases = ", ".join(ast.unparse(base) for base in definition.bases)
    parts = [f'"""{ast.get_docstring(definition)}"""\n']
    parts += [dedent(" " * one.col_offset + (ast.get_source_segment(text, one) or "")) + "\n" for one in kept]
    return f"class {kind.__name__}({bases}):\n" + indent("\n".join(parts), "    ")


__all__ = ["Tree", "sources"]
