"""Adapters for MLX: mlx_lm computes on the CPU what torch computes, and its own adapters are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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
from support.models import adapted_kept_tower, bert, fill

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
    """An adapter folder of a filled adapter on `model`, which comes back."""
    rewritten = fill(melora_fx.rewrite(model, targets, config, **options))
    melora_fx.save_adapter(rewritten, folder)
    return rewritten


def llama_adapter(folder: Path, targets: Any = ("q_proj", "down_proj"), **options: Any) -> Path:
    save_adapted(model_of("LlamaForCausalLM"), folder / "adapter", targets, **options)
    return folder / "adapter"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder for MLX."""
    write_mlx_adapter(llama_adapter(tmp_path), tmp_path / "mlx")
    return tmp_path / "mlx"


CHOICES = {
    "all, of many ranks and alphas": TARGETS,
    "the first layer alone": "re:.*layers.0.*_proj",
    "q_proj alone": "q_proj",
    "another one in each layer": ["layers.0.self_attn.k_proj", "layers.1.mlp.up_proj"],
    "the head alone": "lm_head",
}


@pytest.mark.default_cases("all*")
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
    """Every linear, the head too where it has a weight of its own, with two configurations beside the usual one."""
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
    """With its own names below a layer, its own scale, on the last layer only: as `mlx_lm.lora` does."""
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
    assert_not_written(adapter, tmp_path / "mlx", r"has trained `lm_head` beside .*`melora-fx fold`")


def test_models_that_mlx_lm_does_not_have_are_refused(tmp_path: Path) -> None:
    save_adapted(bert(), tmp_path / "adapter", ["query"], MELoRAConfig(rank=1, num_blocks=2))
    assert_not_written(tmp_path / "adapter", tmp_path / "mlx", r"was trained in `BertModel`, whose modules.*LlamaFor")
    melora_fx.save_adapter(adapted_kept_tower(), tmp_path / "kept")
    assert_not_written(tmp_path / "kept", tmp_path / "mlx", "has trained `norm`")


def test_a_head_that_is_always_the_embedding_is_refused(tmp_path: Path) -> None:
    save_adapted(model_of("GPT2LMHeadModel"), tmp_path / "adapter", "lm_head", MELoRAConfig(rank=1, num_blocks=2))
    assert_not_written(tmp_path / "adapter", tmp_path / "mlx", "adapters on `lm_head`, which are no modules")


def test_values_beyond_float32_are_refused(tmp_path: Path) -> None:
    model = melora_fx.rewrite(model_of("LlamaForCausalLM"), "q_proj", MELoRAConfig(rank=1, num_blocks=1, alpha=1e30))
    for site in melora_fx.sites(model).values():
        site.lora_b.data.fill_(1e30)
    melora_fx.save_adapter(model, tmp_path / "adapter")
    assert_not_written(tmp_path / "adapter", tmp_path / "mlx", r"q_proj.lora_b.*are no numbers")


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


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / CONFIG_FILE).read_text())
        change(content)
        (folder / CONFIG_FILE).write_text(json.dumps(content))

    return damage


def _parameters(**values: Any) -> Callable[[Path], object]:
    return _config(lambda content: content["lora_parameters"].update(values))


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSORS_FILE)
        change(tensors)
        save_file(tensors, folder / TENSORS_FILE)

    return damage


def _cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


DOWN = "model.layers.0.mlp.down_proj"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda folder: (folder / CONFIG_FILE).unlink(), f"it has no {CONFIG_FILE}"),
    "no tensors": (lambda folder: (folder / TENSORS_FILE).unlink(), f"it has no {TENSORS_FILE}"),
    "configuration cut": (_cut(CONFIG_FILE), f"{CONFIG_FILE}` is not JSON"),
    "tensors cut": (_cut(TENSORS_FILE), f"{TENSORS_FILE}` cannot be read, it is truncated or corrupt"),
    "a list": (lambda folder: (folder / CONFIG_FILE).write_text("[]"), "no configuration of a LoRA"),
    "brackets": (lambda folder: (folder / CONFIG_FILE).write_text("[" * 10**5), "is not JSON"),
    "DoRA": (_config(lambda content: content.update(fine_tune_type="dora")), "is DoRA.*`mlx_lm.fuse`"),
    "full": (_config(lambda content: content.update(fine_tune_type="full")), "is full fine-tuning.*`mlx_lm.fuse`"),
    "another kind": (_config(lambda content: content.update(fine_tune_type=["x"])), "must have `fine_tune_type`"),
    "no parameters": (_config(lambda content: content.pop("lora_parameters")), "must have .*`lora_parameters`"),
    "alpha": (_config(lambda content: content["lora_parameters"].pop("scale")), "a finite `scale`"),
    "scale NaN": (_parameters(scale=float("nan")), "a finite `scale`"),
    "scale of 400 digits": (_parameters(scale=10**400), "a finite `scale`"),
    "scale true": (_parameters(scale=True), "a finite `scale`"),
    "rank zero": (_parameters(rank=0), "a `rank` from 1"),
    "rank of text": (_parameters(rank="4"), "a `rank` from 1"),
    "another rank": (_parameters(rank=5), f"`{DOWN}`: lora_a is .*does not fit the rank 5"),
    "nothing": (_tensors(lambda tensors: tensors.clear()), "it is empty"),
    "one is missing": (_tensors(lambda tensors: tensors.pop(f"{DOWN}.lora_b")), f"`{DOWN}.lora_b` is missing"),
    "magnitudes": (_tensors(lambda tensors: tensors.update({f"{DOWN}.m": torch.ones(32)})), f"`{DOWN}` is DoRA"),
    "a weight": (
        _tensors(lambda tensors: tensors.update({f"{DOWN}.weight": torch.ones(2)})),
        f"`{DOWN}.weight` is no part of a LoRA",
    ),
    "an embedding": (
        _tensors(lambda tensors: [tensors.update({f"model.embed_tokens.lora_{x}": torch.ones(4, 4)}) for x in "ab"]),
        "`model.embed_tokens` is an embedding",
    ),
    "transposed": (
        _tensors(lambda tensors: tensors.update({f"{DOWN}.lora_a": tensors[f"{DOWN}.lora_a"].T.contiguous()})),
        f"`{DOWN}`: lora_a is \\(4, 48\\)",
    ),
    "a number": (
        _tensors(lambda tensors: tensors.update({f"{DOWN}.lora_b": torch.tensor(1.0)})),
        f"`{DOWN}`: .* lora_b \\(\\)",
    ),
    "no numbers": (
        _tensors(lambda tensors: tensors.update({f"{DOWN}.lora_b": torch.ones(4, 0)})),
        f"`{DOWN}` holds .*, or nothing",
    ),
    "integers": (
        _tensors(lambda tensors: tensors.update({f"{DOWN}.lora_b": torch.ones(4, 32, dtype=torch.int32)})),
        f"`{DOWN}` holds torch.float32 and torch.int32",
    ),
    "NaN": (_tensors(lambda tensors: tensors[f"{DOWN}.lora_b"].fill_(torch.nan)), f"`{DOWN}` holds NaN"),
}


@pytest.mark.parametrize(("damage", "text"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_folders_are_refused(damage: Callable[[Path], object], text: str, tmp_path: Path) -> None:
    folder = tmp_path / "mlx"
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(
        json.dumps({"num_layers": 1, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}})
    )
    save_file({f"{DOWN}.lora_a": torch.ones(48, 4), f"{DOWN}.lora_b": torch.ones(4, 32)}, folder / TENSORS_FILE)
    assert read_mlx_folder(folder)[DOWN].scale == 20
    damage(folder)
    with pytest.raises(MELoRAError, match=text) as caught:
        read_mlx_folder(folder)
    assert str(folder) in str(caught.value)
