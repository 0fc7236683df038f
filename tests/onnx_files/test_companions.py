"""The files next to a graph: generation settings, written and copied, and when two of them agree."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoders import llama, write_tokenizer
from support.models import assert_unchanged, bert_classifier, tower
from transformers import GenerationConfig, LlamaForCausalLM

from exporters.export_files import refuse_other_model
from exporters.hugging_face import first_setting
from exporters.onnx_files.companions import (
    GENAI_CONFIG,
    GENERATION_CONFIG,
    copy_companions,
    copy_genai_config,
    has_genai_config,
    is_of_one_model,
    says_the_same,
    write_companions,
)
from melora_fx import MELoRAError

WEIRD = {
    "eos_token_id": [2, 3],
    "forced_eos_token_id": 4,
    "temperature": 0.3,
    "do_sample": False,
    "top_p": -3.0,
    "suppress_tokens": [5, 6],
    "bad_words_ids": [[3]],
    "early_stopping": "never",
    "max_length": 5,
}
"""Settings, some of which `save_pretrained` refuses."""


def settings_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / GENERATION_CONFIG).read_text())
    return found


def put(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_how_a_model_generates_is_written(tmp_path: Path) -> None:
    model = llama()
    model.generation_config = GenerationConfig(**WEIRD)
    with assert_unchanged(model):
        write_companions(model, tmp_path)
    assert {name: value for name, value in settings_in(tmp_path).items() if name in WEIRD} == WEIRD
    assert GenerationConfig.from_pretrained(tmp_path).to_diff_dict() == model.generation_config.to_diff_dict()


@pytest.mark.parametrize(("ends", "written"), [(torch.tensor(2), 2), (torch.tensor([2, 3]), [2, 3])], ids=str)
def test_tokens_that_are_tensors_are_written(ends: torch.Tensor, written: Any, tmp_path: Path) -> None:
    model = llama()
    model.generation_config.eos_token_id = ends
    write_companions(model, tmp_path)
    assert settings_in(tmp_path)["eos_token_id"] == written
    assert first_setting([model.generation_config], "eos_token_id") == written
    assert model.generation_config.eos_token_id is ends


@pytest.mark.parametrize(
    "make",
    [lambda: bert_classifier(num_layers=1), tower, lambda: llama().model],
    ids=["a classifier", "none", "no head"],
)
def test_models_that_generate_nothing_have_no_such_file(tmp_path: Path, make: Any) -> None:
    write_companions(make(), tmp_path)
    assert not (tmp_path / GENERATION_CONFIG).exists()


def test_a_model_without_settings_has_none(tmp_path: Path) -> None:
    model = llama()
    model.generation_config = None
    write_companions(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json"}


def test_companions_are_copied_and_other_files_are_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = llama()
    model.save_pretrained(source)
    write_tokenizer(source)
    loaded = LlamaForCausalLM.from_pretrained(source)
    graph = tmp_path / "graph"
    graph.mkdir()
    assert write_companions(loaded, graph) == ()
    put(graph, GENAI_CONFIG, {"model": {"decoder": {"filename": "model.onnx"}}})
    put(graph, "model.export.json", {})
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_companions(graph, copy)
    expected = {"config.json", GENERATION_CONFIG, "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in copy.iterdir()} == expected
    assert all((copy / name).read_bytes() == (graph / name).read_bytes() for name in expected)


SETTINGS = {"eos_token_id": 2, "temperature": 0.5, "do_sample": True}


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (SETTINGS | {"transformers_version": "4.41.0", "_from_model_config": True}, True),
        (json.dumps(SETTINGS, indent=8), True),
        (dict(reversed(SETTINGS.items())), True),
        (SETTINGS | {"top_p": None}, True),
        (SETTINGS | {"eos_token_id": 3}, False),
        (SETTINGS | {"top_p": 0.9}, False),
        (SETTINGS | {"of_a_user": 1}, False),
        ({"eos_token_id": 2}, False),
        ("{", False),
        ("[]", False),
        ("", False),
    ],
    ids=[
        "another version",
        "other spaces",
        "another order",
        "a default",
        "another end",
        "one more",
        "one of a user",
        "fewer",
        "half",
        "a list",
        "nothing",
    ],
)
def test_settings_of_generation_are_compared_and_not_how_they_are_written(
    tmp_path: Path, other: Any, is_same: bool
) -> None:
    first, second = (put(tmp_path / name, GENERATION_CONFIG, each) for name, each in (("a", SETTINGS), ("b", other)))
    assert says_the_same(first, second) == says_the_same(second, first) == is_same
    assert is_of_one_model(first, second) == is_same
    (tmp_path / "b" / "model.safetensors").touch()
    config = put(tmp_path / "b", "config.json", {})
    put(tmp_path / "a", "config.json", config.read_text())
    if is_same:
        refuse_other_model(tmp_path / "a", tmp_path / "b" / "model.onnx")
    else:
        with pytest.raises(MELoRAError, match=r"generation_config\.json` already exists and belongs to another model"):
            refuse_other_model(tmp_path / "a", tmp_path / "b" / "model.onnx")


def test_a_file_that_cannot_be_read_is_its_text(tmp_path: Path) -> None:
    first, second = (put(tmp_path / name, GENERATION_CONFIG, "{") for name in ("a", "b"))
    assert says_the_same(first, second)


def test_the_models_own_folder_takes_its_graph(tmp_path: Path) -> None:
    """Whichever version has written the files in it."""
    model = llama()
    model.save_pretrained(tmp_path / "own")
    settings = settings_in(tmp_path / "own")
    put(tmp_path / "own", GENERATION_CONFIG, json.dumps(settings | {"transformers_version": "4.41.0"}))
    staging = tmp_path / "staging"
    staging.mkdir()
    write_companions(LlamaForCausalLM.from_pretrained(tmp_path / "own"), staging)
    refuse_other_model(staging, tmp_path / "own" / "model.onnx")


GENAI = {"model": {"type": "llama", "vocab_size": 51, "decoder": {"filename": "a.onnx"}}, "search": {"top_k": 1}}


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (GENAI, True),
        (GENAI | {"search": {"top_k": 2}}, True),
        ({"model": GENAI["model"] | {"decoder": {"filename": "b.onnx", "head_size": 8}}}, True),
        ({"model": GENAI["model"] | {"vocab_size": 52}}, False),
        ({"model": GENAI["model"] | {"encoder": {}}}, False),
        ({"model": None}, False),
        ({}, False),
        ([], False),
        ("{", False),
    ],
    ids=["the same", "search", "a graph", "a vocabulary", "an encoder", "no model", "empty", "a list", "half"],
)
def test_what_genai_reads_may_be_of_another_graph_of_the_model(tmp_path: Path, other: Any, is_same: bool) -> None:
    first, second = (put(tmp_path / name, GENAI_CONFIG, each) for name, each in (("a", GENAI), ("b", other)))
    assert is_of_one_model(first, second) == is_of_one_model(second, first) == is_same
    assert says_the_same(first, second) == (other == GENAI)


@pytest.mark.parametrize(
    ("content", "is_its"),
    [
        (GENAI, True),
        ({"model": {"decoder": {"filename": "b.onnx"}}}, False),
        ({"model": {"decoder": {"filename": None}}}, False),
        ({"model": {"decoder": "a.onnx"}}, False),
        ({"model": {"encoder": {}}}, False),
        ({"model": None}, False),
        ([], False),
        ("{", False),
    ],
    ids=["its own", "another's", "no name", "a text", "an encoder's", "no model", "a list", "half"],
)
def test_whose_it_is(tmp_path: Path, content: Any, is_its: bool) -> None:
    put(tmp_path, GENAI_CONFIG, content)
    assert has_genai_config(tmp_path / "a.onnx") == is_its
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_genai_config(tmp_path / "a.onnx", copy / "b.onnx")
    assert has_genai_config(copy / "b.onnx") == is_its
    assert (copy / GENAI_CONFIG).exists() == is_its
    if is_its:
        copied = json.loads((copy / GENAI_CONFIG).read_text())
        assert copied["model"].pop("decoder") == {"filename": "b.onnx"}
        assert copied == {"model": {"type": "llama", "vocab_size": 51}, "search": {"top_k": 1}}


def test_without_one_there_is_none(tmp_path: Path) -> None:
    assert not has_genai_config(tmp_path / "a.onnx")
    copy_genai_config(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert not [*tmp_path.iterdir()]
