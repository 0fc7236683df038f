"""Adapters written for PEFT: loaded by PEFT itself, and compared on logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.fold_folders import llama
from support.models import bert_classifier, fill, rewritten_tower
from support.travelling import BLOCKS, CASES, Case, assert_same_blocks, logits_of, merged, worst_error
from torch import nn

import melora_fx
from exporters import read_peft_adapter, write_peft_adapter
from melora_fx import MELoRAConfig, MELoRAError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT reads it
each_form = pytest.mark.parametrize("form", ["lora", "bdlora"])
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def written(case: Case, folder: Path, form: str = "lora") -> nn.Module:
    """Returns the adapted model; writes its adapter to `folder / "ours"`, and for PEFT to `folder / "peft"`."""
    model = case.adapted()
    melora_fx.save_adapter(model, folder / "ours")
    write_peft_adapter(folder / "ours", folder / "peft", form=form)
    return model


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "peft" / "adapter_config.json").read_text())


@pytest.mark.default_cases("BERT, a head-lora", "Llama-bdlora", "Mixtral-bdlora")
@each_form
@each_case
def test_peft_computes_the_same(case: Case, form: str, tmp_path: Path) -> None:
    if form == "bdlora" and case is not CASES["Llama"] and "BERT" not in case.build.__name__.upper():
        with pytest.raises(MELoRAError, match='write it with form="lora"'):
            written(case, tmp_path, form)
        assert not (tmp_path / "peft").exists()
        return
    expected = logits_of(written(case, tmp_path, form))
    model = PeftModel.from_pretrained(case.build(), tmp_path / "peft").eval()
    assert worst_error(logits_of(case.build()), expected) > 0.1
    assert worst_error(logits_of(model), expected) < 1e-5
    assert worst_error(logits_of(merged(model)), expected) < 1e-5
    read_peft_adapter(tmp_path / "peft", tmp_path / "back")
    assert_same_blocks(tmp_path / "ours", tmp_path / "back")


def test_an_ordinary_lora_has_one_rank_and_no_scaling(tmp_path: Path) -> None:
    written(CASES["BERT, a head"], tmp_path)
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 4, {}, {})
    assert (config["task_type"], config["modules_to_save"], config["bias"]) == ("SEQ_CLS", ["classifier"], "none")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {tensor.size(0) for key, tensor in tensors.items() if "lora_A" in key} == {4}


def test_blocks_are_smaller_by_what_the_packed_factor_saves(tmp_path: Path) -> None:
    config = MELoRAConfig(rank=1, num_blocks=12)
    model = fill(melora_fx.rewrite(llama(), {"q_proj": config, "o_proj": config, "up_proj": config}))
    melora_fx.save_adapter(model, tmp_path / "ours")
    sizes = {}
    for form in ("lora", "bdlora"):
        write_peft_adapter(tmp_path / "ours", tmp_path / form, form=form)
        tensors = load_file(tmp_path / form / "adapter_model.safetensors")
        sizes[form] = {key.split(".", 5)[-1]: tensor.shape for key, tensor in tensors.items() if ".layers.0." in key}
    packed = {key for key, shape in sizes["bdlora"].items() if shape != sizes["lora"][key]}
    assert packed == {"self_attn.q_proj.lora_A.weight", "self_attn.o_proj.lora_A.weight", "mlp.up_proj.lora_B.weight"}
    assert all(sizes["bdlora"][key].numel() * 12 == sizes["lora"][key].numel() for key in packed)


def test_names_that_contain_others_are_not_packed_by_mistake(tmp_path: Path) -> None:
    """PEFT packs every module whose name contains a listed one."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(24, 24)
            self.out_proj = nn.Linear(24, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out_proj(torch.relu(self.proj(x)))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    torch.manual_seed(0)
    plain = Outer()
    state = plain.state_dict()
    model = fill(melora_fx.rewrite(plain, {"inner.proj": BLOCKS, "out_proj": MELoRAConfig(rank=2, num_blocks=3)}))
    melora_fx.save_adapter(model, tmp_path / "ours")
    write_peft_adapter(tmp_path / "ours", tmp_path / "peft", form="bdlora")
    again = Outer()
    again.load_state_dict(state)
    x = torch.randn(4, 24)
    loaded = PeftModel.from_pretrained(again, tmp_path / "peft")
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_narrow_dtype_rounds_is_written_wider(dtype: torch.dtype, tmp_path: Path) -> None:
    model = bert_classifier()
    model = fill(
        melora_fx.rewrite(model, {"query": BLOCKS, "value": MELoRAConfig(rank=2, num_blocks=2, alpha=4.0)})
    ).to(dtype)
    melora_fx.save_adapter(model, tmp_path / "ours")
    write_peft_adapter(tmp_path / "ours", tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    dtypes = {name: {tensor.dtype for key, tensor in tensors.items() if name in key} for name in ("query", "value")}
    assert dtypes == {"query": {torch.float32}, "value": {dtype}}
    own = melora_fx.sites(model)["bert.encoder.layer.0.attention.self.query"]
    lora_b = tensors["base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight"]
    assert torch.equal(lora_b[:12, :2], own.lora_b.detach()[0].float() * 1.5)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    written(CASES["BERT, a head"], tmp_path)
    write_peft_adapter(tmp_path / "ours", tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "peft" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_the_base_can_be_named(tmp_path: Path) -> None:
    written(CASES["Llama"], tmp_path)
    write_peft_adapter(tmp_path / "ours", tmp_path / "named", base_model="someone/a-model")
    assert json.loads((tmp_path / "named" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "someone/a-model"
    )
    assert config_of(tmp_path)["base_model_name_or_path"] is None


def test_a_single_parameter_that_was_trained_is_refused(tmp_path: Path) -> None:
    model = fill(melora_fx.rewrite(bert_classifier(), {"query": BLOCKS}, keep_trainable="classifier.bias"))
    melora_fx.save_adapter(model, tmp_path / "ours")
    with pytest.raises(MELoRAError, match=r"single parameters trainable .'classifier.bias'.*keep the module trainable"):
        write_peft_adapter(tmp_path / "ours", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_places_that_are_not_free_are_refused(tmp_path: Path) -> None:
    melora_fx.save_adapter(rewritten_tower(), tmp_path / "ours")
    before = (tmp_path / "ours" / "adapter.safetensors").read_bytes()
    for out, text in (("ours", "is the folder that is read"), ("ours/in it", "or in it"), ("taken", "exists already")):
        (tmp_path / "taken").mkdir(exist_ok=True)
        (tmp_path / "taken" / "file").touch()
        with pytest.raises(MELoRAError, match=text):
            write_peft_adapter(tmp_path / "ours", tmp_path / out)
    assert (tmp_path / "ours" / "adapter.safetensors").read_bytes() == before
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["file"]
    with pytest.raises(ValueError, match=r"`form` .='dora'. must be one of 'lora', 'bdlora'"):
        write_peft_adapter(tmp_path / "ours", tmp_path / "out", form="dora")
