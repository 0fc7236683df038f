"""Memory that stays in place from run to run."""

from pathlib import Path

import numpy as np
import pytest
from support.onnx_files import WEIGHT, write_graph

from exporters.onnx_runtime import import_onnxruntime
from exporters.runtime.io_binding import ReplayBuffers
from exporters.runtime.providers import choose_provider
from exporters.runtime.session import make_session
from melora_fx import MELoRAError

AXES = {"x": ("batch", 2)}


def test_buffers_keep_their_places_and_give_copies(tmp_path: Path) -> None:
    path = write_graph(tmp_path, data=WEIGHT)
    choice = choose_provider("cpu", path, AXES, shapes={"batch": (2, 2, 2)})
    buffers = ReplayBuffers(make_session(import_onnxruntime(), path, choice), "cpu", 0)
    one = np.eye(2, dtype=np.float32)
    two = np.ones((2, 2), np.float32)
    first = buffers.run({"x": one})["y"]
    places = [value.data_ptr() for value in (*buffers._inputs.values(), *buffers._outputs.values())]
    second = buffers.run({"x": two})["y"]
    assert [value.data_ptr() for value in (*buffers._inputs.values(), *buffers._outputs.values())] == places
    np.testing.assert_array_equal(first, [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(second, [[3, 5, 7], [3, 5, 7]])
    np.testing.assert_array_equal(one, np.eye(2), "the caller's array is not the buffer")


def test_outputs_of_any_size_have_no_place(tmp_path: Path) -> None:
    path = write_graph(tmp_path, data=WEIGHT)
    session = make_session(import_onnxruntime(), path, choose_provider("cpu", path, AXES))
    with pytest.raises(MELoRAError, match="outputs of fixed shapes, but these are not: y"):
        ReplayBuffers(session, "cpu", 0)
