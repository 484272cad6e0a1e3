"""Everything that is checked of one random network: claims against the perturbation oracle, edits against outputs."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from oracles import Comparison
from perturbation import Claim, Place, Responses, felt, leak, permutation_error, unclaimed
from snapshots import differences, snapshot
from torch import Tensor, nn

from espalier.attaching import attach
from espalier.axis import Axis
from espalier.edit.plan import Plan, Resize
from espalier.errors import EspalierError
from espalier.structure import Structure

EXACT = 1e-9
"""Largest difference of outputs, relative to the largest, that rounding explains in float64."""
SEEN = 1e-8
"""Smallest one that counts as an effect."""
_WEIGHTED_SUMS = frozenset({"contract", "batch_norm"})
"""What operators may do along an axis whose units do not touch each other."""


class WrongError(AssertionError):
    """Espalier and an oracle disagree about a network."""


@dataclass
class Findings:
    """What was looked at, so that a test that looks at nothing shows."""

    counts: Counter[str] = field(default_factory=Counter)
    refusals: list[str] = field(default_factory=list)
    """Edits of axes that were said to be free, and why they were refused."""

    def add(self, other: "Findings") -> None:
        self.counts += other.counts
        self.refusals += other.refusals

    def share(self, part: str, whole: str) -> float:
        return self.counts[part] / max(1, self.counts[whole])


@contextmanager
def _about(model: nn.Module, what: str) -> Iterator[None]:
    """Any error inside names the network and the axis."""
    try:
        yield
    except EspalierError as error:
        raise WrongError(f"{what}: {type(error).__name__}: {error}\n{model!r}") from error
    except WrongError:
        raise
    except Exception as error:
        raise WrongError(f"{what}: {type(error).__name__}: {error}\n{model!r}") from error


def claim_of(axis: Axis) -> Claim:
    """What an axis says, without words of Espalier."""
    return [Place(slot.tensor, slot.dim, slot.positions, slot.role == "contract") for slot in axis.slots]


def free_axes(structure: Structure) -> list[Axis]:
    return [axis for axis in structure.axes.values() if axis.reason is None]


# --- Claims ----------------------------------------------------------------------------------------------------------


def check_claims(model: nn.Module, x: Tensor, structure: Structure, rng: torch.Generator, most: int) -> Findings:
    """Every free axis may be permuted; of up to `most` axes one unit is silenced and shaken."""
    found = Findings()
    for record in structure.topology.axes.values():
        found.counts["axes"] += 1
        if record.reasons:
            found.counts["frozen"] += 1
            found.counts[f"frozen: {record.reasons[0].kind}"] += 1
    check_permutations(model, x, structure, rng, found)
    responses = Responses(model, x)
    claims = [claim_of(axis) for axis in structure.axes.values()]
    kept = [claim_of(axis) for axis in structure.axes.values() if axis.reason is not None]
    pure = [
        axis
        for axis in free_axes(structure)
        if axis.size > 1
        and {tap.role for tap in axis.taps} <= _WEIGHTED_SUMS
        and any(slot.role == "contract" for slot in axis.slots)
    ]
    order = torch.randperm(len(pure), generator=rng).tolist()[:most]
    for axis in (pure[one] for one in order):
        unit = int(torch.randint(axis.size, (), generator=rng))
        _check_unit(model, responses, axis, unit, claims, kept, rng, found)
    return found


def check_permutations(
    model: nn.Module, x: Tensor, structure: Structure, rng: torch.Generator, found: Findings
) -> None:
    """Units of a free axis may be renamed."""
    responses = Responses(model, x)
    for axis in free_axes(structure):
        if axis.size > 1:
            found.counts["permuted"] += 1
            error = permutation_error(responses, claim_of(axis), rng)
            if not error < EXACT:
                raise WrongError(f"{axis.name}: its units permuted, the outputs move by {error:.2g}\n{model!r}")


def _check_unit(
    model: nn.Module, responses: Responses, axis: Axis, unit: int, claims: list[Claim], kept: list[Claim],
    rng: torch.Generator, found: Findings,
) -> None:  # fmt: skip
    claim = claim_of(axis)
    found.counts["shaken"] += 1
    found.counts["felt"] += felt(responses, claim, unit, rng) > SEEN
    error = leak(responses, claim, unit, rng)
    if not error < EXACT:
        raise WrongError(f"{axis.name}: unit {unit} is not read, yet changes the outputs by {error:.2g}\n{model!r}")
    extra = unclaimed(responses, claim, unit, claims, kept, rng)
    if extra:
        raise WrongError(f"{axis.name}: with unit {unit} not read, {extra[:3]} are of no use\n{model!r}")


# --- Edits -----------------------------------------------------------------------------------------------------------


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def silence(model: nn.Module, axis: Axis, units: list[int]) -> None:
    """Zeros where units are read."""
    tensors = _tensors(model)
    with torch.no_grad():
        for slot in axis.slots:
            if slot.role == "contract":
                tensors[slot.tensor].index_fill_(slot.dim, torch.tensor(slot.index(units)), 0.0)


def check_removals(model: nn.Module, x: Tensor, structure: Structure, rng: random.Random, most: int) -> Findings:
    """Units that are silent go without a trace; what the contract calls exact is."""
    found = Findings()
    for axis in rng.sample(free := [one for one in free_axes(structure) if one.prunable], min(most, len(free))):
        state = {name: value.clone() for name, value in _tensors(model).items()}
        units = sorted(rng.sample(range(axis.size), rng.randint(1, axis.size - 1)))
        silence(model, axis, units)
        before = Comparison(model, x)
        with _about(model, f"prune({axis.name!r}, {units})"):
            try:
                edit = structure.prune(axis.name, units)
            except EspalierError as error:
                found.refusals.append(f"prune({axis.name!r}, {units}): {error}\n{model!r}")
            else:
                found.counts["removals"] += 1
                found.counts[f"removals, {edit.contract}"] += 1
                error = before.error()
                if edit.contract == "exact" and not error <= EXACT:
                    raise WrongError(f"prune({axis.name!r}, {units}) is not exact, but off by {error:.2g}\n{model!r}")
                structure.undo()
        with torch.no_grad():
            for name, value in _tensors(model).items():
                value.copy_(state[name])
    return found


def check_growths(model: nn.Module, x: Tensor, structure: Structure, rng: random.Random, most: int) -> Findings:
    """What the contract calls exact leaves the outputs as they are."""
    found = Findings()
    before = Comparison(model, x)
    for axis in rng.sample(free := [one for one in free_axes(structure) if one.growable], min(most, len(free))):
        by = rng.randint(1, 4)
        with _about(model, f"grow({axis.name!r}, {by})"):
            try:
                edit = structure.grow(axis.name, by=by, seed=rng.randrange(99))
            except EspalierError as error:
                found.refusals.append(f"grow({axis.name!r}, {by}): {error}\n{model!r}")
                continue
            found.counts["growths"] += 1
            found.counts[f"growths, {edit.contract}"] += 1
            error = before.error()
            if edit.contract == "exact" and not error <= EXACT:
                raise WrongError(f"grow({axis.name!r}, {by}) is not exact, but off by {error:.2g}\n{model!r}")
            structure.undo()
    return found


def random_plan(structure: Structure, rng: random.Random) -> Plan | None:
    """Some axes pruned, some grown, some both, all in one plan."""
    edits = []
    for axis in free_axes(structure):
        chance = rng.random()
        remove = tuple(sorted(rng.sample(range(axis.size), rng.randint(1, axis.size - 1)))) if axis.prunable else ()
        if chance < 0.25 and remove:
            edits.append(Resize(axis.name, remove))
        elif chance < 0.45 and axis.growable:
            edits.append(Resize(axis.name, add=rng.randint(1, 3)))
        elif chance < 0.55 and axis.growable and remove:
            edits.append(Resize(axis.name, remove, rng.randint(1, 3)))
    return Plan(tuple(edits), seed=rng.randrange(99)) if edits else None


def _train_step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    result = model(x)
    loss = sum(one.square().mean() for one in (result if isinstance(result, tuple) else (result,)))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for name, value in _tensors(model).items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise WrongError(f"{name} is not finite after a step\n{model!r}")
    for parameter in model.parameters():
        for key, state in optimizer.state.get(parameter, {}).items():
            if isinstance(state, Tensor) and state.dim() and state.shape != parameter.shape:
                raise WrongError(f"state {key} of shape {tuple(state.shape)} for {tuple(parameter.shape)}\n{model!r}")


def optimizer_of(model: nn.Module, rng: random.Random) -> torch.optim.Optimizer:
    parameters = [one for one in model.parameters() if one.requires_grad]
    kind = rng.randrange(3)
    if kind == 0:
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    return (torch.optim.Adam if kind == 1 else torch.optim.AdamW)(parameters, lr=1e-3)


def check_plans(model: nn.Module, x: Tensor, rng: random.Random, draws: torch.Generator, plans: int) -> Findings:
    """Random plans one after the other, taken back whole; then once more, with optimizer steps between."""
    found = Findings()
    optimizer = optimizer_of(model, rng)
    _train_step(model, x, optimizer)
    structure = attach(model, x, optimizer=optimizer)
    original = snapshot(model, optimizer)
    sizes = {name: axis.size for name, axis in structure.axes.items()}
    done = 0
    for _ in range(plans):
        done += _apply_random(model, x, structure, rng, draws, found)
    for _ in range(done):
        with _about(model, "undo"):
            structure.undo()
    if changed := differences(original, snapshot(model, optimizer)):
        raise WrongError(f"{done} edits and as many undone, but these have changed: {changed[:5]}\n{model!r}")
    if any(axis.size != sizes[name] for name, axis in structure.axes.items()):
        raise WrongError(f"the axes have other sizes after undo\n{model!r}")
    for _ in range(2):
        _apply_random(model, x, structure, rng, draws, found)
        with _about(model, "a training step after an edit"):
            _train_step(model, x, optimizer)
    return found


def _apply_random(
    model: nn.Module, x: Tensor, structure: Structure, rng: random.Random, draws: torch.Generator, found: Findings
) -> bool:
    plan = random_plan(structure, rng)
    if plan is None:
        return False
    before = Comparison(model, x)
    shown = str(plan).replace("\n", "; ")
    with _about(model, shown):
        try:
            edit = structure.apply(plan)
        except EspalierError as error:
            found.refusals.append(f"{shown}: {error}\n{model!r}")
            return False
        found.counts["plans"] += 1
        found.counts[f"plans, {edit.contract}"] += 1
        error = before.error()
        if edit.contract == "exact" and not error <= EXACT:
            raise WrongError(f"{shown} is not exact, but off by {error:.2g}\n{model!r}")
        check_permutations(model, x, structure, draws, found)
    return True


def check(model: nn.Module, x: Tensor, seed: int, most: int = 3, plans: int = 3) -> Findings:
    """All checks of one network. `most` axes each are shaken, pruned and grown; `plans` random plans follow.

    Raises WrongError, which shows the network as source, what was done and what was found.
    """
    found = Findings()
    rng, draws = random.Random(seed), torch.Generator().manual_seed(seed)
    with _about(model, "attach"):
        structure = attach(model, x)
    with _about(model, "claims"):
        found.add(check_claims(model, x, structure, draws, most))
    found.add(check_removals(model, x, structure, rng, most))
    found.add(check_growths(model, x, structure, rng, most))
    found.add(check_plans(model, x, rng, draws, plans))
    found.counts["networks"] += 1
    return found
