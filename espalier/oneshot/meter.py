"""Counts what a shrinking takes on data, so that it can be held to a limit.

The unit is a sample trained on with the network as it was given: a forward pass and a backward pass of twice its FLOPs.
A network of a third of the FLOPs takes a third of that, a pass without gradients a third again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from espalier.errors import ShrinkError
from espalier.graph.topology import infer
from espalier.graph.trees import call_arguments
from espalier.measure.cost import cost_of
from espalier.oneshot.worth import DRAWS, Inputs
from espalier.structure import Structure

TRAINED, FORWARD = 1.0, 1 / 3
"""What a sample takes, with and without a backward pass."""


class Meter:
    """What was spent, and what may be; all in samples trained on with the network as it was given."""

    def __init__(self, structure: Structure, most: float | None, teacher: nn.Module | None) -> None:
        """Begin with nothing spent.

        Args:
            structure: of the network as it was given.
            most: the limit; None: there is none, and passes that are watched are not counted.
            teacher: what training runs forward as well.
        """
        self.most, self.spent = most, 0.0
        self._teacher = teacher
        self._whole = max(1, structure.cost().flops)
        self._example = call_arguments(structure.example)
        self._evaluation = self._looking = 0.0
        self.of_teacher = 0.0
        """What the teacher takes for a sample that is trained on."""
        if most is not None and teacher is not None:
            cost = cost_of(infer(teacher, structure.example))
            self.of_teacher = FORWARD * cost.flops / self._whole

    @property
    def left(self) -> float:
        """What may still be spent."""
        assert self.most is not None
        return self.most - self.spent

    def of(self, structure: Structure) -> float:
        """What a sample takes with a network, as a part of what it takes with the one that was given."""
        return structure.cost().flops / self._whole

    def samples(self, inputs: Inputs) -> float:
        """How many samples as the first of the example inputs there are; longer ones count for more."""
        first, given = _first(inputs), _first(self._example)
        of_example = len(given) if given.dim() else 1
        return float(of_example * first.numel() / max(1, given.numel()))  # a tensor while torch.jit traces

    def charge(self, inputs: Sequence[Inputs], each: float) -> None:
        """Count samples that were looked at, at so much each."""
        self.spent += each * sum(self.samples(one) for one in inputs)

    def set_aside(self, inputs: Sequence[Inputs]) -> None:
        """Learn what looking at a network takes: as much as was spent so far to evaluate it, and scoring on inputs."""
        self._evaluation = self.spent
        self._looking = (DRAWS * TRAINED + FORWARD) * sum(map(self.samples, inputs)) + self._evaluation

    def granted(self, share: float, cost: float, ahead: float) -> float:
        """What a training may take: its share of what is left after all that is not training was set aside.

        Args:
            share: of what is left for training.
            cost: what a sample takes with the network that is trained.
            ahead: likewise of all networks that will be scored, refitted and evaluated after it, together.

        Raises:
            ShrinkError: nothing is left.
        """
        free = self.left - cost * self._evaluation - ahead * self._looking
        if free <= 0:
            raise ShrinkError(
                f"max_training={self.most:g}: nothing is left to train with; {self.spent:,.0f} were spent so far, "
                f"and looking at networks will take up to {self.left - free:,.0f} more. Allow more, evaluate on less "
                "data, or give fewer rounds."
            )
        return share * free

    @contextmanager
    def watching(self, net: nn.Module, each: float, granted: float | None = None) -> Iterator[None]:
        """While the body runs, count the samples that it gives to a network, at so much each if trained on.

        With `granted`, which is for training, the teacher's passes count as well; and all of it counts where no pass
        was seen.

        Raises:
            ShrinkError: in the body, if more than that would be spent.
        """
        if self.most is None:
            yield
            return
        limit = None if granted is None else self.spent + granted

        def note(per_sample: float, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            backward = granted is not None and torch.is_grad_enabled()
            self.spent += per_sample * (TRAINED if backward else FORWARD) * self.samples((args, kwargs))
            if limit is not None and self.spent > limit * (1 + 1e-9):
                raise ShrinkError(
                    "train runs the network on more than `tuning.samples` samples, which is all that max_training "
                    "leaves for this call; train for tuning.samples // batch steps, and evaluate on the way only in "
                    "place of them."
                )

        watched = {net: each}
        if granted is not None and self._teacher is not None:
            watched[self._teacher] = self.of_teacher / FORWARD
        handles = [
            module.register_forward_pre_hook(partial(note, per_sample), with_kwargs=True)
            for module, per_sample in watched.items()
        ]
        before = self.spent
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if granted is not None and self.spent == before:
            self.spent += granted  # it ran some other way, which was not seen


def _first(inputs: Inputs) -> Tensor:
    """The first tensor of inputs; a number where there is none."""
    return next((one for one in tree_leaves(inputs) if isinstance(one, Tensor)), torch.zeros(()))


__all__ = ["FORWARD", "TRAINED", "Meter"]
