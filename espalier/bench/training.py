"""One network being trained on a task, step by step, in a state that can be kept after any step and taken up again.

Training FLOPs are those of every forward pass in which the loss is evaluated, at the size that the network has then,
three times where gradients are recorded: the backward pass costs twice the forward one (Kaplan et al. 2020, section
2.1). Events are counted in this way too, since they evaluate the same loss. Validation is not training, and is not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from espalier.attaching import attach
from espalier.bench.data import Dataset, batches
from espalier.bench.gate_records import can_be_drawn, gates_record, is_shown, map_record, points_record
from espalier.bench.tasks import Task
from espalier.edit.masks import NO_MASKS, Masks
from espalier.errors import CheckpointError, RunError
from espalier.graph.topology import Topology
from espalier.method import Method
from espalier.parts.depth.places import Blocks
from espalier.train.checkpoint import load, save
from espalier.train.events import Event
from espalier.train.session import Session

Batch = tuple[Tensor, Tensor]
Record = dict[str, Any]
Checkpoint = tuple[Mapping[str, Any], Path]

Spent = Literal["training_flops", "seconds"]
FORWARD_AND_BACKWARD = 3
EVALUATION_BATCH = 1000
PROBE_BATCHES = 4
_NETWORK, _RANDOM = "network", "random.safetensors"


@dataclass(frozen=True)
class Spending:
    """What a training may cost, where its end is not a number of steps; it ends with the step that reaches it."""

    of: Spent
    amount: float


@dataclass(frozen=True)
class Assignment:
    """What to train and for how long: everything but the network."""

    task: Task
    data: Dataset
    """On the device that trains."""
    methods: Sequence[Method]
    total_steps: int
    """With `spending` only how finely the schedules of methods count."""
    seed: int
    spending: Spending | None = None
    """Learning rates and methods then follow the part of it that is spent."""
    bfloat16: bool = False
    """Whether forward passes are in bfloat16 where torch's autocast says so; weights and losses are not."""
    clock: Callable[[], float] = time.monotonic
    """Seconds; `time.process_time` where other work on the machine is not to count."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the training set."""
        return math.ceil(len(self.data.x_train) / self.task.batch_size)


class Objective:
    """Cross-entropy with label smoothing; remembers the logits, which the accuracy is read from."""

    def __init__(self, label_smoothing: float, bfloat16: bool = False) -> None:
        self._label_smoothing, self._bfloat16 = label_smoothing, bfloat16
        self.logits = torch.empty(0, 0)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch: a scalar."""
        inputs, labels = batch
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self._bfloat16):
            logits = model(inputs)
        self.logits = logits.detach()
        return F.cross_entropy(logits.float(), labels, label_smoothing=self._label_smoothing)

    def hits(self, labels: Tensor) -> Tensor:
        """How many samples of the last batch were classified correctly; a sample of several places counts by part."""
        return (self.logits.argmax(dim=1) == labels).view(len(labels), -1).float().mean(dim=1).sum()


class Training:
    """A network, its optimizer, and all else that decides its next step."""

    def __init__(
        self,
        assignment: Assignment,
        model: nn.Module,
        checkpoint: Checkpoint | None = None,
        masks: Masks = NO_MASKS,
        follows: Training | None = None,
    ) -> None:
        """Train `model`, freshly built, under masks if there are any; or go on from what `state` and `write` kept.

        With `follows` it goes on where that training stopped, with the optimizer's state of all parameters that are
        still the same: for networks that others have changed.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another network.
        """
        self.assignment = assignment
        device = assignment.data.x_train.device
        example = assignment.data.example
        self._example_size = len(example)
        optimizer = assignment.task.make_optimizer(model)
        self._optimizer = optimizer
        if follows is not None:
            there = set(model.parameters())
            optimizer.state.update({one: state for one, state in follows._optimizer.state.items() if one in there})
        self._order = torch.Generator().manual_seed(assignment.seed)
        self._epoch_order = self._order.get_state()
        self._tally = torch.zeros(3, device=device)  # sum of losses, correct, samples: of the epoch so far
        self.step = self.epoch = self._batch = self.training_flops = self._stage = 0
        self._seconds, self._since = 0.0, assignment.clock()
        self.looked = 0.0
        """Seconds of `seconds` that went into looks at held-out data, in this sitting."""
        self.loss = torch.full((), math.nan, device=device)
        """Of the last step, penalties included: a scalar."""
        if follows is not None:
            self.step, self.epoch, self._batch = follows.step, follows.epoch, follows._batch
            self.training_flops, self._seconds, self.looked = follows.training_flops, follows.seconds, follows.looked
            self._epoch_order, self._tally = follows._epoch_order, follows._tally
        self._scheduler = assignment.task.make_scheduler(optimizer, lambda _: self.done)
        self._on_event: Callable[[Record], None] = _ignore
        if checkpoint is None:
            self.structure = attach(model, example, optimizer=optimizer)
            if masks:
                self.structure.mask(masks)
        else:
            self.structure = load(checkpoint[1] / _NETWORK, model, example, optimizer=optimizer)
        self._measured: Topology | None = None
        self._staged: Topology | None = None
        self._depth: dict[str, int] = {}
        self._cost: dict[str, int] = {}
        self._objective = Objective(assignment.task.label_smoothing, assignment.bfloat16)
        probe = batches(assignment.data.x_val, assignment.data.y_val, assignment.task.batch_size)
        if not any(method.gating is not None for method in assignment.methods):
            probe = islice(probe, PROBE_BATCHES)  # gates are judged by all that is held out, and only once per epoch
        self._session = Session(
            self.structure,
            assignment.methods,
            loss=self._counted_loss,
            probe=list(probe),
            total_steps=assignment.total_steps,
            seed=assignment.seed,
            on_event=self._report_event,
        )
        if checkpoint is not None:
            self._restore(*checkpoint)

    @property
    def model(self) -> nn.Module:
        """The live network."""
        return self.structure.model

    @property
    def seconds(self) -> float:
        """Time spent on training and validation, earlier sittings included."""
        return self._seconds + self.assignment.clock() - self._since

    @property
    def done(self) -> float:
        """The part of the training that is done, 0 to 1."""
        spending = self.assignment.spending
        if spending is None:
            return min(self.step / self.assignment.total_steps, 1.0)
        spent = self.training_flops if spending.of == "training_flops" else self.seconds - self.looked
        return min(spent / spending.amount, 1.0)

    def cost(self) -> dict[str, int]:
        """Parameters, and FLOPs of the forward pass of one sample, as the network is now."""
        if self._measured is not self.structure.topology:
            cost = self.structure.cost()
            self._measured = self.structure.topology
            self._cost = {"parameters": cost.parameters, "flops": cost.flops // self._example_size}
        return self._cost

    def axes(self) -> dict[str, int]:
        """The size of every axis that may change."""
        topology = self.structure.topology
        return {record.name: topology.sizes[number] for number, record in topology.axes.items() if not record.reasons}

    def weights(self) -> dict[str, list[int]]:
        """Live and all weights of every parameter that has a mask."""
        return {name: [int(mask.sum()), mask.numel()] for name, mask in self.structure.masks.items()}

    def depth(self) -> dict[str, int]:
        """The number of layers or cells in each stage of the network; empty if no method changes it."""
        if not any(method.level == "layers" for method in self.assignment.methods):
            return {}
        if self._staged is not self.structure.topology:
            self._staged = self.structure.topology
            self._depth = Blocks(self.structure, None).stages
        return self._depth

    def beginning(self) -> Record:
        """Gates before the first step, and points that are trained on where maps are made; nothing without gates."""
        found = self._gates()
        return {**found, "points": points_record(self.assignment.data)} if "map" in found else found

    def run(
        self, after_step: Callable[[], None], on_epoch: Callable[[Record], None], on_event: Callable[[Record], None]
    ) -> None:
        """Train to the last step. `after_step` may keep the state, or end the training by raising.

        Raises:
            RunError: the loss is no longer finite.
        """
        self._on_event = on_event
        task, data = self.assignment.task, self.assignment.data
        while self.done < 1 or self._batch > 0:
            self._order.set_state(self._epoch_order)
            # batches that were trained on before an interruption are drawn again, and passed over
            drawn = batches(data.x_train, data.y_train, task.batch_size, self._order, task.augment)
            for batch in islice(drawn, self._batch, None):
                if self.done >= 1:
                    break
                self._train_step(batch)
                after_step()
            on_epoch(self._end_epoch())

    def charge(self, samples: int, passes: int) -> None:
        """Count passes that others made through the network as it is, backward ones twice."""
        self.training_flops += passes * self.cost()["flops"] * samples

    def evaluate(self, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
        """Loss and accuracy in eval mode, with gates, if there are any, as they are decided now."""
        began = self.assignment.clock()
        self.model.eval()
        loss = correct = 0.0
        with torch.no_grad(), self._session.decided():
            for batch in batches(inputs, labels, EVALUATION_BATCH):
                loss += float(self._objective(self.model, batch)) * len(batch[1])
                correct += float(self._objective.hits(batch[1]))
        self.model.train()
        self.looked += self.assignment.clock() - began
        return loss / len(labels), correct / len(labels)

    def state(self) -> dict[str, Any]:
        """What JSON can hold of the state between two steps; the rest is what `write` writes."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self._batch,
            "tally": self._tally.tolist(),
            "training_flops": self.training_flops,
            "seconds": self.seconds,
            "scheduler": self._scheduler.state_dict(),
            "session": self._session.state_dict(),
            "stage": self._stage,
        }

    def write(self, folder: Path) -> None:
        """Write network, optimizer and random state into a folder."""
        save(self.structure, folder / _NETWORK)
        random = {"order": self._epoch_order, "torch": torch.get_rng_state()}
        if self._tally.is_cuda:
            random["cuda"] = torch.cuda.get_rng_state(self._tally.device)
        save_file(random, folder / _RANDOM)

    def _restore(self, state: Mapping[str, Any], folder: Path) -> None:
        try:
            random = load_file(folder / _RANDOM)
            self.step, self.epoch, self._batch = int(state["step"]), int(state["epoch"]), int(state["batch"])
            self._tally.copy_(torch.tensor(state["tally"]))
            self._stage = int(state["stage"])
            self.training_flops, self._seconds = int(state["training_flops"]), float(state["seconds"])
            self._scheduler.load_state_dict(state["scheduler"])
            self._session.load_state_dict(state["session"])
            self._epoch_order = random["order"]
            torch.set_rng_state(random["torch"])
            if self._tally.is_cuda:
                torch.cuda.set_rng_state(random["cuda"], self._tally.device)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint in {folder} is damaged ({type(error).__name__}: {error}); start a new run"
            ) from error

    def _counted_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.charge(len(batch[1]), FORWARD_AND_BACKWARD if torch.is_grad_enabled() else 1)
        return self._objective(model, batch)

    def _train_step(self, batch: Batch) -> None:
        loss = self._session.loss(batch)
        labels, self.loss = batch[1], loss.detach()
        hits = self._objective.hits(labels)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        self.step += 1
        self._scheduler.step()
        self._tally += torch.stack([self.loss * len(labels), hits, torch.full_like(hits, len(labels))])
        self._batch += 1
        self._session.step(None if self.assignment.spending is None else self.done)

    def _end_epoch(self) -> Record:
        loss, correct, samples = self._tally.tolist()
        self.epoch += 1
        if not math.isfinite(loss):
            raise RunError(
                f"the training loss is no longer a finite number in epoch {self.epoch}: try a smaller learning rate "
                f"than {self.assignment.task.learning_rate:g}"
            )
        val_loss, val_accuracy = self.evaluate(self.assignment.data.x_val, self.assignment.data.y_val)
        self._session.epoch_end(val_accuracy, mode="max")
        self._tally.zero_()
        self._batch = 0
        self._epoch_order = self._order.get_state()
        return {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": loss / samples,
            "train_accuracy": correct / samples,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            **self.cost(),
            "axes": self.axes(),
            "weights": self.weights(),
            "depth": self.depth(),
            "training_flops": self.training_flops,
            "seconds": round(self.seconds, 3),
            **self._gates(),
        }

    def _gates(self) -> Record:
        """What is recorded where a method has gates."""
        state, data = self._session.gates(), self.assignment.data
        if state is None:
            return {}
        before, self._stage = self._stage, state.stage
        epochs = math.ceil(self.assignment.total_steps / self.assignment.steps_per_epoch)
        record = {"gates": gates_record(state)}
        if can_be_drawn(data) and is_shown(self.epoch, epochs, (before, state.stage)):
            self.model.eval()
            with self._session.decided():
                record["map"] = map_record(self.model, data)
            self.model.train()
        return record

    def _report_event(self, event: Event) -> None:
        before, after = event.cost_before, event.cost_after
        self._on_event(
            {
                "step": self.step,
                "epoch": self.epoch + 1,
                "method": event.method,
                "action": event.action,
                "axes": {name: list(sizes) for name, sizes in event.sizes.items()},
                "masks": {name: list(live) for name, live in event.masks.items()},
                "layers": list(event.layers),
                **({"widths": self.axes()} if event.layers else {}),
                "weights": self.weights(),
                "depth": self.depth(),
                "parameters": [before.parameters, after.parameters],
                "flops": [before.flops // self._example_size, after.flops // self._example_size],
                "loss": [event.loss_before, event.loss_after],
                "contract": event.contract,
                "why": event.why,
                "training_flops": self.training_flops,
                "seconds": round(self.seconds, 3),
            }
        )


def _ignore(record: Record) -> None:
    """Where nobody listens."""
