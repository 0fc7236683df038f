"""PEFT's folders in real life: ties, heads that are not listed, parameters, odd names, mixed dtypes."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import bert_classifier, fill, randn
from support.travelling import BLOCKS, UNEVEN, assert_same_blocks, logits_of, worst_error
from torch import nn

import melora_fx
from exporters import read_peft_adapter, write_gguf_adapter, write_peft_adapter
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.saving.adapter_file import read_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT reads it
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),  # PEFT 0.19
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SIZES = {"vocab_size": 51, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


def tied_llama() -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True)).eval()


def trained(model: nn.Module, **config: Any) -> PeftModel:
    """Returns a PEFT model with random values in everything that it trains."""
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **config)).eval()
    with torch.no_grad():
        for index, parameter in enumerate(peft_model.parameters()):
            if parameter.requires_grad:
                parameter.add_(randn(*parameter.shape, seed=index) * 0.3)
    return peft_model


def saved(model: nn.Module, folder: Path, targets: Any, config: MELoRAConfig = BLOCKS, **options: Any) -> nn.Module:
    """Rewrites and fills a model, saves its adapter in our format and in PEFT's, and returns it."""
    model = fill(melora_fx.rewrite(model, targets, config, **options)).eval()
    melora_fx.save_adapter(model, folder / "ours")
    write_peft_adapter(folder / "ours", folder / "peft")
    return model


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids="+".join)
def test_what_peft_has_trained_apart_is_not_tied_again(modules: list[str], tmp_path: Path) -> None:
    model = trained(tied_llama(), target_modules=["q_proj"], modules_to_save=modules)
    model.save_pretrained(tmp_path / "peft")
    read_peft_adapter(tmp_path / "peft", tmp_path / "ours")
    text = "was trained apart from `.*`, to which the base ties it: merge the adapter where it was trained"
    with pytest.raises(MELoRAError, match=text):
        melora_fx.load_adapter(tied_llama(), tmp_path / "ours")
    tied_llama().save_pretrained(tmp_path / "base")
    with pytest.raises(MELoRAError, match=text):
        melora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "ours", tmp_path / "folded")


def test_what_is_tied_in_ours_moves_with_it_in_peft(tmp_path: Path) -> None:
    model = melora_fx.rewrite(tied_llama(), ["q_proj"], BLOCKS, keep_trainable="lm_head")
    with torch.no_grad():
        model.lm_head.weight.add_(randn(51, 24) * 0.1)
    model = saved_again(model, tmp_path)
    loaded = PeftModel.from_pretrained(tied_llama(), tmp_path / "peft").eval()
    assert worst_error(logits_of(loaded), logits_of(model)) < 1e-5
    assert read_adapter(tmp_path / "ours").model["tied"] == {"lm_head.weight": ["model.embed_tokens.weight"]}


def saved_again(model: nn.Module, folder: Path) -> nn.Module:
    melora_fx.save_adapter(fill(model).eval(), folder / "ours")
    write_peft_adapter(folder / "ours", folder / "peft")
    return model


def gpt2() -> hf.GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 51, "n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, tie_word_embeddings=False)).eval()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_how_square_weights_lie_is_not_guessed(tmp_path: Path) -> None:
    """PEFT saves the orientation of the last module, here a linear: the square Conv1D would be folded transposed."""
    model = trained(gpt2(), target_modules=["attn.c_proj", "lm_head"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    assert json.loads((tmp_path / "peft" / CONFIG).read_text())["fan_in_fan_out"] is False
    read_peft_adapter(tmp_path / "peft", tmp_path / "ours")
    gpt2().save_pretrained(tmp_path / "base")
    with pytest.raises(MELoRAError, match=r"c_proj.*square weight may be \(out, in\) or \(in, out\)"):
        melora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "ours", tmp_path / "folded")
    loaded = melora_fx.load_adapter(gpt2(), tmp_path / "ours").eval()
    assert worst_error(logits_of(loaded), logits_of(model)) < 1e-5
    melora_fx.save_adapter(loaded, tmp_path / "again")
    melora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "again", tmp_path / "folded")
    folded = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "folded").eval()
    assert worst_error(logits_of(folded), logits_of(model)) < 1e-5


def test_how_ours_lie_is_known_when_they_come_back(tmp_path: Path) -> None:
    saved(gpt2(), tmp_path, {"attn.c_proj": BLOCKS, "lm_head": MELoRAConfig(rank=2, num_blocks=1)})
    read_peft_adapter(tmp_path / "peft", tmp_path / "back")
    assert read_adapter(tmp_path / "back").transposed == read_adapter(tmp_path / "ours").transposed
    assert_same_blocks(tmp_path / "ours", tmp_path / "back")


class Product(nn.Module):
    """A product with a parameter (in, out) that is not called `weight`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(12, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


def products() -> nn.Sequential:
    return nn.Sequential(Product(), nn.ReLU(), nn.Linear(24, 12))


def test_parameters_that_are_no_modules_weight(tmp_path: Path) -> None:
    plain, x = products(), randn(4, 12)
    model = saved(copy.deepcopy(plain), tmp_path, ["0.w", "2"], example_inputs=(x,))
    loaded = PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    assert worst_error(loaded(x), model(x)) < 1e-6
    read_peft_adapter(tmp_path / "peft", tmp_path / "back")
    assert_same_blocks(tmp_path / "ours", tmp_path / "back")
    assert read_adapter(tmp_path / "back").parameters == {"0.w": "w"}


def test_names_without_a_dot_are_found_alone(tmp_path: Path) -> None:
    """PEFT matches a listed name with the end of others: `0` with `1.0`."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 24), nn.Sequential(nn.ReLU(), nn.Linear(24, 12)))

    plain, x = build(), randn(4, 12)
    model = saved(build(), tmp_path, ["0"])
    loaded = PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    assert worst_error(loaded(x), model(x)) < 1e-6
    assert not any("1" in name for name, _ in loaded.named_parameters() if "lora" in name)


def test_the_root_itself_is_refused(tmp_path: Path) -> None:
    model = melora_fx.rewrite(Product(), "w", BLOCKS, example_inputs=(randn(2, 12),))
    melora_fx.save_adapter(fill(model), tmp_path / "a")
    with pytest.raises(MELoRAError, match="of the model itself, and PEFT adapts only modules inside it"):
        write_peft_adapter(tmp_path / "a", tmp_path / "peft")


def test_values_beyond_the_dtype_are_not_written(tmp_path: Path) -> None:
    model = melora_fx.rewrite(tied_llama(), ["q_proj"], MELoRAConfig(rank=1, num_blocks=1, alpha=1e30))
    with torch.no_grad():
        for parameter in melora_fx.adapter_parameters(model).values():
            parameter.fill_(1e10)
    melora_fx.save_adapter(model, tmp_path / "ours")
    tied_llama().save_pretrained(tmp_path / "base")
    for write in (
        lambda: write_peft_adapter(tmp_path / "ours", tmp_path / "out"),
        lambda: write_gguf_adapter(tmp_path / "ours", tmp_path / "base", tmp_path / "out"),
    ):
        with pytest.raises(MELoRAError, match="times its scaling exceed the range of its dtype"):
            write()
        assert not (tmp_path / "out").exists()


def test_heads_that_old_versions_do_not_list(tmp_path: Path) -> None:
    model = trained(bert_classifier(), target_modules=["query"], task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "peft")
    edit(tmp_path / "peft", modules_to_save=None)
    read_peft_adapter(tmp_path / "peft", tmp_path / "ours")
    loaded = melora_fx.load_adapter(bert_classifier(), tmp_path / "ours").eval()
    assert worst_error(logits_of(loaded), logits_of(model)) < 1e-6


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained(tied_llama(), target_modules=["q_proj", "o_proj"]).save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


def test_mixed_dtypes_are_held_by_the_wider(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / TENSORS)
    mixed = {key: tensor.bfloat16() if "lora_B" in key else tensor for key, tensor in tensors.items()}
    save_file(mixed, folder / TENSORS)
    read_peft_adapter(folder, tmp_path / "ours")
    for site in read_adapter(tmp_path / "ours").configs:
        own = read_adapter(tmp_path / "ours").tensors_of(site)
        assert torch.equal(own.lora_a[0], tensors[f"base_model.model.{site}.lora_A.weight"])
    write_peft_adapter(tmp_path / "ours", tmp_path / "again")
    again = load_file(tmp_path / "again" / TENSORS)
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items() if "lora_A" in key)


def test_a_matrix_that_is_adapted_as_a_parameter_is_its_module(tmp_path: Path) -> None:
    model = trained(tied_llama(), target_modules=[], target_parameters=["q_proj.weight"])
    model.save_pretrained(tmp_path / "peft")
    read_peft_adapter(tmp_path / "peft", tmp_path / "ours")
    loaded = melora_fx.load_adapter(tied_llama(), tmp_path / "ours").eval()
    assert worst_error(logits_of(loaded), logits_of(model)) < 1e-5


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def test_attention_in_one_module_is_refused(tmp_path: Path) -> None:
    trained(Attention(), target_modules=["attn"]).save_pretrained(tmp_path / "peft")
    with pytest.raises(MELoRAError, match=r"`attn.*adapts an nn\.MultiheadAttention, which cannot be read"):
        read_peft_adapter(tmp_path / "peft", tmp_path / "ours")


def test_the_state_of_the_random_numbers_stays(folder: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    read_peft_adapter(folder, tmp_path / "ours")
    assert torch.equal(torch.get_rng_state(), before)


def _twice(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    key = next(iter(tensors))
    save_file(tensors | {key.removeprefix("base_model.model."): tensors[key].clone()}, folder / TENSORS)


def _renamed(old: str, new: str) -> Any:
    def rename(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        save_file({key.replace(old, new): tensor for key, tensor in tensors.items()}, folder / TENSORS)

    return rename


def _float8(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    save_file({key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}, folder / TENSORS)


BAD: dict[str, tuple[Any, str]] = {
    "twice": (_twice, "contains a tensor twice, with and without the prefix"),
    "LoRA-GA": (lambda folder: edit(folder, init_lora_weights="lora_ga"), "with which PEFT changes the base"),
    "experts of transformers 4": (
        _renamed("self_attn.q_proj", "block_sparse_moe.experts.0.w1"),
        "experts in the form of transformers 4",
    ),
    "float8": (_float8, "float8"),
    "an endless pattern": (
        lambda folder: edit(folder, rank_pattern={r"((.)|(\w)|[a-z.])+[^a-z.0-9_]": 3}),
        "takes too long to match",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str, folder: Path, tmp_path: Path) -> None:
    change, text = BAD[case]
    change(folder)
    with pytest.raises(MELoRAError, match=text):
        read_peft_adapter(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_folders_of_folders_and_folders_of_others(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "several").mkdir()
    shutil.copytree(folder, tmp_path / "several" / "one")
    with pytest.raises(MELoRAError, match="contains adapters in subfolders: name one of one"):
        read_peft_adapter(tmp_path / "several", tmp_path / "ours")
    with pytest.raises(MELoRAError, match=r"is an adapter folder of another program, with adapter_model\.safetensors"):
        read_peft_adapter(folder, tmp_path / "several" / "one")


def test_a_large_description_takes_no_memory(tmp_path: Path) -> None:
    """The file's description claims a million ranks; they are not created for the comparison."""
    saved(tied_llama(), tmp_path, ["q_proj"], UNEVEN)
    file = tmp_path / "peft" / TENSORS
    name = "model.layers.0.self_attn.q_proj"
    entries = {"sites": {name: {"rank": 1 << 20, "num_blocks": 2, "split": None}}}
    save_file(load_file(file), file, {"format": "pt", "melora": json.dumps(entries)})
    read_peft_adapter(tmp_path / "peft", tmp_path / "back")
    assert read_adapter(tmp_path / "back").configs[name].ranks == (1, 3)
