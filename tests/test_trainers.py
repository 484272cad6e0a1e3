"""Espalier in Lightning, in the Trainer of transformers, with Accelerate, and what loggers get."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espalier as esp
from espalier import grow, prune
from espalier.adapters.records import logged
from espalier.errors import CheckpointError
from espalier.method import Method
from espalier.train.outline import continued, outline_of, put_in_order, read_outline, reshaped, write_outline

STEPS, MIDDLE = 12, 6
X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, :3].sum(1) > 0).long() + (X[:, 3:].sum(1) > 0).long()


def network() -> nn.Sequential:
    torch.manual_seed(3)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), *blocks, nn.Linear(8, 3))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def methods() -> list[Method]:
    """A layer comes, units come, units go, and weights are masked; some before the middle and some after it."""
    every = {"every": esp.steps(4), "start": 0.0, "until": 1.0}
    return [
        grow.Net2Deeper(budget=esp.Units(1.5, of="initial"), shape="constant", **every),
        grow.Random(width=1.5, **every),
        prune.L1(budget=esp.Units(0.9, of="initial"), strength=1e-3, **every),
        prune.WeightsMagnitude(budget=esp.Sparsity(0.3), **every),
    ]


def batches() -> list[tuple[Tensor, Tensor]]:
    """Two epochs of six."""
    return [(X[8 * at : 8 * at + 8], Y[8 * at : 8 * at + 8]) for at in range(MIDDLE)] * 2


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 0.01)


def trained(session: esp.Session, part: slice) -> None:
    for batch in batches()[part]:
        found = session.heard(batch, loss(session.model, batch))
        session.optimizer.zero_grad()
        found.backward()
        session.optimizer.step()
        session.step()


def fresh() -> esp.Session:
    model = network()
    structure = esp.attach(model, X[:2], optimizer=adam(model))
    return esp.Session(structure, methods(), loss=loss, total_steps=STEPS)


def same(left: nn.Module, right: nn.Module) -> bool:
    one, two = left.state_dict(), right.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_an_outline_and_what_trainers_save_go_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, half = fresh(), fresh()
    trained(whole, slice(None))
    trained(half, slice(MIDDLE))
    assert whole.structure.layers_moved
    assert half.structure.layers_moved, "parameters have other positions in an optimizer that is built now"
    assert {event.action for event in half.events} >= {"grow", "prune"}
    write_outline(half, tmp_path)
    values, state = half.model.state_dict(), half.optimizer.state_dict()

    model, outline = network(), read_outline(tmp_path)
    structure = reshaped(outline, model, X[:2])
    assert any(bool(one.isnan().any()) for one in model.parameters()), "what nobody loads is no number"
    model.load_state_dict(values)
    optimizer = adam(model)
    optimizer.load_state_dict(state)
    put_in_order(outline, model, optimizer)
    structure.train_with(optimizer)
    session = esp.Session(structure, methods(), loss=loss, total_steps=STEPS)
    continued(outline, session)
    trained(session, slice(MIDDLE, None))
    assert same(model, whole.model)
    assert [event.step for event in session.events] == [event.step for event in whole.events]


def test_an_outline_for_another_optimizer_is_refused() -> None:
    session = fresh()
    trained(session, slice(MIDDLE))
    model, outline = network(), outline_of(session)
    reshaped(outline, model, X[:2])
    with pytest.raises(CheckpointError, match="holds other parameters than the saved one"):
        put_in_order(outline, model, torch.optim.SGD(list(model.parameters())[1:], 0.1))


def test_methods_that_evaluate_the_loss_refuse_one_that_was_evaluated() -> None:
    model = network()
    structure = esp.attach(model, X[:2], optimizer=adam(model))
    session = esp.Session(structure, [prune.NPN()], loss=loss, total_steps=STEPS)
    with pytest.raises(esp.EspalierError, match=r"session\.loss\(batch\)"):
        session.heard(batches()[0], loss(model, batches()[0]))


class Recorder:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, Any]] = []

    def numbers(self, step: int, values: Any) -> None:
        self.seen.append(("numbers", step, dict(values)))

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        self.seen.append((name, step, values.tolist()))

    def text(self, step: int, name: str, text: str) -> None:
        self.seen.append(("text", step, text))


def session_with(logger: Any) -> esp.Session:
    model = network()
    structure = esp.attach(model, X[:2], optimizer=adam(model))
    found = esp.Session(structure, methods(), loss=loss, total_steps=STEPS, on_event=logged(structure, logger))
    trained(found, slice(None))
    return found


def test_a_logger_is_told_of_every_event_and_the_network_after_it() -> None:
    logger = Recorder()
    session = session_with(logger)
    texts = [value for what, _, value in logger.seen if what == "text"]
    numbers = [value for what, _, value in logger.seen if what == "numbers"]
    assert texts == [str(event) for event in session.events]
    assert numbers[-1]["espalier/parameters"] == session.structure.cost().parameters
    assert numbers[-1]["espalier/sparsity"] == pytest.approx(0.3, abs=0.05)
    widths = [value for what, _, value in logger.seen if what == "espalier/widths"]
    assert sorted(widths[-1]) == sorted(axis.size for axis in session.structure.axes.values() if axis.reason is None)
    assert any(what == "espalier/sparsities" for what, _, _ in logger.seen)


def test_tensorboard_gets_numbers_and_histograms(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from espalier.adapters.tensorboard import TensorBoard

    session = session_with(TensorBoard(tmp_path))
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert read.Scalars("espalier/parameters")[-1].value == session.structure.cost().parameters
    assert "espalier/widths" in read.Tags()["histograms"]
    assert len(read.Tensors("espalier/event/text_summary")) == len(session.events)


def test_mlflow_gets_numbers_and_histograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its default, a database, needs more packages
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("mlflow.tracking.fluent", exc_type=ImportError)  # old ones import halfway with a new protobuf
    from espalier.adapters.mlflow import MLflow

    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("here")
    with mlflow.start_run() as run:
        session = session_with(MLflow())
    found = mlflow.get_run(run.info.run_id)
    assert found.data.metrics["espalier/parameters"] == session.structure.cost().parameters
    assert mlflow.artifacts.load_text(f"{found.info.artifact_uri}/espalier/event.txt").count("\n") >= 1


def test_wandb_gets_numbers_and_histograms_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    from espalier.adapters.wandb import WandB

    run = wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    session = session_with(WandB(run))
    summary = dict(run.summary)
    run.finish()
    assert summary["espalier/parameters"] == session.structure.cost().parameters
    assert "espalier/widths" in summary
    assert [*tmp_path.rglob("*.wandb")]


# --- Lightning ---


def lightning_run(folder: Path, checkpoint: Path | None = None) -> tuple[Any, Any]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from espalier.adapters.lightning import EspalierCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Parameter(
                torch.ones(2)
            )  # a parameter that is no part of what changes, before those that are
            self.net = network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            found = loss(self.net, batch) + self.other.square().sum()
            self.log("loss", found)
            return found

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self)

    callback = EspalierCallback(methods(), example=X[:2], loss=loss, part="net")
    saver = ModelCheckpoint(dirpath=folder, every_n_epochs=1, save_top_k=-1, filename="{step}")
    trainer = Trainer(
        max_epochs=2, callbacks=[callback, saver], logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
    module = Module()
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return module, callback


@pytest.mark.filterwarnings("ignore")  # Lightning's own, about pytrees, workers and loggers
def test_lightning_grows_prunes_and_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from espalier.adapters.lightning import load_checkpoint

    module, callback = lightning_run(tmp_path / "whole")
    again, later = lightning_run(tmp_path / "again", tmp_path / "whole" / f"step={MIDDLE}.ckpt")
    assert callback.session.structure.layers_moved
    assert {event.action for event in callback.session.events} >= {"grow", "prune"}
    assert same(module, again)
    assert [str(one) for one in later.session.events] == [str(one) for one in callback.session.events]

    by_hand = fresh()
    trained(by_hand, slice(None))
    assert same(by_hand.model, module.net), "Lightning's loop is the plain one"

    empty = type(module)()
    load_checkpoint(str(tmp_path / "whole" / f"step={STEPS}.ckpt"), empty, X[:2], part="net")
    assert same(empty, module)


# --- The Trainer of transformers ---


def hugging_face_run(folder: Path, make: Callable[[], Any], checkpoint: Path | None = None) -> tuple[Any, Any]:
    from transformers import Trainer, TrainingArguments

    from espalier.adapters.huggingface import EspalierCallback

    tokens = torch.randint(3, 40, (48, 8), generator=torch.Generator().manual_seed(0))
    model = make()
    every = {"every": esp.steps(4), "start": 0.0, "until": 1.0}
    callback = EspalierCallback(
        [
            grow.CopyBlocks(budget=esp.Units(1.5, of="initial"), shape="constant", **every),
            prune.Taylor(budget=esp.Units(0.8, of="initial"), axes=["*gate_proj"], uniform=True, **every),
        ],
        example={"input_ids": tokens[:2]},
        resume=checkpoint,
    )
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, save_steps=MIDDLE, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=1, logging_strategy="no", gradient_accumulation_steps=2,
    )  # fmt: skip
    data = [{"input_ids": one, "labels": one} for one in tokens]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    return model, callback


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=32, num_key_value_heads=2, **sizes))


@pytest.mark.filterwarnings("ignore")  # of packages that the Trainer imports
def test_the_trainer_grows_prunes_and_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    model, callback = hugging_face_run(tmp_path / "whole", llama)
    again, later = hugging_face_run(tmp_path / "again", llama, tmp_path / "whole" / f"checkpoint-{MIDDLE}")
    events = callback.session.events
    assert {event.action for event in events} >= {"grow", "prune"}
    assert callback.session.structure.layers_moved
    assert all(event.loss_before is not None for event in events), "batches were seen"
    assert same(model, again)
    assert [str(one) for one in later.session.events] == [str(one) for one in events]
    read = type(model).from_pretrained(tmp_path / "whole" / f"checkpoint-{STEPS}")
    assert same(read, model)


# --- Accelerate ---


def test_accelerate_saves_and_loads_what_grew(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from espalier.adapters.accelerate import Growing

    def prepared() -> tuple[Any, Growing, Iterator[Any]]:
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        model, optimizer = accelerator.prepare(model, adam(model))
        growing = Growing(accelerator, model, optimizer, methods(), example=X[:2], loss=loss, total_steps=STEPS)
        return accelerator, growing, (model, optimizer)

    def run(accelerator: Any, growing: Growing, model: Any, optimizer: Any, part: slice) -> None:
        for batch in batches()[part]:
            found = growing.session.loss(batch)
            optimizer.zero_grad()
            accelerator.backward(found)
            optimizer.step()
            growing.session.step()

    accelerator, growing, (model, optimizer) = prepared()
    run(accelerator, growing, model, optimizer, slice(MIDDLE))
    accelerator.save_state(str(tmp_path / "state"))
    run(accelerator, growing, model, optimizer, slice(MIDDLE, None))
    assert growing.session.structure.layers_moved

    accelerator, again, (other, optimizer) = prepared()
    accelerator.load_state(str(tmp_path / "state"))
    run(accelerator, again, other, optimizer, slice(MIDDLE, None))
    assert same(model, other)
    assert json.loads((tmp_path / "state" / "espalier" / "session.json").read_text())["step"] == MIDDLE
