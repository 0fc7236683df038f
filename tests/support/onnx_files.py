"""A graph so small that its file can be written by hand, and broken on purpose."""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

WEIGHT = np.arange(6, dtype=np.float32).tobytes()


def write_graph(folder: Path, location: str = "model.onnx.data", *, data: bytes | None = None) -> Path:
    """y = x W with W, (2, 3), in an external file."""
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
