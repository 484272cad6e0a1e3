"""What a forward pass takes where the network will run: eager PyTorch, compiled, or ONNX Runtime.

A `Runtime` makes a network ready once and times single passes of it, so that several networks can be timed in turn. It
is also a plain function of a network and example inputs, as any other that measures: `Latency(ms=12, measure=run)`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import MethodError
from espalier.graph.trees import call_arguments

Measure = Callable[[nn.Module, Any], float]
"""A network and example inputs -> seconds of one inference."""
_PASSES = 20


@dataclass(frozen=True)
class Runtime(ABC):
    """Where a network runs, and by which clock its passes are timed."""

    clock: Callable[[], float] = time.perf_counter
    """Seconds: wall-clock time, or `time.process_time` for the time of this process alone on a shared machine."""
    warmup: int = 3
    """Passes before the first one that is timed."""

    @abstractmethod
    def ready(self, model: nn.Module, example: Any) -> Callable[[], object]:
        """Make the network ready; what is returned runs it once, in eval mode and without gradients."""

    def prepared(self, model: nn.Module, example: Any) -> Callable[[], float]:
        """Make the network ready and warm; what is returned runs it once and says how many seconds that took."""
        run, clock = self.ready(model, example), self.clock
        devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}

        def timed() -> float:
            if "cuda" in devices:
                torch.cuda.synchronize()
            with for_inference(model):
                start = clock()
                run()
                if "cuda" in devices:
                    torch.cuda.synchronize()
                return clock() - start

        for _ in range(self.warmup):
            timed()
        return timed

    def __call__(self, model: nn.Module, example: Any) -> float:
        """Median seconds of a forward pass, over 20 of them after the warm-up."""
        timed = self.prepared(model, example)
        return statistics.median(timed() for _ in range(_PASSES))


@dataclass(frozen=True)
class Eager(Runtime):
    """PyTorch as it is."""

    def ready(self, model: nn.Module, example: Any) -> Callable[[], object]:
        args, kwargs = call_arguments(example)
        return lambda: model(*args, **kwargs)


@dataclass(frozen=True)
class Compiled(Runtime):
    """`torch.compile`, for the sizes of the example inputs; compiling is no part of the time, but takes its own."""

    mode: str | None = None
    """As `torch.compile` takes it, such as ``max-autotune``."""

    def ready(self, model: nn.Module, example: Any) -> Callable[[], object]:
        args, kwargs = call_arguments(example)
        compiled = torch.compile(model, dynamic=False, mode=self.mode)

        def run() -> object:
            # Every network shares the code of its classes, and after eight recompilations of one code PyTorch would go
            # on in eager mode without an error: that time would be taken for that of compiled code.
            with torch._dynamo.config.patch(
                recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16, fail_on_recompile_limit_hit=True
            ):
                return compiled(*args, **kwargs)

        return run


@dataclass(frozen=True)
class OnnxRuntime(Runtime):
    """ONNX Runtime, on the network as the exporter of torch gives it for the sizes of the example inputs.

    Needs the packages onnx, onnxscript and onnxruntime: ``pip install espalier[shrink]``.
    """

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    threads: int | None = None
    """Threads within an operator; None for as many as torch has."""

    def ready(self, model: nn.Module, example: Any) -> Callable[[], object]:
        try:
            import onnxruntime
        except ImportError as error:
            raise MethodError(
                "OnnxRuntime measures with the packages onnx, onnxscript and onnxruntime: pip install espalier[shrink]."
            ) from error
        args, kwargs = call_arguments(example)
        with for_inference(model):
            program = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, verbose=False)
        assert program is not None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads() if self.threads is None else self.threads
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            program.save(path)
            session = onnxruntime.InferenceSession(path, options, providers=list(self.providers))
        tensors = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        wanted = session.get_inputs()
        if len(wanted) != len(tensors):
            raise MethodError(
                f"OnnxRuntime: the exported network takes {len(wanted)} inputs where the example has {len(tensors)} "
                "tensors; give tensors alone as example inputs, or measure with a function of your own."
            )
        given = {one.name: tensor.cpu().numpy() for one, tensor in zip(wanted, tensors, strict=True)}
        return lambda: session.run(None, given)


@contextmanager
def for_inference(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients while the body runs; all modes are then as they were."""
    modes = [(module, module.training) for module in model.modules() if module.training]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


__all__ = ["Compiled", "Eager", "Measure", "OnnxRuntime", "Runtime", "for_inference"]
