"""The Surgeon: branch off edited copies of a network while it trains, let them compete, and go on from the winner.

After Schiessler, Aydin, Linka & Cyron 2021 (Neural Network Surgery, doi 10.1016/j.neunet.2021.08.034), with a control
branch that gets as many steps as its rivals, rungs at which losers stop (successive halving: Jamieson & Talwalkar 2016,
arXiv:1502.07943), a paired test on held-out data, and everything charged to one budget of training FLOPs.

A search is a deterministic program whose steps are jobs (`espalier.evolve.job`). What a job gave is in the ledger; a
search that starts again runs through the same program and computes only what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from espalier.errors import RunError
from espalier.evolve.horizon import Curve, Point
from espalier.evolve.job import Branch, Exam, Job, key_of
from espalier.evolve.judge import Objective, Verdict
from espalier.evolve.ledger import Ledger
from espalier.evolve.pareto import Front, Judged
from espalier.evolve.problem import Problem
from espalier.evolve.proposals import Proposer, Scout
from espalier.evolve.recommended import Recommended
from espalier.evolve.runners import InProcess, Runner
from espalier.evolve.store import Store

Record = Mapping[str, Any]
_PIECE = 0.05
"""Part of the budget that is trained between two checkpoints at most."""
_LOOKING = 0.5
"""What proposals may cost, as a part of what the branches of a cycle may."""
_FEWEST = 2
"""Steps of a rung whose weights have a mean."""
_UNJUDGED = 0.8
"""Part of the time before a point of the curve whose weights do not belong to it."""


@dataclass(frozen=True)
class Surgeon:
    """How a search goes about it. Times are parts of the budget of training FLOPs."""

    proposer: Proposer = field(default_factory=Recommended)
    objective: Objective = field(default_factory=Objective)
    first: float = 0.04
    """When the first cycle begins."""
    last: float = 0.3
    """When the last one does."""
    cycles: int = 3
    """How many there are at most, each later than the one before by the same factor; 0 for plain training."""
    patience: int = 1
    """Cycles in a row without a winner after which there are no more."""
    candidates: int = 3
    """How many edits are tried in each."""
    share: float = 0.08
    """What the branches of a cycle may take, the control included; all but the one that is gone on with are lost."""
    rungs: tuple[float, ...] = (0.25, 0.75)
    """How the share of a cycle is divided among its rungs."""
    least: float = 0.25
    """A branch is trained for at least this part of the steps that the network has had, those of its parameters in the
    mean; edits that are too dear for that are not tried, but for those that begin anew."""
    dear: float = 0.03
    """No cycle begins as long as the steps that it takes would lower the loss by more than this part of it, by the
    curve of the loss until then; nor if its share pays for judging alone, or for a step or less of a rung. Then plain
    training is worth more: the budget is short, or the network at its very beginning. Infinite: cycles in any case."""
    averaged: float = 0.5
    """Networks are judged at the mean of their weights over this part of the steps of a rung (0: as they are)."""
    scout_batches: int = 4
    """Batches that proposals are made from."""
    watched: bool = False
    """Networks that are trained alone are looked at on held-out data too, after every piece: a curve for the reader.
    Nothing depends on it, so it is not charged."""

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.last < 1 or not self.dear >= 0:
            raise RunError(f"expected 0 < first <= last < 1 and dear from 0 on, found {self!r}.")
        counts = (self.cycles, self.patience - 1, self.candidates - 1, self.scout_batches - 1)
        if min(counts) < 0 or not self.rungs or min(self.rungs) <= 0 or not 0 < self.share < 1:
            raise RunError(f"expected share, rungs and counts above 0 (cycles may be 0): {self!r}.")

    def times(self) -> list[float]:
        """When cycles begin."""
        factor = (self.last / self.first) ** (1 / max(1, self.cycles - 1))
        return [self.first * factor**number for number in range(self.cycles)]


@dataclass(frozen=True)
class Node:
    """A network on the way."""

    network: str | None
    """Address of its checkpoint; None for a fresh one."""
    steps: int
    """That it was trained for."""
    result: Record
    """Of the job that made it."""


class Search:
    """One search, in a folder that holds its ledger and its checkpoints; the same arguments go on where it stopped."""

    def __init__(
        self,
        problem: Problem,
        surgeon: Surgeon,
        total: int,
        folder: Path,
        runner: Runner | None = None,
        on_record: Callable[[Record], None] | None = None,
        on_result: Callable[[Job, Record], None] | None = None,
        alone: Runner | None = None,
    ) -> None:
        """Begin, or go on.

        Args:
            problem: what is trained.
            surgeon: how.
            total: training FLOPs of everything together: branches, scoring and recovery too.
            folder: where ledger and checkpoints are; all workers have to see it.
            runner: where jobs run; by default in this process.
            on_record: is told what happens, from the beginning on, also where it was computed before.
            on_result: is told of every job that was computed as it ends, in any order; for a display.
            alone: where those run that nothing else runs beside: by default where all do. `InProcess()` lets workers of
                `runner` start meanwhile, but what kills it kills the search, which then has to be started again.

        Raises:
            RunError: `total` is not above 0, or the folder cannot be written.
        """
        if total < 1:
            raise RunError(f"expected training FLOPs above 0, found {total!r}.")
        self.problem, self.surgeon, self.total = problem, surgeon, total
        self.store = Store(folder / "store")
        self.ledger = Ledger(folder / "ledger.sqlite", repr((problem, surgeon, total)))
        self._runner = InProcess() if runner is None else runner
        self._alone = self._runner if alone is None else alone
        self._on_record = on_record or (lambda record: None)
        self._on_result = on_result or (lambda job, result: None)
        self.front = Front()
        self.spent = 0
        self._lineage = 0
        self._start = math.inf
        self._known = Point(0, math.inf)
        self._born = 0
        self._computed = False

    def run(self) -> Record:
        """Search to the end of the budget, and look at the test data once. Returns the last record.

        Raises:
            RunError: the control cannot be trained (its loss is no number, say), or no space is left.
        """
        node, vain, worth = self._begun(), 0, False
        share = self.surgeon.share * self.total
        for cycle, begin in enumerate(self._times(node, share)):
            if cycle == 0:
                node = self._judged(node, math.floor(begin * self.total / 2))
            if worth:
                node = self._trained(node, math.floor(begin * self.total))
            else:
                node, worth = self._weighed(cycle, node, math.floor(begin * self.total), share)
            if worth and self.spent + share < self.total:
                won = self._lineage
                node = self._cycle(cycle, node, share)
                self._forget_all_but(node.result)
                vain = 0 if self._lineage > won else vain + 1
                if vain == self.surgeon.patience:
                    break
        return self._ended(self._trained(node, self.total))

    # --- training

    def _begun(self) -> Node:
        result = self._must(Branch(self.problem, None, None, 0, 0, 0, self.total, 0.0))
        self.spent += int(result["spent"])
        self._start = float(result["loss"])
        self._known = Point(0, self._start)
        self.front.add(Judged.of(result))
        self._on_record({"kind": "start", "total": self.total, "total_spent": self.spent, **_shown(result)})
        return Node(str(result["network"]), 0, result)

    def _trained(self, node: Node, until: int) -> Node:
        """The network trained on alone until so many FLOPs are spent, in pieces."""
        left = (min(until, self.total) - self.spent) // int(node.result["step_flops"])
        pieces = math.ceil(left * node.result["step_flops"] / (_PIECE * self.total))
        for number in range(pieces):
            steps = left * (number + 1) // pieces - left * number // pieces
            job = replace(self._branch(node, None, steps, None), watched=self.surgeon.watched)
            node = self._after(node, self._must(job), job.steps)
        return node

    def _times(self, node: Node, share: float) -> list[float]:
        """When cycles may begin: never, if what they take is for judging, or rungs are too short to be judged."""
        surgeon, branches = self.surgeon, 1 + self.surgeon.candidates
        judging = branches * len(surgeon.rungs) * self.spent
        training = branches * _FEWEST * int(node.result["step_flops"]) * sum(surgeon.rungs) / min(surgeon.rungs)
        times = surgeon.times()
        if not times or max(judging, training) <= share or surgeon.dear == math.inf:
            return times
        self._on_record({"kind": "dear", "total_spent": self.spent})
        return []

    def _judged(self, node: Node, until: int) -> Node:
        """The network trained on alone, and judged: a point of the curve that prices are taken from. As it is, if there
        is no time for a step."""
        node = self._trained(node, self.spent + math.floor(_UNJUDGED * (until - self.spent)))
        steps = (until - self.spent) // int(node.result["step_flops"])
        if steps < 1:
            return node
        result = self._must(self._branch(node, None, steps, self.surgeon.averaged))
        self._known = Point(node.steps + steps, float(result["loss"]))
        return self._after(node, result, steps)

    def _weighed(self, cycle: int, node: Node, until: int, share: float) -> tuple[Node, bool]:
        """The network trained on alone, and whether a cycle costs little by the curve of its loss until then."""
        known = self._known
        node = self._judged(node, until)
        curve = Curve.through(self._start, known, self._known)
        left = (self.total - self.spent) / int(node.result["step_flops"])
        cost = curve.price(left, left - (1 + _LOOKING) * share / int(node.result["step_flops"]))
        measured = self._known.steps > known.steps > 0
        if self.surgeon.dear == math.inf or (measured and cost <= self.surgeon.dear * abs(self._known.loss)):
            self._known = known if known.steps else self._known  # the race is too near to the later one
            return node, True
        self._on_record({"kind": "dear", "cycle": cycle, "cost": cost, "total_spent": self.spent})
        return node, False

    def _after(self, node: Node, result: Record, steps: int) -> Node:
        self.spent += int(result["spent"])
        self._forget_all_but(result)
        self._on_record({"kind": "trained", "steps": node.steps + steps, "total_spent": self.spent, **_shown(result)})
        return self._next(node, result, steps)

    def _next(self, node: Node, result: Record, steps: int) -> Node:
        return Node(str(result["network"]), node.steps + steps, result)

    def _ended(self, node: Node) -> Record:
        judged = self._must(self._branch(node, None, 0, 0.0))
        self.front.add(Judged.of(judged))
        exam = self._must(Exam(self.problem, str(judged["network"])))
        record = {
            "kind": "end", "steps": node.steps, "total_spent": self.spent, "network": judged["network"],
            "front": [one.record() for one in self.front.members()], **_shown(judged), **exam,
        }  # fmt: skip
        self._on_record(record)
        return record

    # --- a cycle

    def _cycle(self, cycle: int, node: Node, share: float) -> Node:
        """Branches of a network compete for so many FLOPs; the winner, or the control."""
        surgeon = self.surgeon
        scout = Scout(
            self.problem, node.network, surgeon.proposer, surgeon.candidates, node.steps, surgeon.scout_batches,
            math.floor(_LOOKING * share),
        )  # fmt: skip
        found = self._do([scout], self._alone)[0]
        self.spent += int(found.get("spent", 0))
        proposals = self._affordable(found.get("proposals", ()), node, share)
        self._on_record({
            "kind": "cycle", "cycle": cycle, "proposals": len(proposals), "total_spent": self.spent,
            "seconds": found.get("seconds", 0.0),
        })  # fmt: skip
        if not proposals:
            self._on_record({"kind": "won", "cycle": cycle, "name": None, "total_spent": self.spent})
            return node
        alive = {f"{cycle}.{number}": one for number, one in enumerate(proposals)}
        nodes = dict.fromkeys(alive, node)
        control, verdicts = node, dict[str, Verdict]()
        for rung, part in enumerate(surgeon.rungs):
            names = list(alive)
            budget = share * part / sum(surgeon.rungs)
            steps = self._steps(budget, node, [alive[name]["flops"] for name in names])
            jobs = [self._branch(control, None, steps, surgeon.averaged)]
            for name in names:
                job = self._branch(nodes[name], None, steps, surgeon.averaged)
                first = nodes[name] is node
                jobs.append(replace(job, plan=alive[name]["plan"], anew=alive[name]["anew"]) if first else job)
            self._on_record({
                "kind": "rung", "cycle": cycle, "rung": rung, "names": names, "steps": [steps] * len(jobs),
                "total_spent": self.spent, "edits": [alive[name]["what"] for name in names],
            })  # fmt: skip
            results = self._do(jobs, self._runner)
            self.spent += sum(int(one.get("spent", 0)) for one in results)
            if "failed" in results[0]:
                raise RunError(f"the search cannot go on, since its control failed: {results[0]['failed']}")
            control = self._next(control, results[0], steps)
            self.front.add(Judged.of(results[0]))
            reached = Point(control.steps - self._born, float(results[0]["loss"]))
            curve, verdicts = Curve.through(self._start, self._known, reached), {}
            for name, result in zip(names, results[1:], strict=True):
                record = {"kind": "branch", "cycle": cycle, "rung": rung, "name": name, "parent": self._lineage}
                record |= {"edit": alive[name]["kind"], "predicted": alive[name]["gain"]}
                record |= {part: alive[name][part] for part in ("what", "why")}
                if "failed" in result:
                    self._on_record({**record, "failed": result["failed"]})
                    continue
                left = (self.total - self.spent) / control.result["step_flops"]
                ratio = result["step_flops"] / control.result["step_flops"]
                age = nodes[name].steps + steps - node.steps if alive[name]["anew"] else None
                training = curve.price(left, left / ratio, age)
                verdict = surgeon.objective.verdict(result, results[0], len(proposals), training)
                verdicts[name] = verdict
                self.front.add(Judged.of(result))
                nodes[name] = self._next(nodes[name], result, steps)
                self._on_record({
                    **record, **_shown(result), "gain": verdict.gain, "error": verdict.error, "price": verdict.price,
                    "accepted": verdict.accepted, "total_spent": self.spent,
                })  # fmt: skip
            self._on_record({
                "kind": "control", "cycle": cycle, "rung": rung, "slope": curve.slope, "total_spent": self.spent,
                **_shown(results[0]),
            })  # fmt: skip
            alive = {name: alive[name] for name, verdict in verdicts.items() if not verdict.hopeless}
        able = [name for name in alive if verdicts[name].accepted]
        winner = min(able, key=lambda name: verdicts[name].score, default=None)
        self._on_record({"kind": "won", "cycle": cycle, "name": winner, "total_spent": self.spent})
        after = control if winner is None else nodes[winner]
        if winner is not None:
            self._lineage += 1
            kept = 0.0 if alive[winner]["anew"] else control.result["parameters"] / after.result["parameters"]
            self._born = node.steps - math.floor(min(1.0, kept) * (node.steps - self._born))
        self._known = Point(after.steps - self._born, float(after.result["loss"]))
        return after

    def _affordable(self, proposals: Sequence[Record], node: Node, share: float) -> list[Record]:
        """Without the dearest ones, until all that are left can be trained for long enough."""
        kept = list(proposals)
        least = self.surgeon.least * (node.steps - self._born)
        while self._steps(share, node, [one["flops"] for one in kept]) < least:
            may_go = [one for one in kept if not one["anew"]]
            if not may_go:
                break
            kept.remove(max(may_go, key=lambda one: int(one["flops"])))
        return kept

    def _steps(self, budget: float, node: Node, flops: Sequence[int]) -> int:
        """Of the control and of each branch, which cost so many FLOPs per sample."""
        each = budget / int(node.result["step_flops"])
        relative = 1.0 + sum(one / int(node.result["flops"]) for one in flops)
        return max(1, math.floor(each / relative))

    def _branch(self, node: Node, plan: str | None, steps: int, judged: float | None) -> Branch:
        return Branch(self.problem, node.network, plan, node.steps, steps, self.spent, self.total, judged)

    def _forget_all_but(self, result: Record) -> None:
        """Of checkpoints, but those of the front; not while the search runs through what it knows, of which later ones
        are needed."""
        if self._computed:
            self.store.keep_only([str(result["network"]), *(one.network for one in self.front.members())])

    # --- jobs

    def _must(self, job: Job) -> Record:
        result = self._do([job], self._alone)[0]
        if "failed" in result:
            raise RunError(f"the search cannot go on: {result['failed']}")
        return result

    def _do(self, jobs: Sequence[Job], first: Runner) -> list[Record]:
        """What jobs give, in their order; what the ledger knows is not computed. A lost one is tried once more."""
        keys = [key_of(job) for job in jobs]
        self._computed = False
        found = {key: result for key in keys if (result := self.ledger.get(key)) is not None}
        for attempt, runner in enumerate((first, self._runner)):
            missing = [(key, job) for key, job in dict(zip(keys, jobs, strict=True)).items() if key not in found]
            for number, result in runner.run([job for _, job in missing], self.store.root) if missing else ():
                key = missing[number][0]
                self._computed = True
                self._on_result(missing[number][1], result)
                if attempt or not result.get("lost"):
                    self.ledger.put(key, result)
                    found[key] = result
        return [found[key] for key in keys]


def _shown(result: Record) -> Record:
    """What records show of a result."""
    names = ("parameters", "flops", "latency", "loss", "accuracy", "sizes", "seconds", "seconds_training")
    return {name: result[name] for name in names if name in result}


__all__ = ["Node", "Record", "Search", "Surgeon"]
