"""`export_onnx` with a key-value cache: the graphs' inputs and outputs, in each form, and exports without a cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from support.decoders import VOCABULARY, adapted_llama, example, llama, logits_after
from support.exports import Exports
from support.models import bert_classifier, gpt2, randn, tokens

import melora_fx
from exporters import OrtRunner, export_onnx, fold_onnx
from exporters.generation.decoder import CachedDecoder
from exporters.graph import passes
from melora_fx import MELoRAError

TEXTS = ([5, 9, 4, 20, 33], [7, 8, 30])
NEXT = ([11, 40, 41], [12, 6, 19])


def kind_of(target: str) -> dict[str, str]:
    """Returns options as in the other tests, so that all share one export."""
    return {} if target == "portable" else {"target": target}


def steps_of(runner: OrtRunner, padding: str, adapter: Path | None = None) -> list[list[np.ndarray]]:
    """Returns the last logits of each text, after the prompts and after each of the next tokens."""
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
    """Checks each text against torch, alone, without padding and without a cache."""
    for column, logits in enumerate(found):
        for row, text in enumerate(TEXTS):
            expected = logits_after(model, [*text, *NEXT[row][:column]])
            assert np.abs(logits[row] - expected).max() <= tolerance * np.abs(expected).max(), (column, row)


@pytest.mark.slow_cases("keep-ort-cpu", "swap-portable", "fold-ort-cuda")
@pytest.mark.default_cases("fold-portable", "swap-ort-cpu")
@pytest.mark.parametrize("target", ["portable", "ort-cpu", "ort-cuda"])
@pytest.mark.parametrize("adapter", ["fold", "keep", "swap"])
def test_every_step_is_torchs(exports: Exports, tmp_path: Path, adapter: str, target: str) -> None:
    model = adapted_llama()
    melora_fx.save_adapter(model, tmp_path / "adapter")
    report = exports("adapted decoder", adapter=adapter, **kind_of(target))
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


def splits(length: int, *, one_token: bool) -> Iterator[tuple[int, ...]]:
    yield (length,)
    yield (1,) * length
    yield (length - 3, 1, 1, 1)
    if not one_token:
        yield (3, length - 5, 2)


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 1, 1, 1, 1, 1, 1]],
        [[0, 0, 1, 1, 1, 1, 1, 1]],
        [[1, 1, 0, 0, 1, 0, 1, 1]],
        [[1, 1, 1, 1, 1, 0, 0, 1]],
        [[0, 0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1]],
    ],
    ids=["none", "padding", "holes", "new tokens that are padding", "texts"],
)
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_masks_of_any_form(exports: Exports, mask: list[list[int]], target: str) -> None:
    """Each text is computed as if there were nothing between its tokens, in one step and in several."""
    adapter = "fold" if target == "portable" else "swap"
    runner = OrtRunner(exports("adapted decoder", adapter=adapter, **kind_of(target)).path)
    model = adapted_llama() if target == "portable" else llama()
    masks = np.array(mask)
    ids = np.random.default_rng(0).integers(3, VOCABULARY, masks.shape)
    for sizes in splits(masks.shape[1], one_token=len(mask) > 1 and target != "portable"):
        decoder = CachedDecoder(runner, len(mask))
        ends = np.cumsum(sizes)
        steps = [decoder.step(ids[:, end - size : end], masks[:, :end]) for end, size in zip(ends, sizes, strict=True)]
        logits = np.concatenate(steps, axis=1)
        for row, is_read in enumerate(masks.astype(bool)):
            with torch.no_grad():
                expected = model(torch.from_numpy(ids[row][is_read])[None], use_cache=False).logits[0].numpy()
            np.testing.assert_allclose(logits[row][is_read], expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_several_tokens_of_several_texts_are_refused_where_they_are_wrong(exports: Exports) -> None:
    decoder = CachedDecoder(OrtRunner(exports("adapted decoder", adapter="swap", target="ort-cpu").path), 2)
    decoder.step(np.array([[5, 9], [4, 3]]), np.ones((2, 2), np.int64))
    with pytest.raises(MELoRAError, match=r"input_ids.shape\[0\] == 1 or input_ids.shape\[1\] == 1"):
        decoder.step(np.array([[5, 9], [4, 3]]), np.ones((2, 4), np.int64))


@pytest.mark.default_cases("portable")
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_a_fold_into_the_graph_is_a_fresh_export(exports: Exports, tmp_path: Path, target: str) -> None:
    melora_fx.save_adapter(adapted_llama(), tmp_path / "adapter")
    fold_onnx(exports("decoder", **kind_of(target)).path, tmp_path / "adapter", tmp_path / "folded")
    fresh = Path(exports("adapted decoder", adapter="fold", **kind_of(target)).path).parent
    assert data_bytes(tmp_path / "folded") == data_bytes(fresh)
    names = {file.name for file in fresh.iterdir() if file.suffix == ".json"}
    for name in names - {"model.export.json"}:
        assert (tmp_path / "folded" / name).read_bytes() == (fresh / name).read_bytes(), name
    assert "genai_config.json" in names


def data_bytes(folder: Path) -> bytes:
    (file,) = folder.glob("*.data")
    return file.read_bytes()


@pytest.mark.slow
def test_the_cache_of_a_graph_in_half_precision_is_in_half_precision(exports: Exports) -> None:
    report = exports("adapted decoder", adapter="keep", target="ort-cuda")
    graph = onnx.load(report.path, load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    caches = {types[name] for name in types if name.startswith(("past_key_values", "present"))}
    assert caches == {onnx.TensorProto.FLOAT16}
    assert types["logits"] == onnx.TensorProto.FLOAT


@pytest.mark.slow_cases("as asked")
@pytest.mark.parametrize("case", ["in the configuration", "as asked"])
def test_without_a_cache(tmp_path: Path, case: str) -> None:
    model = llama(use_cache=case == "as asked")
    options = {"use_cache": False} if case == "as asked" else {}
    report = export_onnx(model, example(), tmp_path, **options)
    assert list(report.inputs) == ["input_ids", "attention_mask"]
    assert list(report.outputs) == ["logits"]
    assert not any("cache" in note for note in report.notes)
    assert not (tmp_path / "genai_config.json").exists()


@pytest.mark.parametrize(
    ("make", "inputs", "options", "reason"),
    [
        (bert_classifier, tokens(), {}, "`BertForSequenceClassification` is not a transformers model that generates"),
        (llama, {"inputs_embeds": randn(2, 7, 32)}, {}, "`example_inputs` has no `input_ids`"),
        (llama, example(), {"dynamic_axes": {"input_ids": {0: "rows"}}}, "`dynamic_axes` names custom axes"),
    ],
    ids=["no decoder", "no tokens", "axes"],
)
def test_what_has_no_cache_says_why(tmp_path: Path, make: Any, inputs: Any, options: Any, reason: str) -> None:
    with pytest.raises(MELoRAError, match=f"`use_cache=True`: the graph cannot have a key-value cache: {reason}"):
        export_onnx(make(), inputs, tmp_path / "out", use_cache=True, **options)
    assert not (tmp_path / "out").exists()


def test_an_option_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`use_cache` \(='yes'\) must be True, False or \"auto\""):
        export_onnx(gpt2(num_layers=1), tokens(), tmp_path, use_cache="yes")


@pytest.mark.slow
def test_without_a_cache_the_report_says_why(tmp_path: Path) -> None:
    report = export_onnx(llama(), {"inputs_embeds": randn(2, 7, 32)}, tmp_path, verify=False)
    assert "without a key-value cache: `example_inputs` has no `input_ids`" in report.notes


def ignore_mask(graph: onnx_ir.Graph) -> None:
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    for node in [node for node in mask.consumers() if node.op_type == "Cast"]:
        ones = onnx_ir.node("Equal", [mask, mask])
        graph.insert_before(node, ones)
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], ones.outputs[0])


def share_positions(graph: onnx_ir.Graph) -> None:
    """Gives all texts the positions of the first one."""
    positions = next(value for value in graph.inputs if value.name == "position_ids")
    first = onnx_ir.node("Constant", [], {"value_ints": [0]})
    row = onnx_ir.node("Gather", [positions, first.outputs[0]], {"axis": 0})
    onnx_ir.convenience.replace_all_uses_with(positions, row.outputs[0])
    row.replace_input_with(0, positions)
    graph.insert_before(next(iter(graph)), [first, row])


def mix_layers(graph: onnx_ir.Graph) -> None:
    """Swaps the output keys of two layers."""
    graph.outputs[1], graph.outputs[3] = graph.outputs[3], graph.outputs[1]
    graph.outputs[1].name, graph.outputs[3].name = graph.outputs[3].name, graph.outputs[1].name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [(ignore_mask, "padding before a text"), (share_positions, "padding before a text"), (mix_layers, "one token")],
)
def test_a_wrong_graph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, words: str) -> None:
    monkeypatch.setattr(passes, "PASSES", (*passes.PASSES, lambda export: change(export.graph)))
    with pytest.raises(MELoRAError, match=f"not equal to torch at {words}"):
        export_onnx(llama(num_hidden_layers=2 if change is mix_layers else 1), example(), tmp_path)
