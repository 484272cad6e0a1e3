"""gromo (Inria): growing networks that are built from module classes of its own."""

from __future__ import annotations

from espalier.bench.training import Training
from espalier.errors import RunError
from espalier.suite.preparing import Prepared
from espalier.suite.watching import Watching


class Gromo:
    """No cell can be done: all networks of the suites are plain PyTorch modules."""

    def train(self, prepared: Prepared, watching: Watching) -> Training:
        """Says why not."""
        raise RunError(
            f"gromo grows networks that are made of its own classes; {prepared.cell.task.model!r} is made of plain "
            "PyTorch modules, and would have to be rewritten, with another initialisation, to be the same network"
        )


__all__ = ["Gromo"]
