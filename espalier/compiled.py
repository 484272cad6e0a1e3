"""Code that `torch.compile` made of a network, under edits.

Compiled code has guards: where a parameter has another size it is not run, and PyTorch compiles once more, beside it.
After eight times (`torch._dynamo.config.recompile_limit`) it stops, and everything goes on in eager mode. And hooks,
by which some inserted layers run, have no guards at all. So what edits make useless is thrown away in time.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import CodeType

import torch
from torch import nn

from espalier.errors import EspalierWarning


def uncompiled(model: nn.Module) -> nn.Module:
    """The module in the wrapper that `torch.compile` made; any other module itself."""
    if "torch._dynamo" in sys.modules and isinstance(model, torch._dynamo.OptimizedModule):
        inner = model._orig_mod
        assert isinstance(inner, nn.Module)
        return inner
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether this is a wrapper of `torch.compile`, or any of its modules was compiled in place."""
    if uncompiled(model) is not model:
        return True
    return any(module._compiled_call_impl is not None for module in model.modules())


class CompiledCode:
    """What there is of compiled code in the process; functions that use a network are compiled too, not only it."""

    def __init__(self) -> None:
        self._given_up = _times_given_up()

    def renew(self, *, layers: bool) -> None:
        """After an edit: discard what is of no use any more. It is compiled anew when it runs the next time.

        Args:
            layers: modules came or went, for which there may be no guards: everything is discarded. Otherwise only
                functions with at least half of the versions that PyTorch allows; they keep those that other networks
                or other sizes of inputs run, as long as there is room.

        Warns with EspalierWarning if PyTorch had given up on something since the last edit.
        """
        if "torch._dynamo" not in sys.modules:
            return
        from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code

        for code in _compiled_functions():
            versions = len(_debug_get_cache_entry_list(code))
            if versions and (layers or 2 * versions >= _limit()):
                reset_code(code)
        self.warn_if_given_up("the edit at hand discards them, so that it is compiled again")

    def warn_if_given_up(self, now: str = "call torch.compiler.reset() to have it compiled again") -> None:
        """Warn with EspalierWarning if PyTorch has given up compiling something since this was last asked."""
        times = _times_given_up()
        if times > self._given_up:
            warnings.warn(
                f"torch.compile gave up on a function after {_limit()} versions of it and has run it in eager mode "
                f"since; {now}. Edits do not lead there by themselves: let inputs keep their sizes or mark what "
                "changes (torch._dynamo.mark_dynamic); TORCH_LOGS=recompiles says what it is.",
                EspalierWarning,
                stacklevel=4,
            )
        self._given_up = times


def _limit() -> int:
    limit = torch._dynamo.config.recompile_limit
    assert isinstance(limit, int)
    return limit


def _compiled_functions() -> Iterator[CodeType]:
    """The functions of the process that PyTorch has compiled, or what remains of them after a break of the graph."""
    for weak in list(torch._dynamo.convert_frame.input_codes.seen):
        code = weak()
        if code is not None:
            yield code


def _times_given_up() -> int:
    """How often a limit of versions was reached, as PyTorch counts it."""
    if "torch._dynamo" not in sys.modules:
        return 0
    counted = torch._dynamo.utils.counters["unimplemented"].items()
    return sum(times for what, times in counted if "limit" in what.partition("\n")[0])


__all__ = ["CompiledCode", "is_compiled", "uncompiled"]
