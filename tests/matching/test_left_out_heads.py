"""Linears that "all-linear" leaves out as heads, that `keep_trainable` takes from it, and that a mapping excludes."""

from typing import Any

import pytest
import torch
from support.architecture_table import TABLE
from support.heads import CLASSES, CONFIG, HEAD_SIZES, build, documented_heads, find, row
from support.models import IN, OUT, assert_unchanged, bert, bert_classifier, randn, tokens
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, RTDetrConfig, RTDetrForObjectDetection

import melora_fx
from melora_fx import MELoRAConfig
from melora_fx.matching.heads import find_heads

EIGHT = MELoRAConfig(rank=2, num_blocks=8)


def chosen(model: nn.Module, targets: Any, **options: Any) -> list[str]:
    return [site.name for site in melora_fx.match(model, targets, CONFIG, **options).sites]


@pytest.mark.default_cases(
    "BertForPreTraining",
    "DistilBertForSequenceClassification",
    "BartForSequenceClassification",
    "DetrForObjectDetection",
    "WhisperForAudioClassification",
    "BlipForConditionalGeneration",
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_no_head_of_transformers_is_adapted(name: str) -> None:
    found = find(name)
    assert not found.sizes & HEAD_SIZES
    assert not any("must be divisible" in reason for reason in found.reasons)
    assert row(name, found) == documented_heads(TABLE.read_text())[name], (
        "run the command at the top of docs/ARCHITECTURES.md"
    )


def test_the_table_lists_every_class() -> None:
    assert list(documented_heads(TABLE.read_text())) == list(CLASSES)


@pytest.mark.parametrize("name", ["DetrForObjectDetection", "BlipForConditionalGeneration"])
def test_what_is_left_out_is_told_and_its_name_still_adapts_it(name: str) -> None:
    report = melora_fx.match(build(name), "all-linear", CONFIG)
    assert report.heads
    assert set(report.heads) <= {site.name for site in report.untargeted}
    assert f'heads, which "all-linear" leaves out: {report.heads[0]}' in " ".join(str(report).split())
    one_block = MELoRAConfig(rank=2, num_blocks=1)
    named = melora_fx.match(build(name), [report.heads[0]], one_block)
    assert [site.name for site in named.sites] == [report.heads[0]]
    assert named.heads == ()


def test_a_class_of_the_users_own() -> None:
    class Intents(BertPreTrainedModel):
        def __init__(self, config: BertConfig) -> None:
            super().__init__(config)
            self.bert = BertModel(config)
            self.widen = nn.Linear(24, 36)
            self.intents = nn.Linear(36, 5)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.intents(self.widen(self.bert(input_ids).pooler_output))

    model = Intents(bert().config).eval()
    assert melora_fx.match(model, "all-linear", CONFIG).heads == ("widen", "intents")
    assert melora_fx.match(nn.ModuleDict({"inner": model}), "all-linear", CONFIG).heads == (
        "inner.widen",
        "inner.intents",
    )


@pytest.mark.slow
def test_a_whole_capture_has_the_same_heads() -> None:
    report = melora_fx.match(
        build("DistilBertForSequenceClassification"), "all-linear", CONFIG, example_inputs=tokens()
    )
    assert report.heads == ("pre_classifier", "classifier")


def test_a_body_as_wide_as_its_labels_is_adapted() -> None:
    model = build("T5ForQuestionAnswering")
    model.config.num_labels = 24
    assert len(chosen(model, "all-linear")) == 6 + 10


class Tied(nn.Module):
    """Its output layer shares the embedding's memory, but is a separate parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, IN)
        self.body = nn.Linear(IN, IN)
        self.out = nn.Linear(IN, 40, bias=False)
        self.out.weight = nn.Parameter(self.embedding.weight.detach())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(self.embedding(ids)))


def test_what_shares_memory_with_an_embedding_is_left_out() -> None:
    assert chosen(Tied(), "all-linear") == ["body"]
    assert chosen(Tied(), ["all-linear", "out"]) == ["body", "out"]


@pytest.mark.parametrize("name", ["qa_outputs", "classification_head", "logits_proj", "score"])
def test_the_names_are_all_that_an_exported_graph_has(name: str) -> None:
    model = nn.Sequential()
    model.add_module("body", nn.Linear(IN, OUT))
    model.add_module(name, nn.Linear(OUT, 3))
    program = torch.export.export(model, (randn(2, IN),))
    assert melora_fx.match(program, "all-linear", CONFIG).heads == (name,)


@pytest.mark.parametrize("name", ["class_embed", "enc_out_bbox_embed", "enc_score_head"])
def test_the_heads_of_detectors_are_left_out_wherever_they_are(name: str) -> None:
    """Their base models contain them, in lists; the numbers of labels show nothing there."""
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Module())
    model[1].add_module(name, nn.ModuleList([nn.Linear(IN, 3)]))
    assert find_heads(model, ["0", f"1.{name}.0"]) == {f"1.{name}.0"}


@pytest.mark.slow
@pytest.mark.parametrize("num_labels", [3, 8])
def test_as_many_labels_as_heads_or_layers(num_labels: int) -> None:
    config = RTDetrConfig(encoder_layers=1, decoder_layers=1)
    config.num_labels = num_labels
    with torch.device("meta"):
        report = melora_fx.match(RTDetrForObjectDetection(config), "all-linear", MELoRAConfig(rank=1, num_blocks=1))
    assert {"model.enc_score_head", "model.decoder.class_embed.0"} <= set(report.heads)
    assert num_labels not in {site.out_features for site in report.sites}


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, OUT), nn.Sequential(nn.Linear(OUT, OUT), nn.Linear(OUT, 3)))


@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
def test_keep_trainable_wins_over_all_linear(whole: bool) -> None:
    options = {"example_inputs": (randn(2, IN),)} if whole else {}
    model = melora_fx.rewrite(small(), "all-linear", CONFIG, keep_trainable="1", **options)
    assert list(melora_fx.sites(model)) == ["0"]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"0.lora_a", "0.lora_b", "1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias"}


def test_keep_trainable_does_not_win_over_a_name() -> None:
    model = small()
    with assert_unchanged(model), pytest.raises(ValueError, match=r"`targets` both name '1\.0'"):
        melora_fx.rewrite(model, ["all-linear", "1.0"], CONFIG, keep_trainable="1")


def test_all_linear_that_leaves_nothing_is_refused() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT))
    with (
        assert_unchanged(model),
        pytest.raises(ValueError, match="leaves out all linears, as heads or kept trainable: 0"),
    ):
        melora_fx.rewrite(model, "all-linear", CONFIG, keep_trainable="0")


@pytest.mark.parametrize("parent", ["encoder.layer.0", "layer.0", "*.0", r"re:.*layer\.0"])
def test_a_mapping_leaves_a_module_alone_with_all_below_it(parent: str) -> None:
    names = chosen(bert(), {parent: None, "all-linear": CONFIG})
    assert len(names) == 6 + 1
    assert not any(".0." in name for name in names)
    kept = chosen(bert(), {"layer.0.attention.self.query": CONFIG, parent: None, "all-linear": CONFIG})
    assert [name for name in kept if ".0." in name] == ["encoder.layer.0.attention.self.query"], "first match wins"


def test_an_indivisible_head_is_not_answered_with_a_number_of_blocks() -> None:
    ((name, reason),) = melora_fx.match(bert_classifier(), ["classifier"], EIGHT).skipped
    assert (name, reason) == (
        "classifier",
        "`out_features` (=3) must be divisible by `num_blocks` (=8): leave it out of `targets`, and train the "
        "head whole with `keep_trainable`",
    )
