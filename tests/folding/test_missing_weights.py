"""Weights that a checkpoint lacks, and what a plain model needs besides an adapter: labels and a padding token."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.command_line import run
from support.fold_folders import CONFIG, Folders, bits, edit_json
from support.models import bert, bert_classifier, gpt2, output_of, tokens
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    GPT2ForSequenceClassification,
)

from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.load_model import load_model
from melora_fx.saving.adapter_file import read_adapter

ONE_BLOCK = MELoRAConfig(rank=2, num_blocks=3)
NAMED = {"num_labels": 3, "id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}


def distilbert() -> DistilBertForMaskedLM:
    """Returns a base whose checkpoint has neither `pre_classifier` nor `classifier`."""
    sizes = {"vocab_size": 51, "dim": 24, "hidden_dim": 36, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32}
    return DistilBertForMaskedLM(DistilBertConfig(**sizes)).eval()


def test_a_layer_that_stayed_random_is_refused_by_name(folders: Folders) -> None:
    folders.prepare(distilbert(), "q_lin", ONE_BLOCK, trained=DistilBertForSequenceClassification, keep="classifier")
    with folders.refused("lacks weights of DistilBertForSequenceClassification.*`pre_classifier.bias`, `pre_class"):
        load_model(folders.base, class_name="DistilBertForSequenceClassification", brought=("classifier.weight",))
    folders.assert_refused("`pre_classifier.bias`, `pre_classifier.weight`. Pass")
    for arguments in ((folders.adapter,), ("--base-of", folders.adapter)):
        result = run("export", folders.base, *arguments, "-o", folders.out / "model.onnx")
        assert (result.returncode, "`pre_classifier.weight`" in result.stderr) == (1, True), result.stderr
        assert "`classifier.weight`" not in result.stderr
    assert not folders.out.exists()


def test_a_layer_that_the_adapter_brings_is_there(folders: Folders) -> None:
    kept = ["pre_classifier", "classifier"]
    trained = folders.prepare(
        distilbert(), "q_lin", ONE_BLOCK, trained=DistilBertForSequenceClassification, keep=kept, **NAMED
    )
    assert (
        load_model(
            folders.base,
            class_name="DistilBertForSequenceClassification",
            num_labels=3,
            brought=read_adapter(folders.adapter).kept_tensors(),
        ).num_labels
        == trained.num_labels
    )
    folders.fold()
    folded, info = AutoModelForSequenceClassification.from_pretrained(folders.out, output_loading_info=True)
    assert not info["missing_keys"]
    assert folded.config.id2label == NAMED["id2label"]
    expected, _ = folders.in_memory(DistilBertForSequenceClassification, **NAMED)
    assert bits({"logits": output_of(folded.eval(), tokens())}) == bits({"logits": output_of(expected, tokens())})


def test_a_base_alone_that_lacks_its_head_is_not_exported(tmp_path: Path) -> None:
    bert(num_layers=1).save_pretrained(tmp_path / "base")
    edit_json(tmp_path / "base" / CONFIG, lambda config: config.update(architectures=["BertForSequenceClassification"]))
    result = run("export", tmp_path / "base", "-o", tmp_path / "out.onnx")
    assert result.returncode == 1
    assert "lacks weights of BertForSequenceClassification" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_head_of_another_size_is_refused_with_both(folders: Folders) -> None:
    folders.prepare(bert_classifier(num_layers=1), "query", num_labels=7, ignore_mismatched_sizes=True)
    folders.assert_refused(r"`classifier.bias` \(\(3,\) there, \(7,\) in the model\)")


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_tied_is_there(tied: bool, folders: Folders) -> None:
    """The language model's head is not stored if it shares the embedding's weight."""
    model = gpt2(num_layers=1)
    folders.prepare(model, "c_attn", ONE_BLOCK)
    edit_json(folders.base / CONFIG, lambda config: config.update(tie_word_embeddings=tied))
    if tied:
        folders.fold()
    else:
        folders.assert_refused("`lm_head.weight`")


def test_labels_and_padding_token_travel_with_the_adapter(folders: Folders) -> None:
    model = gpt2(num_layers=1)
    model.config.pad_token_id = None
    options: dict[str, Any] = {"trained": GPT2ForSequenceClassification, "keep": "score", **NAMED}
    folders.prepare(model, "c_attn", ONE_BLOCK, pad_token_id=2, **options)
    facts = read_adapter(folders.adapter).model
    assert len(facts.pop("layout_sha256")) == 64
    assert facts == {
        "class": "GPT2ForSequenceClassification",
        "num_labels": 3,
        "labels": ["no", "yes", "maybe"],
        "pad_token_id": 2,
    }
    folders.fold()
    config = json.loads((folders.out / CONFIG).read_text())
    assert (config["id2label"], config["pad_token_id"]) == ({"0": "no", "1": "yes", "2": "maybe"}, 2)
    assert GPT2ForSequenceClassification.from_pretrained(folders.out).config.label2id == NAMED["label2id"]


@pytest.mark.slow
def test_an_export_has_the_labels_and_the_padding_token(folders: Folders) -> None:
    model = gpt2(num_layers=1)
    model.config.pad_token_id = None
    options: dict[str, Any] = {"trained": GPT2ForSequenceClassification, "keep": "score", **NAMED}
    folders.prepare(model, "c_attn", ONE_BLOCK, pad_token_id=2, **options)
    result = run("export", folders.base, folders.adapter, "-o", folders.parent / "export")
    assert result.returncode == 0, result.stderr
    config = json.loads((folders.parent / "export" / CONFIG).read_text())
    assert (config["id2label"], config["pad_token_id"]) == ({"0": "no", "1": "yes", "2": "maybe"}, 2)


def test_labels_that_say_nothing_are_left_out(folders: Folders) -> None:
    folders.prepare(bert(num_layers=1), "query", trained=BertForSequenceClassification, keep="classifier", num_labels=5)
    assert "labels" not in read_adapter(folders.adapter).model


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("raise SystemExit('ran')\n")
    config = {"model_type": "their_own", "auto_map": {"AutoConfig": "model.Config", "AutoModel": "model.Model"}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(MELoRAError, match=r"is custom code \(`auto_map` in config.json\), which is not run"):
        load_model(tmp_path)
