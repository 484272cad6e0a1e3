"""Modules whose attributes the code around them reads: something else in their place would not have these."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

_OF_EVERY_MODULE = frozenset(dir(nn.Module)) | frozenset(vars(nn.Module()))


def read_attributes(parent: nn.Module) -> dict[str, str]:
    """Child of a module -> an attribute of it, one that not every module has, which the forward of its parent reads.

    Read from the source of the forward and of the methods of the same class that it calls; what is written in another
    way, by `getattr` or through other variables, is not seen.
    """
    kind: Any = type(parent)
    return {child: attribute for child, attribute in _reads(kind) if child in parent._modules}


@cache
def _reads(kind: Any) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    left, seen = ["forward"], {"forward"}
    while left:
        for node in _nodes(kind, left.pop()):
            if isinstance(node, ast.Attribute) and _is_self(node.value) and node.attr not in seen:
                seen.add(node.attr)  # a method of its own, perhaps
                left.append(node.attr)
            child = _child(node)
            if child is not None and child[1] not in _OF_EVERY_MODULE:
                found.setdefault(*child)
    return tuple(found.items())


def _child(node: ast.AST) -> tuple[str, str] | None:
    """``self.child.attribute`` as (child, attribute)."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and _is_self(node.value.value):
        return node.value.attr, node.attr
    return None


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _nodes(kind: Any, method: str) -> Iterator[ast.AST]:
    function = getattr(kind, method, None)
    if not inspect.isfunction(function) or function is getattr(nn.Module, method, None):
        return
    try:
        source = textwrap.dedent(inspect.getsource(function))
        yield from ast.walk(ast.parse(source))
    except (OSError, TypeError, SyntaxError):
        return  # written in no file


__all__ = ["read_attributes"]
