"""Lengths of past and present are read off the mask: for every part of their shapes, in buffers of any length."""

from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
from support.decoders import adapted_llama, logits_after
from support.exports import Exports
from torch import nn

import melora_fx
from exporters import OrtRunner
from exporters.decoders.step_conditions import ONE_TOKEN_OR_TEXT
from exporters.graph.cached_attention import read_lengths_off_mask
from exporters.graph.export import CACHED_ATTENTION, Export
from exporters.runtime.cache_inputs import empty_cache, step_inputs

HEADS, HEAD_DIM = 2, 8
PARTS = [(0, 4), (2, 3), (1, 3), (2, 4), (3, 4), (0, 2), (-2, 4), (-2, -1), (-4, -1), (-9, -2), (-9, 9), (0, -3)]
PARTS += [(2, None), (-1, None), (4, None), (7, 9), (3, 2), (None, None), (None, 3)]
"""Parts of a shape: start and end, or None if the graph leaves them out."""


def value(name: str, dtype: onnx_ir.DataType, *shape: int | str) -> onnx_ir.Value:
    return onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(dtype))


def attention_graph(*, fused: bool = True) -> onnx_ir.Model:
    """Returns a graph of one attention over a cache; every part of the shapes of past and present is an output."""
    integer, real = onnx_ir.DataType.INT64, onnx_ir.DataType.FLOAT
    tokens, mask = value("input_ids", integer, "batch", "new"), value("attention_mask", integer, "batch", "total")
    states = value("states", real, "batch", "new", HEADS * HEAD_DIM)
    past = [value(f"past_key_values.0.{kind}", real, "batch", HEADS, "past", HEAD_DIM) for kind in ("key", "value")]
    ends, total = (value(name, onnx_ir.DataType.INT32, *shape) for name, shape in (("ends", ["batch"]), ("sum", [])))
    inputs = [states, states, states, *past, ends, total]
    if fused:
        attributes = {"num_heads": HEADS, "kv_num_heads": HEADS}
        attention = onnx_ir.node(CACHED_ATTENTION, inputs, attributes, domain="com.microsoft", num_outputs=3)
        nodes, presents = [attention], attention.outputs[1:]
    else:
        nodes = [onnx_ir.node("Concat", [each, each], {"axis": 2}) for each in past]
        presents = [node.outputs[0] for node in nodes]
    outputs = []
    for whose, each in (("past", past[0]), ("present", presents[1])):
        for start, end in PARTS:
            given = {key: number for key, number in (("start", start), ("end", end)) if number is not None}
            shape = onnx_ir.node("Shape", [each], given)
            shape.outputs[0].name = f"{whose} {start} {end}"
            shape.outputs[0].dtype, shape.outputs[0].shape = integer, onnx_ir.Shape([None])
            outputs.append(onnx_ir.node("Identity", shape.outputs))
            outputs[-1].outputs[0].name = f"{whose}[{start}:{end}]"
            outputs[-1].outputs[0].dtype, outputs[-1].outputs[0].shape = integer, onnx_ir.Shape([None])
            nodes += [shape, outputs[-1]]
    for kind, present in zip(("key", "value"), presents, strict=True):
        present.name, present.dtype = f"present.0.{kind}", real
        present.shape = onnx_ir.Shape(["batch", HEADS, "kept", HEAD_DIM])
    graph = onnx_ir.Graph(
        [tokens, mask, states, *past, ends, total],
        [*(node.outputs[0] for node in outputs), *presents],
        nodes=nodes,
        opset_imports={"": 20, "com.microsoft": 1},
        name="attention",
    )
    return onnx_ir.Model(graph, ir_version=10)


def export_of(graph_model: onnx_ir.Model) -> Export:
    names = [each.name for each in graph_model.graph.inputs]
    unused: Any = None
    return Export(graph_model, nn.Module(), dict.fromkeys(names), lambda _: nullcontext(), *[unused] * 4)


def run(graph_model: onnx_ir.Model, batch: int, new: int, total: int, buffer: int | None = None) -> dict[str, Any]:
    """Returns the outputs for a past in memory of its own size, or in a buffer."""
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(graph_model).SerializeToString())
    generator = np.random.default_rng(0)
    past = np.zeros((batch, HEADS, total - new if buffer is None else buffer, HEAD_DIM), np.float32)
    past[:, :, : total - new] = generator.random((batch, HEADS, total - new, HEAD_DIM))
    given = {
        "input_ids": np.zeros((batch, new), np.int64),
        "attention_mask": np.ones((batch, total), np.int64),
        "states": generator.random((batch, new, HEADS * HEAD_DIM), np.float32),
        "past_key_values.0.key": past,
        "past_key_values.0.value": past,
        "ends": np.full(batch, total - 1, np.int32),
        "sum": np.array(total, np.int32),
    }
    taken = {each.name for each in session.get_inputs()}
    names = [each.name for each in session.get_outputs()]
    outputs = session.run(names, {name: array for name, array in given.items() if name in taken})
    return dict(zip(names, outputs, strict=True))


def assert_parts(outputs: dict[str, Any], batch: int, past: int, present: int) -> None:
    for whose, length in (("past", past), ("present", present)):
        shape = [batch, HEADS, length, HEAD_DIM]
        for start, end in PARTS:
            found = outputs[f"{whose}[{start}:{end}]"].tolist()
            assert found == shape[start:end], (whose, start, end)


@pytest.mark.parametrize("buffer", [None, 16], ids=["", "in a buffer"])
def test_every_part_of_a_shape_is_right(buffer: int | None) -> None:
    export = export_of(attention_graph())
    read_lengths_off_mask(export)
    for batch, (new, total) in product((1, 3), ((5, 5), (1, 6), (1, 12))):
        assert_parts(run(export.graph_model, batch, new, total, buffer), batch, total - new, total)
    assert export.conditions == [ONE_TOKEN_OR_TEXT]
    assert export.has_stale_types


def test_without_it_the_length_is_the_buffers() -> None:
    """This is what the rewrite is for; in memory of its own size the original graph is correct too."""
    graph_model = attention_graph()
    assert_parts(run(graph_model, 2, 1, 6), 2, 5, 6)
    outputs = run(graph_model, 2, 1, 6, buffer=16)
    assert outputs["past[2:3]"].tolist() == outputs["present[2:3]"].tolist() == [16]


def test_only_lengths_of_the_cache_are_replaced() -> None:
    """Heads and head sizes are still read from it; the nodes are in an order in which they can run."""
    export = export_of(attention_graph())
    before = [node for node in export.graph if node.op_type == "Shape"]
    unread = [node for node in before if not _asks_for_length(node)]
    read_lengths_off_mask(export)
    after = [node for node in export.graph if node.op_type == "Shape"]
    assert {*unread} <= {*after}
    of_cache = [node for node in after if "past" in str(node.inputs[0].name) or "present" in str(node.inputs[0].name)]
    assert not any(_asks_for_length(node) for node in of_cache)
    done: set[onnx_ir.Value] = {*export.graph.inputs}
    for node in export.graph:
        assert {*node.inputs} <= done
        done |= {*node.outputs}


def _asks_for_length(node: onnx_ir.Node) -> bool:
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 4)
    return 2 in range(4)[start:end]


@pytest.mark.parametrize("without", ["a cache", "a fused attention"])
def test_other_graphs_stay_as_they_are(without: str) -> None:
    export = export_of(attention_graph(fused=without != "a fused attention"))
    if without == "a cache":
        export.inputs = {name: None for name in export.inputs if "past" not in name}
    before = [*export.graph]
    read_lengths_off_mask(export)
    assert [*export.graph] == before
    assert not export.conditions
    assert not export.has_stale_types


@pytest.mark.parametrize("adapter", [None, "own"])
def test_a_decoder_in_a_buffer_for_the_longest_text(exports: Exports, tmp_path: Path, adapter: str | None) -> None:
    """As onnxruntime-genai runs it, with past and present in one memory: a prompt, then one token, then several."""
    model = adapted_llama()
    report = exports("adapted decoder", adapter="swap", target="ort-cpu")
    runner = OrtRunner(report.path)
    if adapter is not None:
        melora_fx.save_adapter(model, tmp_path / "adapter")
        tensors = runner._load(tmp_path / "adapter").values
    else:
        tensors = {}
    text = [5, 9, 4, 20, 33, 7, 8]
    names = runner.input_names
    buffers = {name: np.zeros((1, 2, 40, 8), np.float32) for name in empty_cache(runner.session.get_inputs(), 1)}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in buffers.items()}
    with melora_fx.disabled(model) if adapter is None else nullcontext():
        for start, end in ((0, 4), (4, 5), (5, 7)):
            binding = runner.session.io_binding()
            tokens = np.array([text[start:end]])
            for name, array in step_inputs(names, tokens, np.ones((1, end), np.int64)).items():
                binding.bind_cpu_input(name, array)
            for name, each in (values | tensors).items():
                binding.bind_ortvalue_input(name, each)
            for name, each in values.items():
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), each)
            binding.bind_output("logits")
            runner.session.run_with_iobinding(binding)
            logits = binding.get_outputs()[-1].numpy()[0]
            expected = [logits_after(model, text[: place + 1]) for place in range(start, end)]
            np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(values["past_key_values.0.key"].numpy()[:, :, :7]).min() > 0
    assert not values["past_key_values.0.key"].numpy()[:, :, 7:].any()
