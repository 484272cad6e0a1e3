"""What the FLOPs of a larger network are worth in loss, by the time the budget is spent.

The loss of a network that is trained for t steps, at the mean of its last weights, is taken to fall from that of the
start, L0, towards a limit of its own along a hyperbola:

    L(t) = L0 - F(t),    F(t) = D t / (T + t),    b = -dL / d ln t = F T / (T + t)

through two points at which it was judged. Where the steps t are many times T it falls as 1 / t and nearly all is
learnt; where it has fallen in a straight line so far, T would be infinite, and every step worth as much as those
before. But a loss that is positive ends at zero at the lowest, D <= L0, so that T is at most t L(t) / F(t): a straight
line ends as late as it can. With u = t / (T + t), 1 at the end of the curve and 0 at its beginning, the price of having
R' steps left in place of R is

    L(t + R') - L(t + R) = b t (R - R') / ((t + u R') (t + u R))

Steps that are saved are counted with u = 1, at which they are worth least: in doubt, for the network as it is. That
the network's rivals run along the same curve, only lower by what they have gained, is an assumption; a network that
has just grown gains on, so that prices may be low. With each doubling of t the loss of a small perceptron fell by
0.38, 0.16, 0.05, 0.03 and 0.01 on MNIST, and by 0.11, 0.06, 0.06, 0.06 and 0.01 on CIFAR-10. With u = 1 for all
prices, searches of a few hundred steps widened networks that were then not trained enough (docs/results/surgeon.md).

A network that begins anew is compared with what the other one's loss was at its age s, and will have been trained for
s + R' steps where the other one has t + R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A network of the search was judged."""

    steps: int
    """That it was trained for."""
    loss: float
    """Held out."""


@dataclass(frozen=True)
class Curve:
    """How the loss of a network falls."""

    start: float
    """L0: the loss before the first step."""
    steps: int
    """t: those until now."""
    fallen: float
    """F: what the loss has fallen by."""
    delay: float
    """T, in steps; infinite for a straight line of a loss that may fall below zero."""

    @classmethod
    def through(cls, start: float, before: Point, after: Point) -> Curve:
        """From this loss through two points; one that does not fall from one to the other is at its end."""
        steps, first, last = max(1, after.steps), start - before.loss, start - after.loss
        rates = (first / max(1, before.steps), last / steps)
        if after.steps <= before.steps or (rates[0] <= rates[1] and last > first):
            delay = math.inf
        else:
            delay = max(0.0, last - first) / max(rates[0] - rates[1], 1e-300)
        if last > 0 and after.loss >= 0:
            delay = min(delay, steps * after.loss / last)
        return cls(start, steps, last, delay)

    @property
    def known(self) -> float:
        """u: how far the curve has bent, from 0 for a straight line to 1 at its end."""
        return self.steps / (self.delay + self.steps)

    @property
    def slope(self) -> float:
        """b: what the loss falls by per e-folding of the steps."""
        return max(0.0, self.fallen) * (1 - self.known)

    def at(self, steps: float) -> float:
        """The loss after so many steps, more than none."""
        return self.start - self.fallen * steps / (self.steps * (1 - self.known) + steps * self.known)

    def price(self, left: float, left_instead: float, age: int | None = None) -> float:
        """What the loss will be higher by, if so many steps are left instead of those that there were.

        `age`: the steps that a network was trained for which began anew, and runs along the curve from there.
        """
        left, left_instead = max(0.0, left), max(0.0, left_instead)
        if age is not None:
            return self.at(self.steps) - self.at(age) + self.at(age + left_instead) - self.at(self.steps + left)
        known = self.known if left_instead < left else 1.0
        there = (self.steps + known * left) * (self.steps + known * left_instead)
        return self.slope * self.steps * (left - left_instead) / there


__all__ = ["Curve", "Point"]
