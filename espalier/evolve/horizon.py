"""What the FLOPs of a larger network are worth in loss, by the time the budget is spent.

The loss of a network that is trained for t steps, at the mean of its last weights, is taken to fall towards a limit of
its own as 1 / t:

    L(t) = c + a / t,    b = -dL / d ln t = a / t

With R steps left for a network as it is and R' for one whose steps cost more, the price of these is

    b (t / (t + R') - t / (t + R))

and negative for one whose steps cost less. The slope b is measured on the network that is trained anyway. That its
rivals run along the same curve, only lower by what they have gained, is an assumption; a network that has just grown
gains on, so that prices may be low. With each doubling of t the loss of a small perceptron fell by 0.38, 0.16, 0.05,
0.03 and 0.01 on MNIST, and by 0.11, 0.06, 0.06, 0.06 and 0.01 on CIFAR-10. With 1 / sqrt(t) in place of 1 / t no growth
was accepted from starts that were too small, of one seed on each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A network of the search was judged."""

    steps: int
    """That it was trained for."""
    loss: float
    """Held out."""


def slope(before: Point, after: Point) -> float:
    """What the loss falls by per e-folding of the steps, at the later of two points; 0 where it rises."""
    if not after.steps > before.steps > 0:
        return 0.0
    a = (before.loss - after.loss) / (1 / before.steps - 1 / after.steps)
    return max(0.0, a / after.steps)


def price(slope: float, steps: int, left: float, left_instead: float) -> float:
    """What the loss will be higher by, if so many steps are left instead of those that there were."""
    return slope * (steps / (steps + max(0.0, left_instead)) - steps / (steps + max(0.0, left)))


__all__ = ["Point", "price", "slope"]
