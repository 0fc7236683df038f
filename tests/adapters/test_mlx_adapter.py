"""Adapters for MLX: mlx_lm computes on the CPU what torch computes; adapters that it writes are read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.fold_folders import content_of
from support.mlx_models import (
    CLASSES,
    IDS,
    OTHERWISE_IN_MLX,
    error_of,
    mlx_logits,
    model_of,
    save_base,
    skip_without_mlx,
    torch_logits,
)
from support.models import bert, fill

import melora_fx
from exporters import write_mlx_adapter
from exporters.adapters.lora_form import loras_of
from exporters.adapters.mlx_adapter import CONFIG_FILE, TENSORS_FILE, read_mlx_folder
from exporters.adapters.mlx_names import ARCHITECTURES
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.saving.adapter_file import read_adapter

BOUND = 1e-5
RSLORA = MELoRAConfig(rank=(1, 3), num_blocks=2, alpha=(1.0, 5.0), use_rslora=True)
TARGETS: dict[str, Any] = {
    "lm_head": MELoRAConfig(rank=1, num_blocks=2),
    "q_proj": RSLORA,
    "*.0.self_attn.v_proj": None,
    "all-linear": MELoRAConfig(rank=2, num_blocks=2, alpha=3.0),
}


def save_adapted(model: Any, folder: Path, targets: Any, config: MELoRAConfig = RSLORA, **options: Any) -> Any:
    """Saves a filled adapter of `model` in a folder and returns the rewritten model."""
    rewritten = fill(melora_fx.rewrite(model, targets, config, **options))
    melora_fx.save_adapter(rewritten, folder)
    return rewritten


def llama_adapter(folder: Path, targets: Any = ("q_proj", "down_proj"), **options: Any) -> Path:
    save_adapted(model_of("LlamaForCausalLM"), folder / "adapter", targets, **options)
    return folder / "adapter"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """An adapter folder for MLX."""
    write_mlx_adapter(llama_adapter(tmp_path), tmp_path / "mlx")
    return tmp_path / "mlx"


CHOICES = {
    "all, of many ranks and alphas": TARGETS,
    "the first layer alone": "re:.*layers.0.*_proj",
    "q_proj alone": "q_proj",
    "another one in each layer": ["layers.0.self_attn.k_proj", "layers.1.mlp.up_proj"],
    "the head alone": "lm_head",
}


@pytest.mark.slow
@pytest.mark.parametrize("targets", CHOICES.values(), ids=CHOICES)
def test_mlx_computes_what_torch_computes(targets: Any, tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM")
    save_base(model, tmp_path / "base")
    plain = torch_logits(model)
    expected = torch_logits(save_adapted(model, tmp_path / "adapter", targets))
    write_mlx_adapter(tmp_path / "adapter", tmp_path / "mlx")
    assert error_of(plain, expected) > 0.1
    assert error_of(mlx_logits(tmp_path / "base", tmp_path / "mlx"), expected) < BOUND
    melora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "folded")
    assert error_of(mlx_logits(tmp_path / "folded"), expected) < BOUND


def test_mlx_reads_the_tensors(written: Path, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is missing: pip install mlx[cpu]", exc_type=ImportError)
    name = "model.layers.1.mlp.down_proj"
    tensors = mx.load(str(written / TENSORS_FILE))
    x = torch.randn(3, 48)
    (own,) = loras_of(read_adapter(tmp_path / "adapter").tensors_of(name))
    actual = mx.array(x.numpy()) @ tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]
    torch.testing.assert_close(torch.tensor(actual.tolist()), x @ own.lora_a.T @ own.lora_b.T, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("class_name", CLASSES)
def test_every_architecture(class_name: str, tmp_path: Path) -> None:
    model = model_of(class_name)
    save_base(model, tmp_path / "base")
    options = {}
    if ARCHITECTURES[class_name].experts:
        model.set_experts_implementation("grouped_mm")
        options = {"example_inputs": {"input_ids": IDS, "use_cache": False}}
    plain = torch_logits(model)
    rewritten = save_adapted(model, tmp_path / "adapter", targets_of(model), **options)
    if options:
        assert any("gate_up_proj" in name for name in melora_fx.sites(rewritten))
    expected = torch_logits(rewritten)
    write_mlx_adapter(tmp_path / "adapter", tmp_path / "mlx")
    assert error_of(plain, expected) > 0.1
    if class_name in OTHERWISE_IN_MLX:
        melora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "folded")
        expected = mlx_logits(tmp_path / "folded")
    assert error_of(mlx_logits(tmp_path / "base", tmp_path / "mlx"), expected) < BOUND


def targets_of(model: Any) -> dict[str, Any]:
    """Returns every linear, and the head if it has its own weight, with three different configurations."""
    names = [name for name, _ in model.named_modules()]
    targets = {name: RSLORA for name in ("q_proj", "query_key_value") if any(each.endswith(name) for each in names)}
    targets |= {"*shared_expert_gate": None} if any("shared_expert_gate" in each for each in names) else {}
    if not model.config.tie_word_embeddings:
        (head,) = (name for name, module in model.named_modules() if module is model.get_output_embeddings())
        targets[head] = TARGETS["lm_head"]
    return targets | {"all-linear": TARGETS["all-linear"]}


def test_every_architecture_that_is_written_is_tested() -> None:
    assert set(CLASSES) == set(ARCHITECTURES)


@pytest.mark.slow
def test_mlx_refuses_an_adapter_on_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM", tie_word_embeddings=True)
    save_base(model, tmp_path / "base")
    save_adapted(model, tmp_path / "adapter", "lm_head", MELoRAConfig(rank=1, num_blocks=2))
    write_mlx_adapter(tmp_path / "adapter", tmp_path / "mlx")
    skip_without_mlx()
    with pytest.raises(ValueError, match=r"lm_head.lora_a: not an adapter parameter"):
        mlx_logits(tmp_path / "base", tmp_path / "mlx")


def test_the_configuration_names_the_modules(written: Path) -> None:
    modules = [f"model.layers.{i}.{name}" for i in range(2) for name in ("mlp.down_proj", "self_attn.q_proj")]
    assert json.loads((written / CONFIG_FILE).read_text()) == {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": modules, "rank": 4, "scale": 1.0},
        "num_layers": 2,
    }


def test_the_same_adapter_gives_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write_mlx_adapter(tmp_path / "adapter", tmp_path / "again")
    first, again = content_of(written), content_of(tmp_path / "again")
    assert {name: data for name, (data, _, _) in first.items()} == {name: data for name, (data, _, _) in again.items()}


def test_what_is_written_is_read_bit_for_bit(written: Path, tmp_path: Path) -> None:
    adapter = read_adapter(tmp_path / "adapter")
    found = read_mlx_folder(written)
    assert set(found) == set(adapter.configs)
    for site, lora in found.items():
        (own,) = loras_of(adapter.tensors_of(site))
        assert lora.scale == 1
        assert torch.equal(lora.lora_a, own.lora_a)
        assert torch.equal(lora.lora_b, own.lora_b)


@pytest.mark.slow
def test_experts_are_read_as_stacks(tmp_path: Path) -> None:
    model = model_of("MixtralForCausalLM")
    inputs = {"input_ids": IDS, "use_cache": False}
    save_adapted(model, tmp_path / "adapter", "gate_up_proj", example_inputs=inputs)
    write_mlx_adapter(tmp_path / "adapter", tmp_path / "mlx")
    found = read_mlx_folder(tmp_path / "mlx")
    block = "model.layers.1.block_sparse_moe.switch_mlp"
    own = loras_of(read_adapter(tmp_path / "adapter").tensors_of("model.layers.1.mlp.experts.gate_up_proj"))
    halves = torch.stack([lora.lora_b for lora in own]).chunk(2, dim=1)
    for name, half in zip(("gate_proj", "up_proj"), halves, strict=True):
        assert torch.equal(found[f"{block}.{name}"].lora_a, torch.stack([lora.lora_a for lora in own]))
        assert torch.equal(found[f"{block}.{name}"].lora_b, half)


@pytest.mark.slow
def test_what_mlx_writes_is_read(tmp_path: Path) -> None:
    """As `mlx_lm.lora` does: with MLX's own names below a layer, its own scale, and only on the last layer."""
    skip_without_mlx()
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    save_base(model_of("LlamaForCausalLM"), tmp_path / "base")
    model, _ = load_model(tmp_path / "base")
    plain = {name: torch.tensor(value.tolist()) for name, value in tree_flatten(model.parameters())}
    parameters = {"rank": 3, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    model.freeze()
    linear_to_lora_layers(model, 1, parameters)
    for module in (model.layers[1].self_attn.q_proj, model.layers[1].mlp.up_proj):
        module.lora_b = mx.random.normal(module.lora_b.shape)
    (tmp_path / "mlx").mkdir()
    mx.save_safetensors(str(tmp_path / "mlx" / TENSORS_FILE), dict(tree_flatten(model.trainable_parameters())))
    content = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (tmp_path / "mlx" / CONFIG_FILE).write_text(json.dumps(content))

    found = read_mlx_folder(tmp_path / "mlx")
    assert set(found) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    for name, module in (
        ("self_attn.q_proj", model.layers[1].self_attn.q_proj),
        ("mlp.up_proj", model.layers[1].mlp.up_proj),
    ):
        lora = found[f"model.layers.1.{name}"]
        expected = torch.tensor(module.fuse().weight.tolist())
        actual = plain[f"model.layers.1.{name}.weight"] + lora.scale * lora.lora_b @ lora.lora_a
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def assert_not_written(adapter: Path, out: Path, text: str) -> None:
    with pytest.raises(MELoRAError, match=text):
        write_mlx_adapter(adapter, out)
    assert not out.exists()


def test_a_trained_head_is_refused(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path, ["q_proj"], keep_trainable="lm_head")
    assert_not_written(adapter, tmp_path / "mlx", r"has trained `lm_head` in addition .*`melora-fx fold`")


def test_models_that_mlx_lm_does_not_have_are_refused(tmp_path: Path) -> None:
    save_adapted(bert(num_layers=1), tmp_path / "adapter", ["query"], MELoRAConfig(rank=1, num_blocks=2))
    assert_not_written(tmp_path / "adapter", tmp_path / "mlx", r"was trained in `BertModel`, whose names.*LlamaFor")


def test_a_head_that_is_always_the_embedding_is_refused(tmp_path: Path) -> None:
    save_adapted(model_of("GPT2LMHeadModel"), tmp_path / "adapter", "lm_head", MELoRAConfig(rank=1, num_blocks=2))
    assert_not_written(tmp_path / "adapter", tmp_path / "mlx", "adapters on `lm_head`, which are not modules")


@pytest.mark.parametrize(
    ("dtype", "text"),
    [(torch.float32, "q_proj.*exceed the range of its dtype"), (torch.float64, r"q_proj.lora_b.*are not finite")],
)
def test_values_beyond_float32_are_refused(dtype: torch.dtype, text: str, tmp_path: Path) -> None:
    config = MELoRAConfig(rank=1, num_blocks=1, alpha=1e30)
    model = melora_fx.rewrite(model_of("LlamaForCausalLM").to(dtype), "q_proj", config)
    for site in melora_fx.sites(model).values():
        site.lora_b.data.fill_(1e30)
    melora_fx.save_adapter(model, tmp_path / "adapter")
    assert_not_written(tmp_path / "adapter", tmp_path / "mlx", text)


def test_float64_becomes_float32(tmp_path: Path) -> None:
    save_adapted(model_of("LlamaForCausalLM").double(), tmp_path / "adapter", "q_proj")
    write_mlx_adapter(tmp_path / "adapter", tmp_path / "mlx")
    assert {tensor.dtype for tensor in load_file(tmp_path / "mlx" / TENSORS_FILE).values()} == {torch.float32}


def test_places_that_are_taken_are_refused(written: Path, tmp_path: Path) -> None:
    before = content_of(tmp_path)
    with pytest.raises(MELoRAError, match="exists already"):
        write_mlx_adapter(tmp_path / "adapter", written)
    with pytest.raises(MELoRAError, match="is the folder that is read, or in it"):
        write_mlx_adapter(tmp_path / "adapter", tmp_path / "adapter" / "mlx")
    assert content_of(tmp_path) == before
