"""`torch.nn.utils.prune`: global magnitude pruning of single weights, as PyTorch itself has it."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune

from espalier.bench.training import Training
from espalier.errors import RunError
from espalier.suite.peers.peer import in_turns
from espalier.suite.preparing import Prepared
from espalier.suite.watching import Watching


class TorchPrune:
    """The weights of smallest magnitude are masked, at the moments of Espalier's own pruning along the cubic way."""

    package = "torch"

    def train(self, prepared: Prepared, watching: Watching) -> Training:
        """Mask weights of the large network.

        Raises:
            RunError: the cell is not of the track ``unstructured``.
        """
        cell = prepared.cell
        if cell.track != "unstructured":
            raise RunError(
                "torch.nn.utils.prune multiplies weights by masks and changes no size: it has nothing for the track "
                f"{cell.track!r}"
            )

        def edit(training: Training, number: int, count: int) -> nn.Module:
            left = cell.point + (1 - cell.point) * (1 - (number + 1) / count) ** 3
            weights = [(one, "weight") for one in training.model.modules() if isinstance(one, (nn.Linear, nn.Conv2d))]
            total = sum(one.weight.numel() for one, _ in weights)
            masked = sum(int((one.weight == 0).sum()) for one, _ in weights)
            prune.global_unstructured(
                weights, pruning_method=prune.L1Unstructured, amount=max(0, round((1 - left) * total) - masked)
            )
            return training.model

        course = cell.contender.course
        moments = tuple(at + 0.5 / course.periods for at in course.moments)
        training = in_turns(prepared, watching, prepared.large(), moments, edit, "torch.nn.utils.prune")
        for one in training.model.modules():
            if isinstance(one, (nn.Linear, nn.Conv2d)) and prune.is_pruned(one):
                prune.remove(one, "weight")  # type: ignore[no-untyped-call]
        return training


__all__ = ["TorchPrune"]
