"""Gradients by the weights of ghost units, for many axes in one pass forward and backward.

With outgoing weights O of zero (or incoming weights A of zero) units contribute nothing, so that axes do not see each
other and each gets what it would get alone:

    D(A) = dL/dO at O = 0         what the units would learn to do, given what they respond to
    G(O) = dL/dA at A = 0         what they would learn to respond to, given what they do; linear in O

Both have a transposed derivative that is a gradient as well, at weights that are small rather than zero, so that
nothing is differentiated twice: G is the derivative of D at A = 0, hence G'(V) = D(tV) / t, and the derivative of
|D(A)|^2 / 2 is dL/dA at (A, t D(A)) / t.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.parts.ghosts.amplitude import row_norm, unit_rows
from espalier.parts.ghosts.ghosts import Ghosts, Side, Tensors
from espalier.parts.ghosts.wiring import rest_of
from espalier.parts.score import Context

Rows = Mapping[str, Tensor]
"""Axis -> (k, d), the entries of its new units on one side."""
Asked = Literal["incoming", "outgoing"]
_LINEAR = 0.02
"""Relative difference up to which two sides of the adjoint identity are equal."""


class Passes:
    """Passes through a network with ghost units, all on one batch: the last of the training, else the first probe.

    Args:
        context: of the method that asks.
        ghosts: the units.
        silent: axes whose new units have shifts of zero, so that they are zero where their incoming weights are.

    Raises:
        MethodError: there is no batch.
    """

    def __init__(self, context: Context, ghosts: Ghosts, silent: Collection[str] = ()) -> None:
        self.ghosts = ghosts
        self._tensors: Tensors = ghosts.tensors
        for axis in silent:
            shifts = rest_of(context.structure, ghosts.sides[axis].rest, axis, "shift")
            if shifts.parts:
                self._tensors = shifts.write(self._tensors, torch.zeros_like(shifts.read(self._tensors)))
        self._context = context
        self.batch: Any = context.batch if context.batch is not None else next(iter(context.probe), None)
        if self.batch is None:
            raise MethodError("there is no batch to take gradients of; call session.loss(batch), or give a probe.")

    def zeros(self, axis: str, side: Asked) -> Tensor:
        """Entries of zero."""
        return torch.zeros_like(self._side(axis, side).read(self.ghosts.tensors))

    def drawn(self, axis: str, side: Asked) -> Tensor:
        """Standard normal entries, the same ones every time."""
        like = self._side(axis, side).read(self.ghosts.tensors)
        return torch.randn(like.shape, generator=self._context.generator(f"{axis} {side}")).to(like)

    def gradients(self, incoming: Rows, outgoing: Rows, asked: Mapping[str, Asked]) -> dict[str, Tensor]:
        """For every axis of `asked` the gradient by one side of its units: (k, d).

        Args:
            incoming: entries of the units; where nothing is given they are what surgery fills in.
            outgoing: likewise.
            asked: axis -> side.

        Raises:
            MethodError: a gradient is not finite.
        """
        tensors = self._tensors
        for side, given in (("incoming", incoming), ("outgoing", outgoing)):
            for axis, rows in given.items():
                tensors = self._side(axis, side).write(tensors, rows)
        names = dict.fromkeys(name for axis, side in asked.items() for name in self._side(axis, side).names)
        found = self.ghosts.gradients(tensors, self.batch, list(names))
        result = {axis: self._side(axis, side).read(found) for axis, side in asked.items()}
        for axis, rows in result.items():
            if not bool(torch.isfinite(rows).all()):
                raise MethodError(
                    f"{axis}: the gradient by the weights of new units is not finite; mend the training (a smaller "
                    "learning rate, gradient clipping) or go back to a checkpoint."
                )
        return result

    def transposed(self, outgoing: Rows, directions: Rows) -> dict[str, Tensor]:
        """The transpose of G applied to directions (k, d), by differentiating twice.

        It is what it is even where the gradient at zero is not that of the neighbourhood, as behind max-pooling, which
        takes the first of several zeros.
        """
        sides = {axis: self.ghosts.sides[axis] for axis in directions}
        with torch.enable_grad():
            rows = {axis: outgoing[axis].detach().requires_grad_() for axis in directions}
            tensors = self._tensors
            for axis, side in sides.items():
                tensors = side.incoming.write(tensors, self.zeros(axis, "incoming"))
                tensors = side.outgoing.write(tensors, rows[axis])
            leaves = {name: tensors[name].requires_grad_() for side in sides.values() for name in side.incoming.names}
            loss = self.ghosts.loss({**tensors, **leaves}, self.batch)
            found = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
            by_name = dict(zip(leaves, found, strict=True))
            product = sum((sides[axis].incoming.read(by_name) * directions[axis]).sum() for axis in directions)
            assert isinstance(product, Tensor)
            try:
                back = torch.autograd.grad(product, list(rows.values()))
            except RuntimeError as error:
                raise MethodError(
                    f"{', '.join(directions)}: the network cannot be differentiated twice ({error}), which incoming "
                    "weights of zero need here; let outgoing weights be zero."
                ) from error
            return dict(zip(rows, back, strict=True))

    def alive(self, axes: Collection[str], *, straight: bool = False) -> set[str]:
        """Those of the axes, all of them silent, whose units learn although their incoming weights are zero.

        It is the gradient that is asked, not the activation for its name: where G(O) is zero for random O, as with
        relu'(0) = 0, the units could never move.

        Args:
            axes: the axes asked about.
            straight: leave out also those where G is not the derivative of D, as behind max-pooling, which takes the
                first of several zeros: there the gradient at zero says little about the first step away from it.
        """
        zero = {axis: self.zeros(axis, "incoming") for axis in axes}
        none = {axis: self.zeros(axis, "outgoing") for axis in axes}
        drawn = {axis: self.drawn(axis, "outgoing") for axis in axes}
        found = self.gradients(zero, drawn, dict.fromkeys(axes, "incoming")) if axes else {}
        alive = {axis: rows for axis, rows in found.items() if bool(rows.any())}
        if not straight or not alive:
            return set(alive)
        small = {axis: self.small(axis) for axis in alive}
        steps = {axis: small[axis] * unit_rows(rows) for axis, rows in alive.items()}
        back = self.gradients({**zero, **steps}, none, dict.fromkeys(alive, "outgoing"))
        return {
            axis
            for axis, rows in alive.items()
            if is_adjoint((rows * steps[axis]).sum(), (drawn[axis] * back[axis]).sum())
        }

    def small(self, axis: str) -> float:
        """A length of incoming rows at which everything smooth is linear: the root of the machine precision."""
        side = self.ghosts.sides[axis].incoming
        return float(torch.finfo(side.read(self._tensors).dtype).eps ** 0.5 * (row_norm(side, self._tensors) or 1.0))

    def _side(self, axis: str, side: str) -> Side:
        sides = self.ghosts.sides[axis]
        return sides.incoming if side == "incoming" else sides.outgoing


def is_adjoint(one: Tensor, other: Tensor) -> bool:
    """Whether <G(O), V> and <O, G'(V)> are equal, as they are for a linear map and its transpose."""
    return float((one - other).abs()) <= _LINEAR * float(one.abs())


__all__ = ["Asked", "Passes", "Rows", "is_adjoint"]
