"""Recurrent layers, where a device has one operator for a whole layer or cell.

Elsewhere the same layers run as matrix products and gates, which have rules of their own. The gates lie side by side in
the weights (LSTM: i, f, g, o; GRU: r, z, n), each with one position per hidden unit. What a layer passes on is what it
reads itself one token later, so that its width is contracted too; with a projection (LSTM) that is another dimension
than that of the cell.
"""

from __future__ import annotations

from collections.abc import Sequence

from espalier.graph.rules.registry import Dims, Reading, Result, Term, rule, size
from espalier.graph.solver import concat
from espalier.graph.trace import Call, Ref

_GATES = {2: 4, 3: 3}
"""Mode, as torch numbers it (2 is LSTM, 3 is GRU) -> gates. The plain modes 0 and 1 have one."""


@rule("mkldnn_rnn_layer")
def one_direction(reading: Reading, call: Call) -> Result:
    """One direction of one layer: (tokens, batch, features) and states (batch, hidden)."""
    a = call.arguments()
    x, state, cell, out = a["input"], a["hx_"], a["cx_"], call.outputs[0]
    weights, biases = [a["weight0"], a["weight1"]], [a["weight2"], a["weight3"]]
    hidden = _hidden(reading, call, [*weights, *(biases if a["has_biases"] else [])], _GATES.get(a["mode"], 1))
    if not a["has_biases"]:
        # In place of biases come tensors that are not read, in the sizes of the weights.
        for ref, empty in zip(weights, biases, strict=True):
            _unify(reading, call, empty, reading.of(ref))
    _read(reading, call, x, reading.of(x)[-1], weights[0])
    _read(reading, call, out, hidden, weights[1])
    reading.expect(call, "hidden_size", hidden)
    states = (reading.of(x)[1], hidden)
    for ref in (state, cell):
        _unify(reading, call, ref, states)
    return [(*reading.of(x)[:-1], hidden), states, states, *_scratch(reading, call, 3)]


@rule("_cudnn_rnn")
def all_layers(reading: Reading, call: Call) -> Result:
    """All layers and directions: (tokens, batch, features) and states (layers x directions, batch, hidden)."""
    a = call.arguments()
    x, state, cell, out = a["input"], a["hx"], a["cx"], call.outputs[0]
    projected, each = bool(a["proj_size"]), a["weight_stride0"]
    groups = [a["weight"][start : start + each] for start in range(0, len(a["weight"]), each)]
    hidden: Term | None = None
    passed: Term | None = None
    width = reading.of(x)[-1]
    directions = 2 if a["bidirectional"] else 1
    for number, group in enumerate(groups):
        *weights, projection = group if projected else (*group, None)
        cells = _hidden(reading, call, weights, _GATES.get(a["mode"], 1))
        outgoing = cells if projection is None else reading.of(projection)[0]
        hidden, passed = _same(reading, call, hidden, cells), _same(reading, call, passed, outgoing)
        if number and number % directions == 0:
            width = concat(*[passed] * directions)
        _read(reading, call, x if number < directions else out, width, weights[0])
        _read(reading, call, out, passed, weights[1])
        if projection is not None:
            _read(reading, call, out, hidden, projection)
    assert hidden is not None
    assert passed is not None
    reading.expect(call, "hidden_size", hidden)
    layers, batch = reading.of(state)[0], reading.of(x)[0 if a["batch_first"] else 1]
    states: list[Dims] = []
    for ref, term in ((state, passed), (cell, hidden)):
        dims = (layers, batch, term)
        if isinstance(ref, Ref):
            _unify(reading, call, ref, dims)
        states.append(dims if isinstance(ref, Ref) else (0,))
    width = concat(*[passed] * directions)
    return [(*reading.of(x)[:-1], width), *states, *_scratch(reading, call, 3)]


@rule("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell")
def gates_of_a_cell(reading: Reading, call: Call) -> Result:
    """The elementwise part of a cell: gates (batch, gates x hidden) and a state (batch, hidden)."""
    a = call.arguments()
    lstm = "lstm" in call.name
    state = a["cx"] if lstm else a["hx"]
    batch, hidden = reading.of(state)
    for key in ("input_gates", "hidden_gates", "input_bias", "hidden_bias"):
        if isinstance(a[key], Ref):
            *others, gates = reading.of(a[key])
            for piece in _pieces(reading, call, gates, 4 if lstm else 3):
                reading.unify(hidden, piece, call)
            for term in others:
                reading.unify(batch, term, call)
            if reading.is_parameter(a[key]):
                reading.tap("shift", call, a[key], 0)
    states = (batch, hidden)
    return [states, states, reading.of(a["input_gates"])] if lstm else [states, *_scratch(reading, call, 1)]


def _scratch(reading: Reading, call: Call, first: int) -> list[Dims | None]:
    """What an operator hands to its own backward."""
    return [None if ref is None else reading.shape(ref) for ref in call.outputs[first:]]


def _hidden(reading: Reading, call: Call, weights: Sequence[Ref], gates: int) -> Term:
    """The hidden dimension of one direction of a layer: that of every gate in its weights and biases."""
    hidden: Term | None = None
    for ref in weights:
        for piece in _pieces(reading, call, reading.of(ref)[0], gates):
            hidden = _same(reading, call, hidden, piece)
        if reading.is_parameter(ref) and len(reading.of(ref)) == 1:
            reading.tap("shift", call, ref, 0)
    assert hidden is not None
    return hidden


def _pieces(reading: Reading, call: Call, term: Term, gates: int) -> list[Term]:
    return reading.cut(term, [size(term) // gates] * gates, call)


def _same(reading: Reading, call: Call, known: Term | None, term: Term) -> Term:
    if known is None:
        return term
    reading.unify(known, term, call)
    return known


def _read(reading: Reading, call: Call, holder: Ref | None, term: Term, weight: Ref) -> None:
    """A layer sums with `weight` over `term`, a dimension of what `holder` is computed from or is."""
    reading.unify(term, reading.of(weight)[1], call)
    if reading.is_parameter(weight):
        reading.tap("contract", call, weight, 1)
        reading.tap("produce", call, weight, 0)
    if holder is not None and not reading.is_weight(holder):
        reading.tap_term("contract" if reading.is_parameter(weight) else "bilinear", call, holder, term)
    reading.cost(call, 2, *reading.of(call.args[0])[:-1], *reading.of(weight))


def _unify(reading: Reading, call: Call, ref: Ref, dims: Dims) -> None:
    for term, other in zip(reading.of(ref), dims, strict=True):
        reading.unify(term, other, call)
