"""What `espalier inspect` looks at: built-in networks, those of timm, torchvision and transformers, anyone's function.

Networks come with random weights; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import nn

from espalier.bench.models import MODELS, build
from espalier.bench.text import LENGTH
from espalier.errors import DataError, EspalierError

SAMPLES = 2
"""Samples in the example inputs: two, since batch norm cannot train on one."""
TOKENS = 16
WAVE = 16_000
_CLASSES = 10
_CIFAR = (3, 32, 32)
_OTHER_SHAPES: Mapping[str, tuple[int, ...]] = MappingProxyType({"mlp": (1, 8, 8), "lenet5": (1, 28, 28)})


@dataclass(frozen=True)
class Target:
    """A network and inputs that it runs on, in the forms that `espalier.attach` takes."""

    name: str
    model: nn.Module
    example_inputs: Any


def find_target(name: str) -> Target:
    """The network of that name: one of ``MODELS``, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME`` (a model type of
    transformers), or ``package.module:function``, which returns a model and its example inputs.

    Raises:
        DataError: the name is unknown, its package is not installed, or the network could not be built.
    """
    source, colon, inner = name.partition(":")
    if not colon:
        example = torch.zeros(SAMPLES, *_OTHER_SHAPES.get(name, _CIFAR))
        if name == "gpt":
            example = torch.zeros(SAMPLES, LENGTH, dtype=torch.long)
        if name not in MODELS:
            raise DataError(
                f"unknown network '{name}': expected one of {', '.join(MODELS)}, or timm:NAME, torchvision:NAME, "
                "hf:NAME or package.module:function"
            )
        return Target(name, build(name, tuple(example.shape[1:]), _CLASSES), example)
    if not inner:
        raise DataError(f"'{name}' lacks a name after the colon: timm:resnet50, hf:bert or my.package:make_model")
    model, example = _SOURCES[source](inner) if source in _SOURCES else _call(source, inner)
    return Target(name, model, example)


def _timm(name: str) -> tuple[nn.Module, Any]:
    timm = _package("timm", name)
    if not timm.is_model(name):
        raise DataError(f"timm {timm.__version__} has no model '{name}'; timm.list_models() lists them")
    with _building(f"timm:{name}"):
        model = timm.create_model(name, pretrained=False)
        return model, torch.zeros(SAMPLES, *timm.data.resolve_model_data_config(model)["input_size"])


def _torchvision(name: str) -> tuple[nn.Module, Any]:
    torchvision = _package("torchvision", name)
    try:
        builder = torchvision.models.get_model_builder(name)
    except ValueError:
        raise DataError(
            f"torchvision {torchvision.__version__} has no model '{name}'; torchvision.models.list_models() lists them"
        ) from None
    # the backbones of detection and segmentation models come with weights unless told otherwise
    without = dict.fromkeys({"weights", "weights_backbone"} & set(signature(builder).parameters))
    side = 299 if name == "inception_v3" else 224
    with _building(f"torchvision:{name}"):
        return builder(**without), torch.zeros(SAMPLES, 3, side, side)


def _transformers(name: str) -> tuple[nn.Module, Any]:
    """Random weights of the default configuration; on the meta device, since the largest ones fit no memory."""
    transformers = _package("transformers", name)
    try:
        config = transformers.AutoConfig.for_model(name)
    except ValueError:
        raise DataError(
            f"transformers {transformers.__version__} has no model type '{name}': expected one such as bert, gpt2, "
            "llama or vit"
        ) from None
    with _building(f"hf:{name}"), torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
        return model, _transformers_inputs(name, model)


@contextmanager
def _building(name: str) -> Iterator[None]:
    """Anything can go wrong in the code of a thousand models: all of it becomes one error that names the model."""
    try:
        yield
    except EspalierError:
        raise
    except Exception as error:
        raise DataError(
            f"{name} could not be built in its default form ({_summary(error)}); build it in a function of your own "
            "that returns the model and its example inputs, and give package.module:function"
        ) from error


def _transformers_inputs(name: str, model: Any) -> dict[str, torch.Tensor]:
    config, main = model.config, model.main_input_name
    if main == "input_ids":
        inputs = {main: torch.zeros(SAMPLES, TOKENS, dtype=torch.long)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.zeros(SAMPLES, TOKENS, dtype=torch.long)
        return inputs
    if main == "pixel_values":
        side = getattr(config, "image_size", None) or 224
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return {main: torch.zeros(SAMPLES, getattr(config, "num_channels", 3), height, width)}
    if main == "input_values":
        return {main: torch.zeros(SAMPLES, WAVE)}
    raise DataError(
        f"no example inputs are known for '{name}', which reads '{main}'; build it in a function of your own that "
        "returns the model and its example inputs, and give package.module:function"
    )


def made_by(name: str) -> Any:
    """What a function of the user's own returns: ``package.module:function``, looked for in the working directory too.

    Raises:
        DataError: there is no such function, or it failed.
    """
    source, _, inner = name.partition(":")
    with ExitStack() as stack:
        sys.path.insert(0, "")  # what lies in the working directory can be named, as with python -m
        stack.callback(sys.path.remove, "")
        function = _function(source, inner)
        try:
            return function()
        except Exception as error:
            raise DataError(f"{name} failed: {_summary(error)}") from error


def is_function(name: str) -> bool:
    """Whether a name is that of a function of the user's own."""
    source, colon, inner = name.partition(":")
    return bool(colon and inner) and source not in _SOURCES


def _call(source: str, inner: str) -> tuple[nn.Module, Any]:
    """The model and example inputs that a user's own function returns."""
    name = f"{source}:{inner}"
    made = made_by(name)
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise DataError(
            f"{name} should return a model (torch.nn.Module) and its example inputs, found {type(made).__name__}"
        )
    return made


def _function(source: str, inner: str) -> Callable[[], Any]:
    try:
        module = importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{source}.".startswith(f"{error.name}."):
            raise DataError(f"importing {source} failed: {_summary(error)}") from error
        raise DataError(
            f"there is no module '{source}' (for '{source}:{inner}'): expected timm, torchvision, hf, or a module that "
            "can be imported from here"
        ) from None
    except Exception as error:
        raise DataError(f"importing {source} failed: {_summary(error)}") from error
    function = vars(module).get(inner)
    if not callable(function):
        raise DataError(f"{source} has no function '{inner}'")
    return function  # type: ignore[no-any-return]


def _package(package: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        reason = f"is not installed: pip install {package}"
        if importlib.util.find_spec(package) is not None:
            reason = f"is installed, but cannot be imported ({error})"
        raise DataError(f"'{name}' is a network of {package}, which {reason}") from error
    except Exception as error:  # torchvision raises RuntimeError where it does not fit torch
        raise DataError(
            f"'{name}' is a network of {package}, which is installed, but cannot be imported ({_summary(error)})"
        ) from error


def _summary(error: Exception) -> str:
    """The error in one line, with the place in the code where it arose."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]} ({frame.filename}:{frame.lineno})"


_SOURCES: Mapping[str, Callable[[str], tuple[nn.Module, Any]]] = MappingProxyType(
    {"timm": _timm, "torchvision": _torchvision, "hf": _transformers}
)
