"""Graphs so small that their files can be written by hand, and broken on purpose."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
from onnx import TensorProto, helper, numpy_helper

from exporters.export_files import publish
from exporters.onnx_files.metadata import METADATA_KEY
from exporters.onnx_files.save_graph import save_graph
from melora_fx.files import staging_folder

WEIGHT = np.arange(6, dtype=np.float32).tobytes()


def data_of(graph: Path) -> Path:
    """Returns the file with the weights of an exported graph."""
    (file,) = graph.parent.glob(f"{graph.name}.*.data")
    return file


def write_graph(folder: Path, location: str = "model.onnx.data", *, data: bytes | None = None) -> Path:
    """Writes a graph of y = x W with W (2, 3) in an external file."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2, 3], np.arange(6, dtype=np.float32).tobytes(), raw=True)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [weight],
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    if data is not None:
        (folder / location).write_bytes(data)
    return folder / "model.onnx"


def publish_small(path: Path, value: float, **companions: str) -> Path:
    """Writes one of our graphs with a weight full of `value`, and JSON files next to it, as an export does."""
    with staging_folder(path) as staging:
        save_small(staging / path.name, [value] * 100)
        for name, text in companions.items():
            (staging / f"{name}.json").write_text(text)
        publish(staging, path)
    return path


def save_small(path: Path, values: npt.ArrayLike) -> None:
    """Writes one of our graphs with the weight `values`, which is its output."""
    weight = numpy_helper.from_array(np.asarray(values, np.float32), "w")
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, weight.dims)
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "graph", [], [output], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: "{}"})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_graph(onnx_ir.from_proto(model), path)


def value_in(path: Path) -> float:
    """Returns the value that fills the weight of such a graph; raises an error if its data is incomplete."""
    (value,) = set(numpy_helper.to_array(onnx.load(path).graph.initializer[0]).tolist())
    return value
