"""`espalier.export_onnx`: a network as an ONNX file, compared with the live one in ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compiled import uncompiled
from espalier.errors import ExportError
from espalier.export.code import outputs_of, random_like
from espalier.graph.trees import call_arguments, map_tensors
from espalier.peers import check_whole
from espalier.structure import Structure


def export_onnx(
    network: Structure | nn.Module,
    path: str | Path,
    example: Any = None,
    *,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> float:
    """Write a network as ONNX, by torch's dynamo exporter, and compare its outputs in ONNX Runtime with torch's.

    The comparison is in eval mode on random inputs, with another number of samples if that is free.

    Args:
        network: what `attach` returned, or any module.
        path: of the file.
        example: example inputs as for `attach`; None for those of the structure.
        dynamic_batch: whether the first dimension of every input is left free.
        tolerance: the largest difference of any output that is accepted, relative to the largest output if that is
            above 1.

    Returns:
        The largest difference, as it is compared with `tolerance`.

    Raises:
        ExportError: onnx, onnxscript or onnxruntime is missing; the network cannot be exported; or the outputs differ
            by more.
        ParallelError: the network is sharded.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(package)
        except ImportError as error:
            raise ExportError(f"{package} is missing: pip install 'espalier[export]'.") from error
    if isinstance(network, nn.Module):
        model = uncompiled(network)
    else:
        check_whole(network.peers, "an export")
        model = network.model
    if example is None:
        if isinstance(network, nn.Module):
            raise ExportError("example: give example inputs, from which the network is exported.")
        example = network.example
    model_modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        _write(model, Path(path), _samples(example, 2) if dynamic_batch else example, dynamic_batch=dynamic_batch)
    except Exception as error:  # the exporter raises many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ExportError(f"the network cannot be exported to ONNX: {type(error).__name__}: {first}") from error
    finally:
        for module, training in model_modes:
            module.training = training
    difference = _difference(model, Path(path), random_like(_samples(example, 3) if dynamic_batch else example))
    if not difference <= tolerance:
        raise ExportError(f"ONNX Runtime differs from torch by {difference:.2g}; accepted are {tolerance:.2g}.")
    return difference


def _write(model: nn.Module, path: Path, example: Any, *, dynamic_batch: bool) -> None:
    args, kwargs = call_arguments(example)
    batch = torch.export.Dim.DYNAMIC

    def shape(tensor: Tensor) -> dict[int, Any] | None:
        return {0: batch} if tensor.dim() else None

    shapes = None
    if dynamic_batch:
        shapes = map_tensors(kwargs, shape) if kwargs else map_tensors(args, shape)
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):  # of the exporter's own code
            warnings.simplefilter("ignore", kind)
        torch.onnx.export(
            model, args, str(path), kwargs=kwargs or None, dynamo=True, dynamic_shapes=shapes, external_data=False,
            verbose=False,
        )  # fmt: skip


def _samples(example: Any, count: int) -> Any:
    """An example with another number of samples, those that it has over and over."""

    def repeated(tensor: Tensor) -> Tensor:
        if not tensor.dim():
            return tensor
        return tensor[torch.arange(count, device=tensor.device) % tensor.shape[0]]

    return map_tensors(example, repeated)


def _difference(model: nn.Module, path: Path, example: Any) -> float:
    import onnxruntime

    args, kwargs = call_arguments(example)
    expected = [tensor for _, tensor in outputs_of(model, args, kwargs)]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    given = dict(zip(names, _tensors((args, kwargs)), strict=True))
    found = session.run(None, {name: tensor.cpu().numpy() for name, tensor in given.items()})
    if len(found) != len(expected):
        raise ExportError(f"ONNX Runtime gives {len(found)} outputs; expected {len(expected)}.")
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        exact = one.double().cpu()
        if tuple(exact.shape) != tuple(other.shape):
            raise ExportError(f"ONNX Runtime gives an output of shape {other.shape}; expected {tuple(exact.shape)}.")
        scale = max(1.0, float(exact.abs().max()))
        worst = max(worst, float((exact - torch.from_numpy(other).double()).abs().max()) / scale)
    return worst


def _tensors(tree: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    map_tensors(tree, found.append)
    return iter(found)


__all__ = ["export_onnx"]
