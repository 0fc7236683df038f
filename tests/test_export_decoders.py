"""`export_onnx` with a key-value cache: what the graphs take and compute, in each form, and what has none."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from support.decoders import adapted_llama, example, llama, logits_after
from support.models import assert_unchanged, bert_classifier, gpt2, randn, tokens

import melora_fx
from exporters import ExportReport, OrtRunner, export_onnx, fold_onnx
from exporters.generation.decoder import CachedDecoder
from exporters.graph import passes
from exporters.graph.export import Export
from melora_fx import MELoRAError

TEXTS = ([5, 9, 4, 20, 33], [7, 8, 30])
NEXT = ([11, 40, 41], [12, 6, 19])


def steps_of(runner: OrtRunner, padding: str, adapter: Path | None = None) -> list[list[np.ndarray]]:
    """The last logits of each text, after the prompts and after each of the next tokens."""
    decoder = CachedDecoder(runner, len(TEXTS), adapter)
    length = max(map(len, TEXTS))
    ids, mask = np.zeros((2, length), np.int64), np.zeros((2, length), np.int64)
    ends = []
    for row, text in enumerate(TEXTS):
        start = length - len(text) if padding == "left" else 0
        ids[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
        ends.append(start + len(text) - 1)
    found = [[row[end] for row, end in zip(decoder.step(ids, mask), ends, strict=True)]]
    for column in range(len(NEXT[0])):
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
        new = np.array([[text[column]] for text in NEXT])
        found.append([row[-1] for row in decoder.step(new, mask)])
    return found


def assert_steps_are_near(found: list[list[np.ndarray]], model: Any, tolerance: float) -> None:
    """Each text as torch computes it alone, without padding and without a cache."""
    for column, logits in enumerate(found):
        for row, text in enumerate(TEXTS):
            expected = logits_after(model, [*text, *NEXT[row][:column]])
            assert np.abs(logits[row] - expected).max() <= tolerance * np.abs(expected).max(), (column, row)


@pytest.mark.default_cases("fold-portable", "swap-ort-cpu", "keep-ort-cuda")
@pytest.mark.parametrize("target", ["portable", "ort-cpu", "ort-cuda"])
@pytest.mark.parametrize("adapter", ["fold", "keep", "swap"])
def test_every_step_is_torchs(tmp_path: Path, adapter: str, target: str) -> None:
    model = adapted_llama()
    melora_fx.save_adapter(model, tmp_path / "adapter")
    with assert_unchanged(model):
        report = export_onnx(model, example(), tmp_path / "out", adapter=adapter, target=target)
    assert list(report.inputs)[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert report.inputs["attention_mask"] == ("batch", "total_sequence")
    assert report.inputs["past_key_values.1.value"] == ("batch", 2, "past_sequence", 8)
    assert list(report.outputs)[:3] == ["logits", "present.0.key", "present.0.value"]
    assert report.ranges == {"batch": "1 and more", "sequence": "1 and more", "past_sequence": "0 and more"}
    assert report.op_counts.get("GroupQueryAttention", 0) == (0 if target == "portable" else 2)
    runner = OrtRunner(report.path)
    tolerance = 2e-2 if report.precision == "fp16" else 1e-4
    for padding in ("left", "right"):
        own = tmp_path / "adapter" if adapter == "swap" else None
        assert_steps_are_near(steps_of(runner, padding, own), model, tolerance)
        if adapter == "swap":
            with melora_fx.disabled(model):
                assert_steps_are_near(steps_of(runner, padding), model, tolerance)


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_one_text_takes_several_tokens_a_step(tmp_path: Path, target: str) -> None:
    model = llama()
    report = export_onnx(model, example(), tmp_path, target=target)
    decoder = CachedDecoder(OrtRunner(report.path), 1)
    ids = np.array([[5, 9, 4, 20, 33, 11, 40]])
    for start, end in ((0, 3), (3, 5), (5, 7)):
        logits = decoder.step(ids[:, start:end], np.ones((1, end), np.int64))
        expected = [logits_after(model, ids[0, : place + 1]) for place in range(start, end)]
        np.testing.assert_allclose(logits[0], expected, atol=1e-4 * np.abs(expected).max())


def test_several_tokens_of_several_texts_are_refused_where_they_are_wrong(tmp_path: Path) -> None:
    report = export_onnx(llama(), example(), tmp_path, target="ort-cpu")
    decoder = CachedDecoder(OrtRunner(report.path), 2)
    decoder.step(np.array([[5, 9], [4, 3]]), np.ones((2, 2), np.int64))
    with pytest.raises(MELoRAError, match=r"input_ids.shape\[0\] == 1 or input_ids.shape\[1\] == 1"):
        decoder.step(np.array([[5, 9], [4, 3]]), np.ones((2, 4), np.int64))


def test_a_runner_begins_a_text_with_its_tokens_alone(tmp_path: Path) -> None:
    model = llama()
    report = export_onnx(model, example(), tmp_path)
    runner = OrtRunner(report.path)
    outputs = runner.run({"input_ids": np.array([[5, 9, 4]])})
    expected = logits_after(model, [5, 9, 4])
    np.testing.assert_allclose(outputs["logits"][0, -1], expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(MELoRAError, match=r"missing \['attention_mask', 'position_ids'"):
        runner.run({"input_ids": np.array([[5]]), "past_key_values.0.key": outputs["present.0.key"]})


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_a_fold_into_the_graph_is_a_fresh_export(tmp_path: Path, target: str) -> None:
    model = adapted_llama()
    melora_fx.save_adapter(model, tmp_path / "adapter")
    export_onnx(llama(), example(), tmp_path / "base", target=target)
    fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "folded")
    export_onnx(model, example(), tmp_path / "fresh", target=target)
    assert data_bytes(tmp_path / "folded") == data_bytes(tmp_path / "fresh")
    names = {file.name for file in (tmp_path / "fresh").iterdir() if file.suffix == ".json"}
    for name in names - {"model.export.json"}:
        assert (tmp_path / "folded" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes(), name
    assert "genai_config.json" in names


def data_bytes(folder: Path) -> bytes:
    (file,) = folder.glob("*.data")
    return file.read_bytes()


def test_the_cache_of_a_graph_in_half_precision_is_in_half_precision(tmp_path: Path) -> None:
    report = export_onnx(llama(), example(), tmp_path, target="ort-cuda")
    graph = onnx.load(report.path, load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    caches = {types[name] for name in types if name.startswith(("past_key_values", "present"))}
    assert caches == {onnx.TensorProto.FLOAT16}
    assert types["logits"] == onnx.TensorProto.FLOAT


def export_gpt2(folder: Path, **options: Any) -> ExportReport:
    return export_onnx(gpt2(num_layers=1), tokens(), folder, **options)


@pytest.mark.parametrize("case", ["in the configuration", "as asked"])
def test_without_a_cache(tmp_path: Path, case: str) -> None:
    model = llama(use_cache=case == "as asked")
    options = {"use_cache": False} if case == "as asked" else {}
    report = export_onnx(model, example(), tmp_path, **options)
    assert list(report.inputs) == ["input_ids", "attention_mask"]
    assert list(report.outputs) == ["logits"]
    assert not any("cache" in note for note in report.notes)
    assert not (tmp_path / "genai_config.json").exists()


def test_a_cache_though_the_configuration_has_none(tmp_path: Path) -> None:
    report = export_onnx(llama(use_cache=False), example(), tmp_path, use_cache=True)
    assert "present.0.key" in report.outputs


@pytest.mark.parametrize(
    ("make", "inputs", "options", "reason"),
    [
        (bert_classifier, tokens(), {}, "`BertForSequenceClassification` is no model of transformers that generates"),
        (
            llama,
            {"inputs_embeds": randn(2, 7, 32)},
            {},
            "`example_inputs` has no `input_ids`",
        ),
        (
            llama,
            example() | {"labels": example()["input_ids"]},
            {},
            "`example_inputs` gives `labels` beside the tokens",
        ),
        (llama, example(), {"dynamic_axes": {"input_ids": {0: "rows"}}}, "`dynamic_axes` names its own"),
        (
            lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
            example(),
            {},
            r"its rotary embedding \(`rope_type` 'dynamic'\) changes with the number of tokens",
        ),
    ],
    ids=["no decoder", "no tokens", "labels", "axes", "rope"],
)
def test_what_has_no_cache_says_why(tmp_path: Path, make: Any, inputs: Any, options: Any, reason: str) -> None:
    with pytest.raises(MELoRAError, match=f"`use_cache=True`: the graph cannot have a key-value cache: {reason}"):
        export_onnx(make(), inputs, tmp_path / "out", use_cache=True, **options)
    assert not (tmp_path / "out").exists()


def test_an_option_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`use_cache` \(='yes'\) must be True, False or \"auto\""):
        export_gpt2(tmp_path, use_cache="yes")


def test_without_a_cache_the_report_says_why(tmp_path: Path) -> None:
    report = export_onnx(llama(), {"inputs_embeds": randn(2, 7, 32)}, tmp_path, verify=False)
    assert "without a key-value cache: `example_inputs` has no `input_ids`" in report.notes


def test_a_wrong_graph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose texts are computed as if they had no padding."""

    def ignore_mask(export: Export) -> None:
        mask = next(value for value in export.graph.inputs if value.name == "attention_mask")
        for node in [node for node in mask.consumers() if node.op_type == "Cast"]:
            ones = onnx_ir.node("Equal", [mask, mask])
            export.graph.insert_before(node, ones)
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], ones.outputs[0])

    monkeypatch.setattr(passes, "PASSES", (*passes.PASSES, ignore_mask))
    with pytest.raises(MELoRAError, match="not equal to torch at padding before a text"):
        export_onnx(llama(), example(), tmp_path)
