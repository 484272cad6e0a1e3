"""What is said to be permissible runs, and what runs is said to be permissible or refused for a documented reason."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from brute_sites import Place, at, close, given, joined, observed, outcome, put, removals, replaced, shapes, wanted_of
from effort import FACTOR
from grammar import network
from grammar_modules import nested
from torch import Tensor, nn

from espalier.edit.layers import Bypass
from espalier.graph.regions import Boundaries, Region
from espalier.graph.sites import Site, sites
from espalier.graph.topology import Topology, infer

REFUSED_THOUGH_IT_RUNS = (
    "has several inputs of the size of its result",
    "runs ",
    "computes something that is used elsewhere",
    "writes into memory that is used elsewhere",
    "gives back 2 tensors that are used",
    "gives back something else than a tensor",
    "does not get the same in every pass",
    "does not give back the same in every pass",
    "has another result used in another pass",
    "has its ",
    "turns ",
    "computes nothing that is used",
    "is known as ",
    "hands on memory that is written to later",
    "is never run by itself",
    "has no input",
)
"""How the reasons begin for which something is refused that would run: all of them are in docs/theory.md."""


def test_the_page_lists_them():
    page = (Path(__file__).parent.parent / "docs" / "theory.md").read_text()
    refused = page.partition("What is refused though it would run")[2].partition("## What is a heuristic")[0]
    for reason in REFUSED_THOUGH_IT_RUNS:
        assert f"*{reason.strip()}" in refused, reason


class WrongError(AssertionError):
    """Espalier and brute force disagree about a network."""


@dataclass
class Subject:
    """One network with what is said of it and what is seen of it."""

    model: nn.Module
    x: Tensor
    found: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.topology: Topology = infer(self.model, self.x)
        self.modules = dict(self.model.named_modules())
        self.sites = sites(self.topology, self.modules)
        self.boundaries = Boundaries(self.topology)
        self.seen = observed(self.model, self.x)
        self.wanted = wanted_of(self.model, self.x)

    def region(self, path: str) -> Region:
        found = self.boundaries.region(path)
        assert isinstance(found, Region)
        return found

    def check(self, claim: str, holds: bool, site: Site) -> None:
        self.found[claim] += 1
        if not holds:
            raise WrongError(f"{claim}: {site}\n{dict(site.why_not)}\n{self.model!r}")


def stand_in(region: Region, entry: Place, *, zero: bool) -> Bypass:
    return Bypass(entry, region.exit, region.items, region.result, region.order, zero=zero, copied=region.written)


def check_removal(one: Subject, site: Site) -> None:
    """What is said to be removable is: the network runs, is trained, and gives results of the same shapes."""
    regions = [one.region(path) for path in site.modules]
    entries = [region.takes[0] for region in regions] if len(regions) > 1 else [regions[0].entry]
    for zero in {False, site.removal == "zero"}:
        with ExitStack() as stack:
            for path, region, entry in zip(site.modules, regions, entries, strict=True):
                assert entry is not None
                new = stand_in(region, entry, zero=zero and path == site.modules[-1])
                stack.enter_context(replaced(one.model, path, new))
            for mode in (False, True):
                found = outcome(one.model, one.x, mode, backward=mode)
                one.check("removed", shapes(found) == shapes(one.wanted[mode]), site)


def check_copy(one: Subject, site: Site) -> None:
    """A silent copy after a module changes nothing."""
    path, region = site.modules[0], one.region(site.modules[0])
    module = one.modules[path]
    twin = copy.deepcopy(module)
    for name in site.silence or ():
        twin.get_parameter(name.removeprefix(f"{path}.")).data.zero_()

    def again(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], result: object) -> object:
        assert region.entry is not None
        arguments = put(given(args, kwargs), region.entry, at(result, region.exit))
        found = twin(*(arguments[number] for number in range(len(args))), **{key: arguments[key] for key in kwargs})
        handed_on.append(torch.equal(at(found, region.exit), at(result, region.exit)))
        return put(result, region.exit, at(found, region.exit))

    handed_on: list[bool] = []
    handle = module.register_forward_hook(again, with_kwargs=True)
    try:
        twin.train(False)
        found = outcome(one.model, one.x, False)
    finally:
        handle.remove()
    # A copy may lay its result out in its own way, after which others round in theirs.
    one.check("silent copy", handed_on == [True] and close(found, one.wanted[False]), site)


def check_soundness(one: Subject) -> None:
    for site in one.sites:
        if site.removal is not None:
            check_removal(one, site)
        if len(site.modules) > 1:
            continue
        path = site.modules[0]
        if site.insert_after or site.insert_before:
            region = one.region(path)
            after, before = [region.exit] if site.insert_after else (), region.takes if site.insert_before else ()
            one.check("joined", joined(one.model, one.x, one.wanted, path, after, before), site)
        if site.silence is not None:
            check_copy(one, site)


def is_documented(reason: str) -> bool:
    return reason.startswith(REFUSED_THOUGH_IT_RUNS)


def check_completeness(one: Subject) -> None:
    for site in one.sites:
        if len(site.modules) > 1:
            continue
        path = site.modules[0]
        seen = one.seen.get(path, [])
        if site.removal is None and removals(one.model, one.x, one.wanted, path, seen):
            one.check("removal refused though it runs", is_documented(site.why_not["removal"]), site)
            one.found[site.why_not["removal"].split(" ")[0]] += 1
        elif site.removal is not None:
            one.found["removal seen"] += 1
        could_join = not site.insert_after and seen and isinstance(seen[0][1], Tensor)
        if could_join and joined(one.model, one.x, one.wanted, path, [()]):
            one.check("insertion refused though it runs", is_documented(site.why_not["insert_after"]), site)


def check_runs(one: Subject) -> None:
    """A run of the children of an `nn.Sequential` that goes without a change of size consists of sites that do."""
    removable = {site.modules for site in one.sites if site.removal is not None}
    for path, module in one.modules.items():
        if type(module) is not nn.Sequential or len(one.seen.get(path, ())) != 1:
            continue
        children = [f"{path}.{key}" for key in module._modules]
        if any(len(one.seen[child]) != 1 or not isinstance(one.seen[child][0][1], Tensor) for child in children):
            continue
        for start in range(len(children)):
            for end in range(start + 2, len(children) + 1):
                run = tuple(children[start:end])
                entry, exit = one.seen[run[0]][0][0][0], one.seen[run[-1]][0][1]
                regions = [one.boundaries.region(child) for child in run]
                if shapes([entry]) != shapes([exit]) or any(not isinstance(region, Region) for region in regions):
                    continue
                others = [one.seen[child][0] for child in children if child not in run]
                is_whole = (path,) in removable and all(result is arguments[0] for arguments, result in others)
                site = next(site for site in one.sites if site.modules == (run[0],))
                one.check("run", is_whole or concatenated(run, removable), site)


def concatenated(run: tuple[str, ...], parts: set[tuple[str, ...]]) -> bool:
    return not run or any(concatenated(run[size:], parts) for size in range(1, len(run) + 1) if run[:size] in parts)


def check(model: nn.Module, x: Tensor) -> Counter[str]:
    one = Subject(model, x)
    check_soundness(one)
    check_completeness(one)
    check_runs(one)
    return one.found


@pytest.mark.parametrize("seed", range(180 * FACTOR))
def test_a_network_of_nested_modules(seed):
    found = check(*nested(seed))
    assert found["joined"] + found["removal seen"] > 0


@pytest.mark.parametrize("seed", range(30 * FACTOR))
def test_a_network_as_people_write_it(seed):
    written = network(seed)
    found = check(written.model, written.x)
    assert found["joined"] > 0
