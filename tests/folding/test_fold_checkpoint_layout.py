"""A fold into a checkpoint with exactly the tensors of the adapter's model need not build its class for their names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.fold_folders import BLOCKS, CONFIG, SINGLE, Folders, bits, edit_json, edit_tensors, llama
from support.models import Holder, bert, bert_classifier, gpt2
from transformers import BertForSequenceClassification, LlamaForCausalLM

import melora_fx
from melora_fx.folding import checkpoint_plan
from melora_fx.saving import save
from melora_fx.saving.adapter_file import read_adapter
from melora_fx.saving.fingerprint import layout_sha256


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the names of the classes that folds build to learn the names of their parameters."""
    classes: list[str] = []
    map_keys = checkpoint_plan.map_keys

    def noted(checkpoint: Any, class_name: Any, num_labels: Any) -> Any:
        classes.append(class_name)
        return map_keys(checkpoint, class_name, num_labels)

    monkeypatch.setattr(checkpoint_plan, "map_keys", noted)
    return classes


def assert_folded(folders: Folders, model: Any) -> None:
    """Checks that the folder has the bits of a fold in memory."""
    expected, _ = folders.in_memory(type(model))
    folders.fold()
    folded = type(model).from_pretrained(folders.out)
    assert bits(folded.state_dict()) == bits(expected.state_dict())


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize(
    ("make", "target", "keep"), [(llama, "q_proj", ()), (gpt2, "c_attn", ()), (bert_classifier, "query", "classifier")]
)
def test_the_class_is_not_built(
    make: Any, target: str, keep: str, sharded: bool, folders: Folders, asked: list[str]
) -> None:
    """GPT-2 ties its head to its embedding; neither of them is a site."""
    model = make()
    folders.prepare(model, target, sharded=sharded, keep=keep)
    assert_folded(folders, model)
    assert asked == []


def test_a_checkpoint_under_other_names_needs_the_class(folders: Folders, asked: list[str]) -> None:
    folders.prepare(bert(), "query", trained=BertForSequenceClassification, keep=["classifier"])
    folders.fold()
    assert asked == ["BertForSequenceClassification"]


def test_an_adapter_that_says_nothing_of_the_layout_needs_the_class(
    folders: Folders, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like adapters of earlier versions and of other programs."""
    monkeypatch.setattr(save, "checkpoint_layout", lambda model, found: None)
    model = folders.prepare(llama(), "q_proj")
    assert "layout_sha256" not in read_adapter(folders.adapter).model
    assert_folded(folders, model)
    assert asked == ["LlamaForCausalLM"]


def test_a_tied_weight_that_is_trained_needs_the_class(folders: Folders, asked: list[str]) -> None:
    folders.prepare(gpt2(), "c_attn", keep=["lm_head"])
    assert "layout_sha256" not in read_adapter(folders.adapter).model
    folders.fold()
    assert asked == ["GPT2LMHeadModel"]


def test_a_tied_site_is_refused(folders: Folders, asked: list[str]) -> None:
    folders.prepare(gpt2(), ["lm_head", "c_attn"])
    folders.assert_refused("shares its weight with 'transformer.wte.weight'")
    assert asked == ["GPT2LMHeadModel"]


@pytest.mark.parametrize("change", ["lacking", "other shape"])
def test_what_a_checkpoint_lacks_is_found(change: str, folders: Folders, asked: list[str]) -> None:
    folders.prepare(bert_classifier(), "query")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        bias = tensors.pop("classifier.bias")
        if change == "other shape":
            tensors["classifier.bias"] = torch.cat([bias, bias])

    edit_tensors(folders.base / SINGLE, edit)
    folders.assert_refused("lacks weights of BertForSequenceClassification.*`classifier.bias`")
    assert asked == ["BertForSequenceClassification"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda config: config.pop("tie_word_embeddings"), "lacks weights of LlamaForCausalLM.*`lm_head.weight`"),
        (lambda config: config.update(model_type="mistral"), "holds a mistral model"),
        (lambda config: config.pop("model_type"), "config.json` cannot be read"),
    ],
    ids=["ties", "another model", "no model"],
)
def test_another_configuration_needs_the_class(change: Any, text: str, folders: Folders, asked: list[str]) -> None:
    """The first configuration does not tie the head that the adapter's model ties, and the checkpoint lacks it."""
    model = LlamaForCausalLM(type(llama().config)(**(llama().config.to_dict() | {"tie_word_embeddings": True})))
    folders.prepare(model, "q_proj")
    edit_json(folders.base / CONFIG, change)
    folders.assert_refused(text)
    assert asked == ["LlamaForCausalLM"]


class Counting(Holder):
    """Has a state that is not a tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_a_module_with_a_state_of_its_own_is_saved_without_a_layout(tmp_path: Path) -> None:
    model = llama()
    model.model.norm = Counting(model.model.norm)
    melora_fx.save_adapter(melora_fx.rewrite(model, ["q_proj"], BLOCKS), tmp_path)
    assert "layout_sha256" not in read_adapter(tmp_path).model


def test_a_module_in_two_places_has_its_first_name(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert not any("layers.1.mlp" in name for name in shapes)
    melora_fx.save_adapter(melora_fx.rewrite(model, ["q_proj"], BLOCKS), tmp_path)
    assert read_adapter(tmp_path).model["layout_sha256"] == layout_sha256(shapes, model.config.to_dict())
