"""Second moments of new entries at their own age, by a hook before the optimizer's step.

An optimizer divides steps by a mean of squared gradients, v. New entries have no past: zero would make their steps
too large, since nothing corrects the bias of one entry late in training; the mean of their neighbours starves them,
since what reads new units starts at zero, and their gradients with it (on MNIST, a network doubled at step 500 gained
a tenth of what it gained after all state was cleared). So v of an entry that is `YOUTH` steps old or younger is made
from its own gradients alone: with

    v <- d v + e g^2    and    N_T,   by which the optimizer divides v at its step T

(Adam: d = beta2, e = 1 - beta2, N_T = 1 - beta2^T; RMSprop and Adadelta: d = their decay, e = 1 - d, N = 1; Adagrad:
d = e = 1, N_T = T), v / N_T of an entry at its k-th step is

    m_k = m_(k-1) + w (s g^2 - m_(k-1)),    w = max(1 / k, e / N_T),

the mean of its own squares until the optimizer's own decay forgets faster. Old entries are divided by what they
remember, which may be much more than what they see now; s is the mean of v / N over the grown-up entries of the
parameter over that of their squares at this step. So a new entry moves as if it had always been there, with gradients
in their present proportion to those of its neighbours. That needs no memory but the age, which lies in the
optimizer's state, where it follows edits, is saved, and vanishes when all entries are grown up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Adadelta, Adagrad, Optimizer, RMSprop
from torch.utils.hooks import RemovableHandle

from espalier.edit.whole import whole

AGE: Final = "age"
"""The state that holds, for every entry of a parameter, how many steps it has seen, `YOUTH` at most."""
YOUTH: Final = 100
"""Steps after which v is left to the optimizer."""
_MOMENTS: Final = ("exp_avg_sq", "square_avg", "sum")


def ages(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """The ages of the entries of a parameter, all grown up; None if the optimizer keeps no v of them."""
    group = next((one for one in optimizer.param_groups if any(parameter is held for held in one["params"])), None)
    state = optimizer.state.get(parameter, {})
    key = next((key for key in _MOMENTS if isinstance(state.get(key), Tensor)), None)
    if group is None or key is None or state[key].shape != parameter.shape or _law(optimizer, group, state) is None:
        return None
    return torch.full_like(state[key], YOUTH)


def forget_if_grown_up(state: MutableMapping[str, Any]) -> None:
    """Drop the ages from the state of a parameter if all of them are `YOUTH`."""
    if AGE in state and bool(whole((state[AGE] >= YOUTH).all())):
        del state[AGE]


class Youth:
    """Keeps v of the young entries of an optimizer."""

    def __init__(self, optimizer: Optimizer | None) -> None:
        self._optimizer = optimizer
        self._hook: RemovableHandle | None = None
        self._young: list[tuple[Mapping[str, Any], Tensor]] = []

    def look(self) -> None:
        """Find young entries again, after anything has changed the optimizer's state."""
        if self._optimizer is None:
            return
        self._young = []
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                if AGE in state:
                    self._young.append((group, parameter))
        if self._young and self._hook is None:
            self._hook = self._optimizer.register_step_pre_hook(self._hooked)
        elif not self._young and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _hooked(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Run before the step, or within it after the closure that makes its gradients."""
        given = {"closure": args[1], **kwargs} if len(args) > 1 else kwargs
        closure: Callable[[], Any] | None = given.get("closure")
        if closure is None:
            self.before_step()
            return None

        def evaluated() -> Any:
            loss = closure()
            self.before_step()
            return loss

        return (*args[:1], *args[2:]), {**given, "closure": evaluated}

    def before_step(self) -> None:
        """Set v so that the step to come leaves it as it should be; gradients are those of that step."""
        if not self._young or self._optimizer is None:
            return
        scale, overflow = (getattr(self._optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if overflow is not None and bool(overflow):  # a scaler lets a fused optimizer skip the step
            return
        grown = []
        with torch.no_grad():
            for group, parameter in self._young:
                state, gradient = self._optimizer.state.get(parameter, {}), parameter.grad
                if AGE not in state or gradient is None or gradient.is_sparse:
                    continue
                gradient = gradient if scale is None else gradient / scale
                law = _law(self._optimizer, group, state)
                assert law is not None
                self._set(state, gradient.to(state[AGE].dtype).square(), *law)
                state[AGE].add_(1).clamp_(max=YOUTH)
                forget_if_grown_up(state)
                if AGE not in state:
                    grown.append(parameter)
        self._young = [one for one in self._young if not any(one[1] is parameter for parameter in grown)]

    @staticmethod
    def _set(
        state: Mapping[str, Any], square: Tensor, d: float, e: float, before: Tensor | float, now: Tensor | float
    ) -> None:
        age = state[AGE]
        young = age < YOUTH
        for key in _MOMENTS:
            if key not in state:
                continue
            v = state[key]
            past = torch.where(age > 0, v / before, 0.0)
            weight = (1 / (age + 1)).clamp(min=e / now)
            wanted = now * (past + weight * (stale(v / before, square, young) * square - past))
            v.copy_(torch.where(young, ((wanted - e * square) / d).clamp_(min=0), v))
        if "max_exp_avg_sq" in state:  # amsgrad: the largest of their own
            state["max_exp_avg_sq"].masked_fill_(young, 0)


def stale(mean: Tensor, square: Tensor, young: Tensor) -> Tensor:
    """By how much what the optimizer remembers of grown-up entries is larger than the squares of this step; else 1."""
    remembered, seen = (whole(torch.where(young, 0.0, one).sum()) for one in (mean, square))
    return torch.where((remembered > 0) & (seen > 0), remembered / seen, 1.0)


def _law(
    optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[float, float, Tensor | float, Tensor | float] | None:
    """d, e, N of the step before and N of the one to come; None if v is something else here."""
    if isinstance(optimizer, RMSprop):
        return group["alpha"], 1 - group["alpha"], 1.0, 1.0
    if isinstance(optimizer, Adadelta):
        return group["rho"], 1 - group["rho"], 1.0, 1.0
    step = state.get("step")
    if step is None:
        return None
    if isinstance(optimizer, Adagrad):
        return 1.0, 1.0, step, step + 1
    if "betas" in group and "exp_avg_sq" in state:
        beta = float(group["betas"][1])
        return beta, 1 - beta, 1 - beta**step, 1 - beta ** (step + 1)
    return None


__all__ = ["AGE", "YOUTH", "Youth", "ages", "forget_if_grown_up"]
