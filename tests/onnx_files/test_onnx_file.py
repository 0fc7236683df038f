"""Reading a .onnx file from outside: files that are not graphs, and weights that are elsewhere, missing or cut off."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from support.onnx_files import WEIGHT, write_graph

from exporters import OrtRunner, write_ort_adapter
from exporters.onnx_files.metadata import read_facts
from exporters.onnx_files.onnx_file import (
    axes_by_name,
    content_hash,
    data_files,
    has_optional_inputs,
    precision_of,
    read_graph,
    required_inputs,
)
from melora_fx import MELoRAError


def test_a_whole_graph_runs(tmp_path: Path) -> None:
    path = write_graph(tmp_path, data=WEIGHT)
    outputs = OrtRunner(path).run({"x": np.eye(2, dtype=np.float32)})
    np.testing.assert_array_equal(outputs["y"], [[0, 1, 2], [3, 4, 5]])


def test_missing_weights_are_named(tmp_path: Path) -> None:
    path = write_graph(tmp_path)
    with pytest.raises(MELoRAError, match=r"`.*model\.onnx\.data` does not exist"):
        OrtRunner(path)


def test_weights_that_were_cut_short_are_named(tmp_path: Path) -> None:
    path = write_graph(tmp_path, data=WEIGHT[:-1])
    with pytest.raises(MELoRAError, match=r"model\.onnx\.data` has 23 bytes of 24: it was cut short"):
        OrtRunner(path)


@pytest.mark.parametrize(
    "location", ["../weights", "a/../../weights", "/{folder}/weights", "C:\\weights", "..\\weights"]
)
def test_weights_out_of_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "weights").write_bytes(WEIGHT)
    path = write_graph(tmp_path / "graph", location.replace("{folder}", str(tmp_path)))
    for read in (OrtRunner, read_facts, lambda path: write_ort_adapter("none", path, "none")):
        with pytest.raises(MELoRAError, match="leads out of the graph's folder"):
            read(path)


def test_weights_in_a_folder_below_are_the_graphs_own(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    path = write_graph(tmp_path, "weights/w", data=WEIGHT)
    assert data_files(path, read_graph(path)) == {"weights/w": tmp_path / "weights" / "w"}
    np.testing.assert_array_equal(OrtRunner(path).run({"x": np.eye(2, dtype=np.float32)})["y"], [[0, 1, 2], [3, 4, 5]])


def test_files_that_are_no_graph(tmp_path: Path) -> None:
    with pytest.raises(MELoRAError, match="it does not exist"):
        read_graph(tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_bytes(write_graph(tmp_path).read_bytes()[:100])
    with pytest.raises(MELoRAError, match="cannot be read as an ONNX graph"):
        OrtRunner(tmp_path / "broken.onnx")


def test_weights_of_a_type_that_has_no_size_are_no_graph(tmp_path: Path) -> None:
    path = write_graph(tmp_path, data=WEIGHT)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].data_type = onnx.TensorProto.STRING
    path.write_bytes(model.SerializeToString())
    with pytest.raises(MELoRAError, match=r"cannot be read as an ONNX graph: .*STRING"):
        read_graph(path)


def test_what_a_graph_says_of_itself(tmp_path: Path) -> None:
    model = read_graph(write_graph(tmp_path, data=WEIGHT))
    assert axes_by_name(required_inputs(model)) == {"x": ("batch", 2)}
    assert data_files(tmp_path / "model.onnx", model) == {"model.onnx.data": tmp_path / "model.onnx.data"}
    assert precision_of(model) == "fp32"
    half = onnx_ir.Tensor(np.zeros((2, 3), np.float16))
    model.graph.initializers["w"].const_value = half
    assert precision_of(model) == "fp16"


def test_the_hash_is_that_of_graph_and_weights(tmp_path: Path) -> None:
    paths = [write_graph(tmp_path / str(index), data=data) for index, data in enumerate((WEIGHT, WEIGHT, WEIGHT[::-1]))]
    first, same, other = (content_hash(path, read_graph(path)) for path in paths)
    assert first == same != other


def test_inputs_with_a_default_are_not_required() -> None:
    model = onnx_ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[batch, ?] x, float z = {2}) => (float[batch, ?] y)'
        "{ y = Mul (x, z) }"
    )
    assert axes_by_name(required_inputs(model)) == {"x": ("batch", "?")}
    assert has_optional_inputs(model)
