"""How many axes grow, and lose silent units, without changing what the network computes; and what stands in the way.

Every growable axis of every network is grown by itself, and the outputs are compared in float64, in eval and in train
mode (dropout masks held, where dropout is a module). Contracts are counted by what they promise and by their reason; an
edit that promises to be exact and is not is an error. `NOT_EXACT` says of each reason whether any start could make such
an edit exact: what remains are edits that are exact in theory and not declared.

    python benchmarks/exact_share.py                     generated networks and the small ones of the tests
    python benchmarks/exact_share.py --generated 200
    python benchmarks/exact_share.py --zoo hf_llama vit_tiny_patch16_dinov3_qkvb      (packages of the zoo needed)
    python benchmarks/exact_share.py --zoo all
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import networks  # noqa: E402
import zoo_small  # noqa: E402
from oracles import FixedDropout, FixedDropout2d, HeldMasks, disturb, outputs, relative_error  # noqa: E402

import espalier  # noqa: E402
from espalier.edit.plan import grow_plan  # noqa: E402
from espalier.errors import EspalierError  # noqa: E402
from espalier.graph.trees import map_tensors  # noqa: E402
from espalier.structure import Structure  # noqa: E402

BOUND = {True: 1e-9, False: 1e-5}
"""The largest relative difference: of a network in float64 throughout, and of one whose code goes through float32."""
NOT_EXACT: dict[str, str] = {
    r"softmax": "new entries take part in the sum of exponentials",
    r"a norm within groups|normalised within groups": "a new channel's own variation over space adds to the variance",
    r"native_dropout|bernoulli": "masks move new units off the mean of the others",
    r"is not even": "the mean over an uneven scale differs from token to token (post-norm)",
    r"do not stay at the mean .*(convolution|native_batch_norm)": "each of the others has its own filter or statistics",
    r"do not stay at the mean .*mul": "masks and gates move new units off the mean of the others",
    r"do not stay at the mean .*(glu|gelu|relu|silu|tanh|sigmoid|elu)": "the mean does not pass an activation function",
    r"runs over more than this axis": "the mean over several dimensions does not stay in one unit",
    r"is reduced (?!.*native_batch_norm)": "a mean or maximum over the units counts them",
}
"""Part of a reason -> why no start of new units makes such an edit exact."""


@dataclass
class Count:
    """What was found."""

    contracts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    refused: int = 0
    wrong: list[str] = field(default_factory=list)

    def note(self, place: str, contract: str, why: str) -> None:
        self.contracts[contract] += 1
        if contract != "exact":
            reason = f"{contract}: {reason_of(why)}"
            self.reasons[reason] += 1
            self.examples.setdefault(reason, f"{place}: {why}")

    def add(self, other: Count) -> None:
        self.contracts += other.contracts
        self.reasons += other.reasons
        self.examples = {**other.examples, **self.examples}
        self.refused += other.refused
        self.wrong += other.wrong


def double(example: Any) -> Any:
    return map_tensors(example, lambda one: one.double() if one.is_floating_point() else one)


def with_held_dropout(model: nn.Module) -> nn.Module:
    """Dropout modules exchanged for those whose masks stay with their units."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout and child.p > 0:
                setattr(module, name, FixedDropout(child.p))
            elif type(child) is nn.Dropout2d and child.p > 0:
                setattr(module, name, FixedDropout2d(child.p))
    return model


def prepared(model: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """In float64, with weights at which no error hides; and the example."""
    model, example = with_held_dropout(model.double()), double(example)
    disturb(model, example, 0)
    return model, example


def is_deterministic(model: nn.Module, example: Any, train: bool) -> bool:
    """Whether nothing random happens but in dropout modules, whose masks are held."""
    first = outputs(model, example, train, 5, HeldMasks())
    handle = model.register_forward_pre_hook(_draw)
    try:
        return torch.equal(first, outputs(model, example, train, 5, HeldMasks()))
    finally:
        handle.remove()


def _draw(module: nn.Module, arguments: Any) -> None:
    """Moves the state of the random numbers."""
    torch.rand(7)


class Comparison:
    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example = model, example
        self.masks = {train: HeldMasks() for train in (False, True) if is_deterministic(model, example, train)}
        self.before = self.present()

    def present(self) -> dict[bool, Tensor]:
        return {train: outputs(self.model, self.example, train, 5, masks) for train, masks in self.masks.items()}

    def error(self) -> float:
        return max(relative_error(found, self.before[train]) for train, found in self.present().items())


def in_double(structure: Structure) -> bool:
    """Whether no code asks for single precision."""
    calls = [call for one in structure.topology.predictions for call in one.calls]
    return not any(call.name == "aten::_to_copy" and call.kwargs.get("dtype") is torch.float32 for call in calls)


def reason_of(why: str) -> str:
    """A reason without names and numbers, the last operator aside."""
    text = re.sub(r" in \S+ \([^()]*, (\w+)\)", r" (\1)", why.split("; ")[0])
    text = re.sub(r"\bin [\w.]+ in front", "in front", text)
    text = re.sub(r"\b[\w.]+\.(weight|bias|[\w]+) ", "", text)
    text = re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "n", text)
    return text.split(" ", 1)[1] if " " in text else text


def theory(reason: str) -> str | None:
    return next((why for pattern, why in NOT_EXACT.items() if re.search(pattern, reason)), None)


def count(name: str, model: nn.Module, example: Any, compare: bool = True) -> Count:
    """Grow every growable axis by itself, compare, undo; or only ask what that would promise."""
    found = Count()
    structure: Structure = espalier.attach(model, example)
    comparison = Comparison(model, example) if compare else None
    for axis in [one for one in structure.axes.values() if one.growable]:
        by = 2 if axis.size > 1 else 1
        try:
            if comparison is None:
                promise, _ = structure.check(grow_plan({axis.name: by}))
                found.note(f"{name}, {axis.name}", promise.kind, promise.why)
                continue
            edit = structure.grow(axis.name, by=by)
        except EspalierError:
            found.refused += 1
            continue
        found.note(f"{name}, {axis.name}", edit.contract, edit.why)
        if edit.contract == "exact":
            try:
                error = comparison.error()
            except RuntimeError as problem:
                error = float("inf")
                found.wrong.append(f"{name}, {axis.name}: {problem}")
            if error > BOUND[in_double(structure)]:
                found.wrong.append(f"{name}, {axis.name}: {error:.2g} ({edit.why})")
        structure.undo()
    return found


def generated(number: int) -> Iterator[tuple[str, nn.Module, Any]]:
    for seed in range(number):
        yield f"build({seed}, {seed % 7})", *networks.build(seed, seed % 7)


def small() -> Iterator[tuple[str, nn.Module, Any]]:
    for name, make in zoo_small.ZOO.items():
        try:
            yield name, *prepared(*make())
        except ModuleNotFoundError as error:
            print(f"{name}: left out ({error})")


def zoo(names: list[str]) -> Iterator[tuple[str, nn.Module, Any]]:
    from zoo_parts.models import ZOO
    from zoo_parts.torchvision_import import torchvision_importable

    torchvision_importable()

    for name in ZOO if names == ["all"] else names:
        yield name, *prepared(*ZOO[name]())


def report(title: str, total: Count) -> None:
    number = total.contracts.total()
    undeclared = sum(times for reason, times in total.reasons.items() if theory(reason) is None)
    exact = total.contracts["exact"]
    shares = ", ".join(f"{kind} {times}" for kind, times in total.contracts.most_common())
    print(f"\n{title}: {number} growable axes: {shares}; refused {total.refused}")
    if number:
        print(f"  exact {exact / number:.1%} of all; {exact / max(1, exact + undeclared):.1%} of those exact in theory")
    for reason, times in total.reasons.most_common():
        print(f"  {times:5} {reason}")
        print(f"        {theory(reason) or '** exact in theory, or not known not to be **'}")
        print(f"        e.g. {total.examples[reason]}")
    for line in total.wrong:
        print(f"  WRONG {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generated", type=int, default=60, help="number of generated networks")
    parser.add_argument("--zoo", nargs="+", help="names of the zoo, or all, instead")
    parser.add_argument("--declared", action="store_true", help="with --zoo: do not compare outputs, which takes long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    if options.zoo:
        total = Count()
        for name, model, example in zoo(options.zoo):
            one = count(name, model, example, not options.declared)
            report(name, one)
            total.add(one)
        report("zoo", total)
        wrong = len(total.wrong)
    else:
        for title, source in (("generated networks", generated(options.generated)), ("small networks", small())):
            total = Count()
            for name, model, example in source:
                total.add(count(name, model, example))
            report(title, total)
            wrong += len(total.wrong)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
