"""Inputs made from a graph's description of itself, and refusals."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exporters import OrtRunner
from exporters.runtime.graph_inputs import axis_roles, make_inputs
from melora_fx import MELoRAError

INPUTS = {
    "input_ids": (TensorProto.INT64, ["batch_size", "sequence_length"]),
    "attention_mask": (TensorProto.INT32, ["batch_size", "sequence_length"]),
    "token_type_ids": (TensorProto.INT64, ["batch_size", "sequence_length"]),
    "position_ids": (TensorProto.INT64, [1, "sequence_length"]),
    "pixel_values": (TensorProto.FLOAT, ["batch_size", 3, 4, 4]),
    "half": (TensorProto.FLOAT16, [None, None]),
    "flag": (TensorProto.BOOL, []),
}


def runner(folder: Path, **inputs: tuple[int, list[str | int | None]]) -> OrtRunner:
    """Returns a runner of a graph that returns its inputs."""
    values = [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()]
    results = [helper.make_tensor_value_info(f"{name}_out", *spec) for name, spec in inputs.items()]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in inputs]
    graph = helper.make_graph(nodes, "graph", values, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "graph.onnx")
    return OrtRunner(folder / "graph.onnx", threads=1)


def test_every_input_gets_values_that_it_can_take(tmp_path: Path) -> None:
    graph = runner(tmp_path, **INPUTS)
    assert axis_roles(graph) == {"batch", "sequence"}
    inputs = make_inputs(graph, 2, 5)
    assert {name: array.shape for name, array in inputs.items()} == {
        "input_ids": (2, 5),
        "attention_mask": (2, 5),
        "token_type_ids": (2, 5),
        "position_ids": (1, 5),
        "pixel_values": (2, 3, 4, 4),
        "half": (2, 5),
        "flag": (),
    }
    assert inputs["input_ids"].min() >= 3
    assert inputs["input_ids"].max() < 32
    assert inputs["attention_mask"].tolist() == [[1] * 5] * 2
    assert not inputs["token_type_ids"].any()
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert inputs["half"].dtype == np.float16
    assert inputs["pixel_values"].std() > 0.5
    graph.run(inputs)


def test_the_same_seed_gives_the_same_values(tmp_path: Path) -> None:
    graph = runner(tmp_path, input_ids=INPUTS["input_ids"])
    first, again, other = (make_inputs(graph, 4, 8, seed=seed)["input_ids"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_other_axes_need_a_size(tmp_path: Path) -> None:
    graph = runner(tmp_path, x=(TensorProto.FLOAT, ["batch", "channels", "past + 1"]))
    with pytest.raises(MELoRAError, match=r"`channels` of `x`, `past \+ 1` of `x`: .*--axis NAME=SIZE"):
        make_inputs(graph, 2, 5)
    assert make_inputs(graph, 2, 5, {"channels": 3, "past + 1": 0})["x"].shape == (2, 3, 0)
    with pytest.raises(ValueError, match=r"no input of .* has an axis `chanels`: batch, channels, past \+ 1"):
        make_inputs(graph, 2, 5, {"chanels": 3, "past + 1": 0})
    assert axis_roles(graph) == {"batch"}


def test_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MELoRAError, match=r"`text` of .* is a tensor\(string\)"):
        make_inputs(runner(tmp_path, text=(TensorProto.STRING, ["batch"])), 2, 5)
