"""`genai_config.json`: its content, generation with it in onnxruntime-genai, and the graph that it belongs to."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as hf
from support.decoders import VOCABULARY, adapted_llama, greedy_tokens, llama, spread
from support.exports import Exports
from support.models import gpt2

import melora_fx
from exporters import ExportReport, export_onnx, fold_onnx, write_ort_adapter
from exporters.export_files import publish
from exporters.generation.genai_config import TYPES, genai_config, write_genai_config
from exporters.onnx_files.companions import GENAI_CONFIG

PROMPT = [5, 9, 4, 20, 33]
NEW = 20


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / GENAI_CONFIG).read_text())
    return found


def names_of(folder: Path) -> tuple[str, bool]:
    """Returns the file name of the graph, and whether it uses a shared buffer."""
    found = described(folder)
    return found["model"]["decoder"]["filename"], found["search"]["past_present_share_buffer"]


def copy_of(report: ExportReport, folder: Path) -> Path:
    shutil.copytree(Path(report.path).parent, folder)
    return folder


@pytest.mark.slow
def test_it_describes_the_graph(exports: Exports) -> None:
    report = exports("adapted decoder", adapter="swap", target="ort-cpu")
    found = described(Path(report.path).parent)
    graph = onnx.load(report.path, load_external_data=False).graph
    model, decoder = found["model"], found["model"]["decoder"]
    assert decoder["filename"] == "model.onnx"
    layers = range(decoder["num_hidden_layers"])
    patterns = [decoder["inputs"][f"past_{kind}_names"] for kind in ("key", "value")]
    inputs = [decoder["inputs"][name] for name in ("input_ids", "attention_mask", "position_ids")]
    required = [value.name for value in graph.input if value.name not in {each.name for each in graph.initializer}]
    assert {*inputs, *(pattern % layer for pattern in patterns for layer in layers)} == {*required}
    patterns = [decoder["outputs"][f"present_{kind}_names"] for kind in ("key", "value")]
    outputs = [decoder["outputs"]["logits"], *(pattern % layer for pattern in patterns for layer in layers)]
    assert {*outputs} == {value.name for value in graph.output}
    sizes = (decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"])
    assert (*sizes, decoder["hidden_size"], model["vocab_size"], model["context_length"]) == (4, 2, 8, 32, 51, 64)
    assert (model["type"], model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == ("llama", 1, 2, 0)
    assert found["search"]["max_length"] == model["context_length"]
    assert not decoder["session_options"]["provider_options"]


@pytest.mark.slow
def test_a_buffer_is_shared_where_the_graph_adds_to_it(exports: Exports) -> None:
    for options, is_shared in (({"target": "ort-cpu", "adapter": "swap"}, True), ({"adapter": "fold"}, False)):
        report = exports("adapted decoder", **options)
        assert names_of(Path(report.path).parent) == ("model.onnx", is_shared)
        assert ("GroupQueryAttention" in report.op_counts) == is_shared


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eos_token_id": [7, 8], "pad_token_id": 5, "bos_token_id": 4}, (4, [7, 8], 5)),
        ({"eos_token_id": [7, 8]}, (1, [7, 8], 0)),
        ({"eos_token_id": [7, 8], "pad_token_id": 51}, (1, [7, 8], 7)),
        ({"eos_token_id": 0, "bos_token_id": 0}, (0, 0, 0)),
        ({}, (1, 2, 0)),
        (None, (1, 2, 0)),
    ],
    ids=["all", "several ends", "padding outside of the vocabulary", "zeros", "none", "no settings"],
)
def test_tokens_are_those_that_the_model_generates_with(settings: Any, expected: tuple[Any, ...]) -> None:
    model = llama()
    model.generation_config = None if settings is None else hf.GenerationConfig(**settings)
    found = genai_config(export_of(model), "llama")["model"]
    assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}, (0, [], 0)),
        ({"pad_token_id": None, "eos_token_id": [9, 8]}, (1, [9, 8], 9)),
        ({"pad_token_id": None, "eos_token_id": []}, (1, [], 0)),
        ({"pad_token_id": -1, "eos_token_id": 9}, (1, 9, 9)),
    ],
    ids=["none", "no padding", "no ends", "padding that is none"],
)
def test_models_without_special_tokens(settings: Any, expected: tuple[Any, ...]) -> None:
    """onnxruntime-genai needs each of them, and looks up padding like any token."""
    model = llama()
    model.generation_config = None
    for name, value in settings.items():
        setattr(model.config, name, value)
    found = genai_config(export_of(model), "llama")["model"]
    assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == expected


def export_of(model: Any, provider: str = "cpu", path: str = "model.onnx") -> Any:
    """Returns the attributes of an export that `genai_config` reads."""
    inputs = dict.fromkeys(("input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"))
    options = SimpleNamespace(path=Path(path), target=SimpleNamespace(provider=provider))
    tensors = {name: torch.zeros(2, 2, 3, 8) for name in inputs}
    return SimpleNamespace(
        model=model, inputs=tensors, options=options, has_one_token_steps=False, has_own_mask=True, has_cache=True
    )


def test_a_graph_without_positions_and_one_for_a_gpu() -> None:
    found = genai_config(export_of(llama(), "cuda", "own.onnx"), "llama")["model"]["decoder"]
    assert "position_ids" not in found["inputs"]
    assert found["session_options"]["provider_options"] == [{"cuda": {}}]
    assert found["filename"] == "own.onnx"


def test_a_decoder_beside_an_encoder_has_none(tmp_path: Path) -> None:
    export = export_of(llama())
    export.has_own_mask = False
    (note,) = write_genai_config(export, tmp_path)
    assert note.startswith("no genai_config.json: onnxruntime-genai cannot run an encoder and decoder of type 'llama'")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("name", "written"),
    [("gpt_oss", "gptoss"), ("hunyuan_v1_dense", "hunyuandensev1"), ("gpt2", "decoder"), ("opt", "decoder")],
)
def test_types_of_other_names(tmp_path: Path, name: str, written: str) -> None:
    model = llama()
    model.config.model_type = name
    assert write_genai_config(export_of(model), tmp_path) == ()
    assert described(tmp_path)["model"]["type"] == written
    assert written in (*TYPES, "decoder")


# Generated by onnxruntime-genai


def by_genai(folder: Path, prompts: Sequence[Sequence[int]], adapter: Path | None = None) -> list[list[int]]:
    """Returns what onnxruntime-genai writes after prompts of one length, end tokens included."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    length = len(prompts[0]) + NEW
    parameters.set_search_options(max_length=length, batch_size=len(prompts))
    generator = genai.Generator(model, parameters)
    if adapter is not None:
        adapters = genai.Adapters(model)
        adapters.load(str(adapter), "own")
        generator.set_active_adapter(adapters, "own")
    generator.append_tokens(np.array(prompts if len(prompts) > 1 else prompts[0], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[*map(int, generator.get_sequence(row))][len(prompts[0]) :] for row in range(len(prompts))]


def without_end(folder: Path, *, share: bool | None = None) -> Path:
    """Changes the settings so that no token ends a text, and the buffer is shared as requested. The padding token ends
    texts in onnxruntime-genai, so it becomes one that the model does not write here.
    """
    found = described(folder)
    found["model"] |= {"eos_token_id": [], "pad_token_id": 45}
    if share is not None:
        found["search"]["past_present_share_buffer"] = share
    (folder / GENAI_CONFIG).write_text(json.dumps(found))
    return folder


@pytest.mark.slow
def test_genai_writes_what_torch_writes(exports: Exports, tmp_path: Path) -> None:
    folder = without_end(copy_of(exports("adapted decoder", adapter="fold"), tmp_path / "graph"))
    expected = [greedy_tokens(adapted_llama(), prompt, NEW) for prompt in (PROMPT, [7, 8, 30, 31, 32])]
    assert by_genai(folder, [PROMPT]) == expected[:1]
    assert by_genai(folder, [PROMPT, [7, 8, 30, 31, 32]]) == expected


@pytest.mark.parametrize("share", [None, False], ids=["in a shared buffer", "in memory of their own"])
def test_genai_writes_with_adapters(exports: Exports, tmp_path: Path, share: bool | None) -> None:
    report = exports("adapted decoder", adapter="swap", target="ort-cpu")
    folder = without_end(copy_of(report, tmp_path / "graph"), share=share)
    model = adapted_llama()
    melora_fx.save_adapter(model, tmp_path / "adapter")
    write_ort_adapter(tmp_path / "adapter", report.path, tmp_path / "own.onnx_adapter")
    expected = greedy_tokens(model, PROMPT, NEW)
    assert by_genai(folder, [PROMPT], tmp_path / "own.onnx_adapter") == [expected]
    base = greedy_tokens(llama(), PROMPT, NEW)
    assert by_genai(folder, [PROMPT]) == [base]
    assert base != expected


def bloom() -> Any:
    """Returns a BLOOM, which has no positions and other names for its sizes."""
    torch.manual_seed(0)
    return spread(hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)))


@pytest.mark.slow_cases("gpt2-portable", "bloom-ort-cpu")
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("make", [gpt2, bloom])
def test_genai_runs_types_that_it_does_not_know(tmp_path: Path, make: Any, target: str) -> None:
    model = make().eval()
    folder = tmp_path / "graph"
    export_onnx(model, {"input_ids": torch.tensor([[5, 9, 4], [7, 8, 3]])}, folder, target=target)
    assert described(folder)["model"]["type"] == "decoder"
    assert by_genai(without_end(folder), [PROMPT]) == [greedy_tokens(model, PROMPT, NEW)]


# Which graph it is of


def put(folder: Path, name: str, settings: dict[str, Any] | None, graph: Path) -> None:
    """Publishes a graph under this name, with a genai_config.json of these settings, or without one."""
    staging = folder.parent / "staging"
    staging.mkdir()
    shutil.copy(graph, staging / name)
    if settings is not None:
        settings["model"]["decoder"]["filename"] = name
        (staging / GENAI_CONFIG).write_text(json.dumps(settings))
    folder.mkdir(exist_ok=True)
    publish(staging, folder / name)
    shutil.rmtree(staging)


@pytest.mark.slow
def test_it_is_of_the_graph_written_last(exports: Exports, tmp_path: Path) -> None:
    shared = Path(exports("adapted decoder", adapter="swap", target="ort-cpu").path)
    portable = Path(exports("adapted decoder", adapter="fold").path)
    of_shared, of_portable = described(shared.parent), described(portable.parent)
    folder = tmp_path / "out"
    put(folder, "a.onnx", of_shared, shared)
    put(folder, "b.onnx", of_portable, portable)
    assert names_of(folder) == ("b.onnx", False)
    put(folder, "a.onnx", of_shared, shared)
    assert names_of(folder) == ("a.onnx", True)
    put(folder, "a.onnx", of_portable, portable)
    assert names_of(folder) == ("a.onnx", False)


def test_it_goes_with_its_graph(exports: Exports, tmp_path: Path) -> None:
    """If the next graph of this name has none; a graph of another name leaves it there."""
    graph = Path(exports("adapted decoder", adapter="fold").path)
    folder = tmp_path / "out"
    put(folder, "a.onnx", described(graph.parent), graph)
    put(folder, "b.onnx", None, graph)
    assert names_of(folder) == ("a.onnx", False)
    put(folder, "a.onnx", None, graph)
    assert not (folder / GENAI_CONFIG).exists()


def test_a_fold_has_that_of_its_base(exports: Exports, tmp_path: Path) -> None:
    melora_fx.save_adapter(adapted_llama(), tmp_path / "adapter")
    base = copy_of(exports("decoder"), tmp_path / "base")
    fold_onnx(base, tmp_path / "adapter", tmp_path / "other" / "merged.onnx")
    assert names_of(tmp_path / "other") == ("merged.onnx", False)
    expected = described(base)
    expected["model"]["decoder"]["filename"] = "merged.onnx"
    assert described(tmp_path / "other") == expected
    assert by_genai(without_end(tmp_path / "other"), [PROMPT]) == [greedy_tokens(adapted_llama(), PROMPT, NEW)]
    fold_onnx(base, tmp_path / "adapter", base / "merged.onnx")
    assert names_of(base) == ("merged.onnx", False)


@pytest.mark.parametrize(
    "content",
    [
        '{"model": {"decoder": {"filename": "another.onnx"}}}',
        '{"model": {"type": "whisper", "encoder": {}}}',
        '{"model": null}',
        "[]",
        "{",
        "\udcff",
    ],
    ids=["another graph's", "an encoder's", "of no model", "a list", "half", "no text"],
)
def test_a_fold_leaves_that_of_another_graph(exports: Exports, tmp_path: Path, content: str) -> None:
    melora_fx.save_adapter(adapted_llama(), tmp_path / "adapter")
    base = copy_of(exports("decoder"), tmp_path / "base")
    (base / GENAI_CONFIG).write_bytes(content.encode(errors="surrogateescape"))
    fold_onnx(base, tmp_path / "adapter", tmp_path / "other")
    assert not (tmp_path / "other" / GENAI_CONFIG).exists()
    fold_onnx(base, tmp_path / "adapter", base / "merged.onnx")
    assert (base / GENAI_CONFIG).read_bytes() == content.encode(errors="surrogateescape")
