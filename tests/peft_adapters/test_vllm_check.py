"""Which adapters vLLM accepts: each rule, and the text of each refusal."""

import json
from pathlib import Path

import pytest
from support.adapter_files import edit_header
from support.fold_folders import llama
from support.models import adapted_kept_tower, bert, fill, gpt2, rewritten_tower, tower
from torch import nn

import melora_fx
from exporters.peft_adapters.vllm import RANKS, check_for_vllm
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.saving.adapter import Adapter
from melora_fx.saving.adapter_file import read_adapter

LINEAR = ["up", "gate"]
BLOCKS = MELoRAConfig(rank=2, num_blocks=3)


def saved(model: nn.Module, folder: Path) -> Adapter:
    melora_fx.save_adapter(model, folder)
    return read_adapter(folder)


@pytest.mark.parametrize(
    ("rank", "num_blocks", "flag", "flags"),
    [
        (1, 1, 1, "--enable-lora"),
        (1, 3, 8, "--enable-lora"),
        (3, 3, 16, "--enable-lora"),
        (6, 3, 32, "--enable-lora --max-lora-rank 32"),
        ((8, 8, 6), 3, 32, "--enable-lora --max-lora-rank 32"),
    ],
)
def test_smallest_rank_that_admits_it(
    rank: int | tuple[int, ...], num_blocks: int, flag: int, flags: str, tmp_path: Path
) -> None:
    config = MELoRAConfig(rank=rank, num_blocks=num_blocks)
    needs = check_for_vllm(saved(melora_fx.rewrite(tower(), LINEAR, config), tmp_path / "adapter"))
    assert (needs.rank, needs.max_lora_rank) == (config.total_rank, flag)
    assert str(needs) == f"vllm serve BASE {flags}"


def test_the_largest_of_several_sites_and_the_parts_of_a_split(tmp_path: Path) -> None:
    targets = {"up": MELoRAConfig(rank=2, num_blocks=3, split=3), "gate": BLOCKS}
    needs = check_for_vllm(saved(melora_fx.rewrite(tower(), targets), tmp_path / "adapter"))
    assert (needs.rank, needs.max_lora_rank) == (18, 32)


@pytest.mark.parametrize(("rank", "is_taken"), [(RANKS[-1], True), (RANKS[-1] + 1, False)])
def test_ranks_end_somewhere(rank: int, is_taken: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    adapter = saved(melora_fx.rewrite(model, ["0"], MELoRAConfig(rank=rank, num_blocks=1)), tmp_path / "adapter")
    if is_taken:
        assert check_for_vllm(adapter).max_lora_rank == 512
        return
    with pytest.raises(MELoRAError, match=r"has rank 513, and vLLM's `--max-lora-rank` ends at 512; compress it to"):
        check_for_vllm(adapter)


def test_trained_heads_are_refused(tmp_path: Path) -> None:
    melora_fx.save_adapter(adapted_kept_tower(), tmp_path / "adapter")
    text = r"cannot be served by vLLM: it has modules that were trained in full \(`norm`\), .*; fold it into the base$"
    with pytest.raises(MELoRAError, match=text):
        check_for_vllm(read_adapter(tmp_path / "adapter"))


def test_models_that_vllm_serves_without_adapters(tmp_path: Path) -> None:
    model = melora_fx.rewrite(gpt2(num_layers=1), ["c_attn"], BLOCKS)
    with pytest.raises(MELoRAError, match=r"it adapts a `GPT2LMHeadModel`, which vLLM serves without adapters; fold"):
        check_for_vllm(saved(model, tmp_path / "adapter"))


def test_weights_that_lie_the_other_way(tmp_path: Path) -> None:
    with pytest.raises(MELoRAError, match=r"the weights of `conv` are \(in, out\), like Conv1D's"):
        check_for_vllm(saved(rewritten_tower(), tmp_path / "adapter"))


def test_stacks_of_experts(tmp_path: Path) -> None:
    melora_fx.save_adapter(melora_fx.rewrite(tower(), LINEAR, BLOCKS), tmp_path / "adapter")
    edit_header(tmp_path / "adapter", lambda header: header["sites"]["up"]["base"].update(shape=[1, 36, 24]))
    with pytest.raises(MELoRAError, match=r"it adapts stacks of experts \(`up`\), which vLLM accepts only for some"):
        check_for_vllm(read_adapter(tmp_path / "adapter"))


def test_a_pooler_is_dropped_without_a_word(tmp_path: Path) -> None:
    model = melora_fx.rewrite(bert(num_layers=1), ["query", "dense"], BLOCKS)
    with pytest.raises(MELoRAError, match=r"it adapts `pooler\.dense`, which vLLM silently drops"):
        check_for_vllm(saved(model, tmp_path / "adapter"))


def test_the_text_names_three_of_many(tmp_path: Path) -> None:
    adapter = saved(melora_fx.rewrite(tower(), LINEAR, MELoRAConfig(rank=1, num_blocks=1)), tmp_path / "adapter")
    object.__setattr__(adapter, "kept", tuple("abcde"))
    with pytest.raises(MELoRAError, match=r"in full \(`a`, `b`, `c`, … \(2 more\)\)"):
        check_for_vllm(adapter)


def test_an_encoder_is_taken_and_its_notes_say_as_what(tmp_path: Path) -> None:
    model = melora_fx.rewrite(bert(num_layers=1), ["query", "value"], BLOCKS)
    needs = check_for_vllm(saved(model, tmp_path / "adapter"))
    assert needs.flags == "--enable-lora"
    assert len(needs.notes) == 1
    assert needs.notes[0].startswith("The adapter is of a `BertModel`: vLLM applies it to an embedding model")


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_a_head_is_taken_of_some_models(targets: list[str], tmp_path: Path) -> None:
    model = fill(melora_fx.rewrite(llama(), targets, MELoRAConfig(rank=1, num_blocks=1)))
    notes = check_for_vllm(saved(model, tmp_path / "adapter")).notes
    assert [note[:20] for note in notes] == (["vLLM adapts `lm_head"] if "lm_head" in targets else [])


def test_a_model_that_takes_adapters_in_the_code_of_transformers(tmp_path: Path) -> None:
    melora_fx.save_adapter(melora_fx.rewrite(tower(), LINEAR, BLOCKS), tmp_path / "adapter")
    edit_header(tmp_path / "adapter", lambda header: header["model"].update({"class": "StableLmForCausalLM"}))
    notes = check_for_vllm(read_adapter(tmp_path / "adapter")).notes
    assert [note[:56] for note in notes] == ["vLLM's own `StableLmForCausalLM` accepts no adapters and"]


def test_a_file_that_names_no_model_is_taken(tmp_path: Path) -> None:
    model = melora_fx.rewrite(gpt2(num_layers=1), ["lm_head"], MELoRAConfig(rank=1, num_blocks=1))
    melora_fx.save_adapter(model, tmp_path / "adapter")
    edit_header(tmp_path / "adapter", lambda header: header["model"].pop("class"))
    assert "class" not in json.dumps(read_adapter(tmp_path / "adapter").model)
    assert check_for_vllm(read_adapter(tmp_path / "adapter")).max_lora_rank == 1
