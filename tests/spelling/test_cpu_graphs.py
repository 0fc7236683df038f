"""Graphs for a CPU: their operators, and that they compute what torch computes, at other sizes too."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from support.exports import CONFIG, Exports
from support.models import bert_classifier, fill, gpt2, randn, tokens
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import melora_fx
from exporters import OrtRunner, export_onnx
from exporters.spelling.gates import gate_updates

HIDDEN, INNER = 24, 48


class Mlp(nn.Module):
    """Two products, an activation and a residual sum, then a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(nn.functional.gelu(self.up(x))))


class Reader(nn.Module):
    """An attention, an MLP, and a head that reads one token."""

    def __init__(self, token: int = 0, *, returns_states: bool = False) -> None:
        super().__init__()
        self.token, self.returns_states = token, returns_states
        self.query, self.key, self.value, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.mlp, self.head = Mlp(), nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> Any:
        heads = [layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        states = self.mlp(x + self.out(mixed))
        logits = self.head(states[:, self.token])
        return (logits, states) if self.returns_states else logits


def assert_equal_at(model: nn.Module, path: Path, sizes: Any, make: Any) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in sizes:
        x = make(*size)
        with torch.no_grad():
            expected = model(x)
        found = session.run(None, {"x": x.numpy()})
        for got, want in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)


def optimized_ops(path: Path, folder: Path) -> list[str]:
    """Returns the operators that a plain session with default options runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node]


def rows_of(path: Path, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(path, load_external_data=False).graph.node if node.op_type == op_type]


def test_products_and_biases_are_one_operator_over_all_rows(tmp_path: Path) -> None:
    model = nn.Sequential(Mlp(), Mlp()).eval()
    report = export_onnx(model, {"input": randn(2, 5, HIDDEN)}, tmp_path / "model.onnx")
    ops = report.op_counts
    assert ops["Gemm"] == 4
    assert "MatMul" not in ops
    assert ops["Reshape"] == 2  # one to rows, one back
    assert ops["Add"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_no_session_makes_a_skip_normalisation_of_it(target: str, exports: Exports, tmp_path: Path) -> None:
    report = exports("bert", target=target)
    ops = optimized_ops(Path(report.path), tmp_path)
    assert "SkipLayerNormalization" not in ops
    assert ops.count("LayerNormalization") == report.op_counts["LayerNormalization"]


@pytest.mark.slow
def test_graphs_for_a_gpu_are_as_they_were(exports: Exports) -> None:
    ops = exports("bert", target="ort-cuda", precision="fp32").op_counts
    assert "SkipLayerNormalization" in ops
    assert "Gemm" not in ops or ops["Gemm"] <= 2  # pooler and classifier, as torch's exporter writes them


@pytest.mark.default_cases("-1")
@pytest.mark.parametrize("token", [0, -1, 2])
def test_a_head_that_reads_one_token_costs_its_last_layer_one_row_a_text(token: int, tmp_path: Path) -> None:
    model = Reader(token).eval()
    report = export_onnx(model, {"x": randn(2, 5, HIDDEN)}, tmp_path / "model.onnx")
    graph = onnx.shape_inference.infer_shapes(onnx.load(report.path)).graph
    order = [node.op_type for node in graph.node]
    assert order.count("Gather") == 2  # of the attention's output and of x
    last = max(index for index, op_type in enumerate(order) if op_type == "Gather")
    assert order[last + 1 :].count("Gemm") >= 3  # the projection, the MLP, the head
    assert_equal_at(model, Path(report.path), [(1, 3), (4, 9), (3, 5)], lambda b, t: randn(b, t, HIDDEN))


@pytest.mark.slow
def test_rows_that_are_returned_are_computed(tmp_path: Path) -> None:
    model = Reader(returns_states=True).eval()
    report = export_onnx(model, {"x": randn(2, 5, HIDDEN)}, tmp_path / "model.onnx")
    assert report.op_counts["Gather"] == 1
    assert_equal_at(model, Path(report.path), [(1, 3), (4, 9)], lambda b, t: randn(b, t, HIDDEN))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["keep", "swap"])
def test_the_updates_of_the_last_layer_are_those_of_one_token_too(adapter: str, tmp_path: Path) -> None:
    model = fill(melora_fx.rewrite(Reader().eval(), "all-linear", CONFIG, example_inputs=(randn(2, 5, HIDDEN),)))
    report = export_onnx(model, {"x": randn(2, 5, HIDDEN)}, tmp_path / "model.onnx", adapter=adapter, form="block")
    nodes = onnx.load(report.path, load_external_data=False).graph.node
    last = max(index for index, node in enumerate(nodes) if node.op_type == "Gather")
    assert [node.op_type for node in nodes[last:]].count("MatMul") >= 2 * 3


class Apart(nn.Module):
    """Two sequences whose lengths are the same only in the example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.first(x), self.second(y)
        return a.softmax(1), (b @ a.transpose(1, 2)).tanh()


@pytest.mark.slow
def test_axes_of_one_name_need_not_be_of_one_length(tmp_path: Path) -> None:
    model = Apart().eval()
    report = export_onnx(model, {"x": randn(2, 5, HIDDEN), "y": randn(2, 5, HIDDEN)}, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    for first, second in itertools.product((2, 7), (3, 7)):
        x, y = randn(2, first, HIDDEN), randn(2, second, HIDDEN)
        with torch.no_grad():
            expected = model(x, y)
        for got, want in zip(session.run(None, {"x": x.numpy(), "y": y.numpy()}), expected, strict=True):
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_product_at_an_output_is_not_copied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 7, bias=False)).eval()
    report = export_onnx(model, {"input": randn(2, 5, HIDDEN)}, tmp_path / "model.onnx")
    graph = onnx.load(report.path, load_external_data=False).graph
    assert [node.op_type for node in graph.node if graph.output[0].name in node.output] == ["MatMul"]


def test_keys_are_transposed_at_once(exports: Exports) -> None:
    ops = exports("bert").op_counts
    assert ops["Transpose"] == 5  # query, key twice, value, and back; ONNX Runtime makes one of the two
    assert ops.get("Slice", 0) <= 2  # of the positions, and of a shape


@pytest.mark.slow
def test_a_mask_that_masks_nothing_is_left_out(tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **sizes)).eval()
    report = export_onnx(model, {"pixel_values": randn(2, 3, 32, 32)}, tmp_path / "model.onnx")
    assert not {"Where", "Less", "Not"} & report.op_counts.keys()


MASKS = {
    "behind": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
    "before": [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]],
    "altogether": [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]],
}


@pytest.mark.slow_cases("bert_classifier-behind", "gpt2-before")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("make", [bert_classifier, gpt2])
def test_zeros_stay_where_the_example_needs_them(make: Any, mask: str, tmp_path: Path) -> None:
    inputs = tokens() | {"attention_mask": torch.tensor(MASKS[mask])}
    options: dict[str, Any] = {"use_cache": False} if make is gpt2 else {}
    portable = export_onnx(make(num_layers=1), inputs, tmp_path / "portable.onnx", **options)
    fused = export_onnx(make(num_layers=1), inputs, tmp_path / "fused.onnx", target="ort-cpu", **options)
    assert "Where" in portable.op_counts
    assert ("Where" in fused.op_counts) == (mask != "behind")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["auto", "gated", "block"])
def test_an_update_is_left_out_without_an_adapter(form: str, tmp_path: Path) -> None:
    model = fill(melora_fx.rewrite(bert_classifier(num_layers=1), "all-linear", CONFIG))
    report = export_onnx(model, tokens(), tmp_path / "model.onnx", adapter="swap", form=form)
    ifs = rows_of(Path(report.path), "If")
    assert len(ifs) == (0 if form == "block" else 4)  # query, key and value share one
    assert set(report.forms) == {"block"}
    runner = OrtRunner(report.path)
    base = export_onnx(bert_classifier(num_layers=1), tokens(), tmp_path / "base.onnx")
    inputs = {name: value.numpy() for name, value in tokens(batch=3, length=9).items()}
    np.testing.assert_array_equal(runner.run(inputs)["logits"], OrtRunner(base.path).run(inputs)["logits"])


def test_a_branch_stands_behind_what_it_takes() -> None:
    text = """
        <ir_version: 10, opset_import: ["": 20]>
        site (float[B, 4] x, float[4, 4] w, float[4] c, float[2, 2, R] a, float[2, R, 2] b) => (float[B, 4] y)
        <int64[3] of_blocks = {-1, 2, 2}, int64[1] width = {4}> {
            rows = Shape <start = 0, end = 1> (x)
            view = Reshape (x, of_blocks)
            slices = Transpose <perm = [1, 0, 2]> (view)
            hidden = MatMul (slices, a)
            update = MatMul (hidden, b)
            tokens = Transpose <perm = [1, 0, 2]> (update)
            shape = Concat <axis = 0> (rows, width)
            flat = Reshape (tokens, shape)
            base = Gemm (x, w, c)
            y = Add (base, flat)
        }
    """
    model = onnx_ir.serde.deserialize_model(onnx.parser.parse_model(text))
    gate_updates(model, [("a", "b")])
    assert "If" in [node.op_type for node in model.graph]
    onnx.checker.check_model(onnx_ir.serde.serialize_model(model))
