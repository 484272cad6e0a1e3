"""The layer that can be put anywhere without a change of the network's function: a residual branch that begins at zero.

x + out(act(mid(norm(x)))), where all of `out` is zero at first. In contrast to an identity (Net2Net's deeper student,
Chen et al. 2016, arXiv:1511.05641) it needs no activation of a special kind, and norms inside of it cannot be seen
from outside, in train mode either. It learns at once: the gradient of `out` is that of the sum times the branch's
activations, which are not zero; `mid` follows as soon as `out` has left zero. That residual branches train well from
zero is known from the last scale of residual blocks (Goyal et al. 2017, arXiv:1706.02677) and from Fixup (Zhang et al.
2019, arXiv:1901.09321).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from espalier.edit.activations import activation as activation_named
from espalier.errors import PlanError

NORMS = frozenset({"batch", "layer", "group", "rms"})
"""Kinds of norms that a `Residual` may have."""

CONVOLUTIONS: Mapping[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = MappingProxyType(
    {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
)
_BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Residual(nn.Module):
    """x + out(act(mid(norm(x)))), with `out` zero when it is made: shapes stay, and so do values at first.

    Features are the last dimension for linear layers, dimension 1 for convolutions. A batch norm beside linear layers
    takes values of shape [N, C] only.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        kernel: tuple[int, ...] | None = None,
        norm: str | None = None,
        groups: int = 1,
        eps: float = 1e-5,
        activation: str = "relu",
        pointwise_out: bool = True,
    ) -> None:
        """A new branch; `mid` and the norm begin as torch makes them.

        Args:
            features: size of the values that it gets and gives.
            hidden: size between `mid` and `out`.
            kernel: odd kernel sizes of convolutions in one, two or three dimensions; None for linear layers.
            norm: one of `NORMS`, or None. A convolution has no layer norm and no rms norm.
            groups: of a group norm.
            eps: of the norm.
            activation: one of `espalier.edit.activations.ACTIVATIONS`.
            pointwise_out: whether the kernel of `out` is 1; otherwise it is that of `mid`.

        Raises:
            PlanError: no layer can be made of these.
        """
        super().__init__()
        self.norm = _norm(norm, features, kernel, groups, eps)
        self.mid = layer(features, hidden, kernel)
        self.act = activation_named(activation)
        self.out = layer(hidden, features, kernel and (1,) * len(kernel) if pointwise_out else kernel)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """The input plus what the branch makes of it."""
        branch: Tensor = self.out(self.act(self.mid(self.norm(x))))
        return x + branch


def layer(features: int, out: int, kernel: tuple[int, ...] | None, *, bias: bool = True) -> nn.Module:
    """A linear layer, or a convolution that keeps the size of its input. Raises PlanError if there is none such."""
    for size in (features, out):
        if type(size) is not int or size < 1:
            raise PlanError(f"expected a number of features of at least 1, found {size!r}.")
    if kernel is None:
        return nn.Linear(features, out, bias=bias)
    make = CONVOLUTIONS.get(len(kernel))
    if make is None or any(type(size) is not int or size < 1 or size % 2 == 0 for size in kernel):
        raise PlanError(f"expected one to three odd kernel sizes, found {kernel}: others do not keep the size.")
    padding = tuple(size // 2 for size in kernel)
    return make(features, out, kernel, padding=padding, bias=bias)  # type: ignore[arg-type]


def _norm(kind: str | None, features: int, kernel: tuple[int, ...] | None, groups: int, eps: float) -> nn.Module:
    if kind is None:
        return nn.Identity()
    if kind not in NORMS:
        raise PlanError(f"there is no norm {kind!r}; known are {', '.join(sorted(NORMS))} and None.")
    if kind == "batch":
        return _BATCH_NORMS[len(kernel or ())](features, eps=eps)
    if (kind == "group") is (kernel is None):
        fitting = "batch or layer or rms" if kernel is None else "batch or group"
        layers = "linear layers" if kernel is None else "convolutions"
        raise PlanError(f"a {kind} norm does not go with {layers}; expected {fitting}, or None.")
    if kind == "group":
        if groups < 1 or features % groups:
            raise PlanError(f"a group norm of {groups} groups does not divide {features} features.")
        return nn.GroupNorm(groups, features, eps=eps)
    return nn.LayerNorm(features, eps=eps) if kind == "layer" else nn.RMSNorm(features, eps=eps)


__all__ = ["CONVOLUTIONS", "NORMS", "Residual", "layer"]
