"""`espalier.export_code`: a changed network as a short Python file and safetensors, which need torch alone."""

from __future__ import annotations

import builtins
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from espalier.compiled import uncompiled
from espalier.errors import ExportError
from espalier.export import plain
from espalier.export.tree import Tree, sources
from espalier.graph.named_tensors import tensor_table
from espalier.graph.trees import call_arguments, flatten_tensors, map_tensors
from espalier.graph.undisturbed import undisturbed
from espalier.peers import check_whole
from espalier.structure import Structure
from espalier.train.checkpoint_contents import described
from espalier.train.checkpoint_network import SavedNetwork

CODE, VALUES = "network.py", "network.safetensors"


def export_code(structure: Structure, folder: str | Path, build: Callable[[], nn.Module]) -> Path:
    """Write a network as `network.py` and `network.safetensors`, from which it is restored without Espalier.

    The file says in plain Python, which uses torch and safetensors only, what became of the user's model: layers that
    came and went, attributes, and the sizes of all axes that changed. ``restore(model)`` makes a freshly built model
    the exported one; ``load()`` builds it first, where `build` can be imported. Before this function returns, the file
    was run with Espalier out of reach on a model from `build`, and its outputs in eval mode, on random inputs of the
    sizes of the example, were compared with those of the live network, bit by bit.

    Args:
        structure: of the network.
        folder: where to; what is there under these names is replaced.
        build: builds the model as it was when it was attached to; it may draw weights as it likes.

    Returns:
        The path of `network.py`.

    Raises:
        ExportError: an inserted layer cannot be expressed, `build` gives a model of another class, or outputs differ.
        CheckpointError: `build` gives a model of other sizes, or there is state outside of parameters and buffers.
        PlanError: the layers that came do not fit what `build` gives.
        ParallelError: the network is sharded.
    """
    check_whole(structure.peers, "an export")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    network, model = described(structure), structure.model
    fresh = _built(build, model)
    tree = Tree.of(fresh, network.depth)
    network.check_tensors(table := tensor_table(fresh))
    tensors = tensor_table(model).tensors
    built = {name: tuple(one.shape) for name, one in table.tensors.items() if one.shape != tensors[name].shape}
    text = _text(structure, network, tree, built, build)
    save_file({name: one.detach().clone().contiguous() for name, one in tensors.items()}, folder / VALUES)
    (folder / CODE).write_text(text)
    _verify(text, folder, structure, build)
    return folder / CODE


def _built(build: Callable[[], nn.Module], model: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        fresh = build()
    if not isinstance(fresh, nn.Module):
        raise ExportError(f"build: expected a function that gives a {type(model).__name__}, found {fresh!r}.")
    fresh = uncompiled(fresh)
    if type(fresh) is not type(model):
        raise ExportError(f"build: expected a {type(model).__name__}, found a {type(fresh).__name__}.")
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    return fresh.to(device)


def _text(
    structure: Structure,
    network: SavedNetwork,
    tree: Tree,
    built: Mapping[str, tuple[int, ...]],
    build: Callable[[], nn.Module],
) -> str:
    name = type(structure.model).__name__
    sizes = {axis: (one.original, one.size) for axis, one in network.axes.items() if one.original != one.size}
    changed = [f"    {axis}: {before} -> {after}" for axis, (before, after) in sizes.items()] or ["    none"]
    order = {tensor: one.order for tensor, one in network.tensors.items() if one.order != tuple(range(len(one.order)))}
    attributes = [(one.module, one.path, _literal(structure.model, one.module, one.path)) for one in network.attributes]
    parts = [
        f'"""{name}, pruned and grown: {structure.cost()} for the example inputs.\n\n'
        "Needs torch and safetensors only. Axes whose size is no longer the one that the code builds:\n\n"
        + "\n".join(changed)
        + '\n"""\n',
        "from __future__ import annotations\n",
        "import copy\nfrom collections.abc import Mapping, Sequence\nfrom pathlib import Path\n"
        "from typing import Any\n",
        "import torch\nfrom safetensors.torch import load_file\nfrom torch import Tensor, nn\n",
        _table("ATTRIBUTES", "Module, attribute or entry of its configuration, value.", attributes),
        _table("BUILT", "Sizes of parameters and buffers as the code builds them, where they are others now.", built),
        _table("ORDER", "Dimensions from the outermost to the innermost in memory, where that is unusual.", order),
    ]
    if tree.classes:
        parts.append("SurgeryError, Place = RuntimeError, tuple\nAFTER, BEFORE = 'inserted_after', 'inserted_before'\n")
        parts += [one + "\n" for one in sources(tree.classes)]
        parts.append("found_at = at\n" if any("found_at" in one for one in parts) else "")
    functions = (plain.children, plain.blank, plain.set_attribute, plain.tensors_of, plain.fill)
    parts += [dedent(inspect.getsource(function)) + "\n" for function in functions]
    lines = ["old = dict(model.named_modules())", *tree.copies, *tree.lines] if tree.lines else ["pass"]
    parts.append(
        "def change_layers(model: nn.Module) -> None:\n"
        '    """Layers that came and went."""\n' + "".join(f"    {line}\n" for line in lines) + "\n"
    )
    parts.append(_RESTORE.format(name=name, values=VALUES))
    if _importable(build):
        parts.append(_LOAD.format(module=build.__module__, function=build.__name__))
    return "\n".join(part for part in parts if part)


_RESTORE = '''def restore(model: nn.Module) -> nn.Module:
    """Make a freshly built {name} the exported one; values go to the devices on which it is."""
    change_layers(model)
    for path, name, value in ATTRIBUTES:
        set_attribute(model.get_submodule(path), name, value)
    fill(model, load_file(Path(__file__).parent / "{values}"), BUILT, ORDER)
    return model
'''

_LOAD = '''
def load() -> nn.Module:
    """The exported network."""
    from {module} import {function}

    return restore({function}())
'''


def _table(name: str, about: str, content: Mapping[str, Any] | list[Any]) -> str:
    """A constant of a file, an entry to a line."""
    opening, closing = "{}" if isinstance(content, Mapping) else "[]"
    entries = (
        [f"    {key!r}: {value!r},\n" for key, value in content.items()]
        if isinstance(content, Mapping)
        else [f"    {one!r},\n" for one in content]
    )
    kind = "dict[str, tuple[int, ...]]" if isinstance(content, Mapping) else "list[tuple[str, tuple[str, ...], Any]]"
    inside = "\n" + "".join(entries) if entries else ""
    return f'{name}: {kind} = {opening}{inside}{closing}\n"""{about}"""\n'


def _literal(model: nn.Module, module: str, path: tuple[str, ...]) -> object:
    value = vars(model.get_submodule(module))[path[0]]
    return vars(value)[path[1]] if len(path) > 1 else value


def _importable(build: Callable[[], nn.Module]) -> bool:
    name, module = getattr(build, "__name__", ""), getattr(build, "__module__", "__main__")
    return module != "__main__" and module in sys.modules and getattr(sys.modules[module], name, None) is build


def _verify(text: str, folder: Path, structure: Structure, build: Callable[[], nn.Module]) -> None:
    """Run the file on a fresh model, and compare outputs."""
    available = {**vars(builtins), "__import__": _without_espalier}
    namespace: dict[str, Any] = {"__name__": "network", "__file__": str(folder / CODE), "__builtins__": available}
    exec(compile(text, str(folder / CODE), "exec"), namespace)
    fresh = namespace["restore"](_built(build, structure.model))
    args, kwargs = call_arguments(random_like(structure.example))
    found = [outputs_of(model, args, kwargs) for model in (structure.model, fresh)]
    for (path, expected), (_, other) in zip(*found, strict=True):
        if expected.shape != other.shape or not torch.equal(expected, other):
            raise ExportError(
                f"{path}: the restored network does not give the outputs of the live one. Something besides "
                "parameters, buffers and attributes differs between the live model and what build() gives; see what it "
                "sets after the model is built."
            )


def _without_espalier(name: str, *arguments: Any, **keywords: Any) -> Any:
    if name.partition(".")[0] == "espalier":
        raise ExportError("the file needs Espalier, which it must not.")
    return __import__(name, *arguments, **keywords)


def outputs_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors that a model gives in eval mode, and where they are in its result; it is left as it was."""
    with undisturbed(list(model.modules()), training=False):
        result = model(*args, **kwargs)
    found = list(flatten_tensors(result, "output"))
    return found or list(flatten_tensors(vars(result), "output"))


def random_like(example: Any) -> Any:
    """Inputs of the sizes of an example: random numbers in place of its floating-point ones, its own whole numbers."""
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
        return tensor

    return map_tensors(example, drawn)


__all__ = ["export_code", "outputs_of", "random_like"]
