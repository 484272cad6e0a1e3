"""What the FLOPs of a larger network are worth in loss, by the time the budget is spent.

The loss of a network that is trained for t steps, at the mean of its last weights, is taken to fall towards a limit of
its own as 1 / sqrt(t):

    L(t) = c + a / sqrt(t),    b = -dL / d ln t = a / (2 sqrt(t))

With R steps left for a network as it is and R' for one whose steps cost more, the price of these is

    2 b (sqrt(t / (t + R')) - sqrt(t / (t + R)))

and negative for one whose steps cost less. The slope b is measured on the network that is trained anyway; that its
rivals run along the same curve, only lower by what they have gained, is an assumption. A curve in ln t prices growth
twice as high at half of the budget, and more the earlier; losses of small perceptrons on MNIST fell faster than 1 / sqrt(t)
(by 0.38, 0.16, 0.05, 0.03 and 0.01 with each doubling of t), on CIFAR-10 more slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

_POWER = 1.0


@dataclass(frozen=True)
class Point:
    """A network of the search was judged."""

    steps: int
    """That it was trained for."""
    loss: float
    """Held out."""


def slope(before: Point, after: Point) -> float:
    """What the loss falls by per e-folding of the steps between two points; 0 where it rises, or nothing lies between."""
    if not after.steps > before.steps > 0:
        return 0.0
    # of c + a t^-p, at the later point
    a = (before.loss - after.loss) / (before.steps**-_POWER - after.steps**-_POWER)
    return max(0.0, _POWER * a * after.steps**-_POWER)


def price(slope: float, steps: int, left: float, left_instead: float) -> float:
    """What the loss will be higher by, if so many steps are left instead of those that there were."""

    def rest(more: float) -> float:
        return (steps / (steps + more)) ** _POWER

    return slope / _POWER * (rest(max(0.0, left_instead)) - rest(max(0.0, left)))


__all__ = ["Point", "price", "slope"]
