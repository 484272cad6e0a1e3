"""Modules that run beside something else: residual branches and parallel branches that end in an addition."""

from __future__ import annotations

from espalier.graph.dims import size_of
from espalier.graph.flow import Flow, operator_name
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.trace import Call, Ref
from espalier.graph.zeros import zero_given

_CONTRACTIONS = frozenset(
    """
    _scaled_dot_product_attention_math _scaled_dot_product_flash_attention_for_cpu addbmm addmm addmv baddbmm bmm
    convolution convolution_overrideable dot einsum embedding gru linear lstm matmul mkldnn_rnn_layer mm mv
    rnn_relu rnn_tanh scaled_dot_product_attention
    """.split()
)
"""Operators in which weights, or positions, are mixed: a branch with one of them does something of its own."""

_OF_SIZES = frozenset("empty_like new_empty new_full new_ones new_zeros ones_like rand_like zeros_like".split())
"""Operators that look at no value: what random masks are made of."""


def is_beside(topology: Topology, prediction: TracePrediction, entry: int, exit: int, first: int, last: int) -> bool:
    """Whether what the calls from `first` to before `last` make of `entry` is only added to something of its origin.

    That is so if `exit` comes to an addition, through nothing but operators that make zeros of zeros, and the other
    summand is, or is computed from, the entry or what the entry is a normalised or rearranged form of. Then the
    network without these calls, with zeros in their place, is the other summand alone: the residual stream that goes
    around a block, or the branches parallel to it.
    """
    flow = prediction.flow
    added = _addition(flow, prediction.outputs, exit, last)
    if added is None:
        return False
    call, other = added
    total = call.outputs[0]
    if total is None or not _same_size(topology, prediction, other, total.index):
        return False
    return _comes_from(flow, other, call.index, _origins(flow, entry, first))


def _addition(flow: Flow, outputs: tuple[int, ...], value: int, since: int) -> tuple[Call, int] | None:
    """The addition that is all that a value comes to, and the other summand."""
    while True:
        uses = [at for at in flow.uses(value, since) if operator_name(flow.calls[at]) not in _OF_SIZES]
        if len(uses) != 1 or flow.is_stale(value, uses[0]) or (value in outputs and uses[0] not in flow.writers[value]):
            return None
        call = flow.calls[uses[0]]
        if operator_name(call) in ("add", "sub"):
            left, right = call.args[:2]
            if not isinstance(left, Ref) or not isinstance(right, Ref) or left.index == right.index:
                return None
            if left.index == value:
                return (call, right.index) if operator_name(call) == "add" else None
            return call, left.index
        if (
            not any(needed <= {value} for needed in zero_given(call))
            or len(call.outputs) != 1
            or call.outputs[0] is None
        ):
            return None
        value, since = call.outputs[0].index, call.index + 1


def _same_size(topology: Topology, prediction: TracePrediction, left: int, right: int) -> bool:
    one, other = (tuple(size_of(dim, topology.sizes) for dim in prediction.dims[index]) for index in (left, right))
    return one == other


def _node(flow: Flow, index: int, before: int) -> int:
    """What a value was made by: the number of a call, or a negative number for an input."""
    call = flow.maker(index, before)
    return -1 - index if call is None else call.index


def _data(flow: Flow, call: Call) -> list[int]:
    return [ref.index for ref in flow.operands[call.index] if ref.index not in flow.of_weights]


def _origins(flow: Flow, entry: int, before: int) -> set[int]:
    """The entry and what it is a normalised or rearranged form of, up to the nearest sum or mixture."""
    start = _node(flow, entry, before)
    found, left = {start}, [start]
    while left:
        at = left.pop()
        if at < 0:
            continue
        call = flow.calls[at]
        operands = _data(flow, call)
        if operator_name(call) in _CONTRACTIONS or (
            operator_name(call) in ("add", "sub", "cat", "stack") and len(set(operands)) > 1
        ):
            continue
        for index in operands:
            node = _node(flow, index, at)
            if node not in found:
                found.add(node)
                left.append(node)
    return found


def _comes_from(flow: Flow, value: int, before: int, origins: set[int]) -> bool:
    start, earliest = _node(flow, value, before), min(origins)
    seen, left = {start}, [start]
    while left:
        at = left.pop()
        if at in origins:
            return True
        if at < 0 or at < earliest:
            continue
        for index in _data(flow, flow.calls[at]):
            node = _node(flow, index, at)
            if node not in seen:
                seen.add(node)
                left.append(node)
    return False


__all__ = ["is_beside"]
