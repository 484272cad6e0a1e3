"""The session: drives methods from anyone's training loop.

    session = Session(structure, [grow.Random(), prune.Magnitude()], loss=loss, total_steps=total_steps)
    for epoch in range(epochs):
        for batch in loader:
            loss = session.loss(batch)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            session.step()               # events happen here and nowhere else
        session.epoch_end(accuracy)

Methods propose, the session disposes: its controller says what each may do, it applies their plans, measures the loss
before and after on the same batch, and records everything. What surgery refuses is left out with a warning; training
goes on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from espalier.compiled import is_compiled
from espalier.errors import CheckpointError, MethodError
from espalier.graph.eager import eagerly
from espalier.method import Method
from espalier.parts.budget import Latency
from espalier.parts.clock import Clock
from espalier.parts.gates.gating import GateState, mean_of
from espalier.parts.score import Context, derived_seed
from espalier.parts.timing.trigger import Metric
from espalier.structure import Structure
from espalier.train import checkpoint_files as files
from espalier.train.acting import Acting
from espalier.train.controller import Controller, Running
from espalier.train.events import Event, finite
from espalier.train.members import Members
from espalier.train.memories import Follower, Memories
from espalier.train.slowing import Slowing
from espalier.train.state import State
from espalier.train.state_tensors import apart, from_text, to_text, together
from espalier.train.taken import Taken
from espalier.train.warning import warn

Batch: TypeAlias = Any
Loss: TypeAlias = Callable[[nn.Module, Batch], Tensor]
_NEVER = sys.maxsize
_TURNS = (
    ("layers", "grow"), ("units", "grow"), ("layers", "prune"), ("units", "prune"),
    ("weights", "prune"), ("weights", "grow"),
)  # fmt: skip


class Session:
    """Grows and prunes a network while the user's loop trains it."""

    def __init__(
        self,
        structure: Structure,
        methods: Sequence[Method],
        *,
        loss: Loss,
        probe: Sequence[Batch] | None = None,
        total_steps: int,
        seed: int = 0,
        on_event: Callable[[Event], None] | None = None,
        scaler: GradScaler | None = None,
    ) -> None:
        """Start a session at step 0.

        Args:
            structure: what `attach` returned, with the optimizer that trains the model.
            methods: where several are due at the same step, layers grow first, then units; then layers, units and
                weights are pruned, and weights grow.
            loss: model and batch -> scalar loss, or one loss per sample, shape (samples,), of which the mean is taken;
                methods with gates that samples draw for themselves need them. Methods evaluate it by themselves, in
                train and in eval mode.
            probe: held-out batches, which methods that judge on data prefer to training batches.
            total_steps: optimizer steps of the whole training; schedules count in fractions of it.
            seed: seeds all that methods draw.
            on_event: called with every event, after it.
            scaler: the gradient scaler of mixed precision (`torch.amp.GradScaler`), if there is one: steps of the
                optimizer that it leaves out are no steps, whoever calls `step` after them. Train until `steps_done` is
                `total_steps`.

        Raises:
            MethodError: an argument is no structure, method, function or number of steps; the structure has no
                optimizer, no axis may change, an axis or a pattern is unknown, a budget cannot be reached, or a method
                needs held-out batches and there are none; a method has gates, and there are several processes, since
                each would draw its own.
            ParallelError: another process has another session, or other held-out batches.
            CaptureError: a trigger looks at activations that no weights read.
        """
        _check_arguments(structure, methods, loss, total_steps)
        assert structure.optimizer is not None
        self.structure = structure
        self._losses, self._probe, self._on_event = loss, tuple(probe or ()), on_event
        self._total_steps, self._seed = total_steps, seed
        self._step = self._epoch = self._boundary = 0
        self._batch: Batch = None
        self._events: list[Event] = []
        self._metrics: list[Metric] = []
        self._taken = Taken(structure.optimizer) if scaler is not None and scaler.is_enabled() else None
        self._controller = Controller(structure, methods)
        self._slowing = Slowing(structure)
        for one in self._controller.running:
            self._check_provided(one)
            self._check_possible(one)
        structure.peers.same(
            "the session",
            {
                "methods": methods,
                "seed": seed,
                "total_steps": total_steps,
                "probe": self._probe,
                "network": self._sizes(),
            },
        )
        self._gated: Running | None = None
        self._due: list[int | None] = []
        self._wake = _NEVER
        self._begin()

    @property
    def model(self) -> nn.Module:
        """The live model: under DistributedDataParallel the wrapper, with FullyShard what is sharded now."""
        return self.structure.peers.live(self.structure.model)

    @property
    def optimizer(self) -> Optimizer:
        """The live optimizer."""
        assert self.structure.optimizer is not None
        return self.structure.optimizer

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything that happened, oldest first."""
        return tuple(self._events)

    @property
    def steps_done(self) -> int:
        """Steps of the schedules that are done: calls of `step`, or what `step` was told."""
        return self._step

    @property
    def epochs_done(self) -> int:
        """Calls of `epoch_end`."""
        return self._epoch

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, the penalties of methods included; the batch is remembered for the next event."""
        self._batch = batch
        self._memories.catch_up()
        return self._completed(self._evaluated(batch), 1.0)

    def heard(self, batch: Batch, loss: Tensor, share: float = 1.0) -> Tensor:
        """As `loss`, for trainers that have evaluated the loss of a batch themselves: what to take the gradient of.

        Args:
            batch: what the loss is of; remembered for the next event.
            loss: a scalar.
            share: the part of the penalties to add, where an optimizer step sums up several losses.

        Raises:
            MethodError: a method has the loss evaluated in a way of its own; `loss` does that.
        """
        if self._gated is not None:
            raise MethodError(
                f"{self._gated.method.name} draws gates while the loss is evaluated; have your trainer take the loss "
                "from session.loss(batch)."
            )
        self._batch = batch
        self._memories.catch_up()
        return self._completed(loss, share)

    @property
    def evaluates(self) -> bool:
        """Whether a method has the loss evaluated in a way of its own, so that `loss` is the only way to it."""
        return self._gated is not None

    def _completed(self, total: Tensor, share: float) -> Tensor:
        """A loss of training with the penalties; triggers hear it."""
        if self._listening and total.requires_grad:  # not where the user only evaluates
            for one in self._listening:
                one.watch.hear(total)
        for one in self._penalised:
            assert one.method.penalty is not None
            penalty = one.method.penalty(self._context(one))
            total = total if penalty is None else total + share * penalty
        return total

    def decided(self) -> AbstractContextManager[None]:
        """Makes the network for a while what the methods have decided on, for evaluating it in the user's own way.

        With a method whose gates are drawn while it trains, units are there or not as they would be now; with any other
        it is the network as it is.
        """
        self._memories.catch_up()
        one = self._gated
        if one is None or one.method.gating is None:
            return nullcontext()
        return _in_eager_mode(one.method.gating.decided(self._context(one)))

    def gates(self) -> GateState | None:
        """Stage of the search, and the probabilities of all gates, as they are now; None without a method with gates.

        Raises:
            MethodError: no axis can have gates, or one that was asked for by name cannot.
        """
        self._memories.catch_up()
        one = self._gated
        return None if one is None or one.method.gating is None else one.method.gating.state(self._context(one))

    def _evaluated(self, batch: Batch) -> Tensor:
        """The loss of a batch as the methods want it evaluated."""
        one = self._gated
        if one is None or one.method.gating is None:
            return self._loss(self.structure.runs, batch)
        with eagerly():
            return one.method.gating.loss(self._context(one), partial(self._losses, self.model, batch))

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return mean_of(self._losses(model, batch))

    def _as_decided(self, batch: Batch) -> Tensor:
        with self.decided():
            return self._loss(self.structure.model, batch)

    def step(self, done: float | None = None) -> None:
        """To be called after every optimizer step. Events happen here.

        Args:
            done: the part of the training that is done, 0 to 1, where its end is not a number of steps but a budget
                that is spent (training FLOPs, seconds). Then ``total_steps`` says only how finely schedules count: one
                of their steps is 1 / ``total_steps`` of the budget, however many optimizer steps that takes. None: a
                step is a step.

        Raises:
            MethodError: `done` is no part or has fallen, or a method gave scores that are no numbers or do not fit.
        """
        if self._taken is not None and not self._taken.since():
            return
        self._step = self._step + 1 if done is None else self._clock_at(done)
        self.structure.step = self._step
        self._memories.catch_up()
        for one in self._remembering:
            assert one.memory is not None
            one.memory.after_step(self._context(one))
        if self._step >= self._wake:
            with eagerly():
                self._act()
            self.structure.surgery.compiled.warn_if_given_up()

    def epoch_end(self, metric: float | None = None, mode: Literal["min", "max"] = "max") -> None:
        """To be called after every epoch; events that are due by epochs happen at the next `step`.

        Args:
            metric: how good the network is, for methods that ask. Of several processes the mean of those that give one.
            mode: whether a good metric is large (``max``) or small (``min``).
        """
        if mode not in ("min", "max"):
            raise MethodError(f"mode: expected 'min' or 'max', found {mode!r}.")
        found = self.structure.peers.mean("epoch_end", None if metric is None else float(metric))
        self._epoch += 1
        self._boundary = self._step
        self._metrics.append(Metric(self._epoch, None if found is None else finite(found), mode))
        self._look_ahead()

    def state_dict(self) -> dict[str, Any]:
        """The state as what JSON can hold, tensors as text; the network itself is saved by `espalier.save`.

        Where methods hold many tensors, as those with units that sleep do, ``espalier.save(..., session=session)`` and
        `load` are smaller and faster: they keep tensors as safetensors.
        """
        data, tensors = self.state_parts()
        return {**data, "tensors": to_text(tensors)}

    def state_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state as what JSON can hold, with names in place of tensors, and the tensors by name."""
        self._memories.catch_up()
        state = State(
            self._seed,
            self._step,
            self._epoch,
            self._boundary,
            self._metrics,
            self._sizes(),
            self.structure.births,
            self._slowing.stages,
            self._controller.running,
            self._events,
        )
        data, tensors = apart(state.to_json())
        return dict(data), tensors

    def load(self, folder: str | Path) -> None:
        """Go on where ``espalier.save(structure, folder, session=session)`` was called, in the network that it saved.

        Call `espalier.load` with the same folder first, and make the session with the same methods.

        Raises:
            CheckpointError: there is no checkpoint of a session, or as `load_state_dict`; the session is as it was.
        """
        paths = files.read(Path(folder))
        if "session.json" not in paths:
            raise CheckpointError(
                f"the checkpoint in {folder} holds no session; save it with espalier.save(..., session=session)."
            )
        self.load_parts(files.read_json(paths["session.json"]), files.read_tensors(paths["session.safetensors"]))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, in a network that has the sizes it had then (`espalier.load`).

        Raises:
            CheckpointError: the state is damaged, of another version, of other methods or of another network; the
                session is as it was.
        """
        if not isinstance(state, Mapping) or "tensors" not in state:
            raise CheckpointError("this is no state of a session, or one of another version: it holds no tensors.")
        self.load_parts(state, from_text(state["tensors"]))

    def load_parts(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on where `state_parts` was taken; otherwise as `load_state_dict`."""
        found = State.from_json(together(data, tensors), self._controller.running, self._sizes())
        self._controller.running = list(found.running)
        self._events, self._metrics = list(found.events), list(found.metrics)
        self._step, self._epoch, self._boundary, self._seed = found.step, found.epoch, found.boundary, found.seed
        self.structure.births = found.births
        self.structure.step = found.step
        self._slowing.close()
        self._slowing = Slowing(self.structure, found.stages)
        self.structure.surgery.youth.look()  # the optimizer's state may have been loaded
        self._begin()

    def _begin(self) -> None:
        """Take up the work of the methods in the state in which they are."""
        running = self._controller.running
        self.structure.step = self._step
        self._penalised = [one for one in running if one.method.penalty is not None]
        gated = [one for one in running if one.method.gating is not None]
        if len(gated) > 1:
            names = " and ".join(one.method.name for one in gated)
            raise MethodError(f"{names} both evaluate the loss in a way of their own; give one of them.")
        self._gated = next(iter(gated), None)
        if self._gated is not None and is_compiled(self.structure.runs):
            warn(
                f"{self._gated.method.name} puts gates in place of parameters while the loss is evaluated, which "
                "compiled code does not know: session.loss runs in eager mode. The result can be compiled afterwards."
            )
        self._listening = [one for one in running if "loss" in one.watch.needs]
        self._remembering = [one for one in running if one.memory is not None]
        followers: list[Follower] = [one.memory for one in running if one.memory is not None]
        followers += [one.watch for one in running if one.method.schedule.triggers]
        members = [Members(self.structure, one) for one in running]
        self._memories = Memories(self.structure, [*followers, self._slowing], members)
        self._acting = Acting(
            self.structure, self._controller, self._memories, self._slowing, self._context, self._record
        )
        self._look_ahead()

    def _check_provided(self, one: Running) -> None:
        method = one.method
        for trigger in method.schedule.triggers:
            trigger.check(self.structure.topology, one.axes, method.direction)
        needs = {need for trigger in method.schedule.triggers for need in trigger.needs}
        if not self._probe and (method.accept is not None or "probe" in needs):
            asking = "accept=" if method.accept is not None else "its schedule"
            raise MethodError(f"{method.name}: {asking} asks for the held-out loss; give the session probe=[batches].")
        undoing = method.accept is not None or isinstance(method.schedule.amount.budget, Latency)
        if undoing and not self.structure.may_undo:
            raise MethodError(
                f"{method.name}: accept= and Latency undo what they reject; attach with undo_limit above 0."
            )

    def _check_possible(self, one: Running) -> None:
        method = one.method
        if method.gating is not None and self.structure.peers.size > 1:
            raise MethodError(
                f"{method.name} evaluates the loss under gates that each process would draw and train on its own; "
                "train it in one process, or take a method without gates."
            )
        if self.structure.peers.whole:
            return
        looks = (method.penalty, method.memory)
        if any(part is not None for part in looks) or method.recovery.slows or method.level != "units":
            raise MethodError(
                f"{method.name} looks at parameters in every step, or changes more than units, which is not supported "
                "for a network that is sharded; take a method of units without penalty, memory and rates of new units, "
                "or train replicas under DistributedDataParallel."
            )

    def _clock_at(self, done: float) -> int:
        """The step of the schedules at which so much of the training is done."""
        step = math.floor(done * self._total_steps + 1e-9) if 0 <= done <= 1 else -1
        if step < self._step:
            raise MethodError(f"done: expected a part from {self._step / self._total_steps:g} to 1, found {done!r}.")
        return step

    def _clock(self) -> Clock:
        return Clock(self._step, self._epoch, self._boundary, self._total_steps)

    def _sizes(self) -> dict[str, int]:
        topology = self.structure.topology
        return {name: topology.sizes[record.number] for name, record in topology.by_name.items()}

    def _look_ahead(self) -> None:
        """Find the next step at which anything has to be done, so that all others cost nothing."""
        clock = self._clock()
        self._due = [
            None if one.over else one.method.schedule.next_step(clock, one.last, one.acted)
            for one in self._controller.running
        ]
        end = self._total_steps if self._due and self._step < self._total_steps else None
        moments = (*self._due, end, self._slowing.ends)
        self._wake = min((one for one in moments if one is not None), default=_NEVER)

    def _act(self) -> None:
        """The events that are due, in which all processes do the same, or stop."""
        peers = self.structure.peers
        try:
            self._batch = peers.joined(self._batch)
            with peers.looking():
                self._happen()
        except Exception as error:
            peers.settle("an event", error)
            raise
        peers.settle("an event", None)

    def _happen(self) -> None:
        self._slowing.refresh()
        if self._batch is None:
            self._warn_unheard()
        due = [
            one
            for one, at in zip(self._controller.running, self._due, strict=True)
            if at is not None and at <= self._step
        ]
        for one in sorted(due, key=_turn):
            self._acting.event(one, self._clock(), tuple(self._metrics))
        if self._step == self._total_steps:
            for one in self._controller.running:
                if one.last is None or (one.method.schedule.when is not None and one.acted is None):
                    warn(
                        f"{one.method.name} never acted: its schedule {one.method.schedule!r} had no event in "
                        f"{self._total_steps} steps and {self._epoch} epochs (epochs are counted by session.epoch_end)."
                    )
        self._look_ahead()

    def _warn_unheard(self) -> None:
        """Nobody called `loss`: say what remains without effect."""
        gated = () if self._gated is None else (self._gated,)
        names = {one.method.name: None for one in (*self._penalised, *self._listening, *gated)}
        if names:
            warn(
                f"{', '.join(names)}: the loss of training was never taken from session.loss(batch), so that penalties "
                "and gates have no effect and triggers hear no loss; call it in place of your own loss."
            )

    def _context(self, one: Running) -> Context:
        index = next(number for number, other in enumerate(self._controller.running) if other is one)
        return Context(
            self.structure,
            one.axes,
            self._step,
            self._epoch,
            self._step / self._total_steps,
            derived_seed(self._seed, index, one.method.name, self._step),
            partial(self._loss, self.structure.model) if self._gated is None else self._as_decided,
            self._batch,
            self._probe,
            self._total_steps,
            one.memory,
            tuple(self._metrics),
        )

    def _record(self, event: Event) -> None:
        self._events.append(event)
        if self._on_event is not None:
            self._on_event(event)


@contextmanager
def _in_eager_mode(context: AbstractContextManager[None]) -> Iterator[None]:
    with eagerly(), context:
        yield


def _turn(one: Running) -> int:
    return _TURNS.index((one.method.level, one.method.direction))


def _check_arguments(structure: Structure, methods: Sequence[Method], loss: Loss, total_steps: int) -> None:
    if not isinstance(structure, Structure):
        raise MethodError(f"structure: expected what espalier.attach returned, found a {type(structure).__name__}.")
    if structure.optimizer is None:
        raise MethodError("the structure knows no optimizer; attach with optimizer=..., so that its state follows.")
    if isinstance(methods, (Method, str)) or not isinstance(methods, Sequence):
        raise MethodError(f"methods: expected a list of methods, found {methods!r}; for one write [method].")
    for one in methods:
        if not isinstance(one, Method):
            hint = "what calling it returns" if callable(one) else "methods such as espalier.prune.Taylor()"
            raise MethodError(f"methods: expected methods, found {one!r}; give {hint}.")
    if not callable(loss):
        raise MethodError(f"loss: expected a function of a model and a batch, found {loss!r}.")
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise MethodError(f"total_steps: expected a whole number of at least 1, found {total_steps!r}.")


__all__ = ["Batch", "Loss", "Session"]
