"""Parameters that no recorded pass has read: what they might meet elsewhere may not change either.

Where values decide what runs, an expert that none of the recorded inputs were sent to is still there for others. What
would reach it is not known, but it can only be what the code that would call it sees: the values in the forward of the
innermost module around it that did run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from espalier.graph.rules import Reading
from espalier.graph.rules.registry import Dims, refs_in
from espalier.graph.solver import Reason
from espalier.graph.trace import Call, Trace


def freeze_unread(name: str, dims: Dims, readings: Sequence[Reading], other_courses: bool) -> None:
    """Freeze a tensor that no pass has read and, if the forward may take other courses, what might reach it there."""
    reason = Reason("unread", f"{name} is not read by the model's forward, so its use is unknown")
    for reading in readings:
        for term in dims:
            reading.solver.freeze(term, reason)
        if not other_courses or not dims:
            continue
        path = _innermost_that_ran(name, reading.trace)
        unread, around = name.rpartition(".")[0] or name, path or "the model itself"
        near = Reason(
            "unread",
            f"might reach {unread} in {around}, which reads it for other values or in a mode that could not be "
            "recorded; example inputs that make use of it would show what happens to it",
        )
        for index in _visible(path, reading.trace):
            for term in reading.dims.get(index, ()):
                reading.solver.freeze(term, near)


def _innermost_that_ran(name: str, trace: Trace) -> str:
    ran = {path for call in trace.calls for path in call.modules}
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in ran:
            break
    return path


def _visible(path: str, trace: Trace) -> Iterator[int]:
    """The values that the forward of a module itself may see: not those that stay inside one of its parts."""
    parts: dict[int, set[str]] = {}
    for call in trace.calls:
        part = _part(path, call)
        for ref in (*refs_in((call.args, call.kwargs)), *(out for out in call.outputs if out is not None)):
            parts.setdefault(ref.index, set()).add(part)
    own = {ref.index for ref in trace.tensors.values()}
    for index, found in parts.items():
        if index not in own and (found & {"itself"} or (len(found) > 1 and found != {"outside"})):
            yield index


def _part(path: str, call: Call) -> str:
    """Where a call runs, seen from a module: outside of it, in it itself, or in which of the modules that it calls."""
    if path not in call.modules:
        return "outside"
    below = call.modules[call.modules.index(path) + 1 :]
    return f"part {below[0]}" if below else "itself"
