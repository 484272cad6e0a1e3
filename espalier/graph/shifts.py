"""Lists that hand on the results of their last entries, as DARTS does with those of two: what a copy would shift."""

from __future__ import annotations

from collections.abc import Iterable

from espalier.graph.regions import Boundaries, Region
from espalier.graph.visits import Place, Visit


def states(boundaries: Boundaries, path: str, paths: Iterable[str]) -> tuple[Place, ...]:
    """Where among its arguments a module gets the results of the last ones of its list, the oldest first.

    Each module gets all of them but the oldest one at the place before, and the newest one is the result of the module
    before: ``s0, s1 = s1, cell(s0, s1)``. Another one of the list can come, or go, where all are of the size of the
    result: then those that follow get the results of other modules, in the same order. Empty if it is not so.

    Args:
        boundaries: of the network.
        path: of the module.
        paths: of the modules of its list.
    """
    region = boundaries.region(path)
    if not isinstance(region, Region) or len(region.choices) < 2:
        return ()
    for one in boundaries.passes:
        others = [visit for other in paths if other != path for visit in one.visits.get(other, ())]
        for visit in one.visits.get(path, ()):
            after = any(_follows(visit, region.exit, other, region.choices) for other in others)
            if not after and not any(_follows(other, region.exit, visit, region.choices) for other in others):
                return ()
    return region.choices


def _follows(before: Visit, exit: Place, after: Visit, places: tuple[Place, ...]) -> bool:
    """Whether one run of a module gets what another one handed on and what it made, at these places."""
    given = {leaf.place: leaf.value for leaf in before.entries}
    made = next((leaf.value for leaf in before.exits if leaf.place == exit), -1)
    got = {leaf.place: leaf.value for leaf in after.entries}
    return [got.get(place) for place in places] == [*(given.get(place) for place in places[1:]), made]


def shift(boundaries: Boundaries, path: str, paths: Iterable[str]) -> str:
    """Why a copy after a module would change what others get, in words that follow its name; empty if it would not.

    Args:
        boundaries: of the network.
        path: of the module.
        paths: of the modules that may come after it, such as the others of its list.
    """
    region = boundaries.region(path)
    if not isinstance(region, Region):
        return ""
    others = [other for other in paths if other != path]
    for one in boundaries.passes:
        for visit in one.visits.get(path, ()):
            result = {leaf.value for leaf in visit.exits if leaf.place == region.exit}
            entry = {leaf.value for leaf in visit.entries if leaf.place == region.entry}
            for other in others:
                for after in one.visits.get(other, ()):
                    given = {leaf.value for leaf in after.entries}
                    if given & result and given & entry:
                        return f"hands its input on to {other}, beside its result: a copy would shift both"
    return ""


__all__ = ["shift", "states"]
