"""Nodes that TensorRT would not build: on small graphs with one of them each, and on exports without them."""

from pathlib import Path

import onnx
import onnx_ir
import pytest
import torch
from support import zoo
from support.models import fill, randn
from torch import nn

import melora_fx
from exporters import export_onnx
from exporters.onnx_files.onnx_file import read_graph
from exporters.tensorrt_check.obstacles import find_obstacles, group_obstacles, refuse_obstacles
from exporters.tensorrt_check.operators import RESTRICTIONS, SHAPE_INPUTS, TYPES, UNCHECKED
from melora_fx import MELoRAConfig, MELoRAError


def graph(text: str, opset: int = 20, domains: str = "") -> onnx_ir.Model:
    return onnx_ir.from_onnx_text(f'<ir_version: 9, opset_import: ["" : {opset}{domains}]>\n{text}')


def reasons(model: onnx_ir.Model) -> list[str]:
    return group_obstacles(find_obstacles(model))


REFUSED = {
    "operator": ("g (float[N] x) => (float[M] y) { y = Unique (x) }", "Unique", "not among the operators"),
    "double": ("g (float[N] x) => (float[N] y) { d = Cast <to = 11> (x)  y = Cast <to = 1> (d) }", "Cast", "DOUBLE"),
    "double_input": ("g (double[N] x) => (double[N] y) { y = Identity (x) }", "input `x`", "DOUBLE: TensorRT does not"),
    "string": ("g (string[N] x) => (string[N] y) { y = Identity (x) }", "input `x`", "STRING"),
    "nonzero": ("g (float[N] x) => (int64[1, M] y) { y = NonZero (x) }", "NonZero", "depends on values"),
    "compress": ("g (float[N] x, bool[N] m) => (float[M] y) { y = Compress (x, m) }", "Compress", "depends on values"),
    "reshape": (
        "g (float[N] x, int64[2] s) => (float[A, B] y) { y = Reshape (x, s) }",
        "Reshape",
        "the values of `s` decide the shape",
    ),
    "expand": (
        "g (float[N] x, int64[N] i) => (float[A, B] y) <int64[1] one = {1}> {"
        "  m = ReduceMax <keepdims = 0> (i)  u = Unsqueeze (m, one)  s = Concat <axis = 0> (u, one)"
        "  y = Expand (x, s) }",
        "Expand",
        "the values of `s` decide",
    ),
    "range": (
        "g (int64[N] i) => (int64[M] y) <int64 zero = {0}, int64 one = {1}> {"
        "  m = ReduceMax <keepdims = 0> (i)  y = Range (zero, m, one) }",
        "Range",
        "the values of `m` decide",
    ),
    "slice": (
        "g (float[N] x, int64[1] e) => (float[M] y) <int64[1] zero = {0}> { y = Slice (x, zero, e) }",
        "Slice",
        "the values of `e` decide",
    ),
    "topk": ("g (float[N] x, int64[1] k) => (float[M] y) { y, i = TopK (x, k) }", "TopK", "the values of `k` decide"),
    "topk_large": (
        "g (float[N] x) => (float[M] y) <int64[1] k = {4000}> { y, i = TopK (x, k) }",
        "TopK",
        "`k` (=4000) must be below 3840",
    ),
    "attribute": (
        "g (float[N] x) => (float[M] y) <int64[1] k = {2}> { y, i = TopK <sorted = 0> (x, k) }",
        "TopK",
        "its attribute `sorted` (=0) must be 1",
    ),
    "attributes": (
        "g (float[1, 1, N, M] x) => (float[1, 1, A, B] y)"
        " { y = MaxPool <kernel_shape = [2, 2], dilations = [1, 2]> (x) }",
        "MaxPool",
        "its attribute `dilations` (=1, 2) must be 1",
    ),
    "rank": (
        "g (float[1, 2, N] x) => (float[1, 2, M] y) { y = MaxPool <kernel_shape = [2]> (x) }",
        "MaxPool",
        "`x` has 3 axes, not 4 or 5",
    ),
    "second_output": (
        "g (float[1, 1, N, M] x) => (float[1, 1, A, B] y, int64[1, 1, A, B] i)"
        "  { y, i = MaxPool <kernel_shape = [2, 2]> (x) }",
        "MaxPool",
        "its output 1, `i`, is not supported",
    ),
    "axes": (
        "g (float[N] x, int64[1] a) => (float[M] y) { y = ReduceSum (x, a) }",
        "ReduceSum",
        "`a` must be a constant",
    ),
    "zero_point": (
        "g (float[N] x) => (uint8[N] y) <float s = {0.5}, uint8 z = {3}> { y = QuantizeLinear (x, s, z) }",
        "QuantizeLinear",
        "`z` must be a constant zero",
    ),
    "loop": (
        "g (int64 n, bool c, float[2] x) => (float[T, 2] y) { y = Loop (n, c) <body = b (int64 i, bool k) =>"
        " (bool k2, float[2] s) { k2 = Identity (k)  s = Identity (x) }> }",
        "Loop",
        "the values of `n`, `c` decide",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_build_is_named_with_its_reason(name: str) -> None:
    text, place, reason = REFUSED[name]
    lines = reasons(graph(text))
    assert any(line.startswith(place) and reason in line for line in lines), lines


def test_types_are_those_of_what_a_node_computes_with() -> None:
    padded = graph("g (float[N] x) => (bool[M] y) <int64[2] p = {1, 1}> { b = Cast <to = 9> (x)  y = Pad (b, p) }")
    assert reasons(padded) == ["Pad `Pad 1`: BOOL is not among its types: BFLOAT16, FLOAT, FLOAT16, INT32, INT64"]
    indexed = graph("g (bool[N] c, float[N] x, int64[M] i) => (float[M] y) { w = Where (c, x, x)  y = Gather (w, i) }")
    assert reasons(indexed) == []  # a condition and indices have other types than the values


def test_branches_are_looked_into() -> None:
    model = graph(
        "g (bool c, float[N] x, int64[1] k) => (float[M] y) { y = If (c) <"
        "then_branch = t () => (float[M] a) { a, b = TopK (x, k) },"
        "else_branch = e () => (float[M] d) { d = Identity (x) }> }"
    )
    assert [(found.node, found.op_type) for found in find_obstacles(model)] == [("If 0/then_branch/TopK 0", "TopK")]


def test_other_domains_are_refused_once_a_node() -> None:
    model = graph(
        "g (float[N, 8] x) => (float[N, 8] y) { h = com.microsoft.FastGelu (x)  y = com.microsoft.FastGelu (h) }",
        domains=', "com.microsoft" : 1',
    )
    assert reasons(model) == [
        "com.microsoft.FastGelu `FastGelu 0`, `FastGelu 1`: an operator of the domain com.microsoft, which TensorRT "
        "does not know"
    ]


def test_functions_of_the_model_itself_are_looked_into() -> None:
    model = graph(
        "g (float[N] x) => (float[M] y) { y = own.F (x) }\n"
        '<domain: "own", opset_import: ["" : 20]> F (a) => (b) { b = Unique (a) }',
        domains=', "own" : 1',
    )
    assert {found.op_type for found in find_obstacles(model)} == {"Unique"}


@pytest.mark.parametrize(("opset", "refused"), [(8, True), (9, False), (24, False), (25, True)])
def test_opsets_have_bounds(opset: int, refused: bool) -> None:
    lines = reasons(graph("g (float[N] x) => (float[N] y) { y = Relu (x) }", opset))
    assert lines == ([f"graph: opset {opset}: TensorRT supports 9 to 24"] if refused else [])


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N, M, 8] x) => (float[N, A, 2, 4] y) <int64 one = {1}, int64[1] at = {0}, int64[2] heads = {2, 4}> {"
        "  s = Shape (x)  n = Gather (s, one)  u = Unsqueeze (n, at)  b = Shape <start = 0, end = 1> (x)"
        "  c = Concat <axis = 0> (b, u, heads)  y = Reshape (x, c) }",
        "g (int64[N, M] x) => (int64[M] y) <int64 zero = {0}, int64 one = {1}> {"
        "  s = Shape <start = 1, end = 2> (x)  m = Squeeze (s)  y = Range (zero, m, one) }",
        "g (float[N, 8] x, int64[N] lengths) => (float[N, 8] y) <int64[2] eight = {1, 8}, int64[1] one = {1}> {"
        "  s = Shape <start = 0, end = 1> (lengths)  c = Concat <axis = 0> (s, one)  o = ConstantOfShape (c)"
        "  e = Expand (o, eight)  y = Add (x, e) }",
    ],
    ids=["heads", "positions", "mask_of_ones"],
)
def test_shapes_computed_from_shapes_pass(text: str) -> None:
    assert reasons(graph(text)) == []


def test_a_graph_that_would_not_build_is_one_error() -> None:
    refuse_obstacles(graph("g (float[N] x) => (float[N] y) { y = Relu (x) }"), "good.onnx")
    bad = graph("g (float[N, 2, 2] x) => (float[N] y) { d = Det (x)  e = Det (x)  y = Add (d, e) }")
    with pytest.raises(
        MELoRAError, match=r"would not build all of `bad\.onnx`:\nDet `Det 0`, `Det 1`: not among"
    ) as error:
        refuse_obstacles(bad, "bad.onnx")
    assert 'target="ort-cuda"' in str(error.value)
    with pytest.raises(MELoRAError, match=r"the types of the graph `g` cannot be inferred: .*Relu"):
        refuse_obstacles(graph("g (float[N] x) => (float[N] y) { y = Relu () }"), "broken.onnx")


def test_the_tables_agree() -> None:
    """Every operator that has a restriction or a shape as input is a supported one."""
    assert {*RESTRICTIONS, *UNCHECKED, *SHAPE_INPUTS} <= TYPES.keys()
    assert len(TYPES) == 158
    assert all(op_type in {schema.name for schema in onnx.defs.get_all_schemas()} for op_type in {*RESTRICTIONS})


def _export(name: str, path: Path) -> onnx_ir.Model:
    model, inputs = zoo.build(name)
    export_onnx(model, inputs, path, verify=False)
    return read_graph(path)


REAL = [
    "ViT",
    "BERT",
    "GPT-2",
    "MPNet",
    "DeBERTa-v2",
    "ModernBERT",
    "Llama",
    "Gemma 3",
    "Mixtral",
    "T5",
    "BART",
    "Whisper",
    "CLIP",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_exports_have_no_obstacle(name: str, tmp_path: Path) -> None:
    assert reasons(_export(name, tmp_path / "model.onnx")) == []


class Selecting(nn.Module):
    """Returns only the rows that begin with a positive number, doubled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x[:, 0] > 0] * 2


def test_an_export_that_selects_by_value_is_refused(tmp_path: Path) -> None:
    export_onnx(Selecting(), {"x": randn(4, 8)}, tmp_path / "model.onnx", verify=False)
    lines = reasons(read_graph(tmp_path / "model.onnx"))
    assert any(line.startswith("NonZero") and "depends on values" in line for line in lines), lines


def test_optional_inputs_are_refused(tmp_path: Path) -> None:
    model = melora_fx.rewrite(nn.Sequential(nn.Linear(8, 8)), "all-linear", MELoRAConfig(rank=2, num_blocks=2))
    export_onnx(fill(model), {"input": randn(2, 8)}, tmp_path / "model.onnx", adapter="swap", verify=False)
    found = find_obstacles(read_graph(tmp_path / "model.onnx"))
    assert [(obstacle.node, obstacle.op_type) for obstacle in found] == [("0.lora_a", "input"), ("0.lora_b", "input")]
    assert "its default in" in found[0].reason
