"""Module attributes that repeat a size: `out_channels`, `num_features`, `normalized_shape`, `groups`...

For the modules of torch one table says which attribute repeats which dimension. What the code of other modules reads
was followed when it was captured. What neither knows is mended by `espalier.edit.repair`, which tries attributes and
verifies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from espalier.graph.dims import Dim, size_of
from espalier.graph.topology import Topology
from espalier.graph.trace import Call, Ref


@dataclass(frozen=True, slots=True)
class AttributeChange:
    """One attribute of one module, before and after; a path of two names is an attribute of a (copied) config."""

    module: str
    path: tuple[str, ...]
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.module or 'model'}.{'.'.join(self.path)}: {self.old!r} -> {self.new!r}"


_NORMS = frozenset({"native_layer_norm", "_fused_rms_norm", "rms_norm", "mean", "pow"})

Sizes = dict[str, Any]
ShapeOf = Callable[[str], tuple[int, ...] | None]


def _linear(module: nn.Module, shape: ShapeOf, call: Mapping[str, int]) -> Sizes:
    found = shape("weight")
    return {} if found is None else {"in_features": found[1], "out_features": found[0]}


def _convolution(module: nn.Module, shape: ShapeOf, call: Mapping[str, int]) -> Sizes:
    found = shape("weight")
    if found is None or not isinstance(module, nn.modules.conv._ConvNd):
        return {}
    groups = call.get("groups", module.groups)
    into, out = (found[0], found[1] * groups) if module.transposed else (found[1] * groups, found[0])
    return {"in_channels": into, "out_channels": out, "groups": groups}


def _batch_norm(module: nn.Module, shape: ShapeOf, call: Mapping[str, int]) -> Sizes:
    found = shape("weight") or shape("running_mean")
    return {} if found is None else {"num_features": found[0]}


def _group_norm(module: nn.Module, shape: ShapeOf, call: Mapping[str, int]) -> Sizes:
    renamed = {"group": "num_groups", "C": "num_channels"}
    return {renamed[key]: value for key, value in call.items() if key in renamed}


def _embedding(module: nn.Module, shape: ShapeOf, call: Mapping[str, int]) -> Sizes:
    found = shape("weight")
    return {} if found is None else {"num_embeddings": found[0], "embedding_dim": found[1]}


def _bilinear(module: nn.Module, shape: ShapeOf, call: Mapping[str, int]) -> Sizes:
    found = shape("weight")
    return {} if found is None else {"out_features": found[0], "in1_features": found[1], "in2_features": found[2]}


def _prelu(module: nn.Module, shape: ShapeOf, call: Mapping[str, int]) -> Sizes:
    found = shape("weight")
    return {} if found is None else {"num_parameters": found[0]}


def _attention(module: nn.Module, shape: ShapeOf, call: Mapping[str, int]) -> Sizes:
    found = shape("out_proj.weight")
    if found is None or "heads" not in call:
        return {}
    keys, values = shape("k_proj_weight"), shape("v_proj_weight")
    return {
        "embed_dim": found[0],
        "kdim": keys[1] if keys else found[0],
        "vdim": values[1] if values else found[0],
        "num_heads": call["heads"],
        "head_dim": call["head_dim"],
    }


def _recurrent(module: nn.Module, shape: ShapeOf, call: Mapping[str, int]) -> Sizes:
    suffix = "_l0" if isinstance(module, nn.RNNBase) else ""
    into, recurrent = shape(f"weight_ih{suffix}"), shape(f"weight_hh{suffix}")
    if into is None or recurrent is None:
        return {}
    found = {"input_size": into[1], "hidden_size": into[0] // _gates(module)}
    projection = shape("weight_hr_l0")
    return found if projection is None else {**found, "proj_size": projection[0]}


def _gates(module: nn.Module) -> int:
    """Blocks in a recurrent weight: one for every gate."""
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return 4
    return 3 if isinstance(module, (nn.GRU, nn.GRUCell)) else 1


_TABLE: tuple[tuple[type[nn.Module], Callable[[nn.Module, ShapeOf, Mapping[str, int]], Sizes]], ...] = (
    (nn.Linear, _linear),
    (nn.modules.conv._ConvNd, _convolution),
    (nn.modules.batchnorm._NormBase, _batch_norm),
    (nn.GroupNorm, _group_norm),
    (nn.Embedding, _embedding),
    (nn.EmbeddingBag, _embedding),
    (nn.Bilinear, _bilinear),
    (nn.PReLU, _prelu),
    (nn.MultiheadAttention, _attention),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent),
)


def known_changes(model: nn.Module, before: Topology, after: Topology) -> list[AttributeChange]:
    """The changes that the code and the table of known modules ask for between two topologies."""
    repeated = _repeated(before)
    changes = _read_by_code(model, before, after)
    done = {(change.module, change.path) for change in changes}
    for path, module in model.named_modules():
        wanted: Sizes = {}
        for kind, sizes in _TABLE:
            if isinstance(module, kind):
                call = {key: size_of(dim, after.sizes) for key, dim in repeated.get(path, {}).items()}
                wanted = sizes(module, _shape_of(path, after), call)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            wanted = _normalized_shape(module, repeated.get(path, {}), after)
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and "channels" in repeated.get(path, {}):
            wanted = _instance_norm(module, repeated[path]["channels"], before, after)
        for name, new in wanted.items():
            old = getattr(module, name)
            if old != new and old is not None and (path, (name,)) not in done:
                changes.append(AttributeChange(path, (name,), old, new))
    return changes


def _read_by_code(model: nn.Module, before: Topology, after: Topology) -> list[AttributeChange]:
    """Attributes that the code hands to operators as a size: entries of one tuple or list change together."""
    found: dict[tuple[str, tuple[str, ...]], Any] = {}
    for attribute, dim in before.attributes.items():
        new = size_of(dim, after.sizes)
        if new == size_of(dim, before.sizes):
            continue
        names = tuple(part for part in attribute.path if isinstance(part, str))
        owner = (attribute.module, names)
        if len(names) == len(attribute.path):
            found[owner] = new
        else:
            position = attribute.path[-1]
            whole = found.get(owner, value_of(model, *owner))
            found[owner] = type(whole)(new if place == position else item for place, item in enumerate(whole))
    return [
        AttributeChange(module, names, value_of(model, module, names), new) for (module, names), new in found.items()
    ]


def value_of(model: nn.Module, module: str, path: tuple[str, ...]) -> Any:
    """What an attribute of a module holds; the second name of a path is an entry of a settings object."""
    value = model.get_submodule(module).__dict__[path[0]]
    return value if len(path) == 1 else getattr(value, path[1])


def _normalized_shape(module: nn.LayerNorm | nn.RMSNorm, dims: Mapping[str, Dim], after: Topology) -> Sizes:
    count = len(module.normalized_shape)
    if not all(f"normal{back}" in dims for back in range(count)):
        return {}
    return {"normalized_shape": tuple(size_of(dims[f"normal{back}"], after.sizes) for back in reversed(range(count)))}


def _instance_norm(module: nn.modules.instancenorm._InstanceNorm, dim: Dim, before: Topology, after: Topology) -> Sizes:
    """Its operator sees samples x channels; it may have no parameter that shows the channels alone."""
    return {"num_features": module.num_features * size_of(dim, after.sizes) // size_of(dim, before.sizes)}


def _shape_of(path: str, topology: Topology) -> ShapeOf:
    prefix = f"{path}." if path else ""

    def shape(name: str) -> tuple[int, ...] | None:
        full = topology.aliases.get(prefix + name, prefix + name)
        return topology.shape(full) if full in topology.tensors else None

    return shape


def _repeated(topology: Topology) -> dict[str, dict[str, Dim]]:
    """Module path -> sizes that its own operators repeat, which no parameter's shape shows."""
    found: dict[str, dict[str, Dim]] = {}
    for prediction in topology.predictions:
        for call, arguments in prediction.expectations.items():
            for argument, dim in arguments:
                found.setdefault(prediction.calls[call].module, {})[argument] = dim
        for call_ in prediction.calls:
            for key, dim in _sizes_of_call(call_, prediction.dims):
                found.setdefault(call_.module, {}).setdefault(key, dim)
    return found


def _sizes_of_call(call: Call, dims: Mapping[int, tuple[Dim, ...]]) -> Iterator[tuple[str, Dim]]:
    name = call.name.removeprefix("aten::")
    if name in _NORMS and isinstance(call.args[0], Ref):
        source = dims[call.args[0].index]
        for back in range(len(source)):
            yield f"normal{back}", source[-1 - back]
    elif name == "native_batch_norm":
        yield "channels", dims[call.args[0].index][1]
    elif name.startswith("_scaled_dot_product"):
        query = dims[call.args[0].index]
        yield "heads", query[1]
        yield "head_dim", query[3]
