"""Gates on single weights, on columns, and on layers: masked is removed, estimates, edits of others, states."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import BLOCKS
from loops import loss_of
from test_gates import in_double, outputs
from test_npn import Plain, batch_of, memory_of, network
from torch import Tensor, nn

import espalier as esp
from espalier.bench.models import LeNet5
from espalier.edit.plan import Plan, mask_plan
from espalier.errors import MethodError
from espalier.graph.regions import Boundaries
from espalier.method import Method
from espalier.parts.depth.places import Removable
from espalier.parts.gates.branches import branch_place
from espalier.parts.gates.columns import Columns
from espalier.parts.gates.expected import ExpectedCost, PerUnit
from espalier.parts.gates.expected_levels import ExpectedLayers, ExpectedWeights
from espalier.parts.gates.hard_concrete import HardConcrete
from espalier.parts.gates.layer_memory import GatedLayers
from espalier.parts.gates.paper import lenet5
from espalier.parts.gates.places import GatePlace, Gates
from espalier.parts.gates.rows import parted
from espalier.parts.gates.stages import Stages

SEARCH = Stages(k=1.0, start=0.0, until=0.2)
ALWAYS = Stages(k=1.0, start=0.0, until=1.0)
EVERY = esp.steps(1)


def enumerated(run: Plain, key: str, penalty: float) -> Tensor:
    """The gradient of the expected loss with penalty * sum p by the logits of a key, all others at 1."""
    memory, context = run.memory, run.session._context(run.session._gated)
    phi = memory.table.logits[key].clone().requires_grad_()
    p = memory.table.settings.kind.probability(phi, 1.0)
    total = penalty * p.sum()
    with torch.no_grad():
        for number in range(2 ** len(phi)):
            z = torch.tensor([number >> bit & 1 for bit in range(len(phi))]).double()
            with memory.gates(context).applied({key: z}):
                value = float(run.loss(run.model, run.batch))
            with torch.enable_grad():
                total = total + value * torch.where(z > 0, p, 1 - p).prod()
    (exact,) = torch.autograd.grad(total, phi)
    return exact


def estimates(run: Plain, key: str, count: int = 2000) -> Tensor:
    """The gradient of the logits that so many steps would take, one row each, without any being taken."""
    found = []
    for _ in range(count):
        run.session.loss(run.batch)
        found.append(parted(run.memory.table._slope, run.memory.table.logits)[key])
        run.session._step += 1  # other random numbers
    return torch.stack(found)


def check_estimates(run: Plain, key: str, penalty: float) -> None:
    run.session.loss(run.batch)
    exact, rows = enumerated(run, key, penalty), estimates(run, key)
    error = rows.std(0) / len(rows) ** 0.5
    assert ((rows.mean(0) - exact).abs() < 5 * error + 1e-12).all()
    assert (exact.abs() > error).any()


# --- Weights ---------------------------------------------------------------------------------------------------------


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))


def test_the_gradient_by_logits_of_weights_is_that_of_enumeration():
    total = sum(one.numel() for one in tiny().parameters())
    method = esp.prune.NPNWeights(ALWAYS, ExpectedWeights(0.1 * total), begin=0.6, axes=["0.weight"])
    check_estimates(Plain(method, total=10**6, model=tiny()), "0.weight", 0.1)


def test_shut_weights_are_masked_and_nothing_changes_in_either_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    run = Plain(esp.prune.NPNWeights(SEARCH, None, every=EVERY, rate=1e-9), total=40, model=model).train(7)
    shut = torch.rand(6, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    run.memory.table.logits["0.weight"][shut.flatten()] = -4.0
    run.session._batch = run.batch
    before = {}
    for train in (False, True):
        run.model.train(train)
        with torch.no_grad(), run.session.decided():
            before[train] = copy.deepcopy(run.model)(run.batch[0])
    run.session.step()
    assert torch.equal(~run.structure.masks["0.weight"], shut)
    assert "3.weight" not in run.structure.masks
    assert [event.action for event in run.session.events] == ["prune"]
    for train in (False, True):
        run.model.train(train)
        with torch.no_grad():
            torch.testing.assert_close(copy.deepcopy(run.model)(run.batch[0]), before[train], rtol=1e-6, atol=1e-6)
    run.train(10)
    assert not run.model[0].weight[shut].any()
    assert bool((run.memory.table.logits["0.weight"][shut.flatten()] == -1e6).all())


def test_all_but_one_weight_of_a_parameter_may_go_and_the_one_stays_judged_as_open():
    run = Plain(esp.prune.NPNWeights(SEARCH, None, every=EVERY, rate=1e-9), total=40).train(7)
    run.memory.table.logits["2.weight"][:] = -4.0
    run.memory.table.logits["2.weight"][7] = -3.0
    run.train(2)
    assert run.structure.masks["2.weight"].flatten().nonzero().flatten().tolist() == [7]
    run.model.eval()
    with torch.no_grad():
        plain = run.model(run.batch[0])
        with run.session.decided():
            assert torch.equal(run.model(run.batch[0]), plain)


@pytest.mark.parametrize("name", ["2.weight", "0.weight"])
def test_gates_of_weights_follow_edits_as_masks_do_and_undo(name):
    run = Plain(esp.prune.NPNWeights(ALWAYS, None, rate=1e-9), total=400).train(1)
    table = run.memory.table
    shape = run.model.get_parameter(name).shape
    noted = torch.arange(shape.numel()).double() + 1
    table.logits[name] = noted.clone()
    state = json.dumps(run.session.state_dict())
    run.structure.prune("0", [1, 4])
    run.structure.prune("2", [0])
    run.structure.grow("2", by=2)
    context = run.session._context(run.session._gated)
    run.session.state_dict()
    run.memory.gates(context)
    expected = noted.view(shape)
    if name == "2.weight":
        expected = expected[1:, [0, 2, 3, 5]]
        found = table.logits[name].view(6, 4)
        assert torch.equal(found[:4], expected)
        assert bool((found[4:] < 4).all())  # new, at the beginning
        assert bool((found[4:] > 2).all())
    else:
        assert torch.equal(table.logits[name].view(4, 4), expected[[0, 2, 3, 5]])
    for _ in range(3):
        run.structure.undo()
    run.session.state_dict()
    assert json.dumps(run.session.state_dict()) == state
    run.train(3)


def test_masks_of_others_shut_gates_and_lifted_ones_open_them():
    run = Plain(esp.prune.NPNWeights(ALWAYS, ExpectedWeights(1.0), rate=1e-9), total=400).train(1)
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[2] = mask[:, 3] = False
    run.structure.apply(mask_plan({"2.weight": mask}))
    run.train(1)
    p = run.memory.table.probabilities(0.1)["2.weight"].view(5, 6)
    assert not p[~mask].any()
    assert bool((p[mask] > 0.9).all())
    run.structure.apply(mask_plan({"2.weight": None}))
    run.train(1)
    assert bool((run.memory.table.probabilities(0.1)["2.weight"] > 0.9).all())
    assert run.session.events == ()


def test_the_penalty_on_weights_is_their_expected_number():
    structure = esp.attach(network(), batch_of()[0])
    p = {"0.weight": torch.rand(24).double(), "2.weight": torch.rand(30).double()}
    penalty = ExpectedWeights(3.0)
    reference = penalty.reference(structure.topology)
    assert reference == sum(one.numel() for one in structure.model.parameters())
    found = penalty.priced(structure.topology, list(p), reference)(p)
    assert float(found) == pytest.approx(3.0 * float(p["0.weight"].sum() + p["2.weight"].sum()) / reference)
    with pytest.raises(MethodError, match="single weights"):
        penalty.priced(structure.topology, ["2"], reference)
    with pytest.raises(MethodError, match="PerUnit"):
        ExpectedCost(1.0).priced(structure.topology, ["2.weight"], reference)


@pytest.mark.parametrize("kind", [None, HardConcrete()], ids=repr)
def test_a_penalty_on_weights_prunes_and_training_goes_on(kind):
    options: dict[str, Any] = {} if kind is None else {"kind": kind}
    method = esp.prune.NPNWeights(
        Stages(k=2.0, start=0.0, until=0.8), ExpectedWeights(10.0), rate=0.05, every=esp.steps(10), **options
    )
    run = Plain(method, total=200).train(200)
    live = sum(int(one.sum()) for one in run.structure.masks.values())
    assert 0 < live < 60
    assert all(bool(one.isfinite().all()) for one in run.model.parameters())
    run.model.eval()
    with torch.no_grad():
        plain = run.model(run.batch[0])
        with run.session.decided():
            torch.testing.assert_close(run.model(run.batch[0]), plain)


def test_numbers_that_are_left_join_the_weights_and_zeros_become_masks():
    method = esp.prune.NPNWeights(SEARCH, None, kind=HardConcrete(), every=EVERY, rate=1e-9, axes=["2.weight"])
    run = Plain(method, total=40).train(7)
    logits = torch.linspace(-4, 4, 30).double()
    run.memory.table.logits["2.weight"] = logits.clone()
    weight, z = run.model[2].weight.detach().clone(), HardConcrete().judged(logits, 1.0).view(5, 6).float()
    run.session._batch = run.batch
    run.session.step()
    torch.testing.assert_close(run.model[2].weight.detach(), weight * z)
    assert torch.equal(run.structure.masks["2.weight"], z > 0)
    assert run.memory.folding.done
    assert run.memory.table.logits == {}
    run.train(5)
    assert torch.equal(run.model[2].weight == 0, z == 0)


# --- Columns ---------------------------------------------------------------------------------------------------------


def test_columns_and_units_have_gates_together():
    method = esp.prune.NPN(
        SEARCH, PerUnit({"4.weight[1]": 0.2, "2": 0.1}), axes=["2"], columns=["4.weight[1]"], begin=0.6
    )
    run = Plain(method, total=10**6)
    run.session.loss(run.batch)
    assert {key: len(one) for key, one in run.memory.logits.items()} == {"2": 5, "4.weight[1]": 5}
    for key in ("2", "4.weight[1]"):  # every other gate is open in enumeration, so in sampling too
        other = "2" if key != "2" else "4.weight[1]"
        run.memory.table.logits[other][:] = 1e3
        run.memory.table.logits[key] = torch.linspace(-0.5, 0.8, 5).double()
        check_estimates(run, key, 0.2 if key != "2" else 0.1)


def test_shut_columns_are_masked_and_follow_edits():
    run = Plain(esp.prune.NPN(SEARCH, None, axes=["0"], columns=["4.weight[1]"], every=EVERY, rate=1e-9), total=40)
    run.train(5)
    run.memory.logits["4.weight[1]"][:] = torch.tensor([5.0, -5.0, 5.0, 5.0, -4.0]).double()
    run.memory.logits["0"][2] = -5.0
    run.structure.prune("2", [0])
    run.train(2)
    run.session._batch = run.batch
    run.model.eval()
    with torch.no_grad(), run.session.decided():
        before = run.model(run.batch[0])
    run.session.step()
    assert run.sizes() == [5, 4]
    mask = run.structure.masks["4.weight"]
    assert mask.all(0).tolist() == [False, True, True, False]
    assert mask.any(0).tolist() == [False, True, True, False]
    with torch.no_grad():
        torch.testing.assert_close(run.model(run.batch[0]), before)
    run.structure.prune("2", [0])
    run.train(3)
    assert [one > -1e5 for one in run.memory.logits["4.weight[1]"].tolist()] == [True, True, False]


def test_wrong_columns_say_so():
    with pytest.raises(MethodError, match=r"fc1.weight\[1\]"):
        esp.prune.NPN(columns=["2.weight"])
    run = Plain(esp.prune.NPN(columns=["2.weight[2]"]))
    with pytest.raises(esp.errors.EspalierError, match="dimension"):
        run.session.loss(run.batch)
    assert Columns.named("2.weight[2]") == Columns("2.weight", 2)


# --- Layers ----------------------------------------------------------------------------------------------------------


def in_double_blocks(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    model, example = BLOCKS[name].make() if name in BLOCKS else in_double(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if name in BLOCKS:
        model, example = model.double(), tuple(one.double() for one in example)
    return model, example


@pytest.mark.parametrize("name", [*BLOCKS, "hf_llama", "hf_gpt2", "mobilenet"])
def test_a_silenced_layer_is_a_removed_one_in_both_modes(name):
    model, example = in_double_blocks(name)
    structure = esp.attach(model, example)
    catalogue, boundaries, compared = Removable(0, "entry")(structure, None), Boundaries(structure.topology), 0
    for key, candidate in catalogue.candidates.items():
        place = branch_place(boundaries, key, candidate)
        if not isinstance(place, GatePlace):
            continue
        small = copy.deepcopy(model)
        esp.attach(small, example).apply(Plan((), depth=candidate.edits))
        for train in (False, True):
            one, other = copy.deepcopy(model).train(train), small.train(train)
            with torch.no_grad():
                with Gates(esp.attach(one, example), [place]).applied({key: torch.zeros(1).double()}):
                    found = outputs(one, example)
                expected = outputs(other, example)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")
        compared += 1
    assert compared == len(catalogue.candidates) > 0


class Deep(Plain):
    """The user's loop on residual blocks."""

    def __init__(self, method: Method | None, total: int = 40, name: str = "blocks") -> None:
        torch.manual_seed(1)
        self.model, self.example = BLOCKS[name].make()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.batch, self.calls = self.example, 0
        self.structure = esp.attach(self.model, self.example, optimizer=self.optimizer)
        self.session = None
        if method is not None:
            self.session = esp.Session(self.structure, [method], loss=self.loss, total_steps=total, seed=5)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return loss_of(model, batch)

    def names(self) -> list[str]:
        return [one.name for one in self.structure.sites() if one.kind == "cell"]


def test_the_gradient_by_logits_of_layers_is_that_of_enumeration():
    method = esp.prune.NPNLayers(ALWAYS, None, begin=0.6)
    run = Deep(method, total=10**6)
    run.session.loss(run.batch)
    memory, context = run.memory, run.session._context(run.session._gated)
    assert list(memory.table.logits) == ["layers.0", "layers.1", "layers.2"]
    row = torch.cat(list(memory.table.logits.values())).requires_grad_()
    p, total = memory.table.settings.kind.probability(row, 1.0), torch.zeros(()).double()
    for number in range(8):
        z = torch.tensor([number >> bit & 1 for bit in range(3)]).double()
        gates = dict(zip(memory.table.logits, z.split(1), strict=True))
        with torch.no_grad(), memory.gates(context).applied(gates):
            value = float(run.loss(run.model, run.batch))
        total = total + value * torch.where(z > 0, p, 1 - p).prod()
    (exact,) = torch.autograd.grad(total, row)
    rows = torch.cat([estimates(run, key) for key in memory.table.logits], 1)
    error = rows.std(0) / len(rows) ** 0.5
    assert ((rows.mean(0) - exact).abs() < 5 * error).all()
    assert (exact.abs() > error).any()


def test_layers_whose_gates_stay_shut_are_removed_and_the_others_go_on():
    run = Deep(esp.prune.NPNLayers(SEARCH, None, every=EVERY, rate=1e-9)).train(7)
    run.memory.table.logits["layers.1"][:] = -4.0
    kept = float(run.memory.table.logits["layers.2"])
    run.session._batch = run.batch
    run.model.eval()
    with torch.no_grad(), run.session.decided():
        before = run.model(*run.batch)
    run.session.step()
    assert run.names() == ["layers.0", "layers.1"]
    assert run.session.events[-1].layers
    with torch.no_grad():
        torch.testing.assert_close(run.model(*run.batch), before)
    run.train(4)
    assert float(run.memory.table.logits["layers.1"]) == pytest.approx(kept, abs=1e-6)  # it has moved up
    assert list(run.memory.table.logits) == ["layers.0", "layers.1"]


def test_all_layers_may_go_and_what_has_to_stay_joins_the_weights_as_it_is_judged():
    for kept, left in ((0, 0), (2, 2)):
        run = Deep(esp.prune.NPNLayers(SEARCH, None, every=EVERY, rate=1e-9, kept=kept)).train(7)
        for one in run.memory.table.logits.values():
            one[:] = -4.0
        run.session._batch = run.batch
        run.model.eval()
        with torch.no_grad(), run.session.decided():
            before = run.model(*run.batch)
        run.session.step()
        assert len(run.model.layers) == left
        with torch.no_grad():
            torch.testing.assert_close(run.model(*run.batch), before)
        run.train(3)
        assert run.memory.folding.done == (left > 0)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_penalty_on_layers_removes_some_and_training_goes_on(name):
    method = esp.prune.NPNLayers(
        Stages(k=1.0, start=0.0, until=0.7), ExpectedLayers(20.0, "flops"), rate=0.2, begin=0.6, low=0.3, patience=1
    )  # fmt: skip
    run = Deep(method, name=name)
    before = run.structure.cost().parameters
    run.train(40)
    assert run.structure.cost().parameters < before
    assert all(bool(one.isfinite().all()) for one in run.model.parameters())


def test_the_penalty_on_layers_is_their_expected_cost():
    model, example = BLOCKS["resnet"].make()
    structure = esp.attach(model, example)
    sites = {one.name: one for one in structure.sites() if one.removal == "entry" and one.kind == "cell"}
    p = {name: torch.rand(1).double() for name in sites}
    for of in ("parameters", "flops"):
        penalty = ExpectedLayers(2.0, of)
        reference = penalty.reference(structure.topology)
        assert reference == getattr(structure.cost(), of)
        total = sum(float(p[name]) * getattr(one, of) for name, one in sites.items())
        found = penalty.priced(structure.topology, list(p), reference)(p)
        assert float(found) == pytest.approx(2.0 * total / reference)
        assert total > 0
    with pytest.raises(MethodError, match="parameters"):
        ExpectedLayers(1.0, "latency")


def test_layers_without_a_branch_have_no_gate_and_say_why():
    run = Plain(None)
    session = esp.Session(run.structure, [esp.prune.NPNLayers(axes=["1"])], loss=run.loss, total_steps=5)
    with pytest.raises(MethodError, match="no layer can have a gate"):
        session.loss(run.batch)
    assert hash(GatedLayers(asked=["a"])) == hash(GatedLayers(asked=("a",)))


# --- States ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["weights", "columns", "layers", "l0", "l0 weights"])
def test_a_run_that_is_interrupted_goes_on_to_the_same_bits(level, tmp_path: Path):
    stages = Stages(k=1.0, start=0.1, until=0.7, rise=5.0)

    def method() -> Method:
        shared: dict[str, Any] = {"rate": 0.1, "low": 0.3, "patience": 1, "begin": 0.6, "every": esp.steps(3)}
        if level == "columns":
            return esp.prune.NPN(stages, PerUnit({"*": 0.1}), axes=["0"], columns=["4.weight[1]"], **shared)
        if level == "l0":
            return esp.prune.L0(stages, ExpectedCost(3.0), **shared)
        if level == "layers":
            return esp.prune.NPNLayers(stages, ExpectedLayers(0.5), **shared)
        options: dict[str, Any] = {"kind": HardConcrete()} if level == "l0 weights" else {}
        return esp.prune.NPNWeights(stages, ExpectedWeights(3.0), **shared, **options)

    def beginning(with_method: bool) -> Plain:
        chosen = method() if with_method else None
        return Deep(chosen, 60) if level == "layers" else Plain(chosen, total=60)

    for stop in (26, 50):  # in the search and after it
        through = beginning(True).train(stop)
        if level in ("weights", "columns") and stop == 26:
            through.structure.prune("2", [1])
        folder = tmp_path / str(stop)
        esp.save(through.structure, folder)
        state = json.dumps(through.session.state_dict())
        through.train(60 - stop)
        rest = beginning(False)
        rest.model = type(rest)(None).model
        rest.optimizer = torch.optim.Adam(rest.model.parameters(), lr=1e-2)
        example = rest.batch if level == "layers" else rest.batch[0]
        rest.structure = esp.load(folder, rest.model, example, optimizer=rest.optimizer)
        probe = None if level == "layers" else [batch_of(16)]
        rest.session = esp.Session(
            rest.structure, [method()], loss=rest.loss, probe=probe, total_steps=60, seed=5
        )  # fmt: skip
        rest.session.load_state_dict(json.loads(state))
        rest.train(60 - stop)
        assert len(through.session.events) > 0
        for one, other in zip(rest.model.parameters(), through.model.parameters(), strict=True):
            assert torch.equal(one, other)
        states = [run.session.state_dict() for run in (rest, through)]
        for one in states:
            one["events"] = [{**event, "seconds": 0.0} for event in one["events"]]
        assert states[0] == states[1]


# --- The paper's settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("growing", [False, True])
def test_the_papers_lenet5_has_its_gates_and_its_penalty(growing):
    torch.manual_seed(0)
    model, x = LeNet5((1, 28, 28), 10, 1.0), torch.randn(4, 1, 28, 28)
    structure = esp.attach(model, x, optimizer=torch.optim.Adam(model.parameters(), 1e-3))
    method = (esp.grow if growing else esp.prune).NPN(**lenet5(growing=growing), every=esp.steps(1))
    session = esp.Session(structure, [method], loss=lambda m, b: m(b).square().mean(), probe=[x], total_steps=10)
    session.loss(x).backward()
    session.optimizer.step()
    session.step()
    memory = memory_of(session)
    counts = [3, 3, 48, 3] if growing else [20, 50, 800, 500]
    keys = ["conv1", "conv2", "fc1.weight[1]", "fc1"]
    assert {key: len(memory.logits[key]) for key in keys} == dict(zip(keys, counts, strict=True))
    for _ in range(2):  # into the search
        session.loss(x).backward()
        session.optimizer.step()
        session.step()
    p = memory.table.probabilities(0.3)
    per_gate = [10 * 25 / 60_000, 0.5 * 500 / 60_000, 0.1 * 500 / 60_000, 10 * 10 / 60_000]
    expected = sum(weight * float(p[key].sum()) for key, weight in zip(keys, per_gate, strict=True))
    assert float(memory.table.cost(structure.topology, 0.3)[0]) == pytest.approx(expected)
    assert bool((p["conv1"] > 0.9).all())
    memory.table.stage = 1
    closed = torch.arange(len(p["fc1.weight[1]"])) % 3 == 0
    memory.table.logits["fc1.weight[1]"][closed] = -40.0
    session.loss(x).backward()
    session.optimizer.step()
    session.step()
    assert torch.equal(structure.masks["fc1.weight"].any(0), ~closed)
