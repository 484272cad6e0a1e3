"""The oracles can fail: rules and index maps that are wrong on purpose are seen on the random networks.

Each mutant is tried on networks that hold what it may touch, at most `MOST` of them; on the network on which it is
seen, the rule as it should be passes.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import Findings, WrongError, check_claims, check_growths, check_removals
from grammar import IllConditionedError, Written, compose

from espalier.attaching import attach
from espalier.edit import new_tensors
from espalier.edit.changes import Changes
from espalier.graph import dims, reading, topology
from espalier.graph.rules import registry
from espalier.graph.rules.registry import Reading, positive, refs_in, rule_for, size
from espalier.graph.solver import concat, product
from espalier.graph.topology import infer
from espalier.graph.trace import Call

MOST = 16
"""Networks on which a mutant has to be seen."""
Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch], None]


def wrong_rule(name: str, wrong: Callable[[Reading, Call, Callable[[Reading, Call], Any]], Any]) -> Mutant:
    """Another rule for one operator; it is given the right one."""

    def mutate(patch: Patch) -> None:
        right = registry._RULES[name]
        patch.setitem(registry._RULES, name, lambda read, call: wrong(read, call, right))

    return mutate


def like_elementwise(*names: str) -> Mutant:
    """Operators that move or mix units, taken for harmless ones."""

    def mutate(patch: Patch) -> None:
        for name in names:
            patch.setitem(registry._RULES, name, lambda read, call: read.of(refs_in(call.args)[0]))

    return mutate


def without_taps(role: str) -> Mutant:
    """Nobody notices what operators of one role do to an axis."""

    def mutate(patch: Patch) -> None:
        right = Reading.tap_term

        def wrong(self: Reading, seen: str, *rest: Any) -> None:
            if seen != role:
                right(self, seen, *rest)

        patch.setattr(Reading, "tap_term", wrong)

    return mutate


def _shuffled_wrongly(read: Reading, call: Call, right: Any) -> Any:
    terms, groups = read.of(call.args[0]), call.args[1]
    group, within = read.split(terms[1], groups, size(terms[1]) // groups, call)
    return (terms[0], product(group, within), *terms[2:])


def _cat_reversed(read: Reading, call: Call, right: Any) -> Any:
    arguments = call.arguments()
    operands = refs_in(arguments["tensors"])
    terms = list(right(read, call))
    dim = positive(arguments["dim"], len(terms))
    terms[dim] = concat(*(read.of(ref)[dim] for ref in reversed(operands)))
    return tuple(terms)


def _slice_off_by_one(read: Reading, call: Call, right: Any) -> Any:
    terms, arguments = read.of(call.args[0]), call.arguments()
    dim = positive(arguments["dim"], len(terms))
    count, whole, start = read.shape(call.outputs[0])[dim], size(terms[dim]), arguments["start"] or 0
    if count == whole or isinstance(registry.dissolve(read, terms[dim]), int) or start + count >= whole or start < 0:
        return right(read, call)
    _, piece, _ = read.cut(terms[dim], [start + 1, count, whole - start - 1 - count], call)
    return (*terms[:dim], piece, *terms[dim + 1 :])


def _pieces_exchanged(read: Reading, call: Call, right: Any) -> Any:
    """Where they are of one size: their axes are not the same for that."""
    pieces = right(read, call)
    alike = len({tuple(size(term) for term in piece) for piece in pieces}) == 1
    return list(reversed(pieces)) if alike else pieces


def _stride_ignored(read: Reading, call: Call, right: Any) -> Any:
    arguments = call.arguments()
    if arguments["step"] == 1:
        return right(read, call)
    terms, count = list(read.of(call.args[0])), read.shape(call.outputs[0])
    dim = positive(arguments["dim"], len(terms))
    terms[dim] = read.cut(terms[dim], [count[dim], size(terms[dim]) - count[dim]], call)[0]
    return tuple(terms)


def _padded_on_the_other_side(read: Reading, call: Call, right: Any) -> Any:
    terms = list(right(read, call))
    for back in range(len(call.args[1]) // 2):
        before, after = call.args[1][2 * back : 2 * back + 2]
        position = len(terms) - 1 - back
        term = read.of(call.args[0])[position]
        if before != after and not isinstance(terms[position], int):
            terms[position] = concat(after, term, before)
    return tuple(terms)


def _copies_interleaved(read: Reading, call: Call, right: Any) -> Any:
    terms, counts = read.of(call.args[0]), call.args[1]
    terms = (*([1] * (len(counts) - len(terms))), *terms)
    return tuple(product(term, count) for term, count in zip(terms, counts, strict=True))


def _columns_first(read: Reading, call: Call, right: Any) -> Any:
    terms, (height, width) = read.of(call.args[0]), call.args[1]
    return (*terms[:-3], product(height * width, terms[-3]), read.shape(call.outputs[0])[-1])


def _corners_first(read: Reading, call: Call, right: Any) -> Any:
    if not call.name.endswith("unshuffle"):
        return right(read, call)
    terms, factor = read.of(call.args[0]), call.args[1]
    return (*terms[:-3], product(factor * factor, terms[-3]), *read.shape(call.outputs[0])[-2:])


def _merged_the_other_way(read: Reading, call: Call, right: Any) -> Any:
    """A view that merges two dimensions of a parameter's axes, taken for column-major."""
    before, after = read.of(call.args[0]), read.shape(call.outputs[0])
    if len(before) != len(after) + 1 or any(not isinstance(n, int) for n in after):
        return right(read, call)
    for at in range(len(after)):
        sizes = [size(term) for term in before]
        if [*sizes[:at], sizes[at] * sizes[at + 1], *sizes[at + 2 :]] == list(after):
            return (*before[:at], product(before[at + 1], before[at]), *before[at + 2 :])
    return right(read, call)


def _groups_inside(patch: Patch) -> None:
    """Grouped convolutions with the channels of a group outside and the groups inside."""

    def wrong(read: Reading, call: Call, right: Any) -> Any:
        arguments = call.arguments()
        x, weight, groups = arguments["input"], arguments["weight"], arguments["groups"]
        channels, kernel = read.of(x)[1], read.of(weight)
        if groups == 1 or arguments["transposed"] or size(channels) == groups:
            return right(read, call)
        inner, group = read.split(channels, size(channels) // groups, groups, call)
        _, first = read.split(kernel[0], size(kernel[0]) // groups, groups, call)
        read.unify(group, first, call)
        read.unify(inner, kernel[1], call)
        spatial = [read.plain(term) for term in kernel[2:]] and read.shape(call.outputs[0])[2:]
        if arguments["bias"] is not None:
            read.unify(read.of(arguments["bias"])[0], kernel[0], call)
        return (read.of(x)[0], kernel[0], *spatial)

    wrong_rule("convolution", wrong)(patch)


def _parameters_left_out(patch: Patch) -> None:
    """A scale or shift is not tied to what it scales."""

    def wrong(read: Reading, call: Call, right: Any) -> Any:
        operands = [ref for ref in refs_in((call.args, call.kwargs)) if not read.is_weight(ref)]
        if len(operands) != 1 or read.shape(operands[0]) != read.shape(call.outputs[0]):
            return right(read, call)
        return read.of(operands[0])

    for name in ("mul", "add"):
        wrong_rule(name, wrong)(patch)


def _statistics_left_out(patch: Patch) -> None:
    """Running statistics are not tied to the channels."""

    def wrong(read: Reading, call: Call, right: Any) -> Any:
        arguments, terms = call.arguments(), read.of(call.args[0])
        for key in ("weight", "bias"):
            if arguments.get(key) is not None:
                read.unify(terms[1], read.of(arguments[key])[0], call)
        return [terms, *(None if ref is None else read.shape(ref) for ref in call.outputs[1:])]

    for name in registry.known_operators():
        if "batch_norm" in name and "group" not in name:
            wrong_rule(name, wrong)(patch)


def _unknown_guessed(patch: Patch) -> None:
    """What torch-pruning does: an unknown operator is taken for elementwise."""

    def wrong(read: Reading, call: Call, unknown: dict[str, int]) -> Any:
        if rule_for(call) is None and "espalier_tests" in call.name:
            return [read.of(refs_in(call.args)[0])]
        found = rule_for(call)
        result = found(read, call) if found else registry.freeze_all(read, call, "operator", "unknown")
        return [result] if isinstance(result, tuple) else list(result)

    patch.setattr(reading, "_applied", wrong)


def _labels_off_by_one(patch: Patch) -> None:
    """Positions of an axis inside a concatenation, one off."""
    right = dims.labels

    def wrong(dim: Any, sizes: Any, axis: int) -> Any:
        found = right(dim, sizes, axis)
        return np.roll(found, 1) if isinstance(dim, dims.Concat) else found

    patch.setattr(topology, "labels", wrong)


def _sources_off_by_one(patch: Patch) -> None:
    """The index map of the second dimension of weights, one off."""
    right = Changes.sources

    def wrong(self: Changes, tensor: str) -> Any:
        found = right(self, tensor)
        if found is None or len(found) < 2 or found[1] is None:
            return found
        return (found[0], np.roll(found[1], 1), *found[2:])

    patch.setattr(Changes, "sources", wrong)


def _readers_start_at_random(patch: Patch) -> None:
    right = new_tensors.fill

    def wrong(name: Any, tensor: Any, sources: Any, changes: Any, contract: Any, seed: Any) -> Any:
        start = right(name, tensor, sources, changes, contract, seed)
        if isinstance(start, float) and tensor.is_floating_point():
            shape = [n if source is None else len(source) for n, source in zip(tensor.shape, sources, strict=True)]
            return torch.randn(shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(seed))
        return start

    patch.setattr(new_tensors, "fill", wrong)


def _arange_is_uniform(read: Reading, call: Call, right: Any) -> Any:
    return tuple(read.loose(n) for n in read.shape(call.outputs[0]))


def _halves_untied(read: Reading, call: Call, right: Any) -> Any:
    terms = read.of(call.args[0])
    dim = positive(call.arguments()["dim"], len(terms))
    half = size(terms[dim]) // 2
    first, _ = read.cut(terms[dim], [half, half], call)
    return (*terms[:dim], first, *terms[dim + 1 :])


def _value_follows_query(read: Reading, call: Call, right: Any) -> Any:
    """Fused attention that takes the heads of its result from the number of tokens where sizes agree."""
    results = list(right(read, call))
    batch, heads, tokens, dim = results[0]
    results[0] = (batch, dim, tokens, heads) if size(dim) == size(heads) else results[0]
    return results


Case = tuple[Mutant, str, str, str]
"""What is wrong, and where it has to be seen: the domain, a block, and what its code contains."""
CLAIMS: dict[str, Case] = {
    "channel_shuffle without the exchange": (
        *(wrong_rule("channel_shuffle", _shuffled_wrongly), "image", "shuffle", "channel_shuffle"),
    ),
    "cat with its pieces reversed": (wrong_rule("cat", _cat_reversed), "vector", "concatenation", "cat"),
    "slice off by one": (wrong_rule("slice", _slice_off_by_one), "sequence", "cut", ":"),
    "split with its pieces exchanged": (wrong_rule("split_with_sizes", _pieces_exchanged), "vector", "cut", ".split(["),
    "a stride ignored": (wrong_rule("slice", _stride_ignored), "vector", "moved", "::2]"),
    "padding on the other side": (wrong_rule("constant_pad_nd", _padded_on_the_other_side), "image", "padded", "F.pad"),
    "copies interleaved": (wrong_rule("repeat", _copies_interleaved), "vector", "copies", ".repeat("),
    "unfold with kernel positions outside": (wrong_rule("im2col", _columns_first), "image", "patches", "F.unfold"),
    "pixel_unshuffle, places outside": (
        *(wrong_rule("pixel_unshuffle", _corners_first), "image", "pixel_shuffled", "F.pixel_unshuffle"),
    ),
    "a view read column by column": (wrong_rule("view", _merged_the_other_way), "sequence", "shuffle", ".flatten("),
    "groups inside": (_groups_inside, "image", "grouped", "groups="),
    "scales and shifts left out": (_parameters_left_out, "vector", "gain", "self.p1"),
    "running statistics left out": (_statistics_left_out, "image", "conv_norm_act", "BatchNorm2d"),
    "glu with halves of their own": (wrong_rule("glu", _halves_untied), "vector", "gated", "F.glu"),
    "unknown operators guessed": (_unknown_guessed, "sequence", "foreign", "foreign.turned"),
    "flip elementwise": (like_elementwise("flip"), "image", "moved", ".flip("),
    "roll elementwise": (like_elementwise("roll"), "vector", "moved", "roll("),
    "cumsum elementwise": (like_elementwise("cumsum"), "vector", "moved", ".cumsum("),
    "index_select elementwise": (like_elementwise("index_select"), "vector", "moved", ".index_select("),
    "arange uniform": (wrong_rule("arange", _arange_is_uniform), "vector", "moved", "torch.arange(1"),
    "attention with heads for head_dim": (
        wrong_rule("_scaled_dot_product_flash_attention_for_cpu", _value_follows_query),
        *("sequence", "attention", "F.scaled_dot_product_attention"),
    ),
    "positions off by one": (_labels_off_by_one, "image", "concatenation", "cat"),
}
"""Wrong readings of a network: seen by permuting, silencing and shaking units."""
EDITS: dict[str, Case] = {
    "softmax unnoticed": (without_taps("softmax"), "vector", "over_features", ".softmax("),
    "reductions unnoticed": (without_taps("reduce"), "vector", "group_reduce", "amax"),
    "group norms unnoticed": (without_taps("group_norm"), "image", "norm", "nn.GroupNorm"),
    "layer norms unnoticed": (without_taps("layer_norm"), "vector", "norm", "nn.LayerNorm"),
    "products of activations unnoticed": (without_taps("bilinear"), "image", "non_local", "torch.bmm"),
    "an index map off by one": (_sources_off_by_one, "vector", "mlp", "mlp"),
    "readers that start at random": (_readers_start_at_random, "vector", "gated_mlp", "down"),
}
"""Wrong promises and wrong edits: seen in the outputs."""


def networks_with(domain: str, block: str, code: str) -> Iterator[tuple[int, Written]]:
    """Small networks of one domain that hold a block in the spelling that is asked for."""
    found = 0
    for seed in range(20 * MOST):
        rng = random.Random(seed)
        try:
            written = compose(domain, seed, [block, *(rng.randrange(2**16) for _ in range(seed % 2))])
        except IllConditionedError:
            continue
        if code in repr(written.model):
            found += 1
            yield seed, written
        if found == MOST:
            return


def claims(written: Written, seed: int) -> None:
    structure = attach(written.model, written.x)
    structure.surgery.topology = infer(written.model, written.x)  # as it was read, before any axis is tried out
    check_claims(written.model, written.x, structure, torch.Generator().manual_seed(seed), 2)


def edits(written: Written, seed: int) -> None:
    structure = attach(written.model, written.x)
    rng, found = random.Random(seed), Findings()
    found.add(check_removals(written.model, written.x, structure, rng, 2))
    found.add(check_growths(written.model, written.x, structure, rng, 3))


def seen_at(case: Case, look: Callable[[Written, int], None]) -> int | None:
    """How many networks it takes to see a mutant; None if it is not seen."""
    mutate, *where = case
    for count, (seed, written) in enumerate(networks_with(*where), 1):
        with pytest.MonkeyPatch.context() as patch:
            mutate(patch)
            try:
                look(written, seed)
            except WrongError:
                patch.undo()
                look(compose(*written.recipe), seed)
                return count
    return None


@pytest.mark.parametrize("name", CLAIMS)
def test_a_wrong_reading_is_seen(name):
    assert seen_at(CLAIMS[name], claims) is not None


@pytest.mark.parametrize("name", EDITS)
def test_a_wrong_edit_is_seen(name):
    assert seen_at(EDITS[name], edits) is not None
