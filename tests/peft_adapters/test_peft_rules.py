"""PEFT's own rules, found by running it: names matched by their ends, one module with several names, ties."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import BdLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.fold_folders import llama
from support.models import fill, output_of, randn, tokens
from support.travelling import BLOCKS, logits_of, worst_error
from torch import nn

import melora_fx
from exporters import add_adapters, read_peft_adapter, write_peft_adapter
from melora_fx import MELoRAError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT reads it
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),  # PEFT 0.19
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


def distilbert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "dim": 24, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**sizes)).eval()


def tied_llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "d_model": 24, "d_kv": 12, "d_ff": 36, "num_layers": 1, "num_heads": 2}
    return hf.T5EncoderModel(hf.T5Config(**sizes)).eval()


def mamba() -> nn.Module:
    torch.manual_seed(0)
    return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=99, hidden_size=24, num_hidden_layers=1, state_size=4)).eval()


class Heads(nn.Module):
    """Calls one linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        head = nn.Linear(24, 24)
        self.heads = nn.ModuleList([head, head])
        self.middle = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads[1](self.middle(self.heads[0](x).tanh()).tanh())


def trained(model: nn.Module, **config: Any) -> Any:
    """Returns a PEFT model with random values in everything that it trains."""
    peft_model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8} | config)).eval()
    with torch.no_grad():
        for index, parameter in enumerate(dict.fromkeys(peft_model.parameters())):
            if parameter.requires_grad:
                parameter.add_(randn(*parameter.shape, seed=index) * 0.3)
    return peft_model


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TRAINED: dict[str, tuple[Any, dict[str, Any]]] = {
    "a name in another's end": (distilbert, {"target_modules": ["q_lin", "v_lin"], "task_type": "SEQ_CLS"}),
    "norms by their ends": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "a tied head": (
        tied_llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "blocks by parents' names": (
        llama,
        {
            "target_modules": [*LINEAR],
            "use_bdlora": BdLoraConfig(target_modules_bd_a=["mlp"], target_modules_bd_b=["self_attn"], nblocks=2),
        },
    ),
    "a negative alpha": (llama, {"target_modules": ["q_proj", "up_proj"], "lora_alpha": -4}),
    "a negative alpha by name": (llama, {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": -3}}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_the_same_is_computed(case: str, tmp_path: Path) -> None:
    build, config = TRAINED[case]
    model = trained(build(), **config)
    model.save_pretrained(tmp_path / "peft")
    read_peft_adapter(tmp_path / "peft", tmp_path / "ours")
    loaded = melora_fx.load_adapter(build(), tmp_path / "ours").eval()
    assert worst_error(logits_of(loaded), logits_of(model)) < 1e-5
    assert worst_error(logits_of(build().eval()), logits_of(model)) > 1e-3


def test_a_compiled_model_saves_its_wrapper_in_the_names(tmp_path: Path) -> None:
    model = trained(llama(), target_modules=["q_proj"])
    expected = logits_of(model)
    model.base_model.model = torch.compile(model.base_model.model, backend="eager")
    model.save_pretrained(tmp_path / "peft")
    assert all("._orig_mod." in key for key in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    read_peft_adapter(tmp_path / "peft", tmp_path / "ours")
    loaded = melora_fx.load_adapter(llama(), tmp_path / "ours").eval()
    assert worst_error(logits_of(loaded), expected) < 1e-5


def test_embeddings_that_peft_saves_of_its_own_are_named(tmp_path: Path) -> None:
    trained(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    with pytest.raises(MELoRAError, match=r"holds `.*`, which PEFT saves if .*`save_embedding_layers=False`"):
        read_peft_adapter(tmp_path / "peft", tmp_path / "ours")


def test_blocks_of_names_that_are_in_others(tmp_path: Path) -> None:
    """T5's `o` is part of every "encoder", and PEFT matches names anywhere."""
    model = fill(melora_fx.rewrite(t5(), "all-linear", BLOCKS)).eval()
    melora_fx.save_adapter(model, tmp_path / "ours")
    write_peft_adapter(tmp_path / "ours", tmp_path / "peft", form="bdlora")
    loaded = PeftModel.from_pretrained(t5(), tmp_path / "peft").eval()
    inputs = {"input_ids": tokens()["input_ids"]}
    assert worst_error(output_of(loaded, inputs), output_of(model, inputs)) < 1e-5
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["use_bdlora"]["nblocks"] == 2


@pytest.mark.parametrize("kept", [(), ("heads.0",)], ids=["adapted", "kept"])
def test_one_module_of_several_names_is_not_written(kept: tuple[str, ...], tmp_path: Path) -> None:
    targets = "middle" if kept else "all-linear"
    melora_fx.save_adapter(melora_fx.rewrite(Heads(), targets, BLOCKS, keep_trainable=kept), tmp_path / "ours")
    with pytest.raises(MELoRAError, match=r"one module of several names \(heads.0, heads.1\)"):
        write_peft_adapter(tmp_path / "ours", tmp_path / "peft")
    assert melora_fx.sites(melora_fx.load_adapter(Heads(), tmp_path / "ours"))


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["heads.0"]}, {"target_modules": ["middle"], "modules_to_save": ["heads.0"]}],
    ids=["adapted", "saved"],
)
def test_one_name_of_a_module_of_several_is_not_loaded(config: dict[str, Any], tmp_path: Path) -> None:
    trained(Heads(), **config).save_pretrained(tmp_path / "peft")
    read_peft_adapter(tmp_path / "peft", tmp_path / "ours")
    with pytest.raises(MELoRAError, match=r"`heads\.0` is one module of several names"):
        melora_fx.load_adapter(Heads(), tmp_path / "ours")


@pytest.mark.parametrize("name", ["out_proj", "dt_proj"])
def test_what_mamba_reads_past_pefts_adapter_is_refused(name: str, tmp_path: Path) -> None:
    melora_fx.save_adapter(melora_fx.rewrite(mamba(), [name], BLOCKS), tmp_path / "ours")
    with pytest.raises(MELoRAError, match=f"{name}'.*read without"):
        write_peft_adapter(tmp_path / "ours", tmp_path / "peft")


def test_the_base_may_be_a_path(tmp_path: Path) -> None:
    melora_fx.save_adapter(melora_fx.rewrite(llama(), ["q_proj"], BLOCKS), tmp_path / "ours")
    for index, place in enumerate((tmp_path / "base", "me/größe", "\ud800")):
        write_peft_adapter(tmp_path / "ours", tmp_path / f"peft{index}", base_model=place)
        config = json.loads((tmp_path / f"peft{index}" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(place)


@pytest.mark.parametrize(
    "write", [read_peft_adapter, write_peft_adapter, lambda place, out: add_adapters({place: 1}, out)]
)
def test_no_place_is_not_the_working_directory(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    melora_fx.save_adapter(melora_fx.rewrite(llama(), ["q_proj"], BLOCKS), tmp_path / "ours")
    write_peft_adapter(tmp_path / "ours", tmp_path / "peft")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="the place to write is ''"):
        write(tmp_path / ("peft" if write is read_peft_adapter else "ours"), "")
    assert not list((tmp_path / "empty").iterdir())


def test_pickles_of_endless_or_no_values_are_refused(tmp_path: Path) -> None:
    trained(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    key = next(iter(tensors))
    for value in (torch.zeros(1).expand(4, 10**10), torch.empty(4, 24, device="meta")):
        torch.save(tensors | {key: value}, tmp_path / "peft" / "adapter_model.bin")
        with pytest.raises(MELoRAError, match="is not a tensor of numbers"):
            read_peft_adapter(tmp_path / "peft", tmp_path / "ours")


def test_names_that_no_system_takes(tmp_path: Path) -> None:
    for place in ("a\0b", "y" * 300):
        with pytest.raises(MELoRAError, match=r"cannot be read|is not a"):
            read_peft_adapter(place, tmp_path / "ours")
