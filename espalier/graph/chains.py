"""Modules of one parent that hand on to each other: each gets what the one before gives, and nobody else does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from espalier.graph.regions import Boundaries, Pass, Refusal, Region
from espalier.graph.trace import Shape
from espalier.graph.visits import Leaf, Visit


def following(boundaries: Boundaries, paths: Sequence[str]) -> dict[str, str]:
    """Path of a module -> that of the next one in its chain, both children of one parent, in every pass."""
    regions = {path: region for path in paths if isinstance(region := boundaries.region(path), Region)}
    passes = [(_links(one, regions), one.visits) for one in boundaries.passes]
    found = {path: after for links, _ in passes for path, after in links.items()}
    return {
        path: after
        for path, after in found.items()
        if all(links.get(path) == after for links, ran in passes if path in ran or after in ran)
    }


def _links(one: Pass, regions: Mapping[str, Region]) -> dict[str, str]:
    """The chains of one pass, link by link."""
    children: dict[str, list[Visit]] = defaultdict(list)
    for path in regions:
        children[path.rpartition(".")[0]].extend(one.visits.get(path, ()))
    found: dict[str, str] = {}
    for visits in children.values():
        ends: dict[tuple[int, int], Visit] = {}
        for visit in sorted(visits, key=lambda each: (each.last, each.first)):
            region = regions[visit.module]
            if region.takes:
                value = _at(visit.entries, region.takes[0])
                before = ends.pop((value, one.flow.version(value, visit.first)), None)
                if before is not None and _alone(one, value, before, visit):
                    found[before.module] = visit.module
            result = _at(visit.exits, region.exit)
            ends[result, one.flow.version(result, visit.last)] = visit
    return found


def _alone(one: Pass, value: int, before: Visit, after: Visit) -> bool:
    """Whether what one module gives is used by the next one alone; one that runs no operator hands it on."""
    if before.last > after.first:
        return False
    uses = one.flow.uses(value, before.last)
    if after.first == after.last:
        return all(at >= after.first for at in uses)
    is_output = value in one.outputs and not any(at >= before.last for at in one.flow.writers.get(value, ()))
    return not is_output and all(after.first <= at < after.last for at in uses)


def _at(leaves: Sequence[Leaf], place: object) -> int:
    return next(leaf.value for leaf in leaves if leaf.place == place)


def prime_runs(boundaries: Boundaries, after: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """The shortest runs of two or more modules of a chain that begin and end at the same size, from each start.

    All other runs that do are these, and single modules that do, one after the other.
    """
    heads = [path for path in after if path not in set(after.values())]
    for head in heads:
        chain = [head]
        while chain[-1] in after:
            chain.append(after[chain[-1]])
        sizes = _sizes(boundaries, chain)
        last: dict[object, int] = {}
        for end, size in enumerate(sizes):
            start = last.get(size)
            if size is not None and start is not None and end - start > 1:
                yield tuple(chain[start:end])
            last[size] = end


def _sizes(boundaries: Boundaries, chain: Sequence[str]) -> list[object]:
    """The sizes between the modules of a chain, in all passes; first what goes in, last what comes out."""
    regions = [boundaries.region(path) for path in chain]
    found: list[object] = []
    for position in range(len(chain) + 1):
        at = max(position - 1, 0)
        region = regions[at]
        assert not isinstance(region, Refusal)
        places = region.takes[:1] if position == 0 else (region.exit,)
        sizes: list[tuple[Shape, torch.dtype]] = []
        for one in boundaries.passes:
            for visit in one.visits.get(chain[at], ()):
                leaves = visit.entries if position == 0 else visit.exits
                sizes += [one.kind(_at(leaves, place)) for place in places]
        found.append(tuple(sizes) or None)
    return found


__all__ = ["following", "prime_runs"]
