"""Changed Hugging Face models: the configuration follows, and `from_pretrained` reads them without Espalier."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import espalier as esp
from espalier.adapters.config import ConfigError, config_of
from espalier.adapters.pretrained import follow_config, plan_to_config, save_pretrained
from espalier.errors import PlanError

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
TOKENS = {"vocab_size": 40, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, **TOKENS, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(**TOKENS, n_embd=16, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, **TOKENS, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit}
BLOCKS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers", "vit": "vit.layers"}
INNER = {"bert": "*intermediate.dense", "gpt2": "*c_fc", "llama": "*gate_proj", "vit": "*fc1"}

READER = """
import sys
sys.modules["espalier"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
name, *folders = sys.argv[1:]
for folder in folders:
    model = getattr(transformers, name).from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**load_file(folder + "/inputs")).logits
    save_file({"logits": logits.contiguous()}, folder + "/outputs")
"""


def attached(name: str) -> esp.Structure:
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    for one in model.parameters():
        nn.init.normal_(one, std=0.2)
    return esp.attach(model, {"pixel_values": PIXELS} if name == "vit" else {"input_ids": IDS})


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


SOME, ALL = ("smaller", "deeper"), ("inner", "smaller", "deeper", "wider", "shallower")


@pytest.mark.parametrize(
    ("name", "whats"), [("llama", SOME), *(pytest.param(name, ALL, marks=pytest.mark.slow) for name in MODELS)]
)
def test_what_is_pruned_and_grown_is_read_without_espalier(name: str, whats: tuple[str, ...], tmp_path: Path) -> None:
    structure = attached(name)
    inputs = structure.example
    heads = {"num_key_value_heads": 1} if name == "llama" else {}
    edits: dict[str, Callable[[], Any]] = {
        "inner": lambda: structure.apply(
            esp.scaled_plan(structure, esp.Units(0.7, of="initial"), axes=[INNER[name]], uniform=True)
        ),
        "smaller": lambda: structure.apply(plan_to_config(structure, hidden_size=12, num_attention_heads=3, **heads)),
        "deeper": lambda: structure.add_cell(BLOCKS[name], init="copy"),
        "wider": lambda: structure.apply(plan_to_config(structure, hidden_size=20, num_attention_heads=5)),
        "shallower": lambda: structure.remove_layer(f"{BLOCKS[name]}.0"),
    }
    expected = {}
    for what in whats:
        edits[what]()
        save_pretrained(structure, tmp_path / what)
        expected[what] = logits(structure.model, inputs)
        save_file(inputs, tmp_path / what / "inputs")
    if whats == ALL:  # a process of its own takes five seconds
        folders = [str(tmp_path / what) for what in expected]
        subprocess.run([sys.executable, "-c", READER, type(structure.model).__name__, *folders], check=True)
    for what, found in expected.items():
        again = type(structure.model).from_pretrained(tmp_path / what).eval()
        assert torch.equal(logits(again, inputs), found), what
        if whats == ALL:
            assert torch.equal(load_file(tmp_path / what / "outputs")["logits"], found), what
    config: Any = structure.model.config
    found = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    assert found == ((12, 3, 3) if whats == SOME else (20, 5, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Roberta", "Mistral", "Qwen2", "Opt"])
def test_other_architectures_follow_too(name: str, tmp_path: Path) -> None:
    kind = {"Roberta": "RobertaForMaskedLM", "Opt": "OPTForCausalLM"}.get(name, f"{name}ForCausalLM")
    sizes = {**SMALL, **TOKENS, "ffn_dim": 32, "word_embed_proj_dim": 16} if name == "Opt" else {**SMALL, **TOKENS}
    heads = {"num_key_value_heads": 2, "head_dim": 4} if name == "Mistral" else {}
    heads = {"num_key_value_heads": 2} if name == "Qwen2" else heads
    config = getattr(transformers, f"{name.upper() if name == 'Opt' else name}Config")(**sizes, **heads)
    structure = esp.attach(getattr(transformers, kind)(config).eval(), {"input_ids": IDS})
    axes = ["*intermediate.dense", "*gate_proj", "*.fc1"]
    there = [one for one in axes if any(axis.endswith(one[1:]) for axis in structure.axes)]
    structure.apply(esp.scaled_plan(structure, esp.Units(0.7, of="initial"), axes=there, uniform=True))
    save_pretrained(structure, tmp_path)
    again = type(structure.model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, structure.example), logits(structure.model, structure.example))


def test_a_vocabulary_grows_and_the_loss_knows_it() -> None:
    structure = attached("llama")
    first: Any = structure.model.config
    before = logits(structure.model, structure.example)
    structure.apply(plan_to_config(structure, vocab_size=43))
    follow_config(structure)
    assert torch.equal(logits(structure.model, structure.example)[..., :40], before)
    new = torch.full((2, 8), 42)
    assert structure.model(input_ids=new, labels=new).loss.isfinite()
    assert structure.model.config.vocab_size == 43
    assert structure.model.model.config is structure.model.config, "what was shared is shared"
    assert first.vocab_size == 40, "the configuration that the model was built from is the user's"


def test_a_configuration_that_cannot_say_it_is_refused_layer_by_layer(tmp_path: Path) -> None:
    structure = attached("gpt2")
    structure.prune("transformer.h.1.mlp.c_fc", [3])
    folder = tmp_path / "model"
    with pytest.raises(
        ConfigError, match=r"transformer\.h\.1\.mlp\.c_fc: the model has weight \(16, 63\) for \(16, 64\)"
    ):
        save_pretrained(structure, folder)
    assert not folder.exists()


def test_heads_that_are_no_part_of_the_hidden_size_need_a_configuration_with_their_size() -> None:
    for name, able in (("vit", True), ("bert", False)):
        structure = attached(name)
        structure.prune({axis: [0] for axis in structure.axes if axis.endswith(":heads")})
        if able:
            assert config_of(structure).head_dim == 4
        else:
            with pytest.raises(ConfigError, match=r"layer\.1\.attention\.self\.query: the model has weight \(12, 16\)"):
                config_of(structure)


def test_values_that_are_made_from_the_configuration_are_compared() -> None:
    structure = attached("llama")
    rotary = next(axis for axis in structure.axes if axis.endswith("q_proj:2"))
    structure.grow(rotary, 1)
    with pytest.raises(ConfigError):
        save_pretrained(structure, "never written")


def test_bad_settings_are_named() -> None:
    structure = attached("bert")
    with pytest.raises(PlanError, match="hiden_size: BertConfig sets no such number"):
        plan_to_config(structure, hiden_size=12)
    with pytest.raises(PlanError, match="layers come by add_cell"):
        plan_to_config(structure, num_hidden_layers=3)
    with pytest.raises(ConfigError, match="refuses its configuration"):
        plan_to_config(structure, hidden_size=13)
    with pytest.raises(ConfigError, match="has no configuration"):
        config_of(esp.attach(nn.Linear(2, 2), torch.ones(1, 2)))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft and transformers about each other
def test_ranks_of_adapters_grow_and_shrink_and_peft_reads_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from espalier.adapters.lora import rank_axes, save_adapter

    def adapted(rslora: bool) -> Any:
        settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=rslora)
        return peft.get_peft_model(attached("llama").model, settings).eval()

    for rslora in (False, True):
        model = adapted(rslora)
        for name, one in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(one, std=0.2)
        trained = [one for one in model.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(trained, 0.01)
        structure = esp.attach(model, {"input_ids": IDS}, optimizer=optimizer)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        before = logits(model, structure.example)
        first, second = rank_axes(structure)[:2]
        edit = structure.grow(first, 2)
        assert edit.contract == "exact"
        assert torch.equal(logits(model, structure.example), before)
        structure.prune(second, [0, 3])
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        folder = tmp_path / str(rslora)
        save_adapter(structure, folder)
        again = peft.PeftModel.from_pretrained(attached("llama").model, folder).eval()
        assert torch.equal(logits(again, structure.example), logits(model, structure.example))
