"""The parts of a training: batches, names of new weights, usual targets, limits of lengths."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import bert_classifier, gpt2
from support.text_models import TEXT_MODELS, sentences, word_pieces
from transformers import AutoConfig, AutoModelForSequenceClassification, ViTConfig, ViTForImageClassification

from exporters.training.base import load_base, name_new
from exporters.training.batches import Batches
from exporters.training.default_targets import default_targets, describe, linear_names, match_targets
from exporters.training.texts import Texts
from exporters.training.tokenizer import load_tokenizer, measure_texts, token_limit
from melora_fx import MELoRAConfig, MELoRAError

ROWS = sentences(50)
TEXTS = Texts(("a", "b"), tuple((text, 0) for text, _ in ROWS[:33]), tuple((text, 1) for text, _ in ROWS[33:]))


def batches(batch_size: int = 4) -> Batches:
    tokenizer = word_pieces()
    lengths = tuple(len(ids) for ids in tokenizer([text for text, _ in ROWS])["input_ids"])
    return Batches(tokenizer, TEXTS, lengths, batch_size, max(lengths))


def rows_of(made: Any) -> list[tuple[int, ...]]:
    """Returns the tokens of each text, without the padding (0)."""
    return [tuple(token for token in row if token) for inputs, _ in made for row in inputs["input_ids"].tolist()]


def test_an_epoch_has_every_text_once_and_can_begin_in_the_middle() -> None:
    made = batches()
    whole = list(made.shuffled(seed=0, epoch=1))
    assert len(whole) == made.num_steps == 9
    assert sorted(rows_of(whole)) == sorted(
        tuple(ids) for ids in made.tokenizer([text for text, _ in TEXTS.train])["input_ids"]
    )
    assert rows_of(made.shuffled(0, 1, first=5)) == rows_of(whole[5:])
    assert rows_of(made.shuffled(0, 2)) != rows_of(whole)


def test_texts_of_a_batch_are_of_about_the_same_length() -> None:
    made = batches()
    padded = sum(int((inputs["attention_mask"] == 0).sum()) for inputs, _ in made.shuffled(0, 0))
    assert padded < 20
    indices = [index for _, chosen in made.held_out() for index in chosen]
    assert sorted(indices) == list(range(17))


def test_new_modules_are_named_as_wholes() -> None:
    model = bert_classifier()
    head = ["classifier.weight", "classifier.bias"]
    assert name_new(model, [*head, "bert.pooler.dense.weight", "bert.pooler.dense.bias"]) == (
        "classifier",
        "bert.pooler",
    )
    assert name_new(model, ["classifier.bias", "bert.pooler.dense.weight"]) == (
        "classifier.bias",
        "bert.pooler.dense.weight",
    )


@pytest.mark.parametrize(
    ("name", "targets", "new", "limit"),
    [
        ("bert", ("query", "value"), ("bert.pooler", "classifier"), 40),
        ("distilbert", ("q_lin", "v_lin"), ("classifier", "pre_classifier"), 40),
        ("roberta", ("query", "value"), ("classifier",), 38),
        ("albert", ("query", "value"), ("albert.pooler", "classifier"), 40),
        ("mpnet", ("attn.q", "attn.v"), ("classifier",), 38),
        ("gpt2", ("c_attn",), ("score",), 40),
        ("llama", ("q_proj", "v_proj"), ("score",), 40),
    ],
)
def test_what_each_architecture_brings(name: str, targets: Any, new: Any, limit: int, tmp_path: Path) -> None:
    base = load_base(TEXT_MODELS[name].write(tmp_path), ["a", "b"])
    assert default_targets(base.model) == targets
    assert base.new == new
    assert token_limit(base.tokenizer, base.model) == limit
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id is not None
    inputs = base.tokenizer(
        ["cat " * limit, "dog"], padding=True, truncation=True, max_length=limit, return_tensors="pt"
    )
    assert base.model(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"must be at most {limit}, the model's limit"):
        measure_texts(base.tokenizer, ["cat"], base.model, tmp_path, limit + 1)


def test_a_wrong_target_and_a_model_without_usual_names_say_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'q_proj' matches none(.|\n)*c_attn \(2\)(.|\n)*`--targets c_attn`"):
        match_targets(gpt2(), ["q_proj"], MELoRAConfig())
    with pytest.raises(ValueError, match=r"no usual names; its linears are called 0 \(1\), 2 \(1\); pass for example"):
        default_targets(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4)))
    assert describe(linear_names(bert_classifier(num_layers=1))).endswith("`--targets query,value`")


def test_a_folder_of_images_is_no_classifier_of_texts(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=4)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    word_pieces().save_pretrained(tmp_path)
    with pytest.raises(MELoRAError, match="its vit model cannot be loaded as a classifier"):
        load_base(tmp_path, ["a", "b"])


def test_a_tokenizer_without_a_vocabulary_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(MELoRAError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_head_of_another_size_is_new(tmp_path: Path) -> None:
    TEXT_MODELS["bert"].write(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model.save_pretrained(tmp_path)
    assert load_base(tmp_path, ["a", "b", "c"]).new == ("classifier",)
    assert load_base(tmp_path, list("abcde")).new == ()


def test_cut_texts_are_counted(tmp_path: Path) -> None:
    base = load_base(TEXT_MODELS["bert"].write(tmp_path), ["a", "b"])
    texts = ["cat", "cat dog", "cat dog horse", "cat dog horse goat"]
    assert str(measure_texts(base.tokenizer, texts, base.model, tmp_path, None)) == (
        "no text is cut: the longest has 6 tokens"
    )
    lengths = measure_texts(base.tokenizer, texts, base.model, tmp_path, 4)
    assert str(lengths) == "2 of 4 texts (50.0%) are cut at 4 tokens"
    assert (lengths.lengths, lengths.share_cut) == ((3, 4, 5, 6), 0.5)
    some = measure_texts(base.tokenizer, ["cat ☃", "dog"], base.model, tmp_path, None)
    assert str(some).endswith("; 33.3% of the tokens are unknown")
    assert measure_texts(base.tokenizer, ["cat " * 90], base.model, tmp_path, None).max_tokens == 40


def test_a_base_in_half_precision_is_trained_in_float32(tmp_path: Path) -> None:
    TEXT_MODELS["bert"].write(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in load_base(tmp_path, ["a", "b"]).model.parameters()} == {torch.float32}


def test_a_decoder_pads_as_whoever_uses_it_will(tmp_path: Path) -> None:
    """A decoder classifies the last token that is not padding; an encoder keeps its padding, which sets positions."""
    folder = TEXT_MODELS["gpt2"].write(tmp_path / "gpt2")
    tokenizer = TEXT_MODELS["gpt2"].tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(5)
    tokenizer.save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.pad_token_id = 7
    config.save_pretrained(folder)
    base = load_base(folder, ("a", "b"))
    assert (base.tokenizer.pad_token_id, base.model.config.pad_token_id) == (5, 5)
    roberta = load_base(TEXT_MODELS["roberta"].write(tmp_path / "roberta"), ("a", "b"))
    assert roberta.tokenizer.pad_token_id == roberta.model.config.pad_token_id == 1


def test_texts_in_the_order_of_other_labels() -> None:
    turned = TEXTS.with_labels(("b", "a"))
    assert turned.labels == ("b", "a")
    assert turned.train == tuple((text, 1) for text, _ in TEXTS.train)
    assert turned.held_out == tuple((text, 0) for text, _ in TEXTS.held_out)
