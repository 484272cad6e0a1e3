"""Forms of a weight in which its zeros need not be multiplied, and who can have them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

Form: TypeAlias = Literal["compressed rows", "semi-structured"]

DEVICES: Mapping[str, Form] = MappingProxyType({"cpu": "compressed rows", "cuda": "semi-structured"})
"""Kind of device -> the form that its kernels know."""

_AMPERE = (8, 0)


class CompressedRows(nn.Module):
    """A linear map for inference on the CPU whose weight is stored in compressed rows (`torch.sparse_csr`)."""

    weight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
            self.register_buffer("weight", linear.weight.detach().to_sparse_csr())
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        flat = (self.weight @ input.reshape(-1, input.shape[-1]).T).T
        return (flat if self.bias is None else flat + self.bias).reshape(*input.shape[:-1], -1)


class SemiStructured(nn.Module):
    """A linear map for inference whose weight is stored as the two of every four weights that may be live, and where.

    See `torch.sparse.to_sparse_semi_structured`, which raises RuntimeError for sizes that its kernels do not know.
    """

    weight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
            weight = torch.sparse.to_sparse_semi_structured(linear.weight.detach().contiguous())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return nn.functional.linear(input, self.weight, self.bias)


def made(form: Form, linear: nn.Linear) -> nn.Module:
    """A linear layer in that form. Raises RuntimeError where torch has no kernels for it."""
    return CompressedRows(linear) if form == "compressed rows" else SemiStructured(linear)


def problem(form: Form, weight: Tensor, capability: tuple[int, int] | None) -> str:
    """Why a weight cannot have that form, in words that follow its name; empty if nothing is known against it.

    Args:
        form: the form.
        weight: (outputs, inputs).
        capability: compute capability of the GPU that it is on; None for another device.
    """
    if form == "compressed rows":
        return "" if weight.device.type == "cpu" else f"is on {weight.device}; compressed rows are for the CPU"
    if weight.device.type != "cuda" or capability is None:
        return (
            f"is on {weight.device}; kernels that know two of every four weights are those of NVIDIA GPUs of compute "
            "capability 8.0 and more"
        )
    if capability < _AMPERE:
        found = ".".join(map(str, capability))
        return f"is on a GPU of compute capability {found}; kernels that know two of every four weights need 8.0"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        kind = str(weight.dtype).removeprefix("torch.")
        return f"is of type {kind}; kernels that know two of every four weights take float16 and bfloat16"
    if not two_of_four(weight):
        return "has more than two numbers in some four of a row; prune with the pattern NM(2, 4)"
    return ""


def two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four consecutive numbers of a row are not zero."""
    if weight.shape[1] % 4:
        return False
    return bool(((weight.detach().view(len(weight), -1, 4) != 0).sum(-1) <= 2).all())


__all__ = ["DEVICES", "CompressedRows", "Form", "SemiStructured", "made", "problem", "two_of_four"]
