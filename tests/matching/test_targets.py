"""Which linears `targets` chooses: every accepted form, first match wins, and the text of each refusal."""

import re

import pytest
import torch
from support.models import (
    TOWER_SITES,
    Functional,
    Holder,
    Tower,
    assert_unchanged,
    bert,
    bert_classifier,
    gpt2,
    randn,
    tokens,
    tower,
)
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2ForSequenceClassification
from transformers.pytorch_utils import Conv1D

import melora_fx
from melora_fx import MELoRAConfig
from melora_fx.matching.targets import name_matches

CONFIG = MELoRAConfig(rank=2, num_blocks=3)
OTHER = MELoRAConfig(rank=1, num_blocks=2)


def chosen(model, targets, config=CONFIG, **options):
    return [site.name for site in melora_fx.match(model, targets, config, **options).sites]


LAYER = "encoder.layer.{}.attention.self.{}"


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        pytest.param(LAYER.format(1, "query"), [LAYER.format(1, "query")], id="full_name"),
        pytest.param("query", [LAYER.format(0, "query"), LAYER.format(1, "query")], id="suffix"),
        pytest.param("self.query", [LAYER.format(0, "query"), LAYER.format(1, "query")], id="dotted_suffix"),
        pytest.param("*.0.*.query", [LAYER.format(0, "query")], id="glob_star"),
        pytest.param("*.layer.?.attention.self.key", [LAYER.format(0, "key"), LAYER.format(1, "key")], id="glob_one"),
        pytest.param("*.layer.[1-9].*.key", [LAYER.format(1, "key")], id="glob_class"),
        pytest.param(r"re:.*\.0\..*\.(query|key)", [LAYER.format(0, "query"), LAYER.format(0, "key")], id="re"),
        pytest.param(["pooler.dense", "*.1.*.key"], [LAYER.format(1, "key"), "pooler.dense"], id="list_in_model_order"),
        pytest.param(("query",), [LAYER.format(0, "query"), LAYER.format(1, "query")], id="tuple"),
        pytest.param(
            lambda name, module: name.endswith("value") and module.bias is not None,
            [LAYER.format(0, "value"), LAYER.format(1, "value")],
            id="callable",
        ),
        pytest.param(
            {"*.0.*": None, "query": CONFIG, "key": None}, [LAYER.format(1, "query")], id="mapping_first_match_wins"
        ),
    ],
)
def test_forms(targets, names):
    assert chosen(bert(), targets) == names


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        pytest.param("query", "a.query", True, id="suffix"),
        pytest.param("query", "a.my_query", False, id="suffix_is_whole_words"),
        pytest.param("query", "query.a", False, id="prefix_is_not_a_suffix"),
        pytest.param("a.query", "a.query", True, id="equal"),
        pytest.param("q*", "a.query", False, id="glob_is_on_the_whole_name"),
        pytest.param("*q*", "a.query", True, id="glob_crosses_dots"),
        pytest.param("*Q*", "a.query", False, id="glob_is_case_sensitive"),
        pytest.param("re:query", "a.query", False, id="re_is_on_the_whole_name"),
        pytest.param(r"re:.*\.query", "a.query", True, id="re"),
        pytest.param("re:a.query", "axquery", True, id="re_dot"),
        pytest.param("a.query", "axquery", False, id="dot_is_literal"),
    ],
)
def test_name_matches(pattern, name, matches):
    assert name_matches(pattern, name) is matches


@pytest.mark.parametrize("example_inputs", [None, (randn(2, 24),)], ids=["in_place", "whole"])
def test_mapping_gives_each_site_its_own_config(example_inputs):
    model = melora_fx.rewrite(
        tower(),
        {"own.projection": None, "gate": OTHER, "re:up|gate|conv": CONFIG},
        example_inputs=example_inputs,
    )
    assert {name: site.config for name, site in melora_fx.sites(model).items()} == {
        "up": CONFIG,
        "gate": OTHER,
        "conv": CONFIG,
    }


def test_all_linear_takes_every_linear():
    assert chosen(tower(), "all-linear") == list(TOWER_SITES)


def test_all_linear_in_a_mapping_and_in_a_list():
    assert chosen(tower(), {"head": None, "all-linear": CONFIG}) == ["up", "gate", "own.projection", "conv"]
    assert chosen(tower(), ["all-linear"]) == list(TOWER_SITES)


@pytest.mark.default_cases("in_place")
@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
def test_all_linear_leaves_out_the_output_embeddings(whole):
    model = gpt2()
    inputs = {"input_ids": tokens()["input_ids"]} if whole else None
    report = melora_fx.match(model, "all-linear", CONFIG, example_inputs=inputs)
    assert len(report.sites) == 8
    assert [site.name for site in report.untargeted] == ["lm_head"]


@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
def test_all_linear_leaves_out_output_embeddings_of_another_name(whole):
    config = BertConfig(vocab_size=51, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=36)
    inputs = tokens() if whole else None
    report = melora_fx.match(BertForMaskedLM(config), "all-linear", CONFIG, example_inputs=inputs)
    assert "cls.predictions.transform.dense" in [site.name for site in report.sites]
    assert [site.name for site in report.untargeted] == ["cls.predictions.decoder"]


def test_all_linear_leaves_out_the_classifier():
    report = melora_fx.match(bert_classifier(), "all-linear", CONFIG)
    assert [site.name for site in report.untargeted] == ["classifier"]
    assert len(report.sites) == 13


def test_all_linear_leaves_out_the_score_head():
    config = GPT2Config(
        vocab_size=51, n_positions=8, n_embd=24, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2, num_labels=3
    )
    report = melora_fx.match(GPT2ForSequenceClassification(config), "all-linear", CONFIG)
    assert [site.name for site in report.untargeted] == ["score"]


class DeepHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(24, 24)
        self.classifier = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))

    def forward(self, x):
        return self.classifier(self.encoder(x))


def test_all_linear_leaves_out_what_is_below_the_classifier_but_a_name_still_reaches_it():
    assert chosen(DeepHead(), "all-linear") == ["encoder"]
    assert chosen(DeepHead(), "classifier.*") == ["classifier.0", "classifier.2"]


@pytest.mark.parametrize("example_inputs", [None, (randn(2, 24),)], ids=["in_place", "whole"])
def test_callable_is_given_the_module_that_owns_the_weight(example_inputs):
    seen = {}

    def targets(name, module):
        seen[name] = type(module)
        return isinstance(module, nn.Linear)

    names = chosen(tower(), targets, example_inputs=example_inputs)
    assert seen == {"up": nn.Linear, "gate": nn.Linear, "own.projection": Functional, "conv": Conv1D, "head": nn.Linear}
    assert names == ["up", "gate", "head"]


def test_callable_is_given_the_owner_also_of_a_linear_that_cannot_be_adapted():
    seen = {}

    def targets(name, module):
        seen[name] = type(module)
        return name == "linear"

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(24, 24)
            self.rnn = nn.GRU(24, 24)

        def forward(self, x):
            return self.rnn(self.linear(x))[0]

    assert chosen(Recurrent(), targets) == ["linear"]
    assert seen["rnn.weight_ih_l0"] is nn.GRU


@pytest.mark.parametrize(
    ("targets", "error", "text"),
    [
        pytest.param("querry", ValueError, r"'querry' matches none of the 13 linears; nearest: .*query", id="unknown"),
        pytest.param(
            ["query", "vaIue", "kei"], ValueError, r"(?s)'vaIue'.*nearest: .*value.*\n.*'kei'.*key", id="all_at_once"
        ),
        pytest.param("xyzzy", ValueError, r"'xyzzy' matches none.*encoder\.layer\.0.*\(8 more\)", id="nothing_near"),
        pytest.param("re:quer", ValueError, r"'re:quer' matches none", id="re_not_whole"),
        pytest.param({"query": CONFIG, "nope": None}, ValueError, "'nope' matches none", id="none_rule_unmatched"),
        pytest.param([], ValueError, "`targets` is empty", id="empty_list"),
        pytest.param({}, ValueError, "`targets` is empty", id="empty_mapping"),
        pytest.param("", ValueError, "''", id="empty_name"),
        pytest.param("re:(", ValueError, r"'re:\(' is not a regular expression", id="bad_regex"),
        pytest.param(3, TypeError, "`targets` must be a name, a list, a mapping or a callable, got int", id="int"),
        pytest.param(None, TypeError, "`targets` must be .*NoneType", id="none"),
        pytest.param({"query", "key"}, TypeError, "`targets` must be .*set", id="set_has_no_order"),
        pytest.param(["query", 3], TypeError, "every name in `targets` must be a str, got 3", id="list_of_int"),
        pytest.param({3: CONFIG}, TypeError, "every name in `targets` must be a str, got 3", id="int_key"),
        pytest.param({"query": 8}, TypeError, r"`targets\['query'\]` must be a MELoRAConfig or None, got 8", id="rule"),
        pytest.param({"query": {"rank": 8}}, TypeError, "must be a MELoRAConfig or None", id="rule_dict"),
        pytest.param(lambda name, module: False, ValueError, "callable chose none of the 13 linears", id="chose_none"),
    ],
)
def test_refusals(targets, error, text):
    model = bert()
    with assert_unchanged(model), pytest.raises(error, match=text):
        melora_fx.match(model, targets, CONFIG)


def test_mapping_that_leaves_every_match_alone_is_refused():
    """It would freeze the whole model and adapt nothing, silently."""
    model = tower()
    with assert_unchanged(model), pytest.raises(ValueError, match="`targets`"):
        melora_fx.rewrite(model, {"up": None})


def test_model_without_linears():
    model = nn.Sequential(nn.LayerNorm(4), nn.ReLU())
    with assert_unchanged(model), pytest.raises(ValueError, match="no linear nodes that can be adapted"):
        melora_fx.match(model, "all-linear", CONFIG)


@pytest.mark.parametrize("function", [melora_fx.match, melora_fx.rewrite], ids=["match", "rewrite"])
def test_config_and_model_must_have_their_types(function):
    model = tower()
    with assert_unchanged(model), pytest.raises(TypeError, match="`config` must be a MELoRAConfig, got 8"):
        function(model, "up", 8)
    with pytest.raises(TypeError, match=r"`model` must be an nn\.Module or an ExportedProgram, got dict"):
        function({}, "up", CONFIG)


def test_names_are_matched_literally_however_odd():
    model = Holder(nn.ModuleDict({"a-b": nn.Linear(24, 24), "a+b": nn.Linear(24, 24)})["a-b"])
    model.add_module("a+b", nn.Linear(24, 24))
    assert chosen(model, "a+b") == ["a+b"]
    assert chosen(model, "re:" + re.escape("a+b")) == ["a+b"]


def test_tower_names_are_those_of_the_parameters():
    names = dict(Tower().named_parameters())
    assert {name if name in names else f"{name}.weight" for name in TOWER_SITES} <= set(names)
    assert isinstance(names["own.projection"], torch.nn.Parameter)
