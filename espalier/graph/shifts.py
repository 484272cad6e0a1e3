"""Lists whose entries get what the one before got beside its result, as cells of DARTS: a copy would shift both."""

from __future__ import annotations

from collections.abc import Iterable

from espalier.graph.regions import Boundaries, Region


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


__all__ = ["shift"]
